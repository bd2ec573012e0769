"""What the results of a run say: which further stages they call for, and the short table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.gpu_run.record import Row

STEPS = {
    "contender": "step", "network": "network", "batch": "batch", "images_per_second": "images/s", "ms": "ms",
    "predicted_ms": "predicted ms", "ratio": "ours faster by", "share_of_roof": "of roof", "how": "run as", "note": "",
}  # fmt: skip


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def findings(rows: Sequence[Row]) -> set[str]:
    """The names that a stage's ``when`` may have."""
    found = set()
    if any(not row["ok"] for row in of_kind(rows, "step")):
        found.add("step wrong")
    if any(row.get("same") is False or row.get("twice_same") is False
           for row in [*of_kind(rows, "replay"), *of_kind(rows, "smoke")]):  # fmt: skip
        found.add("capture differs")
    return found


def newest(rows: Sequence[Row], *keys: str) -> list[Row]:
    """The last of the rows that agree in ``keys``, in the order in which they first appeared."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found[tuple(row.get(key) for key in keys)] = row
    return list(found.values())


def steps(rows: Sequence[Row]) -> list[Row]:
    """The table's rows: every contender by its newest record of each stage."""
    table = []
    for row in newest(of_kind(rows, "throughput"), "stage", "contender", "network", "batch"):
        words = [row["stage"], row.get("status", "").removeprefix("timed").strip(" :")]
        words += [f"with {row['remedies']}"] if row.get("remedies") else []
        note = ", ".join(word for word in words if word)[:100]
        table.append(row | {"ms": 1e3 * row["seconds"] if row.get("seconds") else None, "note": note})
    return table


def as_runs(rows: Sequence[Row]) -> list[Row]:
    """The same as results files of ``bench.throughput``, one a stage, and ``bench.kernels``: for ``bench.report``."""
    host = next(iter(of_kind(rows, "device")[-1:]), None)
    if host is None:
        return []
    roof = next(iter(of_kind(rows, "roof")[-1:]), None)
    shared = {"smoke": any(row["rehearsal"] for row in of_kind(rows, "run")), "host": host, "roof": roof}
    timed = [row | {"status": row["status"].removeprefix("timed alone")} for row in steps(rows)]
    # what was not interleaved with one another shares no table
    runs = [{"kind": "throughput", "part": stage, **shared, "rows": [row for row in timed if row["stage"] == stage]}
            for stage in dict.fromkeys(row["stage"] for row in timed)]  # fmt: skip
    for of in of_kind(rows, "kernels of")[-1:]:
        runs.append({"kind": "kernels", "part": "kernels", **shared, "setting": of["setting"],
                     "rows": newest(of_kind(rows, "kernel"), "index")})  # fmt: skip
    return runs


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "–" if value is None else str(value)


def text_table(rows: Sequence[Row], columns: dict[str, str]) -> list[str]:
    cells = [list(columns.values())] + [[cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]


def summary(rows: Sequence[Row]) -> list[str]:
    """At most some fifty lines: what ran, what is right, how fast."""
    lines: list[str] = []
    for row in of_kind(rows, "device")[-1:]:
        lines.append(f"{row['device']}, driver {row.get('driver')}, torch {row['torch']}, Triton {row.get('triton')}, "
                     f"commit {row['commit']}")  # fmt: skip
    for row in of_kind(rows, "roof")[-1:]:
        lines.append(f"roof: {row['flops_per_second'] / 1e12:.3g} TFLOP/s ({row['dtype']}), "
                     f"{row['bytes_per_second'] / 1e12:.3g} TB/s copied")  # fmt: skip
    for row in newest(of_kind(rows, "warm"), "stage"):
        if "seconds" in row:
            lines.append(f"{row['kernels']} kernels compiled in {row['seconds']:.0f} s on {row['workers']} processes"
                         + (f", {len(row['errors'])} failed: {row['errors'][0]}" if row["errors"] else ""))  # fmt: skip
    for row in newest(of_kind(rows, "launches"), "stage"):
        lines.append(f"{row['stage']}: {row['checked']} launches by {row['by']}: {row['wrong']} wrong, "
                     f"{row['crashed']} crashed, {row['no_remedy']} without remedy")  # fmt: skip
    for row in of_kind(rows, "remedy"):
        lines.append(f"remedy: {row.get('launch')}: {row.get('variant')}")
    for row in of_kind(rows, "driver")[-1:]:
        lines.append(f"driver: {row['left_out']}" if "left_out" in row else
                     f"driver: {row['right']} right, {len(row['wrong'])} wrong, layout {row['layout']}, status "
                     f"{row['status']}{': ' + row['wrong'][0] if row['wrong'] else ''}")  # fmt: skip
    for row in of_kind(rows, "proof")[-1:]:
        outcome = row.get("left_out") or row["trouble"] or f"proven{', with copies' if row['copies'] else ''}"
        lines.append(f"wgmma kernels: {outcome}")
    for row in newest(of_kind(rows, "measured"), "name"):
        values = ", ".join(f"{name} {value}" for name, value in row["values"].items())
        lines.append(f"measured {row['name']} ({row['settles']}): {values}"[:300])
    for row in newest(of_kind(rows, "step"), "method", "network"):
        lines.append(
            f"step {row['method']}, {row['network']}: {'right' if row['ok'] else 'WRONG ' + str(row.get('errors'))}"
        )
    for row in newest(of_kind(rows, "replay"), "method", "network"):
        same = "captured is launched, twice the same" if row["same"] and row["twice_same"] else "DIFFERS"
        lines.append(f"replay {row['method']}, {row['network']}: {same}{'' if row['captured'] else ', NOT CAPTURED'}")
    for kind in ("walk", "capture"):
        lines += [f"{kind}: {short(row)}" for row in of_kind(rows, kind)]
    if table := steps(rows):
        lines += ["", *text_table(table, STEPS)]
    for row in of_kind(rows, "kernels")[-1:]:
        lines += ["", f"{row['timed']} distinct launches timed: {row['sum_ms']:.3g} ms a step one after the other, "
                  f"{row['predicted_ms']:.3g} predicted; {len(row['dispatch'])} shapes faster otherwise"]  # fmt: skip
        if row.get("misses"):
            columns = {"launch": "further than 25% from its prediction", "by": "by", "us": "us",
                       "predicted_us": "predicted us", "ratio": "ratio", "count": "a step"}  # fmt: skip
            lines += [f"{len(row['misses'])} times are", *text_table(row["misses"][:20], columns)]
    timed = [row for row in of_kind(rows, "kernel") if "us" in row]
    worst = sorted(newest(timed, "index"), key=lambda row: -row["us"] * row["count"])[:8]
    if worst:
        columns = {"launch": "slowest launches", "count": "a step", "us": "us", "predicted_us": "predicted us",
                   "tflops": "TFLOP/s", "gbs": "GB/s", "cuda": "CUDA us", "wgmma": "wgmma us",
                   "wgmma_predicted_us": "predicted wgmma", "vendor": "cuDNN us"}  # fmt: skip
        lines += text_table(worst, columns)
    for kind in ("csrc", "sanitize", "tests", "counters"):
        lines += [f"{kind}: {short(row)}" for row in of_kind(rows, kind)]
    lines += ["", *text_table(of_kind(rows, "stage"), {"name": "stage", "seconds": "s", "status": "status"})]
    return lines


def short(row: Row) -> str:
    """A record's own facts in one line."""
    own = {k: v for k, v in row.items() if k not in ("stage", "kind", "at") and v not in (None, [], {}, "")}
    return ", ".join(f"{k} {v}" for k, v in own.items())[:300]

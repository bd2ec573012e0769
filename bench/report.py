"""Tables and plots from results files.

    python -m bench.report [FILES or folders, default bench/results] [--plots FOLDER] [--against FILE]

A table per file: numbers of two commits, devices or versions never share one. ``--against`` prints the ratio of every
row to the same row of an earlier file, and says what else differs between the two runs. Smoke runs are refused unless
``--smoke`` says that only the drawing is tried.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import drawing
from bench.common import RESULTS
from bench.gpu_run.findings import as_runs
from bench.gpu_run.record import read
from bench.setting import TITLES

Run = dict[str, Any]
# kind → key that names a row, the number compared, whether more is better, columns of its table
KINDS: dict[str, tuple[tuple[str, ...], str, bool, dict[str, str]]] = {
    "throughput": (
        ("network", "method", "batch", "members", "contender"), "images_per_second", True,
        {"network": "network", "method": "method", "batch": "batch", "members": "M = K", "title": "step",
         "images_per_second": "images/s", "p20": "p20", "p80": "p80", "ratio": "ours faster by", "tflops": "TFLOP/s",
         "share_of_roof": "of roof", "peak_mib": "peak MiB", "joules_per_1000": "J/1000 images"},
    ),
    "kernels": (
        ("pass", "launch"), "us", False,
        {"launch": "launch", "count": "per step", "us": "us", "p20": "p20", "p80": "p80", "tflops": "TFLOP/s",
         "gbs": "GB/s", "share_of_roof": "of roof", "dense": "cuDNN us", "grouped": "grouped us",
         "compiled": "compiled us"},
    ),
    "loader": (
        ("loader",), "images_per_second", True,
        {"title": "loader", "images_per_second": "images/s", "p20": "p20", "p80": "p80", "ratio": "ours faster by"},
    ),
    "scaling": (
        ("vary", "value"), "ms", False,
        {"vary": "varied", "value": "value", "ms": "ms", "p20": "p20", "p80": "p80", "gflop": "GFLOP"},
    ),
    "startup": (("phase",), "seconds", False, {"phase": "phase", "seconds": "median s", "cold": "cold s"}),
    "roof": ((), "", True, {}),
}  # fmt: skip


def load(paths: Iterable[Path], smoke: bool) -> list[tuple[Path, Run]]:
    """Runs in the order of their date; those of ``bench.gpu_run`` lie together in one file."""
    files = [f for path in paths for f in ([path] if path.is_file() else sorted(path.glob("**/*.json*")))]
    found = [(file, json.loads(file.read_text())) for file in files if file.suffix == ".json"]
    found += [(file, run) for file in files if file.suffix == ".jsonl" for run in as_runs(read(file))]
    runs = [(file, run) for file, run in found if isinstance(run, dict) and run.get("kind") in KINDS]
    for file, run in runs:
        if run["smoke"] and not smoke:
            raise SystemExit(f"{file} is a smoke run, which measures nothing")
    return sorted(runs, key=lambda pair: pair[1]["host"]["date"])


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "–" if value is None else str(value)


def markdown(rows: Sequence[Run], columns: dict[str, str]) -> str:
    """Numbers to the right; columns without any value left out."""
    kept = {key: title for key, title in columns.items() if any(row.get(key) is not None for row in rows)}
    numeric = {key: all(isinstance(row.get(key), int | float | None) for row in rows) for key in kept}
    lines = ["| " + " | ".join(kept.values()) + " |"]
    lines.append("|" + "|".join("---:" if numeric[key] else "---" for key in kept) + "|")
    for row in rows:
        lines.append("| " + " | ".join(cell(TITLES.get(str(row.get(k)), row.get(k))) for k in kept) + " |")
    return "\n".join(lines)


def heading(file: Path, run: Run) -> str:
    host = run["host"]
    versions = ", ".join(f"{name} {host[name]}" for name in ("driver", "cuda", "torch", "triton") if host.get(name))
    text = f"{'SMOKE RUN, NO RESULT. ' if run['smoke'] else ''}{host['device']}, {versions}; commit {host['commit']}, "
    text += host["date"][:10]
    if roof := run.get("roof"):
        text += (f"; measured roof {roof['flops_per_second'] / 1e12:.3g} TFLOP/s ({roof['dtype']}), "
                 f"{roof['bytes_per_second'] / 1e12:.3g} TB/s")  # fmt: skip
    part = f", {run['part']}" if "part" in run else ""
    return f"### {run['kind']}: {file.name}{part}\n\n{text}"


def describe(file: Path, run: Run) -> str:
    """One file's table, with who was not timed and why."""
    timed = [row for row in run.get("rows", []) if "not timed" not in row.get("status", "")]
    missing = [f"{row.get('title') or row.get('launch')} ({row['status'].removeprefix('not timed: ')})"
               for row in run.get("rows", []) if "not timed" in row.get("status", "")]  # fmt: skip
    parts = [heading(file, run)]
    if timed:
        parts.append(markdown(timed, KINDS[run["kind"]][3]))
    if fits := run.get("fits"):
        parts.append(markdown(fits, {"vary": "varied", "exponent": "exponent", "least_work": "of the least work"}))
    if missing:
        parts.append("Not timed: " + "; ".join(dict.fromkeys(missing)) + ".")
    return "\n\n".join(parts)


def against(run: Run, earlier: Run) -> str:
    """Ratios, above one where ``run`` is better, and what else is not the same."""
    keys, number, more_is_better, _ = KINDS[run["kind"]]
    then = {tuple(row.get(k) for k in keys): row for row in earlier["rows"] if row.get(number)}
    rows = []
    for row in run["rows"]:
        old = then.get(tuple(row.get(k) for k in keys))
        if old and row.get(number):
            ratio = row[number] / old[number]
            own = {k: row.get(k) for k in keys} | {"now": row[number], "then": old[number]}
            rows.append(own | {"better": ratio if more_is_better else 1 / ratio})
    names = ("device", "driver", "cuda", "torch", "triton")
    changed = [f"{n} {earlier['host'].get(n)} → {run['host'].get(n)}" for n in names
               if earlier["host"].get(n) != run["host"].get(n)]  # fmt: skip
    titles = {k: k for k in keys} | {"now": f"{number} now", "then": "then", "better": "better by"}
    note = f"Against commit {earlier['host']['commit']}" + (f"; also changed: {', '.join(changed)}" if changed else "")
    return f"{note}\n\n{markdown(rows, titles) if rows else 'no row in common'}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[RESULTS])
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    parser.add_argument("--against", type=Path, help="results file of an earlier run of the same kind")
    parser.add_argument("--smoke", action="store_true", help="take smoke runs too: numbers that mean nothing")
    options = parser.parse_args(argv)
    runs = load(options.paths, options.smoke)
    if not runs:
        print(f"no results in {', '.join(map(str, options.paths))}")
        return 1
    earlier = json.loads(options.against.read_text()) if options.against else None
    for file, run in runs:
        print(describe(file, run), end="\n\n")
        if earlier and earlier["kind"] == run["kind"]:
            print(against(run, earlier), end="\n\n")
        if options.plots:
            name = f"{file.stem}-{run['part']}" if "part" in run else file.stem
            for plot in drawing.draw(name, run, options.plots):
                print(f"![{plot.stem}]({plot})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

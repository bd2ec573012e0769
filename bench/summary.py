"""The short table at the end of ``bench/on_gpu.sh``: one line per contender and setting, out of a folder's results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.common import table
from bench.throughput import COLUMNS

KEYS = ("network", "method", "batch", "images_per_second", "ratio", "share_of_roof", "status")


def main(argv: list[str]) -> int:
    for file in sorted(Path(argv[0]).glob("*.json")):
        run = json.loads(file.read_text())
        if run.get("kind") == "throughput":
            rows = [row | {"status": row["status"].removeprefix("timed")[:60]} for row in run["rows"]]
            print(f"\n{file.stem}: {run['host']['device']}, commit {run['host']['commit']}"
                  f"{', SMOKE RUN' if run['smoke'] else ''}")  # fmt: skip
            titles = {key: COLUMNS.get(key, key) for key in KEYS}
            print(table(rows, {"title": "step"} | titles))
        elif run.get("kind") == "kernels":
            rows = [row for row in run["rows"] if "us" in row]
            print(f"\n{file.stem}: {len(rows)} distinct launches timed, {len(run['rows']) - len(rows)} not")
            ops = dict.fromkeys(row["op"] for row in rows)
            lines = []
            for op in ops:
                own = [row for row in rows if row["op"] == op]
                us, least = (sum(row[key] * row["count"] for row in own) for key in ("us", "least_us"))
                dense = [row for row in own if row.get("dense")]
                ratio = sum(row["dense"] * row["count"] for row in dense) / us if dense else None
                lines.append({"op": op, "us": us, "share_of_roof": least / us, "dense": ratio})
            print(
                table(lines, {"op": "op", "us": "us a step", "share_of_roof": "of roof", "dense": "cuDNN alone / ours"})
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""How long until training runs: importing the package, building a step, its first call (with the capture), the next.

    python -m bench.startup [--network wrn28_4] [--batch 128] [--json FILE] [--smoke]

Each sample is a fresh Python process, after one whose caches (bytecode, compiled kernels) it fills: "cold" is that
first one, medians are of the others.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench.common import ROOT, arguments, describe_host, save, start, table
from bench.setting import NETWORKS

PHASES = ("import torch", "import fastensdistill", "import its engines", "build", "first step", "second step")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--network", default="wrn28_4", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--engine", choices=("fused", "reference"))
    options = start(parser, argv)
    if options.smoke:
        options.network, options.batch, options.members, options.rounds = "tiny", 2, 2, 1
    device = torch.device(options.device)
    engine = options.engine or ("fused" if device.type == "cuda" else "reference")
    given = json.dumps([options.network, options.batch, options.members, engine, options.device])
    samples: list[dict[str, float]] = []
    for _ in range(options.rounds + 1):
        done = subprocess.run(
            [sys.executable, "-m", "bench.startup_phases", given], capture_output=True, text=True, cwd=ROOT
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        samples.append(json.loads(done.stdout.splitlines()[-1]))
    cold, warm = samples[0], samples[1:]
    rows: list[dict[str, Any]] = [
        {"phase": name, "seconds": statistics.median(s[name] for s in warm), "cold": cold[name]} for name in PHASES
    ]
    print(f"{engine} engine, {options.network}, batch {options.batch}, {options.device}")
    print(table(rows, {"phase": "phase", "seconds": "median s", "cold": "cold s"}))
    setting = {"network": options.network, "batch": options.batch, "members": options.members, "engine": engine}
    save(options.json, "startup", describe_host(device), options.smoke, setting=setting, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What a step costs against K, M, B, width and depth, one varied at a time, and the exponents fitted to that.

    python -m bench.scaling [--engine reference] [--vary members batch] [--json FILE] [--smoke]

The base is a PreResNet of blocks [4, 4, 4], width 1, TDiv − SDiv, M = K = 4, batch 128. The exponent is the slope of
log time over log value, beside that of the least work (the plan's FLOPs): 1 is proportional.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from bench.common import arguments, describe_host, interleave, save, spread, start, table
from bench.contenders import CONTENDERS, Gate
from bench.setting import Setting, batches, drawn_pairs, make
from bench.throughput import cycle

VALUES = {
    "branches": (2, 4, 8, 16), "teachers": (2, 4, 8, 16), "batch": (32, 64, 128, 256, 512), "width": (1, 2, 4, 8),
    "depth": (1, 2, 4, 8),
}  # fmt: skip
SMOKE = {"branches": (2, 4), "teachers": (2, 4), "batch": (2, 4), "width": (1, 2), "depth": (1, 2)}
COLUMNS = {"vary": "varied", "value": "value", "ms": "ms", "p20": "p20", "p80": "p80", "gflop": "GFLOP"}


def varied(base: Setting, vary: str, value: int) -> Setting:
    """``base`` with one thing changed."""
    model, members, branches, batch = dict(base.model), base.members, base.k, base.batch
    if vary == "branches":
        branches = value
    elif vary == "teachers":
        members = value
    elif vary == "batch":
        batch = value
    elif vary == "width":
        model["widen"] = value
    else:
        model["blocks"] = (value,) * len(model["blocks"])
    return Setting(base.network, base.method, batch, members, branches, tuple(model.items()))


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y over log x."""
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    over = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return over / sum((a - mean_u) ** 2 for a in u)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--engine", choices=("fused", "reference"))
    parser.add_argument("--vary", nargs="+", default=list(VALUES), choices=VALUES)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--most", type=int, default=1 << 30, help="leave out values beyond this")
    options = start(parser, argv)
    device = torch.device(options.device)
    engine = CONTENDERS[options.engine or ("fused" if device.type == "cuda" else "reference")]
    base = Setting("scaled", "tdiv-sdiv", options.batch, 4, 4, (("blocks", (4, 4, 4)), ("widen", 1)))
    if options.smoke:
        base = Setting("tiny", "tdiv-sdiv", 2, 2, 2, (("blocks", (1, 1)), ("widen", 1)))
    passed, errors = Gate(base, device).check(engine)
    if not passed:
        print(f"not timed: {engine.title} does not compute the step, errors {errors}")
        return 1
    rows: list[dict[str, Any]] = []
    fits: list[dict[str, Any]] = []
    for vary in options.vary:
        values = [v for v in (SMOKE if options.smoke else VALUES)[vary] if v <= options.most]
        calls, settings = {}, {}
        for value in values:
            setting = settings[value] = varied(base, vary, value)
            problem = make(setting, device)
            problem.config.precision = "bf16" if device.type == "cuda" else "fp32"
            given = batches(setting, 2, device, drawn_pairs(setting, 0, 2), torch.float32)
            calls[str(value)] = cycle(engine.build(problem), given)
        times = interleave(calls, options.rounds, device, least=0.1 if device.type == "cuda" else 0.0)
        found = [spread(times[str(value)]) for value in values]
        for value, t in zip(values, found, strict=True):
            rows.append({
                "vary": vary, "value": value, **{("ms" if k == "median" else k): 1e3 * v for k, v in t.items()},
                "gflop": settings[value].flops / 1e9,
            })  # fmt: skip
        if len(values) > 1:
            fits.append({
                "vary": vary, "exponent": exponent(values, [t["median"] for t in found]),
                "least_work": exponent(values, [settings[value].flops for value in values]),
            })  # fmt: skip
        calls.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"{engine.title}, {base.describe()}")
    print(table(rows, COLUMNS))
    print(table(fits, {"vary": "varied", "exponent": "exponent", "least_work": "of the least work"}))
    content = {"engine": engine.name, "setting": base.describe(), "rows": rows, "fits": fits}
    save(options.json, "scaling", describe_host(device), options.smoke, **content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

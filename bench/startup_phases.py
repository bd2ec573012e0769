"""The process that ``bench.startup`` measures; it must import nothing before its clock runs."""

from __future__ import annotations

import json
import sys
import time


def phases(network: str, batch: int, members: int, engine: str, device: str) -> dict[str, float]:
    """Seconds of each phase; called in a fresh process."""
    found: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        found[name], began = now - began, now

    import torch

    lap("import torch")
    import fastensdistill

    lap("import fastensdistill")
    assert fastensdistill
    import fastensdistill.engine.select

    lap("import its engines")
    from bench.common import synchronize
    from bench.contenders import CONTENDERS
    from bench.setting import Setting, batches, make

    place = torch.device(device)
    setting = Setting(network, "tdiv-sdiv", batch, members)
    problem = make(setting, place)
    problem.config.precision = "bf16" if place.type == "cuda" else "fp32"
    (given,) = batches(setting, 1, place, [(0, 1)], torch.float32)
    synchronize(place)
    began = time.perf_counter()
    step = CONTENDERS[engine].build(problem)
    synchronize(place)
    lap("build")
    for name in ("first step", "second step"):
        step(given)
        synchronize(place)
        lap(name)
    return found


if __name__ == "__main__":
    print(json.dumps(phases(*json.loads(sys.argv[1]))))

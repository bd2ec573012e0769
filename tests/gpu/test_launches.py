"""Every kernel in bf16 in every shape that the plans have, against float64; twice, for errors that move."""

from __future__ import annotations

import pytest
import torch

from bench.launches import Prepared, compare, named, prepare
from bench.setting import Setting

SETTINGS = {
    "odd": Setting("tiny", "tdiv-sdiv", 5, 3),  # 4 and 8 channels, 5 images: masks everywhere
    "post-activation": Setting("tiny-resnet", "tdiv-sdiv", 3, 2),
    "resnet32": Setting("resnet32", "tdiv-sdiv", 16, 4),  # 16 to 64 channels
    "wrn28_4": Setting("wrn28_4", "tdiv-sdiv", 8, 4),  # 64 to 256 channels: the tiles of the paper's network
    "single": Setting("tiny", "kd", 3, 2),
}


def poisoned(prepared: Prepared) -> dict[str, torch.Tensor]:
    """What the launch writes where all memory starts as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return named(prepared.run())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_launches_err_at_most_twice_as_much_as_pytorch(setting, warps):
    wrong, count = [], 0
    for prepared, _ in prepare(setting, torch.device("cuda"), torch.bfloat16):
        moves = prepared.launch.op == "norm statistics"  # running estimates: a second run starts elsewhere
        for name, error, allowed in compare(prepared):
            count += 1
            if error > allowed:
                wrong.append(f"{prepared.where}, {prepared.title}: {name} errs {error:.2e}, allowed {allowed:.2e}")
        first = poisoned(prepared)
        for name, value in poisoned(prepared).items():
            if not moves and not torch.equal(value, first[name]):
                wrong.append(f"{prepared.where}, {prepared.title}: {name} differs between two runs")
    assert count > 50
    assert not wrong, "\n".join(wrong)

"""The CUDA packing on the CPU, bit by bit; the loss, the seeds and the step are emulated in their own tests."""

from __future__ import annotations

import pytest
import torch

from fastensdistill.kernels import pack
from fastensdistill.kernels.layout import Layout
from fastensdistill.kernels.pack import PackOperands, pack_weights_reference
from tests.kernels import emulation, layouts
from tests.untyped import untyped


@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", layouts.CASES)
def test_packing(case, dtype, strided):
    """Bit by bit, in slots 1 … K; the others stay as they were."""
    layout, t = layouts.problem(case, dtype, slots=layouts.CASES[case][0] + 2)
    operands = [t["parameters"], t["deviations"]]
    expected = torch.full((2, layout.packed_size), torch.nan, dtype=torch.bfloat16)
    pack_weights_reference(untyped(PackOperands)(*operands, *expected, layout.fields, 1, len(operands[1]), 1))
    if strided:
        operands = [torch.stack([x, x], -1)[..., 0] for x in operands]
    packed = torch.full_like(expected, torch.nan)
    actual = emulation.both_ways("pack_rank_one", *operands, packed[0], packed[1], layout.dense_fields, 1)
    assert torch.equal(torch.stack(actual).view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("taps", [pack.EXTENSION_TAPS, pack.EXTENSION_TAPS + 1])
def test_more_taps_than_a_tile_holds_are_not_the_extensions(taps, monkeypatch):
    layout = Layout.build([("a", (2, 3, 1, taps), False)])
    operands = [torch.zeros(layout.size, dtype=torch.float64), torch.zeros(1, layout.factors, dtype=torch.float64)]
    packed = torch.zeros(2, layout.packed_size, dtype=torch.bfloat16)
    served = []
    monkeypatch.setattr(pack, "implementation", lambda *arguments: "extension")
    monkeypatch.setattr(pack, "_pack_rank_one", lambda *arguments: served.append(arguments))
    untyped(pack.pack_weights)(*operands, layout, *packed)
    assert len(served) == (taps == pack.EXTENSION_TAPS)
    if served:
        emulation.call("pack_rank_one", *served[0])
    else:
        with pytest.raises(RuntimeError, match=rf"taps \(at most {pack.EXTENSION_TAPS}\)"):
            emulation.call("pack_rank_one", *operands, *packed, layout.dense_fields, 0)


def test_channel_groups_are_not_the_extensions(monkeypatch):
    """Not a single layer of such a network is; nor would it know what to do with the integers of one."""
    layout, t = layouts.problem("both", torch.float64)
    packed, expected = torch.full((2, 2, layout.packed_size), torch.nan, dtype=torch.bfloat16)
    monkeypatch.setattr(pack, "implementation", lambda *arguments: "extension")
    monkeypatch.setattr(pack, "_pack_rank_one", None)
    untyped(pack.pack_weights)(t["parameters"], t["deviations"], layout, *packed)
    operands = t["parameters"], t["deviations"], *expected, layout.fields, 0, 2, 1
    pack_weights_reference(untyped(PackOperands)(*operands))
    assert torch.equal(packed.view(torch.int16), expected.view(torch.int16))


def test_a_race_is_seen(monkeypatch):
    """Results of the two ways that differ in one bit."""
    given = iter((1.0, 1.0 + 2.0**-23))
    monkeypatch.setattr(emulation, "call", lambda name, *operands: torch.tensor(next(given)))
    with pytest.raises(AssertionError, match="teacher_diversity_seed: threads of a phase race"):
        emulation.both_ways("teacher_diversity_seed", torch.zeros(2, 1, 2))

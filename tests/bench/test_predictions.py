"""The model of a step by today's engine: by hand, under its ceilings, in step with the code, and what changes alter."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from bench import predictions, recorded, wgmma_model
from bench.predictions import CHANGES, TODAY, Change, breakdown, costs, predicted, predicted_launch, seconds
from bench.recorded import GAP, L2, LEAST, beside, kernels, occupancy
from bench.setting import Setting
from bench.wgmma_model import OPS, Shape
from fastensdistill.engine import partials
from fastensdistill.engine.graph_nodes import count_step
from fastensdistill.kernels import conv_weight_gradient
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.launch import record_launches
from fastensdistill.kernels.tiles import assume_arch, weight_gradient_split
from fastensdistill.network.gpu import GPUS
from fastensdistill.network.nodes import Conv
from fastensdistill.network.on_load import Abilities
from tests.untyped import untyped

SMALL = Setting("wrn28_1", "tdiv-sdiv", 32, 4)
WIDE = Setting("wrn28_4", "tdiv-sdiv", 512, 4)
H100 = GPUS["h100"]


@pytest.fixture(scope="module")
def wide():
    """The kernels of WRN-28-4 at batch 512, by launch."""
    return [launch for part in WIDE.parts for launch in kernels(part)]


def of(wide, op, layer):
    return [ks for ks in wide if ks[0].op == op and ks[0].layer == layer]


def test_rates_of_the_cards_are_the_measured_ones():
    assert (H100.flops, H100.bandwidth) == (798e12, 3.0e12)
    assert WIDE.flops / H100.flops == pytest.approx(23.87e-3, rel=1e-3)
    assert WIDE.least_time(H100) == pytest.approx(35.74e-3, rel=1e-3)
    assert WIDE.least_time(GPUS["h200"]) == pytest.approx(31.10e-3, rel=1e-3)


def test_convolutions_of_wrn28_4_by_hand(wide):
    # (rows + columns) · 2 bytes are loaded for 2 · rows · columns FLOP: 128 x 64 have 42.7 a byte, 281 TFLOP/s at most.
    # A weight gradient's nine taps of 64 channels are five blocks of rows, 115.2 on average.
    flops = 2 * 4 * 512 * 32 * 32 * 64 * 64 * 9
    for op, rows in (("conv", 128), ("weight gradient", 115.2)):
        one = of(wide, op, "3x3 s1 64→64 @32")[0][0]
        assert one.tile == (128, 64)
        most = -(-one.programs // 132)
        full = one.programs / (132 * most) * (1 - 0.25 ** min(one.occupancy, most))
        assert one.flops == flops
        assert one.seconds(H100) == pytest.approx(flops / (rows * 64 / (rows + 64) * L2) / full, rel=0.01), op
        assert flops / one.seconds(H100) < 282e12
    # 4 x 4096 programs leave two sums of 64 channels each: 1024 rows are made of them by 256 programs at the memory's
    # rate, and those are read by 8 at 50 GB/s each, which takes less than any kernel does
    rows = 2 * 64 * 4
    added, last = next(ks for ks in wide if ks[0].op == recorded.STATISTICS and ks[0].layer == "64 channels @32")
    assert (added.name, added.programs, added.nbytes) == (recorded.ADD_ROWS, 256, (4 * 4096 + 1024) * rows)
    assert added.seconds(H100) == pytest.approx(added.nbytes / (0.85 * 3e12))
    assert (last.name, last.programs) == (recorded.REDUCTIONS[0], 8)
    assert last.nbytes == pytest.approx(1024 * rows, rel=0.01)
    assert last.seconds(H100) == LEAST > last.nbytes / (8 * 50e9)


def test_its_nodes_are_those_of_the_captured_step():
    counted = count_step("wrn28_1", 4, 4, 32)
    found = Counter(k.name for part in SMALL.parts for ks in kernels(part) for k in ks)
    expected = {name: counted.triton[name] for name in found}
    for name in ("conv", "head"):  # of a joint launch both parts have one
        of_one = "grouped_conv_kernel" if name == "conv" else "head_kernel"
        expected[of_one] += 2 * counted.triton[f"joint_{name}_kernel"]
    assert found == expected
    assert {"grouped_conv_kernel", "conv_weight_gradient_kernel", *recorded.REDUCTIONS} <= {*found}
    assert recorded.ADD_ROWS not in found, "the un-fold sums what is so small"
    assert len(costs(SMALL, TODAY, H100)) == counted.total


def test_programs_of_a_multiprocessor():
    """Stated by the tile, else reported, else by registers, which a limit bounds."""
    x, weight = torch.empty(1, 8, 32, 32, 64, dtype=torch.bfloat16), torch.empty(1, 9, 64, 64, dtype=torch.bfloat16)
    with assume_arch(90), record_launches() as launches:
        grouped_conv(x, weight, torch.zeros(1, dtype=torch.int32), kernel=3, padding=1)
    one = launches[0]._replace(programs=0, maxnreg=None)
    assert occupancy(one._replace(programs=5)) == 5
    reported = recorded.reported()
    key = next(key for key in reported if key[:2] == ("grouped_conv_kernel", "3x3 s1 64→64 @32 center"))
    named = one._replace(arguments=one.arguments | {"p_center": torch.empty(0)}, maxnreg=key[-1])
    assert occupancy(named) == reported[key]
    odd = {"H": 31}  # of no network
    wide = one._replace(arguments=one.arguments | odd | {"BLOCK_N": 128}, num_stages=1)
    assert occupancy(wide) == 65536 // (128 * 176)
    assert occupancy(wide._replace(maxnreg=128)) == 4


def test_no_kernel_exceeds_its_ceilings(wide):
    for gpu in (H100, GPUS["h200"]):
        for k in (k for ks in wide for k in ks):
            time = k.seconds(gpu)
            assert k.flops <= time * gpu.flops, k
            assert k.l2 <= time * L2 * (1 + 1e-9), k
            assert k.nbytes <= time * gpu.bandwidth, k
    for rates in (predictions.HALO, predictions.VENDOR):
        assert max(rates.values()) <= 0.9 * 790


def test_a_breakdown_is_the_whole_step():
    total = predicted("wrn28_1", 32, 4, "h100")
    for by in ("op", "layer"):
        rows = untyped(breakdown)(SMALL, H100, by)
        assert sum(row["ms"] for row in rows) == pytest.approx(total)
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert rows[-1]["name"] == "gaps"
        assert rows[-1]["nodes"] == sum(row["nodes"] for row in rows[:-1])
    launches = sum(predicted_launch(launch, part, H100) for part in SMALL.parts for launch in part.launches)
    apart = 1e3 * seconds(SMALL, Change("without joint launches"), H100)
    assert launches / 1e3 + 1e3 * sum(k.seconds(H100) + GAP for k in beside(SMALL)) == pytest.approx(apart)
    assert total < apart
    assert SMALL.least_time(H100) < total / 1e3


def test_it_follows_the_engine(monkeypatch):
    """Nothing left to the un-fold: a node more for every weight gradient that is split. One split, as nobody would
    choose: fewer programs than multiprocessors, a slower step."""

    def forget():
        recorded.record.cache_clear()
        recorded.nodes.cache_clear()

    def whole(*shape):
        split = weight_gradient_split(*shape)
        return split._replace(steps=split.steps * split.splits, splits=1)

    before, recorded_nodes = predicted("wrn28_1", 32, 4, "h100"), len(costs(SMALL, TODAY, H100))
    split = sum(len(recorded.left_by(part)) for part in SMALL.parts if part.training)
    forget()
    try:
        monkeypatch.setattr(partials, "MOST", 0)
        summed, added = len(costs(SMALL, TODAY, H100)), predicted("wrn28_1", 32, 4, "h100")
        monkeypatch.setattr(conv_weight_gradient, "weight_gradient_split", whole)
        forget()
        after, nodes = predicted("wrn28_1", 32, 4, "h100"), len(costs(SMALL, TODAY, H100))
    finally:
        forget()
    assert split == 27
    assert summed == recorded_nodes + split
    assert added > before
    assert nodes == recorded_nodes
    assert after > 1.1 * before


def test_changes_alter_what_they_name(wide):
    (one, *_) = of(wide, "conv", "3x3 s1 256→256 @8")
    alone, *passes = predictions.vendor(one)
    assert len(passes) >= one[0].groups - 1
    assert alone.seconds(H100) == pytest.approx(alone.flops / 620e12)
    narrow = replace(one[0], node=replace(one[0].node, in_shape=(3, 8, 8)))
    assert isinstance(narrow.node, Conv)
    assert predictions.halo(predictions.HALO, 1 << 20)((narrow,)) == (narrow,)
    assert predictions.vendor((narrow,)) == (narrow,)


def test_every_change_has_a_row(capsys):
    rows = untyped(predictions.predictions)("wrn28_1", 32, 4, H100)
    assert [row["change"] for row in rows] == [*(change.title for change in CHANGES), predictions.ROOF]
    assert rows[0]["ratio"] == 1
    assert rows[0]["ms"] == pytest.approx(predicted("wrn28_1", 32, 4, "h100"))
    by_title = {row["change"]: row["ms"] for row in rows}
    assert min(by_title.values()) == rows[-1]["ms"]
    faster = seconds(SMALL, TODAY, GPUS["h200"])
    assert faster < seconds(SMALL, TODAY, H100)
    assert predictions.main(["--networks", "wrn28_1", "--batch", "32"]) == 0
    out = capsys.readouterr().out
    assert "predicted, not measured; ±15%" in out
    assert out.count(" as it stands ") == 2
    assert predictions.main(["--networks", "wrn28_1", "--batch", "32", "--gpu", "h100", "--by", "layer"]) == 0
    assert "weight gradient 3x3 s1 64→64 @8" in capsys.readouterr().out


SQUARE = Shape(4, 512, 3, 1, 64, 64, 32, 32)


def rate(shape, seconds):
    """TFLOP/s."""
    flops = 2 * shape.G * shape.N * shape.height * shape.width * shape.channels * shape.out_channels * shape.kernel**2
    return flops / shape.stride**2 / seconds / 1e12


def test_a_wgmma_convolution_by_hand():
    """36 products of 128 cycles make 64 channels of 256 positions; 8,192 such tiles are 31.03 waves of pairs."""
    pair = 2 * 36 * 128 / 0.8
    assert wgmma_model.wide_cycles(SQUARE, False) == pytest.approx(32 * pair)
    assert wgmma_model.wide_cycles(SQUARE, True) == pytest.approx(32 * pair), (
        "loading hides behind the other's products"
    )
    assert 540 < rate(SQUARE, wgmma_model.conv_seconds(SQUARE)) < 700
    # 16 channels: an instruction reads 80 rows of 32 bytes, 20 cycles; a box of 12.8 KB arrives, 8 KB are staged twice
    narrow = replace(SQUARE, channels=16, out_channels=16)
    tile = (36 * 20 + (400 * 32 + 2 * 256 * 32) / 128) / 0.8
    assert wgmma_model.narrow_cycles(narrow, False) == pytest.approx(-(-8192 // 132) * max(tile, 1100 / 4))
    assert wgmma_model.narrow_cycles(narrow, True) > wgmma_model.narrow_cycles(narrow, False)
    for channels, least, most in ((128, 560, 690), (256, 580, 710)):
        side = 2048 // channels
        wide = replace(SQUARE, channels=channels, out_channels=channels, height=side, width=side)
        assert least < rate(wide, wgmma_model.conv_seconds(wide)) < most


def test_a_wgmma_weight_gradient_by_hand():
    """Splits that fill the multiprocessors: 33, 8 and 2, as many as blocks leave room for."""
    for channels, splits in ((64, 33), (128, 8), (256, 2)):
        side = 2048 // channels
        shape = replace(SQUARE, channels=channels, out_channels=channels, height=side, width=side)
        cut = wgmma_model.gradient_cut(shape)
        assert (cut.splits, cut.products, cut.columns, cut.blocks) == (splits, 3, 192, (channels // 64) ** 2)
        # 16 times 16 positions in a tile, three products of 96 cycles each, and three tiles' time beside
        own = (-(-cut.tiles // splits) + 3) * 16 * 3 * 96 / 0.8
        assert wgmma_model.gradient_seconds(shape) == pytest.approx(own / 1.47e9)
        assert 560 < rate(shape, wgmma_model.gradient_seconds(shape)) < 700
    assert wgmma_model.partial_bytes(SQUARE) == 2 * 4 * 33 * 4 * 9 * 64 * 64


def test_tiles_that_reach_past_an_image_are_counted():
    assert [wgmma_model.tiles(2, *size) for size in ((32, 32), (16, 16), (8, 8))] == [8, 2, 1]
    assert wgmma_model.tiles(2, 12, 20) == 3, "2 images of 12 rows and 8 columns; 20 columns are three tiles' 24"
    assert wgmma_model.tiles(1, 33, 8) == 2
    odd = replace(SQUARE, height=12, width=20)
    assert rate(odd, wgmma_model.conv_seconds(odd)) < 0.65 * rate(SQUARE, wgmma_model.conv_seconds(SQUARE))


def test_every_assumption_says_where_it_comes_from(capsys):
    assert predictions.main(["--assumptions"]) == 0
    printed = capsys.readouterr().out
    for name, one in (*recorded.ASSUMED.items(), *wgmma_model.ASSUMED.items()):
        assert name in printed
        assert len(one.source) > 10
        assert one.source in printed


BY_TITLE = {change.title: change for change in CHANGES}


def test_kernels_of_another_plan_are_those_that_wgmma_covers():
    """The stem, whose three channels no kernel covers, stays Triton's; partial results are summed by the un-fold."""
    by = untyped(CHANGES[-1].by)
    assert by.abilities == Abilities(True, True, True, True)
    found = [ks for parts in predictions.passes(SMALL, by).values() for part in parts for ks in kernels(part, by)]
    convolutions = [ks for ks in found if ks[0].launch.op in OPS]
    assert {ks[0].product > 0 for ks in convolutions if ks[0].width == 3} == {False}
    assert {ks[0].product > 0 for ks in convolutions if ks[0].width >= 16} == {True}
    assert all(len(ks) == 1 for ks in convolutions if ks[0].product)
    kinds = {step.kind for ks in found for step in (*ks[0].launch.prologue, *ks[0].launch.epilogue)}
    assert {"norm_gradient", "second", "open"} <= kinds
    plain = untyped(BY_TITLE["wgmma: weight gradient, 3x3 at stride 1 from 64 channels on"].by)
    own = [ks for parts in predictions.passes(SMALL, plain).values() for part in parts for ks in kernels(part, plain)]
    layers = {ks[0].layer for ks in own if ks[0].product}
    assert layers == {"3x3 s1 64→64 @8"}
    assert {ks[0].launch.op for ks in own if ks[0].product} == {"weight gradient"}


def test_a_layer_of_teachers_and_branches_is_one_launch():
    by = untyped(CHANGES[-1].by)
    parts = predictions.passes(SMALL, by)["distillation, forward"]
    before = [kernels(part, by) for part in parts]
    after = predictions.joined(parts, before)
    count = lambda found: sum(len(ks) for part in found for ks in part)  # noqa: E731
    layers = sum(1 for ks in before[0] if ks[0].launch.op in ("conv", "head"))
    assert count(before) - count(after) == layers > 20
    for total in ("flops", "nbytes"):
        both = [sum(getattr(k, total) for part in found for ks in part for k in ks) for found in (before, after)]
        assert both[0] == pytest.approx(both[1])
    first = [next(ks[0] for ks in found[0] if ks[0].product) for found in (before, after)]
    assert [k.groups for k in first] == [4, 8]
    assert predictions.joined(parts[:1], before[:1]) == before[:1]

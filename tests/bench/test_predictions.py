"""The model of a step by today's engine: by hand, under its ceilings, in step with the code, and what changes alter."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import predictions, recorded
from bench.predictions import CHANGES, TODAY, breakdown, costs, predicted, predicted_launch, seconds
from bench.recorded import COPIES, GAP, L2, beside, kernels
from bench.setting import Setting
from fastensdistill.kernels import conv_weight_gradient
from fastensdistill.network.gpu import GPUS
from fastensdistill.network.nodes import Conv

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
    assert WIDE.least_time(H100) == pytest.approx(35.84e-3, rel=1e-3)
    assert WIDE.least_time(GPUS["h200"]) == pytest.approx(31.16e-3, rel=1e-3)


def test_convolutions_of_wrn28_4_by_hand(wide):
    # (rows + columns) · 2 bytes are loaded for 2 · rows · columns FLOP: 128 x 64 have 42.7 a byte, 281 TFLOP/s at most
    flops = 2 * 4 * 512 * 32 * 32 * 64 * 64 * 9
    for op in ("conv", "weight gradient"):
        one = of(wide, op, "3x3 s1 64→64 @32")[0][0]
        M, N = one.tile
        most = -(-one.programs // 132)
        full = one.programs / (132 * most) * (1 - 0.25 ** min(one.occupancy, most))
        assert one.flops == flops
        assert one.seconds(H100) == pytest.approx(flops / (M * N / (M + N) * L2) / full, rel=0.01), op
        assert flops / one.seconds(H100) < 282e12
    # 4 x 4096 programs leave two sums of 64 channels each, which a few programs read at 50 GB/s
    sums = [ks[0] for ks in wide if ks[0].name == recorded.REDUCTIONS[0] and ks[0].layer == "64 channels @32"]
    assert sums[0].nbytes == pytest.approx(4 * 4096 * 2 * 64 * 4, rel=1e-3)
    assert sums[0].seconds(H100) == pytest.approx(sums[0].nbytes / (min(132, sums[0].programs) * 50e9))


def test_no_kernel_exceeds_its_ceilings(wide):
    for gpu in (H100, GPUS["h200"]):
        for k in (k for ks in wide for k in ks):
            time = k.seconds(gpu)
            assert k.flops <= time * gpu.flops, k
            assert k.l2 <= time * L2 * (1 + 1e-9), k
            assert k.nbytes <= time * gpu.bandwidth, k
    for rates in (predictions.HALO, predictions.HALO_WGMMA, predictions.GRADIENT_WGMMA, predictions.VENDOR):
        assert max(rates.values()) <= 0.9 * 790


def test_a_breakdown_is_the_whole_step():
    total = predicted("wrn28_1", 32, 4, "h100")
    for by in ("op", "layer"):
        rows = breakdown(SMALL, H100, by)
        assert sum(row["ms"] for row in rows) == pytest.approx(total)
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert rows[-1]["name"] == "gaps"
        assert rows[-1]["nodes"] == sum(row["nodes"] for row in rows[:-1])
    launches = sum(predicted_launch(launch, part, H100) for part in SMALL.parts for launch in part.launches)
    rest = [k for part in SMALL.parts for ks in kernels(part) for k in ks if k.op == COPIES] + [*beside(SMALL)]
    assert launches / 1e3 + 1e3 * sum(k.seconds(H100) + GAP for k in rest) == pytest.approx(total)
    assert SMALL.least_time(H100) < total / 1e3


def test_it_follows_the_engine(monkeypatch):
    """One split, as nobody would choose: fewer programs than multiprocessors, no sums of splits, a slower step."""
    before, recorded_nodes = predicted("wrn28_1", 32, 4, "h100"), len(costs(SMALL, TODAY, H100))
    monkeypatch.setattr(conv_weight_gradient, "split_steps", lambda arch, blocks, steps, *more: steps)
    recorded.record.cache_clear()
    try:
        after, nodes = predicted("wrn28_1", 32, 4, "h100"), len(costs(SMALL, TODAY, H100))
    finally:
        recorded.record.cache_clear()
    assert nodes < recorded_nodes
    assert after > 1.1 * before


def test_changes_alter_what_they_name(wide):
    (one, *_) = of(wide, "weight gradient", "3x3 s1 256→256 @8")
    filled = predictions.whole_waves(one)
    assert filled[0].programs % (132 * one[0].occupancy) == 0
    assert filled[0].seconds(H100) <= one[0].seconds(H100)
    (one, *_) = of(wide, "conv gradient", "1x1 s2 64→128 @32")
    zeros = predictions.no_zeros(one[0])
    stored = 2 * one[0].groups * 512 * 32 * 32 * 64
    assert one[0].nbytes - zeros.nbytes == pytest.approx(2 * 0.75 * stored)
    (one, *_) = of(wide, "conv", "3x3 s1 256→256 @8")
    alone, *passes = predictions.vendor(one)
    assert len(passes) >= one[0].groups - 1
    assert alone.seconds(H100) == pytest.approx(alone.flops / 620e12)
    narrow = replace(one[0], node=replace(one[0].node, in_shape=(3, 8, 8)))
    assert isinstance(narrow.node, Conv)
    assert predictions.halo(predictions.HALO, 1 << 20)((narrow,)) == (narrow,)
    assert predictions.vendor((narrow,)) == (narrow,)


def test_every_change_has_a_row(capsys):
    rows = predictions.predictions("wrn28_1", 32, 4, H100)
    assert [row["change"] for row in rows] == [*(change.title for change in CHANGES), predictions.ROOF]
    assert rows[0]["ratio"] == 1
    assert rows[0]["ms"] == pytest.approx(predicted("wrn28_1", 32, 4, "h100"))
    by_title = {row["change"]: row["ms"] for row in rows}
    assert by_title["all of these"] < min(row["ms"] for row in rows[1 : 1 + len(predictions.CHEAP)])
    assert min(by_title.values()) == rows[-1]["ms"]
    faster = seconds(SMALL, TODAY, GPUS["h200"])
    assert faster < seconds(SMALL, TODAY, H100)
    assert predictions.main(["--networks", "wrn28_1", "--batch", "32"]) == 0
    out = capsys.readouterr().out
    assert "predicted, not measured" in out
    assert out.count(" as it stands ") == 2
    assert predictions.main(["--networks", "wrn28_1", "--batch", "32", "--gpu", "h100", "--by", "layer"]) == 0
    assert "weight gradient 3x3 s1 64→64 @8" in capsys.readouterr().out

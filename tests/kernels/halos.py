"""What the halo convolution is tested on, and how its results are compared with the reference's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.kernels import halo_conv as halo
from fastensdistill.kernels.conv_data_gradient import DataGradient
from fastensdistill.kernels.grouped_conv import ConvOutput
from fastensdistill.kernels.reference import pack_mask, pick
from tests.compare import check_close
from tests.kernels.both import values
from tests.kernels.rounding import rounding
from tests.untyped import untyped

BF16 = torch.bfloat16
SLOTS = 3


class Case(NamedTuple):
    name: str
    groups: int
    images: int
    height: int
    width: int
    channels: int
    out_channels: int


CASES = [
    Case("16", 2, 1, 6, 8, 16, 16),
    Case("16-odd-four-groups", 4, 3, 7, 5, 16, 16),
    Case("two-chunks-of-16", 1, 2, 5, 7, 32, 16),  # odd size; the ring is two stages deep: one step per chunk
    Case("16-to-64", 2, 1, 4, 5, 16, 64),  # a quarter of a block's input channels
    Case("32", 3, 2, 3, 3, 32, 32),
    Case("32-two-chunks", 1, 1, 4, 4, 64, 32),
    Case("48-channels", 1, 1, 5, 5, 48, 48),  # a partial chunk after a whole one; three blocks of 16 channels
    Case("64", 2, 1, 9, 32, 64, 64),  # two tiles of 8 rows down, the second with one row
    Case("64-eight-by-eight", 2, 5, 8, 8, 64, 64),  # whole images: four in a tile, one in the next
    Case("80-to-64", 1, 1, 6, 5, 80, 64),  # a whole and a quarter chunk
    Case("128", 1, 2, 8, 8, 128, 128),
    Case("160-to-160", 1, 1, 4, 4, 160, 160),
    Case("wide", 1, 1, 3, 40, 16, 16),  # two tiles of 20 columns across
    Case("one-pixel", 2, 50, 1, 1, 16, 16),  # 45 images a tile: the border bounds it
    Case("one-row", 1, 2, 1, 9, 16, 32),
    Case("three-blocks-of-64", 1, 1, 3, 4, 16, 192),
]


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x, weights of SLOTS slots, and a map from groups to slots that permutes, repeats and skips some."""
    x = values(case.groups, case.images, case.height, case.width, case.channels, dtype=BF16)
    weight = values(SLOTS, 9, case.channels, case.out_channels, dtype=BF16, scale=(9 * case.channels) ** -0.5)
    return x, weight, torch.tensor([(2 * g + 2) % SLOTS for g in range(case.groups)], dtype=torch.int32)


SHAPE = {"kernel": 3, "stride": 1, "padding": 1}


def epilogues(case: Case) -> dict[str, dict]:
    n, out = case.out_channels, (case.groups, case.images, case.height, case.width)
    residual = values(*out, n, dtype=BF16, seed=1)
    following = {"next_scale": values(SLOTS, n, seed=2), "next_shift": values(SLOTS, n, seed=3)}
    prologue = {"in_scale": values(SLOTS, case.channels, seed=5), "in_shift": 2 + values(SLOTS, case.channels, seed=6)}
    strided = values(*out[:2], 2 * case.height - 1, 2 * case.width, n // 2, dtype=BF16, seed=4)
    return {
        "bias-relu-mask": {"bias": values(SLOTS, n), "relu": True, "mask": True},
        "residual-next-mask": {"residual": residual, **following, "mask": True},
        "bias-next-shared-rows": {"bias": values(1, n), **{k: v[:1].clone() for k, v in following.items()}},
        "statistics": {"center": values(1, n)},
        "everything": {
            "bias": values(SLOTS, n), "residual": residual, "relu": True, **following, "center": values(SLOTS, n),
            "mask": True,
        },
        "strided-shortcut": {"residual": strided, "residual_stride": 2, "relu": True, "mask": True},
        "prologue": {**prologue, "center": values(SLOTS, n)},
        "one-input-for-all": {"shared": True, **{name: rows[:1] for name, rows in prologue.items()}},
    }  # fmt: skip


def gradient_epilogues(case: Case) -> dict[str, dict]:
    """For a convolution from the case's out_channels to its channels: the kernel computes what the case says."""
    n, shape = case.out_channels, (case.groups, case.images, case.height, case.width)
    mask = {"mask": pack_mask(values(*shape, n, seed=1) > 0)}
    residual = {"residual": values(*shape, n, dtype=BF16, seed=2)}
    small = values(*shape[:2], -(-case.height // 2), -(-case.width // 2), n + 16, dtype=BF16)
    sums = {"z": values(*shape, n, dtype=BF16, seed=3), "mean": values(1, n, seed=4), "inv_std": values(1, n).abs()}
    per_slot = {name: rows.expand(SLOTS, -1).contiguous() for name, rows in sums.items() if name != "z"}
    return {
        "plain": {},
        "mask": mask,
        "mask-scale-residual": {**mask, "scale": values(SLOTS, n), **residual},
        "residual-first-mask": {**residual, "residual_first": True, **mask},
        "padded-shortcut": {"residual": small, "residual_stride": 2, "residual_first": True, **mask},
        "narrow-shortcut-last": {"residual": small[..., :8].contiguous(), "residual_stride": 2},
        "mask-sums": {**mask, **sums},
        "residual-first-mask-sums": {**residual, "residual_first": True, **mask, **sums, **per_slot},
    }  # fmt: skip


def check_value(name: str, actual: Tensor, expected: Tensor) -> None:
    """What differs is the other neighbour in bf16, and little does: the order of sums, on a device truncation."""
    check_close(name, actual, expected, rounding(expected, BF16))
    share = (actual.double().cpu() != expected.double().cpu()).double().mean().item()
    assert share <= max(0.05, 1 / expected.numel()), f"{name}: {share:.1%} of the values are rounded differently"


def check_forward(actual: ConvOutput, x: Tensor, weight: Tensor, weight_index: Tensor, options: dict) -> None:
    """z against the reference; what follows from z as stored, exactly that (sums up to their order)."""
    expected = halo.halo_conv(x, weight, weight_index, **SHAPE, **options)
    assert [a is None for a in actual] == [e is None for e in expected]
    check_value("z", actual.z, expected.z)
    z = actual.z.float()
    if actual.activated is not None:
        z = (z * pick(options["next_scale"], weight_index) + pick(options["next_shift"], weight_index)).relu().to(BF16)
        check_value("activated", actual.activated, z)
        z = actual.activated
    if actual.mask is not None:
        assert torch.equal(actual.mask, pack_mask(z > 0))
    if actual.statistics is not None:
        rest = actual.z.double() - pick(options["center"], weight_index)
        tile = list(untyped(halo.halo_tile)(*x.shape[1:4], weight.shape[3]))
        sums = torch.stack([halo._tile_sums(rest, tile), halo._tile_sums(rest.square(), tile)], 2)
        check_close("statistics", actual.statistics, sums, 1e-5)


def check_gradient(actual: DataGradient, d: Tensor, weight: Tensor, weight_index: Tensor, options: dict) -> None:
    expected = halo.halo_data_gradient(d, weight, weight_index, in_size=tuple(d.shape[2:4]), **SHAPE, **options)
    check_value("d", actual.d, expected.d)
    assert (actual.statistics is None) == (expected.statistics is None)
    if actual.statistics is not None:
        wide, standard = actual.d.double(), options["z"].double() - pick(options["mean"], weight_index)
        tile = list(untyped(halo.halo_tile)(*d.shape[1:4], weight.shape[3]))
        product = wide * standard * pick(options["inv_std"], weight_index)
        sums = torch.stack([halo._tile_sums(wide, tile), halo._tile_sums(product, tile)], 2)
        check_close("statistics", actual.statistics, sums, 1e-5)


by_name = {case.name: case for case in CASES}
FEW = [by_name[name] for name in ("16-odd-four-groups", "32", "64-eight-by-eight", "160-to-160", "128")]

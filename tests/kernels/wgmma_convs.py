"""What the wgmma convolutions are tested on, and how their results are compared with the references'."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastensdistill.kernels import wgmma_conv as wgmma
from fastensdistill.kernels.elementwise_gradient import GradientEpilogue
from fastensdistill.kernels.grouped_conv import ConvOperands
from fastensdistill.kernels.operands import Window
from fastensdistill.kernels.reference import pack_mask, pick
from tests.compare import check_close
from tests.kernels.both import values
from tests.kernels.halos import check_value

BF16 = torch.bfloat16
SLOTS = 3
MULTIPROCESSORS = 3


class Case(NamedTuple):
    """A convolution of ``images`` of height x width positions; in a gradient they are the result's."""

    groups: int
    images: int
    height: int
    width: int
    channels: int  # of what is multiplied
    out_channels: int  # of the result
    kernel: int
    stride: int

    @property
    def window(self) -> Window:
        return Window(self.kernel, self.stride, self.kernel // 2)

    @property
    def small(self) -> tuple[int, int]:
        """The other side's positions: of a convolution's result, of a gradient's d."""
        return -(-self.height // self.stride), -(-self.width // self.stride)


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return values(*shape, dtype=BF16, seed=seed)


def weights(kernel: int, channels: int, out_channels: int, seed: int = 0) -> Tensor:
    scale = (kernel**2 * channels) ** -0.5
    return values(SLOTS, kernel**2, channels, out_channels, dtype=BF16, scale=scale, seed=seed)


def slots(case: Case) -> Tensor:
    """From groups to slots: permuted, repeated, some skipped."""
    return torch.tensor([(2 * g + 2) % SLOTS for g in range(case.groups)], dtype=torch.int32)


def conv(case: Case, *names: str) -> ConvOperands:
    """A convolution with the parts of ``PARTS`` that are named."""
    shared = "one-input" in names
    x = bf16(1 if shared else case.groups, case.images, case.height, case.width, case.channels)
    o = ConvOperands(x, weights(case.kernel, case.channels, case.out_channels), slots(case))
    n, out = case.out_channels, (case.groups, case.images, *case.small)
    rows = {name: values(SLOTS, n, seed=i) for i, name in enumerate(("bias", "next_scale", "next_shift"))}
    parts: dict[str, dict[str, Any]] = {
        "one-input": {},
        "bias": {"bias": rows["bias"]},
        "relu": {"relu": True},
        "residual": {"residual": bf16(*out, n, seed=4)},
        "shortcut": {"residual": bf16(*out[:2], *(2 * s - 1 for s in out[2:]), n // 2, seed=5), "residual_stride": 2},
        "next": {"next_scale": rows["next_scale"], "next_shift": rows["next_shift"]},
        "next-one-row": {"next_scale": rows["next_scale"][:1].clone(), "next_shift": rows["next_shift"][:1].clone()},
        "sums": {"center": values(1, n, seed=6)},
        "mask": {"mask": True},
        "prologue": {
            "in_scale": values(SLOTS, case.channels, seed=7), "in_shift": 1 + values(SLOTS, case.channels, seed=8),
        },
        "in-relu": {"in_relu": True},
        "second": {
            "second": bf16(*out[:2], *(2 * s - i for i, s in enumerate(out[2:])), 80, seed=9), "second_stride": 2,
            "second_weight": weights(1, 80, n, seed=10), "second_bias": values(1, n, seed=11),
        },
        "second-for-all": {
            "second": bf16(1, case.images, *case.small, 16, seed=9), "second_weight": weights(1, 16, n, seed=10),
        },
    }  # fmt: skip
    return o._replace(**{key: value for name in names for key, value in parts[name].items()})


def gradient(case: Case, *names: str) -> tuple[wgmma.WgmmaGradientOperands, GradientEpilogue]:
    """A data gradient whose result has ``case.out_channels``, with the parts that are named."""
    n, shape, s = case.out_channels, (case.groups, case.images, case.height, case.width), case.stride
    d = bf16(case.groups, case.images, *case.small, case.channels)
    weight = weights(case.kernel, case.channels, n)
    o = wgmma.WgmmaGradientOperands(d, weight, slots(case), case.height, case.width)
    norm = {f"norm_{key}": values(case.groups, case.channels, seed=i) for i, key in enumerate("abc")}
    sources: dict[str, dict[str, Any]] = {
        "second": {
            "second": bf16(case.groups, case.images, *case.small, 48, seed=12), "second_stride": s,
            "second_weight": weights(1, 48, n, seed=13),
        },
        "norm": {"norm_z": bf16(*d.shape, seed=14), **norm},
    }  # fmt: skip
    sums = {"z": bf16(*shape, n, seed=15), "mean": values(1, n, seed=16), "inv_std": values(1, n, seed=17).abs()}
    own = {name: rows if name == "z" else rows.expand(SLOTS, -1).contiguous() for name, rows in sums.items()}
    parts: dict[str, dict[str, Any]] = {
        "mask": {"mask": pack_mask(values(*shape, n, seed=18) > 0)},
        "scale": {"scale": values(SLOTS, n, seed=19)},
        "residual": {"residual": bf16(*shape, n, seed=20)},
        "shortcut": {"residual": bf16(*shape[:2], *case.small, n + 16, seed=21), "residual_stride": s},
        "narrow-shortcut": {"residual": bf16(*shape[:2], *case.small, 8, seed=21), "residual_stride": s},
        "first": {"residual_first": True},
        "sums": sums,
        "mask-of-z": {**own, "mask_scale": values(SLOTS, n, seed=22), "mask_shift": values(SLOTS, n, seed=23)},
    }
    epilogue = GradientEpilogue(**{key: value for name in names for key, value in parts.get(name, {}).items()})
    return o._replace(**{key: value for name in names for key, value in sources.get(name, {}).items()}), epilogue


def check_conv(actual: tuple[Tensor, ...], o: ConvOperands, case: Case, copies: bool = False) -> None:
    """z against the reference; what follows from z as stored, exactly that (sums up to their order)."""
    expected = wgmma.wgmma_conv_reference(o, case.window, MULTIPROCESSORS, copies)
    check_results(actual, expected, o, wgmma.conv_rows(o, case.window, MULTIPROCESSORS))


def check_results(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], o: ConvOperands, rows: wgmma.Rows) -> None:
    assert [a.shape for a in actual] == [e.shape for e in expected]
    check_value("z", actual[0], expected[0])
    z, last = actual[0].float(), actual[0]
    if o.next_scale is not None and o.next_shift is not None:
        last = actual[1]
        follows = z * pick(o.next_scale, o.weight_index) + pick(o.next_shift, o.weight_index)
        check_value("activated", last, follows.relu().to(BF16))
    if o.mask:
        assert torch.equal(actual[2], pack_mask(last > 0))
    if o.center is not None:
        rest = z.double() - pick(o.center, o.weight_index)
        check_close("sums", actual[3], torch.stack([rows.sums(rest), rows.sums(rest.square())], 2), 1e-5)


def check_gradient(
    actual: tuple[Tensor, ...], o: wgmma.WgmmaGradientOperands, e: GradientEpilogue, case: Case, copies: bool = False
) -> None:
    expected = wgmma.wgmma_data_gradient_reference(o, e, case.window, MULTIPROCESSORS, copies)
    assert [a.shape for a in actual] == [x.shape for x in expected]
    check_value("d", actual[0], expected[0])
    if e.z is not None and e.mean is not None and e.inv_std is not None:
        d, rows = actual[0].double(), wgmma.gradient_rows(o, case.window, MULTIPROCESSORS)
        standard = (e.z.double() - pick(e.mean, o.weight_index)) * pick(e.inv_std, o.weight_index)
        check_close("sums", actual[1], torch.stack([rows.sums(d), rows.sums(d * standard)], 2), 1e-5)

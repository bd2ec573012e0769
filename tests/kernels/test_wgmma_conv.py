"""The wgmma convolutions, wide ones, with their kernels run on the CPU: values, sums, every part of both epilogues.

Their own index arithmetic is executed, every role in a thread of its own, asynchronous work done as early and as late
as it may be (host_wgmma.h).
"""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from fastensdistill.errors import InputError
from fastensdistill.kernels import wgmma
from fastensdistill.kernels import wgmma_conv as conv
from fastensdistill.kernels.conv_data_gradient import conv_data_gradient
from fastensdistill.kernels.grouped_conv import grouped_conv
from tests.compare import check_close
from tests.kernels import wgmma_convs as convs
from tests.kernels.emulation import both_ways, hopper, library
from tests.kernels.wgmma_convs import MULTIPROCESSORS, Case, check_conv, check_gradient
from tests.untyped import present, untyped

# groups, images, height, width, channels, out_channels, kernel, stride; then parts of the launch
FORWARD = {
    "64, weights stay": (Case(2, 3, 8, 8, 64, 64, 3, 1), ["sums", "mask"]),
    "48 of 64, odd sizes": (Case(2, 3, 5, 7, 48, 48, 3, 1), ["bias", "relu", "mask", "shortcut"]),
    "a residual where bits were read": (Case(1, 9, 9, 9, 64, 64, 3, 1), ["residual", "relu", "mask"]),
    "128, pairs": (Case(1, 5, 4, 9, 128, 128, 3, 1), ["bias", "residual", "relu", "next", "sums", "mask"]),
    "160, two tiles": (Case(1, 2, 9, 9, 80, 160, 3, 1), ["next-one-row", "mask", "second"]),
    "16 to 64, one input": (Case(3, 1, 33, 9, 16, 64, 3, 1), ["one-input", "prologue", "in-relu", "sums"]),
    "stride 2": (Case(2, 3, 7, 10, 32, 128, 3, 2), ["bias", "sums", "second-for-all"]),
    "stride 2, on load": (Case(1, 3, 7, 10, 80, 64, 3, 2), ["prologue", "residual", "relu"]),
    "1x1": (Case(2, 9, 3, 3, 64, 96, 1, 1), ["prologue", "sums", "next"]),
    "1x1, stride 2": (Case(1, 2, 5, 17, 128, 64, 1, 2), ["bias", "relu", "mask"]),
    "one pixel": (Case(1, 11, 1, 1, 64, 128, 3, 2), ["sums", "relu", "second"]),
    "on load, pairs, a second source": (
        Case(1, 2, 8, 8, 128, 128, 3, 1),
        ["prologue", "in-relu", "second", "residual"],
    ),
}
GRADIENT = {
    "64": (Case(2, 3, 8, 8, 64, 64, 3, 1), ["mask", "sums"]),
    "48 of 64, odd sizes": (Case(2, 3, 5, 7, 48, 48, 3, 1), ["mask", "scale", "residual"]),
    "128, pairs": (Case(1, 5, 4, 9, 128, 128, 3, 1), ["residual", "first", "mask-of-z"]),
    "a residual after the mask, and sums": (Case(1, 5, 4, 9, 128, 128, 3, 1), ["residual", "mask", "sums"]),
    "stride 2, phases of four sizes": (Case(2, 3, 7, 5, 96, 64, 3, 2), ["shortcut", "first", "mask", "sums"]),
    "stride 2, a second source": (Case(1, 2, 6, 9, 128, 64, 3, 2), ["second", "residual", "first", "mask-of-z"]),
    "1x1, stride 2": (Case(1, 2, 5, 8, 32, 160, 1, 2), ["narrow-shortcut", "scale", "mask"]),
    "one pixel": (Case(1, 11, 1, 1, 64, 128, 3, 2), ["mask-of-z", "second"]),
    "phases without positions, weights stay": (Case(1, 12, 65, 1, 64, 64, 3, 2), ["second"]),
    "norm": (Case(2, 3, 9, 11, 64, 64, 3, 1), ["norm", "mask-of-z"]),
    "norm, stride 2": (Case(2, 3, 9, 11, 80, 128, 3, 2), ["norm", "second", "residual", "first", "sums"]),
}


@pytest.mark.parametrize("name", list(FORWARD))
def test_forward(name):
    case, parts = FORWARD[name]
    o = convs.conv(case, *parts)
    check_conv(both_ways("wgmma_conv", *o, *case.window, MULTIPROCESSORS, False), o, case)


@pytest.mark.parametrize("name", list(GRADIENT))
def test_data_gradient(name):
    case, parts = GRADIENT[name]
    o, e = convs.gradient(case, *parts)
    check_gradient(both_ways("wgmma_data_gradient", *o, *e, *case.window, MULTIPROCESSORS, False), o, e, case)


@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_copies_are_right_whatever_the_unit_swizzles(kernel, stride):
    case = Case(1, 2, 5, 10, 32, 64, kernel, stride)
    for offsets in (False, True):
        with hopper(swizzle_offsets=offsets):
            o = convs.conv(case, "sums")
            check_conv(both_ways("wgmma_conv", *o, *case.window, MULTIPROCESSORS, True), o, case, True)
            d, e = convs.gradient(case, "mask-of-z")
            found = both_ways("wgmma_data_gradient", *d, *e, *case.window, MULTIPROCESSORS, True)
            check_gradient(found, d, e, case, True)


def test_one_tile_for_all_shifts_needs_the_units_swizzle_of_addresses():
    case = Case(1, 1, 8, 8, 64, 64, 3, 1)
    o = convs.conv(case)
    with hopper(swizzle_offsets=True), pytest.raises(AssertionError):
        check_conv(both_ways("wgmma_conv", *o, *case.window, MULTIPROCESSORS, False), o, case)


def test_rows_and_memory_are_those_of_the_kernels():
    """Rows of sums, a box's bytes, and whether a BatchNorm's gradient on load fits: as ``wide_plan`` finds them."""
    sizes = (1, 2, 3, 4, 5, 7, 8, 12, 14, 16, 19, 28, 32, 33, 56)
    found = (ctypes.c_int64 * 3)()
    for kernel, stride, gradient, copies, norm in itertools.product((1, 3), (1, 2), (0, 1), (0, 1), (0, 1)):
        window = conv.Window(kernel, stride, kernel // 2)
        for i, (height, width, images) in enumerate(itertools.product(sizes, (1, 9, 32), (1, 3, 512))):
            channels, groups = (64, 128, 160, 256, 640)[i % 5], (1, 4, 8)[i % 3]
            out, multiprocessors = (48, 64, 128, 192, 256, 640)[i % 6], (132, 114, 78)[i // 3 % 3]
            shape = (images, height, width)
            given = (
                kernel,
                stride,
                gradient,
                copies,
                *shape,
                channels,
                0,
                out,
                norm and gradient,
                groups,
                multiprocessors,
            )
            library().wide_plan_of((ctypes.c_int64 * len(given))(*given), found)
            own = (stride if gradient else 1, bool(gradient), bool(norm and gradient), multiprocessors)
            rows = conv.statistics_rows(groups, shape, channels, out, *own)
            tile = rows.tile
            assert [rows.total, conv.box_bytes(window, tile, bool(copies))] == found[:2], given
            fits = conv.norm_fits(window, shape, bool(copies)) if norm and gradient else True
            assert fits == bool(found[2]), given


def test_what_takes_a_norms_gradient_does_for_any_number_of_images():
    """WRN-28-4's layers at 32 x 32 and 16 x 16 do, those at 8 x 8 have no room."""
    window = conv.Window(3, 1, 1)
    assert [conv.takes_norm(c, c, window, s, s) for c, s in ((64, 32), (128, 16), (256, 8))] == [True, True, False]
    for stride, height, width in itertools.product((1, 2), range(1, 40), (8, 33)):
        window = conv.Window(3, stride, 1)
        if conv.takes_norm(64, 64, window, height, width):
            assert all(conv.norm_fits(window, (images, height, width), False) for images in range(1, 12))


def test_same_as_the_other_implementations():
    """Off CUDA the reference computes: values as grouped_conv's and conv_data_gradient's, sums of the same total."""
    case = Case(2, 3, 5, 7, 16, 48, 3, 2)
    o, shape = convs.conv(case, "bias", "sums", "next", "mask", "second"), case.window._asdict()
    for one, other in zip(conv.wgmma_conv(**o._asdict(), **shape), grouped_conv(**o._asdict(), **shape), strict=True):
        a, b = (t.sum(1) if t.dtype == torch.float32 else t.double() for t in (untyped(one), untyped(other)))
        check_close("forward", a, b, 1e-5)
    d, e = convs.gradient(case, "residual", "first", "mask-of-z")
    given = {**d._asdict(), **e._asdict(), **shape, "in_size": (case.height, case.width)}
    del given["height"], given["width"]
    mine, theirs = conv.wgmma_data_gradient(**given), conv_data_gradient(**given)
    check_close("d", mine.d, theirs.d, 0)
    check_close("sums", present(mine.statistics).sum(1), present(theirs.statistics).sum(1), 1e-5)


CASE = Case(2, 1, 6, 8, 64, 64, 3, 1)
O, WINDOW = convs.conv(CASE), CASE.window._asdict()
STRIDED = Case(2, 1, 6, 8, 64, 64, 3, 2)


def gradient_of(case: Case, *parts: str, **changed: object) -> object:
    d, e = convs.gradient(case, *parts)
    given = {**d._asdict(), **e._asdict(), **case.window._asdict(), "in_size": (case.height, case.width), **changed}
    return conv.wgmma_data_gradient(**{name: value for name, value in given.items() if name not in ("height", "width")})


REFUSED = {
    "a wide kernel": (
        lambda: conv.wgmma_conv(O.x, O.weight[:, :4].contiguous(), O.weight_index, kernel=2), "kernel 2, stride 1"),
    "a stem": (
        lambda: conv.wgmma_conv(O.x[..., :3].contiguous(), O.weight[:, :, :3].contiguous(), O.weight_index, **WINDOW),
        "3 to 64 channels"),
    "float32": (
        lambda: conv.wgmma_conv(O.x.float(), O.weight.float(), O.weight_index, **WINDOW), "torch.float32, expected"),
    "what grouped_conv refuses": (
        lambda: conv.wgmma_conv(O.x, O.weight, O.weight_index.long(), **WINDOW), "expected int32"),
    "an odd residual": (
        lambda: conv.wgmma_conv(O.x, O.weight, O.weight_index, **WINDOW, residual=O.x[..., :5].contiguous()),
        "a residual of 5 channels"),
    "an odd second source": (
        lambda: conv.wgmma_conv(O.x, O.weight, O.weight_index, **WINDOW, second=O.x[..., :8].contiguous(),
                                second_weight=O.weight[:, :1, :8].contiguous()), "a second source of 8 channels"),
    "a gradient in float32": (lambda: gradient_of(CASE, out_dtype=torch.float32), "a result in torch.float32"),
    "another stride of a residual": (
        lambda: gradient_of(CASE, residual=convs.bf16(2, 1, 3, 4, 64), residual_stride=2), "residual_stride 2"),
    "another stride of a second source": (
        lambda: gradient_of(STRIDED, second=convs.bf16(2, 1, 6, 8, 16), second_weight=convs.weights(1, 16, 64)),
        "second_stride 1"),
    "a mask from z before a residual": (
        lambda: gradient_of(CASE, "mask-of-z", "residual"), "a mask from z with a residual after it"),
    "a norm's gradient that does not fit": (
        lambda: gradient_of(Case(1, 4, 8, 8, 64, 64, 3, 1), "norm"), "more shared memory than there is"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals(name):
    function, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        function()


def test_opcheck():
    o = convs.conv(CASE, "sums", "mask", "next")
    torch.library.opcheck(torch.ops.fastensdistill.wgmma_conv.default, (*o, *CASE.window, 3, False))
    d, e = convs.gradient(CASE, "sums")
    torch.library.opcheck(torch.ops.fastensdistill.wgmma_data_gradient.default, (*d, *e, *CASE.window, 3, False))


def test_one_graph_under_torch_compile():
    def both(x, weight, weight_index, center):
        out = conv.wgmma_conv(x, weight, weight_index, **WINDOW, center=center)
        back = conv.wgmma_data_gradient(out.z, weight, weight_index, in_size=(6, 8), **WINDOW)
        return out.z, out.statistics, back.d

    arguments = (O.x, O.weight, O.weight_index, torch.ones(1, 64))
    with wgmma.in_copies():
        compiled = torch.compile(both, fullgraph=True, backend="eager")(*arguments)
    for a, e in zip(compiled, both(*arguments), strict=True):
        assert torch.equal(a, e)

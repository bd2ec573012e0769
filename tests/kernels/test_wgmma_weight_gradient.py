"""The weight gradient by wgmma: its kernel on the CPU against float64, how it is cut, and its Python functions.

``emulation.py`` runs what a GPU would, every role in a thread of its own; every case runs with what is asynchronous as
early as allowed and as late, and outputs and shared memory start as NaN.
"""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels import wgmma
from fastensdistill.kernels import wgmma_weight_gradient as module
from fastensdistill.kernels.conv_weight_gradient import (
    WeightGradientOperands,
    WeightGradientShape,
    conv_weight_gradient,
    conv_weight_gradient_reference,
)
from fastensdistill.kernels.grouped_conv import conv_input
from fastensdistill.kernels.operands import Window
from fastensdistill.kernels.reference import through_norm
from tests.kernels.emulation import both_ways, hopper, library, on_cpu
from tests.kernels.weight_gradients import (
    BF16,
    CASES,
    EVERYTHING,
    SQUARE,
    Case,
    cut_of,
    op_operands,
    operands,
)
from tests.untyped import untyped

# Sums of float32 in another order than the reference's, over the sum of what is added without its sign
TOLERANCE = 2e-6


def emulated(o: WeightGradientOperands, window: Window, multiprocessors: int = 3, copies: bool = False) -> Tensor:
    """The partial results."""
    count = cut_of(o, window, multiprocessors, copies).partials
    partial = torch.full((count, len(o.d), window.kernel**2, o.x.shape[4], o.d.shape[4]), float("nan"))
    return both_ways("wgmma_weight_gradient", *o, *window, multiprocessors, copies, partial)[0]


def expected(o: WeightGradientOperands, window: Window) -> tuple[Tensor, Tensor]:
    """The gradient in float64, and the sum of what is added without its sign."""
    u = conv_input(o.x.float(), len(o.d), None, o.in_scale, o.in_shift, False, torch.float32)
    u = (u.relu() if o.in_relu else u).to(BF16).double()
    d = through_norm(o.d, o.norm_z, o.norm_a, o.norm_b, o.norm_c).double()
    results = []
    for sign in (lambda x: x, torch.abs):
        shape = (len(d), window.kernel**2, u.shape[4], d.shape[4])
        results.append(torch.empty(shape, dtype=torch.float64))
        wide = WeightGradientOperands(sign(u), sign(d), None, None)
        conv_weight_gradient_reference(wide, window, "ieee", results[-1], False)
    return results[0], results[1]


def check(o: WeightGradientOperands, window: Window, partial: Tensor) -> None:
    gradient, size = expected(o, window)
    error = (partial.double().sum(0) - gradient).abs() / (size + 1)
    assert error.max() <= TOLERANCE, (error.max(), error.isnan().sum(), error.argmax(), error.shape)


@pytest.mark.parametrize("fused", [(), ("in_scale",), ("in_relu",), ("norm",), EVERYTHING], ids="-".join)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case, fused):
    o = operands(case, fused, shared=fused == ("in_relu",))
    check(o, case.window, emulated(o, case.window))


@pytest.mark.parametrize("fused", [(), EVERYTHING], ids="-".join)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_copies_are_right_whatever_is_swizzled(case, fused):
    o = operands(case, fused)
    check(o, case.window, emulated(o, case.window, copies=True))
    with hopper(swizzle_offsets=True):
        check(o, case.window, emulated(o, case.window, copies=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_assumption_is_only_that_of_shifts_within_a_box(case):
    """Where the unit swizzles offsets, 3x3 at stride 1 needs copies, and nothing else does."""
    o = operands(case)
    with hopper(swizzle_offsets=True):
        if case.window == SQUARE:
            with pytest.raises(AssertionError):
                check(o, case.window, emulated(o, case.window))
        else:
            check(o, case.window, emulated(o, case.window))


@pytest.mark.parametrize("case", CASES[:1] + CASES[2:3] + CASES[11:12], ids=str)
def test_splits(case):
    """As many as there are tiles, and as one: partial results, which add up to the same."""
    o = operands(case, EVERYTHING)
    found = {}
    for multiprocessors in (1, 100):
        cut = cut_of(o, case.window, multiprocessors, False)
        partial = emulated(o, case.window, multiprocessors)
        check(o, case.window, partial)
        found[cut.splits] = partial
        assert torch.equal(partial, emulated(o, case.window, multiprocessors))
    assert set(found) == {1, cut.tiles}


def test_nothing_is_made_of_what_is_not_there():
    """Infinite values of one image reach no other split's results, and none of the channels beside theirs."""
    case = Case(SQUARE, 1, 4, 8, 12, 64, 64)
    o = operands(case)
    clean = emulated(o, SQUARE, 100)
    o.d[0, 3, :, :, 5] = float("inf")
    partial = emulated(o, SQUARE, 100)
    touched = ~torch.isfinite(partial)
    assert touched.any()
    assert not touched[..., :5].any()
    assert not touched[..., 6:].any()
    assert torch.equal(partial[..., 6:], clean[..., 6:])


def cpp_cut(numbers: list[int]) -> list[int]:
    found = (ctypes.c_int64 * 6)()
    library().weight_gradient_cut((ctypes.c_int64 * 11)(*numbers), found)
    return list(found)


def test_python_cuts_as_the_kernel_does():
    widths = (16, 32, 48, 64, 128, 160, 256, 640)
    images = [(1, 1, 1), (512, 32, 32), (512, 16, 16), (512, 8, 8), (3, 7, 5), (9, 4, 4), (2, 33, 50), (7, 25, 25)]
    for i, (Ci, Co) in enumerate(itertools.product(widths, widths)):
        for window, (N, H, W), copies in itertools.product(wgmma.WINDOWS, images, (False, True)):
            groups, normed, mp = (1, 3, 8)[i % 3], (i + N) % 2 == 0, (132, 3, 114)[(i + H) % 3]
            cut = untyped(module.weight_gradient_cut)(
                groups, (1, N, H, W, Ci), Co, window, mp, normed=normed, copies=copies
            )
            numbers = [groups, N, H, W, Ci, Co, window.kernel, window.stride, normed, copies, mp]
            *found, stage_bytes, stages = cpp_cut(numbers)
            assert list(cut) == found, numbers
            assert stages >= module.LEAST_STAGES, numbers
            assert stages * stage_bytes <= module.SHARED


@pytest.mark.parametrize(
    ("blocks", "tiles", "best"),
    [(8, 2048, 16), (32, 512, 4), (128, 128, 1), (800, 128, 2), (1, 1, 1), (1, 5, 5), (132, 1000, 1), (133, 1000, 13)],
)
def test_splits_take_the_least_time(blocks, tiles, best):
    def time(splits: int) -> int:
        return -(-blocks * splits // 132) * (-(-tiles // splits) + module.OVERHEAD)

    assert untyped(module.splits)(blocks, tiles, 132) == best
    assert all(time(best) <= time(splits) for splits in range(1, min(tiles, 132) + 1))


@pytest.mark.parametrize("case", [CASES[0], CASES[10], CASES[15]], ids=str)
def test_function_in_the_place_of_the_op(case):
    """The kernel's partial results are added up into memory that is given, or on top of it."""
    o = operands(case)
    options = {"kernel": case.window.kernel, "stride": case.window.stride, "padding": case.window.padding}
    right = conv_weight_gradient(o.x, o.d, **options)
    reference = module.wgmma_weight_gradient(o.x, o.d, **options)
    torch.testing.assert_close(reference, right, rtol=0, atol=0)
    with on_cpu():
        for add in (False, True):
            out = torch.ones_like(right) if add else torch.full_like(right, float("nan"))
            result = module.wgmma_weight_gradient(o.x, o.d, out=out, add=add, **options)
            assert result is out
            torch.testing.assert_close(out, right + float(add), rtol=1e-5, atol=1e-3)
        # memory for as many partial results as there are, and for another number
        for count in (cut_of(o, case.window, 132, False).partials, 7):
            several = module.wgmma_weight_gradient(o.x, o.d, out=right.new_full((count, *right.shape), 9.0), **options)
            torch.testing.assert_close(several.sum(0), right, rtol=1e-5, atol=1e-3)
        # one partial result is the gradient itself, and memory at an odd address will do
        single = operands(case._replace(images=1, height=2, width=2, channels=64 if case.window.kernel == 3 else 256))
        assert cut_of(single, case.window, 132, False).partials == 1
        odd = torch.empty(1 + single.x.shape[4] * single.d.shape[4] * len(single.d) * case.window.kernel**2)[1:]
        out = odd.view(len(single.d), case.window.kernel**2, single.x.shape[4], single.d.shape[4])
        module.wgmma_weight_gradient(single.x, single.d, out=out, **options)
        check(single, case.window, out[None])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_number_of_partial_results_is_known_beforehand(case):
    for fused in ((), EVERYTHING):
        o = operands(case, fused)
        shape = WeightGradientShape(
            tuple(o.x.shape), len(o.d), o.d.shape[4], case.window, BF16, torch.device("cpu"), bool(fused)
        )
        assert module.partial_count(shape) == len(module.weight_gradient_partials(o, case.window))


def test_op():
    """Its schema, fake and reference go together."""
    given = op_operands(CASES[0], EVERYTHING)
    torch.library.opcheck(torch.ops.fastensdistill.wgmma_weight_gradient.default, given)


def test_refusals():
    o = operands(CASES[0])
    with pytest.raises(InputError, match="does not cover kernel 5, stride 1, padding 2"):
        module.wgmma_weight_gradient(o.x, o.d, kernel=5, padding=2)
    with pytest.raises(InputError, match=r"does not cover x in torch\.float32 with d in torch\.bfloat16"):
        module.wgmma_weight_gradient(o.x.float(), o.d, kernel=3, padding=1)
    with pytest.raises(InputError, match=r"does not cover torch\.float32, expected torch\.bfloat16"):
        module.wgmma_weight_gradient(o.x.float(), o.d.float(), kernel=3, padding=1)
    with pytest.raises(InputError, match="does not cover 8 to 16 channels"):
        module.wgmma_weight_gradient(o.x[..., :8].contiguous(), o.d, kernel=3, padding=1)
    with pytest.raises(InputError, match=r"partial is torch\.float32 of shape "):
        module.weight_gradient_partials(o, SQUARE, torch.empty(1, 2, 9, 16, 8))

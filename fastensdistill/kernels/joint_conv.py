"""Two grouped convolutions of one layer as one launch: a teacher's groups in evaluation mode, a student's in training.

Each of the two sides has its own input, weights, prologue and epilogue (``grouped_conv``), and its own results; layer,
images and dtypes are the same. Equations and results are those of two launches of ``grouped_conv``, bit for bit: the
groups of both are the grid's second axis, and each program is the one that its own launch would have run.

What is gained is a launch with its gap, and a tail: the last wave of programs leaves multiprocessors empty once.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.grouped_conv import (
    ConvOperands,
    ConvOutput,
    conv_empty,
    conv_launch,
    conv_operands,
    conv_output,
    conv_program,
    grouped_conv_reference,
)
from fastensdistill.kernels.launch import BATCH_SIZES, KernelLaunch, issue, kept_to_reference, tl, triton
from fastensdistill.kernels.operands import Window
from fastensdistill.kernels.ops import define

Both = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # results of the evaluation side first


def joint_conv_reference(evaluation: ConvOperands, training: ConvOperands, window: Window, precision: str) -> Both:
    first, second = (grouped_conv_reference(o, window, precision) for o in (evaluation, training))
    return *first, *second


@triton.jit(do_not_specialize=BATCH_SIZES)
def joint_conv_kernel(
    p_x_e, p_weight_e, p_weight_index_e, p_in_scale_e, p_in_shift_e, p_bias_e, p_residual_e, p_next_scale_e,
    p_next_shift_e, p_center_e, p_z_e, p_activated_e, p_mask_e, p_statistics_e,
    p_x_t, p_weight_t, p_weight_index_t, p_in_scale_t, p_in_shift_t, p_bias_t, p_residual_t, p_next_scale_t,
    p_next_shift_t, p_center_t, p_z_t, p_activated_t, p_mask_t, p_statistics_t,
    s_in_e, s_bias_e, s_next_e, s_center_e, s_in_t, s_bias_t, s_next_t, s_center_t,
    n_evaluation, N, n_partials,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, CO: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ROW_TAPS: tl.constexpr, PRECISION: tl.constexpr,
    HR_e: tl.constexpr, WR_e: tl.constexpr, CR_e: tl.constexpr, RESIDUAL_STRIDE_e: tl.constexpr,
    SHARED_e: tl.constexpr, IN_RELU_e: tl.constexpr, RELU_e: tl.constexpr,
    HR_t: tl.constexpr, WR_t: tl.constexpr, CR_t: tl.constexpr, RESIDUAL_STRIDE_t: tl.constexpr,
    SHARED_t: tl.constexpr, IN_RELU_t: tl.constexpr, RELU_t: tl.constexpr,
    BARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(1)
    if BARE:  # nothing before or after either product: one program, given its pointers
        is_e = i_g < n_evaluation
        conv_program(
            (i_g - tl.where(is_e, 0, n_evaluation)).to(tl.int64),
            tl.where(is_e, p_x_e, p_x_t), tl.where(is_e, p_weight_e, p_weight_t),
            tl.where(is_e, p_weight_index_e, p_weight_index_t), None, None, None, None, None, None, None,
            tl.where(is_e, p_z_e, p_z_t), None, None, None,
            N, n_partials, 0, 0, 0, 0,
            H, W, C, HO, WO, CO,
            0, 0, 0, 1,
            KERNEL, STRIDE, PADDING,
            SHARED_e and SHARED_t, False, False, ROW_TAPS, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif i_g < n_evaluation:
        conv_program(
            i_g.to(tl.int64),
            p_x_e, p_weight_e, p_weight_index_e, p_in_scale_e, p_in_shift_e, p_bias_e, p_residual_e, p_next_scale_e,
            p_next_shift_e, p_center_e, p_z_e, p_activated_e, p_mask_e, p_statistics_e,
            N, n_partials, s_in_e, s_bias_e, s_next_e, s_center_e,
            H, W, C, HO, WO, CO,
            HR_e, WR_e, CR_e, RESIDUAL_STRIDE_e,
            KERNEL, STRIDE, PADDING,
            SHARED_e, IN_RELU_e, RELU_e, ROW_TAPS, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        conv_program(
            (i_g - n_evaluation).to(tl.int64),
            p_x_t, p_weight_t, p_weight_index_t, p_in_scale_t, p_in_shift_t, p_bias_t, p_residual_t, p_next_scale_t,
            p_next_shift_t, p_center_t, p_z_t, p_activated_t, p_mask_t, p_statistics_t,
            N, n_partials, s_in_t, s_bias_t, s_next_t, s_center_t,
            H, W, C, HO, WO, CO,
            HR_t, WR_t, CR_t, RESIDUAL_STRIDE_t,
            KERNEL, STRIDE, PADDING,
            SHARED_t, IN_RELU_t, RELU_t, ROW_TAPS, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


AROUND = ("p_in_scale", "p_bias", "p_residual", "p_next_scale", "p_center", "p_mask")


def bare(both: tuple[KernelLaunch, KernelLaunch]) -> bool:
    """Whether two convolutions' launches have neither prologue nor epilogue, and their inputs lie alike."""
    shared = [one for one in both if one.arguments["SHARED"]]
    alike = len(shared) != 1 or shared[0].grid[1] == 1  # a single group finds its input either way
    around = (one.arguments["RELU"] or any(one.arguments[name] is not None for name in AROUND) for one in both)
    return alike and not any(around)


def registers(both: tuple[KernelLaunch, KernelLaunch]) -> int | None:
    """The limit of a joint launch, None without one; 0 where there is none that both keep: they are launched apart.

    Limited is a side that leaves sums. With 128 registers both sides hold as many programs as that one alone; with the
    168 of 64 columns they took up to 147, a program fewer at 32 channels. Bias and residual together need up to 150,
    and would spill 6 of them in 128 columns.
    """
    limits = [one.maxnreg for one in both if one.maxnreg is not None]
    if not limits:
        return None
    columns, limit = both[0].arguments["BLOCK_N"], min(limits)
    wide = any(one.arguments["p_bias"] is not None and one.arguments["p_residual"] is not None for one in both)
    return min(128, limit) if not wide or columns < 64 else limit if columns == 64 else 0


def joined(evaluation: KernelLaunch, training: KernelLaunch) -> list[KernelLaunch]:
    """The launch in the place of two of ``grouped_conv``; these themselves where there is none without spills."""
    both = evaluation, training
    limit = registers(both)
    if limit == 0:
        return [*both]
    sides = {"e": evaluation.arguments, "t": training.arguments}
    arguments: dict[str, Any] = {"n_evaluation": evaluation.grid[1], "BARE": bare(both)}
    for name in map(str, joint_conv_kernel.arg_names):
        stem, _, side = name.rpartition("_")
        if name not in arguments:
            arguments[name] = sides[side][stem] if side in sides else training.arguments[name]
    grid = (training.grid[0], evaluation.grid[1] + training.grid[1])
    programs = max(one.programs for one in both)
    return [KernelLaunch(joint_conv_kernel, grid, arguments, training.num_warps, training.num_stages, limit, programs)]


def _launch(evaluation: ConvOperands, training: ConvOperands, window: Window, precision: str) -> Both:
    if kept_to_reference("grouped_conv"):
        return joint_conv_reference(evaluation, training, window, precision)
    (first, results), (second, others) = (conv_launch(o, window, precision) for o in (evaluation, training))
    for one in joined(first, second):
        issue(one)
    return *results, *others


def _empty(evaluation: ConvOperands, training: ConvOperands, window: Window, precision: str) -> Both:
    return *conv_empty(evaluation, window, precision), *conv_empty(training, window, precision)


_joint_conv = define("joint_conv", joint_conv_reference, _empty, _launch)


def joint_conv(evaluation: Mapping[str, Any], training: Mapping[str, Any]) -> tuple[ConvOutput, ConvOutput]:
    """The results of ``grouped_conv(**evaluation)`` and of ``grouped_conv(**training)``, by one launch.

    Raises:
        InputError: as for ``grouped_conv``, and for two convolutions that differ in their window, in their precision,
            in the shape of a group's input or result, or in a dtype.
    """
    (one, window, precision), (other, *rest) = (conv_operands(**side) for side in (evaluation, training))
    if (window, precision) != tuple(rest):
        raise InputError(f"the two convolutions are {window}, {precision} and {rest[0]}, {rest[1]}; expected the same")
    for name, a, b in (("x", one.x, other.x), ("weight", one.weight, other.weight)):
        if (a.shape[1:], a.dtype, a.device) != (b.shape[1:], b.dtype, b.device):
            raise InputError(
                f"{name} is {a.dtype} {tuple(a.shape)} on {a.device} and {b.dtype} {tuple(b.shape)} on {b.device}; "
                "expected both alike but for the first size"
            )
    found = _joint_conv(*one, *other, *window, precision)
    return conv_output(*found[:4]), conv_output(*found[4:])

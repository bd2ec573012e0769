"""Two classifiers of one layer as one launch: a teacher's groups in evaluation mode, a student's in training.

Equations and results are those of two launches of ``head``, bit for bit: the groups of both are the grid's third axis,
and each program is the one that its own launch would have run, given its pointers.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.head import (
    HeadOperands,
    HeadOutput,
    head_empty,
    head_launch,
    head_operands,
    head_program,
    head_reference,
)
from fastensdistill.kernels.launch import BATCH_SIZES, KernelLaunch, issue, kept_to_reference, tl, triton
from fastensdistill.kernels.ops import define

Both = tuple[Tensor, Tensor, Tensor, Tensor]  # logits and pooled features, those of the evaluation side first
SIDE = ("p_z", "p_weight", "p_bias", "p_weight_index", "p_scale", "p_shift", "p_logits", "p_pooled", "s_scale")


def joint_head_reference(evaluation: HeadOperands, training: HeadOperands) -> Both:
    return *head_reference(evaluation), *head_reference(training)


@triton.jit(do_not_specialize=BATCH_SIZES)
def joint_head_kernel(
    p_z_e, p_weight_e, p_bias_e, p_weight_index_e, p_scale_e, p_shift_e, p_logits_e, p_pooled_e,
    p_z_t, p_weight_t, p_bias_t, p_weight_index_t, p_scale_t, p_shift_t, p_logits_t, p_pooled_t,
    s_scale_e, s_scale_t, n_evaluation, N,
    POSITIONS: tl.constexpr, C: tl.constexpr, CLASSES: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    is_e = tl.program_id(2) < n_evaluation
    i_g = tl.program_id(2) - tl.where(is_e, 0, n_evaluation)
    p_bias, p_scale, p_shift = p_bias_e, p_scale_e, p_shift_e
    if p_bias_e is not None:
        p_bias = tl.where(is_e, p_bias_e, p_bias_t)
    if p_scale_e is not None:
        p_scale, p_shift = tl.where(is_e, p_scale_e, p_scale_t), tl.where(is_e, p_shift_e, p_shift_t)
    head_program(
        i_g.to(tl.int64), tl.where(is_e, p_z_e, p_z_t), tl.where(is_e, p_weight_e, p_weight_t), p_bias,
        tl.where(is_e, p_weight_index_e, p_weight_index_t), p_scale, p_shift,
        tl.where(is_e, p_logits_e, p_logits_t), tl.where(is_e, p_pooled_e, p_pooled_t),
        N, tl.where(is_e, s_scale_e, s_scale_t), POSITIONS, C, CLASSES, RELU, PRECISION,
        BLOCK_B, BLOCK_P, BLOCK_C, BLOCK_N,
    )  # fmt: skip


def joined(evaluation: KernelLaunch, training: KernelLaunch) -> KernelLaunch:
    """The launch in the place of two of ``head``."""
    arguments: dict[str, Any] = {name: value for name, value in training.arguments.items() if name not in SIDE}
    for suffix, one in (("e", evaluation), ("t", training)):
        arguments |= {f"{name}_{suffix}": one.arguments[name] for name in SIDE}
    groups = evaluation.grid[2] + training.grid[2]
    return training._replace(
        kernel=joint_head_kernel,
        grid=(*training.grid[:2], groups),
        arguments=arguments | {"n_evaluation": evaluation.grid[2]},
    )


def _launch(evaluation: HeadOperands, training: HeadOperands) -> Both:
    if kept_to_reference("head"):
        return joint_head_reference(evaluation, training)
    (first, results), (second, others) = head_launch(evaluation), head_launch(training)
    issue(joined(first, second))
    return *results, *others


def _empty(evaluation: HeadOperands, training: HeadOperands) -> Both:
    return *head_empty(evaluation), *head_empty(training)


_joint_head = define("joint_head", joint_head_reference, _empty, _launch)


def joint_head(evaluation: Mapping[str, Any], training: Mapping[str, Any]) -> tuple[HeadOutput, HeadOutput]:
    """The results of ``head(**evaluation)`` and of ``head(**training)``, by one launch.

    Raises:
        InputError: as for ``head``, and for two that differ in the shape of a group's input, in their classes, in a
            dtype, in the precision, or in whether they have a bias, a scale and a ReLU.
    """
    one, other = head_operands(**evaluation), head_operands(**training)
    for name, a, b in (("z", one.z, other.z), ("weight", one.weight, other.weight)):
        if (a.shape[1:], a.dtype, a.device) != (b.shape[1:], b.dtype, b.device):
            raise InputError(
                f"{name} is {a.dtype} {tuple(a.shape)} on {a.device} and {b.dtype} {tuple(b.shape)} on {b.device}; "
                "expected both alike but for the first size"
            )
    kinds = [(o.bias is None, o.scale is None, o.relu, o.precision) for o in (one, other)]
    if kinds[0] != kinds[1]:
        raise InputError(
            "one head has a bias, a scale, a ReLU or a precision that the other has not; expected the same"
        )
    found = _joint_head(*one, *other)
    return HeadOutput(*found[:2]), HeadOutput(*found[2:])

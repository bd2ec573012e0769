"""Two grouped convolutions of one layer as one launch of the wgmma kernels: evaluation groups and training groups.

Each of the two sides has its own input, weights, prologue and epilogue (``wgmma_conv``), and its own results; layer,
images and dtypes are the same. Equations are those of ``grouped_conv``, the function that of ``joint_conv``. A block
works for a group of one of the sides, and all groups share the multiprocessors: rows of partial sums are those of a
launch of as many groups.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels import wgmma
from fastensdistill.kernels.grouped_conv import (
    ConvOperands,
    ConvOutput,
    conv_operands,
    conv_output,
    conv_results,
)
from fastensdistill.kernels.operands import Window
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.wgmma_conv import (
    Rows,
    is_narrow,
    most_channels,
    reference_in_rows,
    statistics_rows,
    unsupported_conv,
)

Both = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # results of the evaluation side first


def joint_rows(evaluation: ConvOperands, training: ConvOperands, window: Window, multiprocessors: int) -> Rows:
    """Rows of the sums of either side."""
    both = evaluation, training
    groups, shape = sum(len(o.weight_index) for o in both), (training.x.shape[1], *window.sizes(training.x))
    channels = max(most_channels(o.x, o.second) for o in both)
    return statistics_rows(groups, shape, channels, training.weight.shape[3], 1, False, False, multiprocessors)


def wgmma_joint_conv_reference(
    evaluation: ConvOperands, training: ConvOperands, window: Window, multiprocessors: int, copies: bool
) -> Both:
    rows = joint_rows(evaluation, training, window, multiprocessors)
    return *reference_in_rows(evaluation, window, rows), *reference_in_rows(training, window, rows)


def _empty(
    evaluation: ConvOperands, training: ConvOperands, window: Window, multiprocessors: int, copies: bool
) -> Both:
    rows = joint_rows(evaluation, training, window, multiprocessors).total
    return *conv_results(evaluation, window, rows), *conv_results(training, window, rows)


# The CUDA kernels are the extension's
_wgmma_joint_conv = define("wgmma_joint_conv", wgmma_joint_conv_reference, _empty)


def unsupported_joint(evaluation: ConvOperands, training: ConvOperands, window: Window) -> str:
    """What of two convolutions one launch does not cover, in a few words; "" where it covers both."""
    one, other = evaluation.second, training.second
    if one is not None and other is not None and one.shape[4] != other.shape[4]:
        return f"second sources of {one.shape[4]} and of {other.shape[4]} channels"
    channels = max(most_channels(o.x, o.second) for o in (evaluation, training))
    if (one is None) != (other is None) and is_narrow(channels, training.weight.shape[3]):
        return f"a second source of one side, with {training.weight.shape[3]} channels of the result"
    return unsupported_conv(evaluation, window) or unsupported_conv(training, window)


def wgmma_joint_conv(evaluation: Mapping[str, Any], training: Mapping[str, Any]) -> tuple[ConvOutput, ConvOutput]:
    """The results of ``wgmma_conv(**evaluation)`` and of ``wgmma_conv(**training)``, by one launch.

    Sums come in rows of their own, whose totals are the same. Raises InputError as ``wgmma_conv`` does, and for two
    convolutions that differ in their window, in the shape of a group's input or result, or in a device.
    """
    (one, window, _), (other, second_window, _) = (conv_operands(**side) for side in (evaluation, training))
    if window != second_window:
        raise InputError(f"the two convolutions are {window} and {second_window}; expected the same")
    for name, a, b in (("x", one.x, other.x), ("weight", one.weight, other.weight)):
        if (a.shape[1:], a.device) != (b.shape[1:], b.device):
            raise InputError(
                f"{name} is {tuple(a.shape)} on {a.device} and {tuple(b.shape)} on {b.device}; expected both alike but "
                "for the first size"
            )
    if reason := unsupported_joint(one, other, window):
        raise InputError(f"wgmma_joint_conv does not cover {reason}")
    found = _wgmma_joint_conv(*one, *other, *window, wgmma.multiprocessors(one.x), wgmma.copies())
    return conv_output(*found[:4]), conv_output(*found[4:])

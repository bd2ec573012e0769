"""What the launches of convolutions with channel groups, dilation or a rectangular window run.

``planned_ops`` lists them with the others. Depthwise ones have kernels of their own; the others are PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastensdistill.engine.op_arguments import find, gradient_epilogue
from fastensdistill.engine.packed import unpack_gradient
from fastensdistill.engine.part_run import PartRun
from fastensdistill.kernels.depthwise_conv import depthwise_conv
from fastensdistill.kernels.depthwise_data_gradient import depthwise_data_gradient
from fastensdistill.kernels.depthwise_weight_gradient import depthwise_weight_gradient
from fastensdistill.kernels.general_conv import general_conv, general_data_gradient, general_weight_gradient
from fastensdistill.kernels.operands import accumulator
from fastensdistill.network.launch import INPUT, Launch, grad, grad_sums, sums
from fastensdistill.network.nodes import Activation, GeneralConv


def window(run: PartRun, launch: Launch) -> dict[str, Any]:
    """The positions of the input that an output sees, as the ops take them."""
    node = run.node(launch.node)
    assert isinstance(node, GeneralConv)
    pairs = {"kernel": node.kernel, "stride": node.stride, "padding": node.padding, "dilation": node.dilation}
    groups = {} if node.depthwise else {"channel_groups": node.groups}
    return {**pairs, **groups, "precision": run.precision}


def bias_gradient(run: PartRun, name: str, d: Tensor) -> None:
    """The gradient of a bias: the sum over images and positions."""
    out, over = run.gradient(name), (1, 2, 3)
    if out is None:
        run.buffers[grad(name)] = d.sum(over, dtype=accumulator(d.dtype))
    elif run.add:
        out.add_(d.sum(over, dtype=out.dtype))
    else:
        torch.sum(d, over, dtype=out.dtype, out=out)


def conv(run: PartRun, launch: Launch) -> None:
    """Such a convolution with its bias; of a depthwise one an activation, too, and sums for a BatchNorm behind it."""
    layer, options = run.weights.layers[launch.node], window(run, launch)
    norm = find(launch, "sums")
    if norm:
        options["center"] = run.weights.norms[norm.arg].center
    if step := find(launch, "activation"):
        user = run.node(step.arg)
        options["activation"] = user.kind if isinstance(user, Activation) else "relu"
    x = run.buffers[launch.reads[0]]
    op: Any = depthwise_conv if launch.op == "depthwise conv" else general_conv
    result = op(x, layer.forward, run.weight_index, bias=layer.bias, **options)
    run.write(launch.steps("store"), result.z)
    if norm:
        run.buffers[sums(norm.arg)] = result.statistics


def conv_gradient(run: PartRun, launch: Launch) -> None:
    """The gradient of its input; of a depthwise one, with what any data gradient takes."""
    op: Any = general_data_gradient
    d, layer, options = run.read(launch.reads[0]), run.layer(launch), window(run, launch)
    if launch.op == "depthwise conv gradient":
        op, options = depthwise_data_gradient, {**options, **gradient_epilogue(run, launch)}
        if scale := find(launch, "scale"):
            options["scale"] = run.weights.scale_shift[scale.arg][0]
    result = op(
        d, run.weights.layers[launch.node].gradient, run.weight_index, in_size=layer.in_shape[1:],
        out_dtype=accumulator(d.dtype) if grad(INPUT) in launch.writes else d.dtype, **options,
    )  # fmt: skip
    run.write(launch.steps("store"), result.d)
    if norm := find(launch, "sums"):
        run.buffers[grad_sums(norm.arg)] = result.statistics


def weight_gradient(run: PartRun, launch: Launch) -> None:
    """The gradients of its weight and bias."""
    node, out = run.layer(launch), run.gradient(f"{launch.node}.weight")
    x, d = run.buffers[launch.reads[0]], run.read(launch.reads[1])
    op: Any = depthwise_weight_gradient if launch.op == "depthwise weight gradient" else general_weight_gradient
    gradient = op(x, d, out=out, add=run.add, **window(run, launch))
    if out is None:
        run.buffers[grad(f"{node.name}.weight")] = unpack_gradient(gradient, node)
    if node.bias:
        bias_gradient(run, f"{node.name}.bias", d)

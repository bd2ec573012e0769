"""What each op of a plan runs: a kernel, with the launch's prologue and epilogue as its arguments. ``OPS`` lists all.

Activations are (G, N, H, W, C) in the weights' dtype, masks packed bits, statistics float32. ``kernels.ops``
decides what computes an op, ``engine.dispatch`` what takes a convolution's place. The few launches that no kernel
covers (shortcuts that nothing can read in place, mean pooling over windows) use PyTorch's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastensdistill.engine import planned_convs
from fastensdistill.engine.common import micro_batch_momentum
from fastensdistill.engine.module_pass import module, module_gradient
from fastensdistill.engine.op_arguments import (
    find,
    flat,
    geometry,
    gradient_epilogue,
    kinds_of,
    loaded,
    residual,
    second,
    through_norm,
)
from fastensdistill.engine.packed import unpack_gradient
from fastensdistill.engine.parallel import processes
from fastensdistill.engine.part_run import PartRun
from fastensdistill.engine.planned_activations import activate, activate_gradient, gated, gated_gradient
from fastensdistill.engine.planned_functions import (
    dropout,
    dropout_gradient,
    logits,
    logits_gradient,
)
from fastensdistill.engine.planned_layer_norms import function, function_gradient
from fastensdistill.engine.planned_pools import pad, pad_gradient, pool, pool_gradient
from fastensdistill.kernels.batch_norm import batch_norm_apply, batch_norm_statistics
from fastensdistill.kernels.batch_norm_backward import batch_norm_backward, batch_norm_coefficients
from fastensdistill.kernels.batch_norm_sums import batch_norm_sums
from fastensdistill.kernels.conv_data_gradient import conv_data_gradient
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient
from fastensdistill.kernels.elementwise_gradient import elementwise_gradient
from fastensdistill.kernels.grouped_conv import ConvOutput, grouped_conv
from fastensdistill.kernels.head import HeadOutput, head
from fastensdistill.kernels.head_backward import head_backward
from fastensdistill.kernels.operands import accumulator
from fastensdistill.network.launch import (
    INPUT,
    Launch,
    coefficients,
    grad,
    grad_sums,
    pooled,
    statistics,
    sums,
)
from fastensdistill.network.nodes import Norm


def write_gradient(run: PartRun, launch: Launch, d: Tensor, partial: Tensor | None) -> None:
    """Store the result of a gradient's launch under the plan's names."""
    run.write(launch.steps("store"), d)
    if norm := find(launch, "sums"):
        run.buffers[grad_sums(norm.arg)] = partial


def conv_arguments(run: PartRun, launch: Launch) -> dict[str, Any]:
    """What ``grouped_conv`` is given, by name."""
    node, layer, kinds = run.layer(launch), run.weights.layers[launch.node], kinds_of(launch)
    options = {**residual(run, launch), **loaded(run, launch, by_slot=True), **second(run, launch, backward=False)}
    if following := find(launch, "scale_shift"):
        options["next_scale"], options["next_shift"] = run.weights.scale_shift[following.arg]
    if norm := find(launch, "sums"):
        options["center"] = run.weights.norms[norm.arg].center
    return {
        "x": flat(run.buffers[launch.reads[0]], node),
        "weight": layer.forward,
        "weight_index": run.weight_index,
        "bias": layer.bias,
        "relu": "relu" in kinds[: kinds.index("store")],
        "mask": "bits" in kinds,
        "precision": run.precision,
        **geometry(node),
        **options,
    }


def write_conv(run: PartRun, launch: Launch, result: ConvOutput) -> None:
    """Store the results of a convolution under the plan's names."""
    run.write(launch.steps("store"), *(result[:2] if find(launch, "scale_shift") else result[:1]))
    run.write(launch.steps("bits"), *([result.mask] if launch.steps("bits") else []))
    if norm := find(launch, "sums"):
        run.buffers[sums(norm.arg)] = result.statistics


def conv(run: PartRun, launch: Launch) -> None:
    """A convolution or linear layer, with what is fused before and after it."""
    given = conv_arguments(run, launch)
    x, weight, weight_index = (given.pop(name) for name in ("x", "weight", "weight_index"))
    write_conv(run, launch, run.implementation(launch, grouped_conv)(x, weight, weight_index, **given))


def conv_gradient(run: PartRun, launch: Launch) -> None:
    """The gradient of a convolution's input."""
    node, d, options = run.layer(launch), run.read(launch.reads[0]), gradient_epilogue(run, launch)
    if scale := find(launch, "scale"):
        options["scale"] = run.weights.scale_shift[scale.arg][0]
    in_size, shape = (node.in_shape[1], node.in_shape[2]), geometry(node)
    if any(step.stride > 1 for step in launch.steps("store")):  # of a 1x1 convolution, where it is not 0
        in_size, shape = (d.shape[2], d.shape[3]), {"kernel": 1}
    result = run.implementation(launch, conv_data_gradient)(
        d,
        run.weights.layers[launch.node].gradient,
        run.weight_index,
        in_size=in_size,
        out_dtype=accumulator(d.dtype) if grad(INPUT) in launch.writes else d.dtype,
        precision=run.precision,
        **shape,
        **options,
        **through_norm(run, launch),
        **second(run, launch, backward=True),
    )
    write_gradient(run, launch, result.d, result.statistics)


def flat_gradient(run: PartRun, launch: Launch) -> None:
    """The gradient of a linear layer's input, an image that it reads as a vector."""
    node, d, weight = run.layer(launch), run.read(launch.reads[0]), run.weights.layers[launch.node].gradient
    C, H, W = node.in_shape
    op = run.implementation(launch, conv_data_gradient)
    d = op(d, weight, run.weight_index, in_size=(1, 1), kernel=1, precision=run.precision).d
    run.write(launch.steps("store"), d.view(*d.shape[:2], H, W, C))


def weight_gradient(run: PartRun, launch: Launch) -> None:
    """The gradient of a layer's weight, and of its bias."""
    node, d = run.layer(launch), run.read(launch.reads[1])
    prologue = {**loaded(run, launch, by_slot=False), **through_norm(run, launch)}
    x = flat(run.buffers[launch.reads[0]], node)
    op = run.implementation(launch, conv_weight_gradient)
    out = run.gradient(f"{node.name}.weight")
    gradient = op(x, d, precision=run.precision, out=out, add=run.add, **geometry(node), **prologue)
    if out is None:
        run.buffers[grad(f"{node.name}.weight")] = unpack_gradient(gradient, node)
    if node.bias:
        planned_convs.bias_gradient(run, f"{node.name}.bias", d)


def norm_sums(run: PartRun, launch: Launch) -> None:
    """Partial sums for a BatchNorm in training mode, where no launch before could make them."""
    z, center = run.read(launch.reads[0]), run.weights.norms[launch.node].center
    run.buffers[launch.writes[0]] = batch_norm_sums(z, center)


def norm_statistics(run: PartRun, launch: Launch) -> None:
    """Finish the sums: statistics of the batch; the running ones move."""
    node, norm, n = run.node(launch.node), run.weights.norms[launch.node], run.count(launch.node)
    assert isinstance(node, Norm)
    every = n * (processes() if run.execution.synchronised else 1)
    run.buffers[statistics(launch.node)] = batch_norm_statistics(
        run.buffers[launch.reads[0]], n, norm.weight, norm.bias, norm.running_mean, norm.running_var,
        momentum=micro_batch_momentum(node.momentum, run.execution.micro_batches), eps=node.eps,
        correction=every / (every - 1) if node.unbiased else 1.0,
    )  # fmt: skip


def elementwise(run: PartRun, launch: Launch) -> None:
    """BatchNorm, a sum, a ReLU, as many of them as follow one another."""
    first, kinds = launch.epilogue[0], kinds_of(launch)
    z = run.read(launch.reads[0])
    if first.kind == "batch_norm":
        batch = run.buffers[statistics(first.arg)]
        scale, shift = batch.scale, batch.shift
    elif first.kind in ("scale_shift", "affine"):
        scale, shift = run.scale_shift(first.arg)
        if first.kind == "affine":  # of the image, which is float32
            z = run.buffers[INPUT].expand(run.groups, *z.shape[1:]).contiguous()
    else:
        scale = torch.ones(1, z.shape[-1], dtype=accumulator(z.dtype), device=z.device)
        shift = torch.zeros_like(scale)
    result = batch_norm_apply(z, scale, shift, relu="relu" in kinds, mask="bits" in kinds, **residual(run, launch))
    run.write(launch.steps("store"), result.y.to(run.weights.dtype))
    run.write(launch.steps("bits"), *([result.mask] if "bits" in kinds else []))


def gradient_steps(run: PartRun, launch: Launch) -> None:
    """Mask, scale and residual of a gradient that no convolution made."""
    options = gradient_epilogue(run, launch)
    if scale := find(launch, "scale"):
        options["scale"] = run.scale_shift(scale.arg)[0]
    result = elementwise_gradient(run.read(launch.reads[0]), **options)
    write_gradient(run, launch, result.d, result.statistics)


def norm_sums_gradient(run: PartRun, launch: Launch) -> None:
    """The two sums that the gradient of a BatchNorm needs."""
    d, z = run.read(launch.reads[0]), run.read(run.node(launch.node).inputs[0])
    options: dict[str, Any] = {"z": z, **run.statistics(launch.node)}
    result = elementwise_gradient(d, **options)
    run.buffers[launch.writes[0]] = result.statistics


def norm_gradient(run: PartRun, launch: Launch) -> None:
    """The gradient of the input, scale and shift of a BatchNorm in training mode."""
    name, step = launch.node, find(launch, "add")
    d, z, partial = (run.read(buffer) for buffer in launch.reads[:3])
    result = batch_norm_backward(
        d, z, partial, run.count(name), run.weights.norms[name].weight, **run.statistics(name),
        residual=run.read(step.arg) if step else None,
        d_weight=run.gradient(f"{name}.weight"), d_bias=run.gradient(f"{name}.bias"), add=run.add,
    )  # fmt: skip
    run.write(launch.steps("store"), *([result.d] if launch.epilogue else []))
    if run.gradient(f"{name}.weight") is None:
        run.buffers[grad(f"{name}.weight")], run.buffers[grad(f"{name}.bias")] = result.d_weight, result.d_bias


def norm_coefficients(run: PartRun, launch: Launch) -> None:
    """What a gradient is multiplied by where it goes through a BatchNorm on load; its scale's and shift's gradients."""
    name, partial = launch.node, run.read(launch.reads[0])
    result = batch_norm_coefficients(
        partial, run.count(name), run.weights.norms[name].weight, **run.statistics(name),
        d_weight=run.gradient(f"{name}.weight"), d_bias=run.gradient(f"{name}.bias"), add=run.add,
    )  # fmt: skip
    run.buffers[coefficients(name)] = result
    if run.gradient(f"{name}.weight") is None:
        run.buffers[grad(f"{name}.weight")], run.buffers[grad(f"{name}.bias")] = result.d_weight, result.d_bias


def head_input(run: PartRun, launch: Launch, source: str) -> tuple[Tensor, dict[str, Any]]:
    """What the head reads, and its prologue."""
    node, x = run.layer(launch), run.read(source)
    if node.in_channels != x.shape[-1]:  # no pooling: all values are features
        x = flat(x, node)
    options: dict[str, Any] = {"relu": any(step.kind == "relu" for step in launch.prologue)}
    for step in launch.prologue:
        if step.kind == "batch_norm":
            batch = run.buffers[statistics(step.arg)]
            options["scale"], options["shift"] = batch.scale, batch.shift
        elif step.kind == "scale_shift":
            options["scale"], options["shift"] = run.weights.scale_shift[step.arg]
    return x, options


def head_arguments(run: PartRun, launch: Launch) -> dict[str, Any]:
    """What ``head`` is given, by name."""
    layer = run.weights.layers[launch.node]
    z, options = head_input(run, launch, launch.reads[0])
    given = {"z": z, "weight": layer.forward[:, 0], "bias": layer.bias, "weight_index": run.weight_index}
    return {**given, "precision": run.precision, **options}


def write_head(run: PartRun, launch: Launch, result: HeadOutput) -> None:
    """Store the results of the last layer under the plan's names."""
    run.buffers[launch.node], run.buffers[pooled(launch.node)] = result.logits, result.pooled


def classify(run: PartRun, launch: Launch) -> None:
    """The last layer, with the pooling, ReLU and BatchNorm before it."""
    write_head(run, launch, head(**head_arguments(run, launch)))


def classify_gradient(run: PartRun, launch: Launch) -> None:
    """The gradient of the head: its features', its weight's and its bias's."""
    node, norm = run.layer(launch), find(launch, "sums")
    x, options = head_input(run, launch, launch.reads[1])
    out, weighted = run.gradient(f"{node.name}.weight"), grad(f"{node.name}.weight") in launch.writes
    if weighted:
        options |= {"pooled": run.read(pooled(node.name)), "d_weight": None if out is None else out[:, 0]}
        options |= {"d_bias": run.gradient(f"{node.name}.bias"), "add": run.add}
    if norm:
        options |= run.statistics(norm.arg)
    weight = run.weights.layers[node.name].forward[:, 0]
    result = head_backward(run.read(launch.reads[0]), x, weight, run.weight_index, precision=run.precision, **options)
    write_gradient(run, launch, result.d.view_as(run.read(launch.reads[1])), result.statistics)
    if weighted and out is None:
        assert result.d_weight is not None
        run.buffers[grad(f"{node.name}.weight")] = unpack_gradient(result.d_weight[:, None], node)
        if node.bias:
            run.buffers[grad(f"{node.name}.bias")] = result.d_bias


OPS: dict[str, Callable[[PartRun, Launch], None]] = {
    "conv": conv,
    "conv gradient": conv_gradient,
    "flat gradient": flat_gradient,
    "weight gradient": weight_gradient,
    "norm sums": norm_sums,
    "norm statistics": norm_statistics,
    "norm": elementwise,
    "elementwise": elementwise,
    "elementwise gradient": gradient_steps,
    "norm sums gradient": norm_sums_gradient,
    "norm gradient": norm_gradient,
    "norm coefficients": norm_coefficients,
    "pool": pool,
    "pool gradient": pool_gradient,
    "pad": pad,
    "pad gradient": pad_gradient,
    "depthwise conv": planned_convs.conv,
    "depthwise conv gradient": planned_convs.conv_gradient,
    "depthwise weight gradient": planned_convs.weight_gradient,
    "general conv": planned_convs.conv,
    "general conv gradient": planned_convs.conv_gradient,
    "general weight gradient": planned_convs.weight_gradient,
    "activation": activate,
    "activation gradient": activate_gradient,
    "gate": gated,
    "gate gradient": gated_gradient,
    "dropout": dropout,
    "dropout gradient": dropout_gradient,
    "function": function,
    "function gradient": function_gradient,
    "logits": logits,
    "logits gradient": logits_gradient,
    "head": classify,
    "head gradient": classify_gradient,
    "module": module,
    "module gradient": module_gradient,
}
"""By a launch's op."""

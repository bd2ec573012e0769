"""LayerNorm over channels by its kernel, where a function of a plan is that and nothing else.

``planned_functions`` runs all other functions, and this one too where the kernel does not reach.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.engine import planned_functions
from fastensdistill.engine.part_run import PartRun
from fastensdistill.engine.planned_functions import as_image_gradient, function_node, leave_gradient, stored_inputs
from fastensdistill.kernels.layer_norm import MOST_CHANNELS, layer_norm, layer_norm_gradient
from fastensdistill.network.expression import Call, ListOf, Own, Value
from fastensdistill.network.launch import Launch, grad
from fastensdistill.network.nodes import Function

ARGUMENTS = ("input", "normalized_shape", "weight", "bias", "eps")


class LayerNorm(NamedTuple):
    """What a LayerNorm over channels consists of: names of its tensors, or None twice, and ε."""

    weight: str | None
    bias: str | None
    eps: float


def as_in_memory(expression: Any, layout: str, positions: tuple[int, ...]) -> tuple[Any, str]:
    """What gives the same values in memory before the module turns them around, and its layout."""
    if layout == "flat" and positions == (1, 1) and isinstance(expression, Call) and expression.function == "flatten":
        inner, *dimensions = expression.args
        if dimensions in ([1], [1, -1]) and not expression.kwargs:
            expression, layout = inner, "image"
    if layout == "image" and isinstance(expression, Call) and expression.function == "permute":
        inner, *order = expression.args
        if order == [0, 3, 1, 2]:
            return inner, "last"
    return expression, layout


def layer_norm_of(node: Function) -> LayerNorm | None:
    """The LayerNorm that ``node`` is; None where it does something else, or has more channels than a program holds."""
    channels, positions = node.shape[0], node.shape[1:]
    call, layout = as_in_memory(node.expression, node.layout, positions)
    over = {"last", "tokens", *(["flat"] if positions == (1, 1) else [])}
    if not (isinstance(call, Call) and call.function is F.layer_norm and {*node.layouts, layout} <= over):
        return None
    given = {"weight": None, "bias": None, "eps": 1e-5, **dict(zip(ARGUMENTS, call.args, strict=False))}
    given |= dict(call.kwargs)
    shape, own = given["normalized_shape"], [given["weight"], given["bias"]]
    shape = shape.items if isinstance(shape, ListOf) else (shape,) if isinstance(shape, int) else shape
    if given["input"] != Value(0) or tuple(shape) != (channels,) or channels > MOST_CHANNELS:
        return None
    if own == [None, None]:
        return LayerNorm(None, None, given["eps"])
    if not all(isinstance(one, Own) for one in own):
        return None
    return LayerNorm(own[0].name, own[1].name, given["eps"])


def rows(run: PartRun, norm: LayerNorm) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight and bias (S, C), and the row of each group; no index where all groups share the first row."""
    if norm.weight is None or norm.bias is None:
        return None, None, None
    weight, bias = (run.weights.tensors[name].detach() for name in (norm.weight, norm.bias))
    if len(weight) == 1 or (run.part.training and run.part.sets == 1):
        return weight[:1], bias[:1], None
    return weight, bias, run.weight_index


@torch.no_grad()
def function(run: PartRun, launch: Launch) -> None:
    """The value of a LayerNorm, or of another expression."""
    node = function_node(run, launch)
    norm = layer_norm_of(node)
    if norm is None:
        planned_functions.function(run, launch)
        return
    weight, bias, index = rows(run, norm)
    y = layer_norm(run.read(node.inputs[0]), weight, bias, weight_index=index, eps=norm.eps)
    C, H, W = node.shape  # of an image that it takes as tokens, H·W and 1
    run.write(launch.steps("store"), y.view(*y.shape[:2], H, W, C))


def function_gradient(run: PartRun, launch: Launch) -> None:
    """The gradients of a LayerNorm's input, weight and bias, as far as they are wanted, or of another expression's."""
    node = function_node(run, launch)
    norm = layer_norm_of(node)
    if norm is None:
        planned_functions.function_gradient(run, launch)
        return
    wanted = [name for name in node.trained if grad(name) in launch.writes]
    weight, _, index = rows(run, norm)
    sets = 0 if not wanted else 1 if index is None else run.groups
    d, x = run.read(launch.reads[0]), run.read(node.inputs[0])
    with torch.no_grad():
        found = layer_norm_gradient(d.to(x.dtype).view(x.shape), x, weight, weight_index=index, eps=norm.eps, sets=sets)
    if stored_inputs(launch):
        run.write(launch.steps("store"), as_image_gradient(launch, found.d))
    for name, gradient in ((norm.weight, found.d_weight), (norm.bias, found.d_bias)):
        if name in wanted and gradient is not None:
            leave_gradient(run, name, gradient)

"""What the launches run that PyTorch computes: functions, dropout, logits that no linear layer makes.

A function's expression is evaluated on the images of all groups as one batch; where every group has tensors of its own,
once for each. Its gradient is autograd's, of the same evaluated again: on the calling thread, so that a captured graph
contains it, and with nothing kept from the forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.engine.part_run import PartRun
from fastensdistill.kernels.operands import accumulator
from fastensdistill.network.expression import Call, ListOf, Value, evaluate, logical, physical
from fastensdistill.network.launch import INPUT, Launch, drawn, grad
from fastensdistill.network.nodes import Dropout, Function

CONCATENATIONS = torch.cat, torch.concat, torch.concatenate
# By layout, the arguments that say that channels are put behind one another
CHANNELS = {
    layout: [{"dim": dim} for dim in dims]
    for layout, dims in {"image": (1, -3), "last": (3, -1), "tokens": (2, -1)}.items()
}
Rows = Mapping[str, Tensor]
"""Tensors of the module by name, of one network."""


def function_node(run: PartRun, launch: Launch) -> Function:
    """The node that a launch computes."""
    node = run.node(launch.node)
    assert isinstance(node, Function)
    return node


def tensors_of(run: PartRun, node: Function) -> list[Rows]:
    """The tensors of the module that ``node`` reads: one mapping for all groups where they share them, else one each.

    Numbers are in the dtype of the activations, but for those of what is trained, which the gradient casts itself.
    """
    names = (*node.trained, *node.constants)
    held = {name: run.weights.tensors[name] for name in names}
    if all(len(rows) == 1 for rows in held.values()) or (run.part.training and run.part.sets == 1):
        return [{name: rows[0] for name, rows in held.items()}]
    chosen = {
        name: rows.expand(run.groups, *rows.shape[1:]) if len(rows) == 1 else rows.index_select(0, run.weight_index)
        for name, rows in held.items()
    }
    return [{name: rows[g] for name, rows in chosen.items()} for g in range(run.groups)]


def computed(node: Function, values: Sequence[Tensor], own: Rows, dtype: torch.dtype) -> Tensor:
    """The node's value (images, H, W, C) from those of its inputs and from tensors of one network."""
    own = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in own.items()}
    views = [logical(x, layout) for x, layout in zip(values, node.layouts, strict=True)]
    return physical(evaluate(node.expression, views, own).to(dtype), node.layout)


def pieces(run: PartRun, names: Sequence[str], count: int) -> list[list[Tensor]]:
    """What stands in these buffers as images (images, H, W, C), of all groups or, for a ``count`` of many, of each."""
    values = [run.read(name) for name in names]
    if count == 1:
        return [[x.flatten(0, 1) for x in values]]
    return [[x[g] for x in values] for g in range(count)]


def concatenates(node: Function) -> bool:
    """Whether ``node`` is a concatenation of the channels of its inputs, each once and in order, and nothing else."""
    call = node.expression
    if not (isinstance(call, Call) and call.function in CONCATENATIONS and {*node.layouts} == {node.layout}):
        return False
    given = dict(zip(("tensors", "dim"), call.args, strict=False)) | dict(call.kwargs)
    values = given.pop("tensors", None)
    values = values.items if isinstance(values, ListOf) else values
    return values == tuple(map(Value, range(len(node.inputs)))) and given in CHANNELS.get(node.layout, ())


@torch.no_grad()
def function(run: PartRun, launch: Launch) -> None:
    """The value of an expression."""
    node = function_node(run, launch)
    if concatenates(node):
        run.write(launch.steps("store"), torch.cat([run.read(name) for name in node.inputs], -1))
        return
    tensors = tensors_of(run, node)
    parts = pieces(run, node.inputs, len(tensors))
    found = [computed(node, values, own, run.weights.dtype) for values, own in zip(parts, tensors, strict=True)]
    y = found[0].unflatten(0, (run.groups, -1)) if len(found) == 1 else torch.stack(found)
    run.write(launch.steps("store"), y)


def function_gradient(run: PartRun, launch: Launch) -> None:
    """The gradients of an expression's inputs and of the parameters in it, as far as they are wanted."""
    node, inputs = function_node(run, launch), stored_inputs(launch)
    if concatenates(node):  # nothing is computed again
        d = run.read(launch.reads[0]).split([shape[0] for shape in run.part.network.in_shapes(node)], -1)
        run.write(launch.steps("store"), *[as_image_gradient(launch, d[i].contiguous()) for i in inputs])
        return
    wanted = [name for name in node.trained if grad(name) in launch.writes]
    tensors = tensors_of(run, node)
    parts = pieces(run, (launch.reads[0], *node.inputs), len(tensors))
    found = [
        gradients(node, d, values, own, inputs, wanted, run.weights.dtype)
        for (d, *values), own in zip(parts, tensors, strict=True)
    ]
    results = [torch.stack(same) if len(same) > 1 else same[0] for same in zip(*found, strict=True)]
    shape = (run.groups, run.part.batch)
    images = [x.contiguous().view(*shape, *x.shape[-3:]) for x in results[: len(inputs)]]
    run.write(launch.steps("store"), *[as_image_gradient(launch, x) for x in images])
    for name, gradient in zip(wanted, results[len(inputs) :], strict=True):
        leave_gradient(run, name, gradient if len(found) > 1 else gradient[None])


def stored_inputs(launch: Launch) -> list[int]:
    """Which of its node's inputs a launch stores the gradients of, in order."""
    given = [int(step.arg) for step in launch.steps("input")]
    return given or [0] * len(launch.steps("store"))


def as_image_gradient(launch: Launch, d: Tensor) -> Tensor:
    """The image's gradient is float32."""
    return d.to(accumulator(d.dtype)) if grad(INPUT) in launch.writes else d


def leave_gradient(run: PartRun, name: str, gradient: Tensor) -> None:
    """Write a parameter's gradient (Q, *shape) to where it belongs."""
    gradient = gradient.to(accumulator(gradient.dtype))
    out = run.gradient(name)
    if out is None:
        run.buffers[grad(name)] = gradient
    elif run.add:
        out.add_(gradient.view_as(out))
    else:
        out.copy_(gradient.view_as(out))


def gradients(
    node: Function, d: Tensor, values: Sequence[Tensor], own: Rows, inputs: Sequence[int], wanted: Sequence[str],
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Of the inputs of these numbers, and of the parameters that are wanted; ``d`` is that of the value."""
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        leaves = [x.detach().requires_grad_(i in inputs) for i, x in enumerate(values)]
        parameters = {name: own[name].detach().requires_grad_() for name in wanted}
        y = computed(node, leaves, {**own, **parameters}, dtype)
        asked = [*(leaves[i] for i in inputs), *parameters.values()]
        if not y.requires_grad:  # it depends on none of them
            return [torch.zeros_like(x) for x in asked]
        found = torch.autograd.grad(y, asked, d.to(y.dtype), allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, asked, strict=True)]


def dropout(run: PartRun, launch: Launch) -> None:
    """Draw what is dropped, as PyTorch draws for the same batch by its default generator, and multiply."""
    node, x = run.node(launch.node), run.read(launch.reads[0])
    assert isinstance(node, Dropout)
    noise = run.buffers[drawn(node.name)] = factors(node, x)
    run.write(launch.steps("store"), x * noise)


def factors(node: Dropout, x: Tensor) -> Tensor:
    """What the values of ``x`` (G, N, H, W, C) are multiplied by; 1 in the place of what is drawn together."""
    G, N, H, W, C = x.shape
    if node.over == "image":
        kept = x.new_empty(G, N, 1, 1, 1).bernoulli_(1 - node.p)
        return kept.div_(1 - node.p) if node.scaled and node.p < 1 else kept
    if node.over == "value" and node.layout == "flat":  # PyTorch draws in the order of memory, here (C, H, W)
        kept = F.dropout(x.new_ones(G, N, C, H, W), node.p, training=True).permute(0, 1, 3, 4, 2).contiguous()
    else:
        shape = (G, N, H, W, C) if node.over == "value" else (G, N, 1, 1, C)
        kept = F.dropout(x.new_ones(shape), node.p, training=True)
    return kept if node.scaled else kept.ne(0).to(x.dtype)


def dropout_gradient(run: PartRun, launch: Launch) -> None:
    """The same for the gradient."""
    d, noise = run.read(launch.reads[0]), run.read(launch.reads[1])
    run.write(launch.steps("store"), as_image_gradient(launch, d * noise))


def logits(run: PartRun, launch: Launch) -> None:
    """Logits (G, N, classes), float32, of a value (G, N, 1, 1, classes)."""
    z = run.read(launch.reads[0])
    run.buffers[launch.node] = z.to(accumulator(z.dtype)).flatten(2)


def logits_gradient(run: PartRun, launch: Launch) -> None:
    """Back."""
    d = run.read(launch.reads[0])
    run.write(launch.steps("store"), d.to(run.weights.dtype)[:, :, None, None])

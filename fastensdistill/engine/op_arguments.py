"""What a launch's steps are as arguments of the op that it runs: the buffers and rows that its names stand for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastensdistill.engine.part_run import PartRun
from fastensdistill.network.launch import Launch, Step, coefficients, statistics
from fastensdistill.network.nodes import Conv, Layer


def find(launch: Launch, kind: str) -> Step | None:
    """The first step of a launch's epilogue of this kind, if there is one."""
    for step in launch.epilogue:
        if step.kind == kind:
            return step
    return None


def kinds_of(launch: Launch) -> list[str]:
    """The kinds of the epilogue's steps, in order."""
    return [step.kind for step in launch.epilogue]


def flat(x: Tensor, node: Layer) -> Tensor:
    """A linear layer's input as one position with all values."""
    return x if isinstance(node, Conv) else x.flatten(2)[:, :, None, None, :].contiguous()


def geometry(node: Layer) -> dict[str, int]:
    """Kernel, stride and padding, as the ops take them; a linear layer is a 1x1 convolution."""
    if isinstance(node, Conv):
        return {"kernel": node.kernel, "stride": node.stride, "padding": node.padding}
    return {"kernel": 1}


def residual(run: PartRun, launch: Launch) -> dict[str, Any]:
    """What an epilogue adds, as the ops take it."""
    step = find(launch, "add")
    return {"residual": run.read(step.arg), "residual_stride": step.stride} if step else {}


def gradient_epilogue(run: PartRun, launch: Launch) -> dict[str, Any]:
    """Residual, mask and sums of a gradient; not its scale, of which one op takes a row per slot, another per group."""
    kinds, options = kinds_of(launch), residual(run, launch)
    if options:
        later = kinds[kinds.index("add") :]
        options["residual_first"] = not {"mask", "open", "scale"}.isdisjoint(later)
    if mask := find(launch, "mask"):
        options["mask"] = run.read(mask.arg)
    if norm := find(launch, "open"):
        batch = run.buffers[statistics(norm.arg)]
        options["mask_scale"], options["mask_shift"] = batch.scale, batch.shift
    if norm := find(launch, "sums"):
        options |= {"z": run.read(run.node(norm.arg).inputs[0]), **run.statistics(norm.arg)}
    return options


def loaded(run: PartRun, launch: Launch, by_slot: bool) -> dict[str, Any]:
    """The prologue of a convolution's input; its rows are by slot or by group, which are the same in training mode."""
    options: dict[str, Any] = {}
    for step in launch.prologue:
        if step.kind == "affine":
            rows = run.weights.scale_shift[step.arg] if by_slot else run.scale_shift(step.arg)
            options["in_scale"], options["in_shift"] = rows
        elif step.kind == "batch_norm":
            batch = run.buffers[statistics(step.arg)]
            options["in_scale"], options["in_shift"] = batch.scale, batch.shift
        elif step.kind == "relu":
            options["in_relu"] = True
    return options


def through_norm(run: PartRun, launch: Launch) -> dict[str, Any]:
    """The prologue of a gradient: the BatchNorm that it goes through as it is loaded."""
    for step in launch.prologue:
        if step.kind == "norm_gradient":
            rows = run.buffers[coefficients(step.arg)]
            z = run.read(run.node(step.arg).inputs[0])
            return {"norm_z": z, "norm_a": rows.a, "norm_b": rows.b, "norm_c": rows.c}
    return {}


def second(run: PartRun, launch: Launch, backward: bool) -> dict[str, Any]:
    """The second source of a convolution or of its data gradient."""
    step = find(launch, "second")
    if step is None:
        return {}
    layer = run.weights.layers[step.arg]
    options = {"second": run.read(launch.reads[1]), "second_stride": step.stride}
    if backward:
        return options | {"second_weight": layer.gradient}
    return options | {"second_weight": layer.forward, "second_bias": layer.bias}

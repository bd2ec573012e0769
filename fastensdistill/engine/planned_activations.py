"""What the launches of activations and gates run; ``planned_ops`` lists them with the others."""

from __future__ import annotations

from typing import Any

from fastensdistill.engine.op_arguments import find
from fastensdistill.engine.part_run import PartRun
from fastensdistill.engine.planned_functions import as_image_gradient, stored_inputs
from fastensdistill.kernels.activation import activation
from fastensdistill.kernels.activation_gradient import activation_gradient
from fastensdistill.kernels.gate import gate, gate_gradient
from fastensdistill.network.launch import Launch, grad_sums, statistics
from fastensdistill.network.nodes import Activation


def activation_arguments(run: PartRun, launch: Launch) -> dict[str, Any]:
    """Its kind, BatchNorm and residual, as the ops take them."""
    node = run.node(launch.node)
    assert isinstance(node, Activation)
    options: dict[str, Any] = {"kind": node.kind}
    if norm := find(launch, "batch_norm"):
        batch = run.buffers[statistics(norm.arg)]
        options["scale"], options["shift"] = batch.scale, batch.shift
    elif norm := find(launch, "scale_shift"):
        options["scale"], options["shift"] = run.scale_shift(norm.arg)
    if step := find(launch, "add"):
        options["residual"] = run.read(step.arg)
    return options


def activate(run: PartRun, launch: Launch) -> None:
    """An activation, with the BatchNorm before it and a residual behind it."""
    options = activation_arguments(run, launch)
    run.write(launch.steps("store"), activation(run.read(launch.reads[0]), **options))


def activate_gradient(run: PartRun, launch: Launch) -> None:
    """The gradient of an activation's input, or of the result of the BatchNorm that it takes in, with its sums."""
    options = activation_arguments(run, launch)
    if norm := find(launch, "sums"):
        options |= run.statistics(norm.arg)
    result = activation_gradient(run.read(launch.reads[0]), run.read(launch.reads[1]), **options)
    run.write(launch.steps("store"), as_image_gradient(launch, result.d))
    if norm:
        run.buffers[grad_sums(norm.arg)] = result.statistics


def gated(run: PartRun, launch: Launch) -> None:
    """An image times a value per channel."""
    x, g = (run.read(name) for name in run.node(launch.node).inputs)
    run.write(launch.steps("store"), gate(x, g))


def gated_gradient(run: PartRun, launch: Launch) -> None:
    """The gradients of both, or of one."""
    x, g = (run.read(name) for name in run.node(launch.node).inputs)
    found = gate_gradient(run.read(launch.reads[0]), x, g)
    results = [as_image_gradient(launch, found[i]) for i in stored_inputs(launch)]
    run.write(launch.steps("store"), *results)

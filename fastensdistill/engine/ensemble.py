"""E plain networks at once, in evaluation mode: those of one architecture are groups of the same launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastensdistill.engine.common import ImageShape, state_of
from fastensdistill.engine.module_check import planned_or_module
from fastensdistill.engine.module_pass import ModuleWeights
from fastensdistill.engine.packed import PackedWeights
from fastensdistill.engine.part_run import Execution
from fastensdistill.engine.passes import Pass
from fastensdistill.errors import InputError
from fastensdistill.method.calls import device_of, dtype_of
from fastensdistill.network.launch import Group
from fastensdistill.network.nodes import Affine, Network, Norm
from fastensdistill.network.plan import plan
from fastensdistill.network.unplanned import Unplanned, modules_of

State = Mapping[str, Tensor]


def architectures(networks: Sequence[nn.Module], shape: ImageShape) -> list[Network]:
    """The traced architecture of each network, as it is in evaluation mode; of one that has no plan, its module's.

    Raises InputError, naming the network, where none can be planned, for one that can neither be planned nor captured
    as a module, and for one that has another device or number of classes than the first.
    """
    if not networks:
        raise InputError("no networks given: expected at least one")
    found: dict[int, Network] = {}
    for i, network in enumerate(networks):
        if id(network) not in found:
            found[id(network)] = planned_or_module(network, shape, f"network {i}", gradient=False, apart=True)
    traced = [found[id(network)] for network in networks]
    modules = modules_of(traced)
    if len(modules) == len(traced):
        raise InputError(f"network 0: {modules[0]}")
    first = next(i for i in range(len(traced)) if i not in modules)
    for i, own in enumerate(traced):
        classes, expected = (net.by_name[net.output].shape[0] for net in (own, traced[first]))
        if classes != expected:
            raise InputError(f"network {i} gives {classes} classes; expected {expected}, as network {first} does")
        (device, dtype), like = ((device_of(m), dtype_of(m)) for m in (networks[i], networks[first]))
        if device != like[0] or (dtype != like[1] and i not in modules):
            raise InputError(
                f"network {i} is {dtype} on {device}; expected {like[1]} on {like[0]}, as network {first} is"
            )
    return traced


def tensors_read(network: Network, state: State) -> list[str]:
    """The names of the tensors in ``state``, a state dict, that an evaluation of ``network`` reads."""
    if isinstance(network, Unplanned):
        return [name for name, value in state.items() if isinstance(value, Tensor)]
    names = [name for node in network.nodes for name in node.parameters]
    kinds = {Norm: ("running_mean", "running_var"), Affine: ("mean", "std")}
    return names + [f"{node.name}.{kind}" for node in network.nodes for kind in kinds.get(type(node), ())]


class Ensemble:
    """Logits of E networks; the i-th network of an architecture has slot i of its packed weights.

    Args:
        networks: the traced architecture of each, which is taken as in evaluation mode.
        dtype, device: of the packed weights, which are zero until they are written.
        branches: packed weights of one architecture, to be used for it; their first slots are the networks'.

    Call :meth:`plan` before the first batch, and again for batches of another size; weights stay as they are.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        dtype: torch.dtype,
        device: torch.device,
        execution: Execution,
        branches: PackedWeights | None = None,
    ):
        self.networks, self.execution = [network.evaluated for network in networks], execution
        self.passes: list[Pass] = []
        self.groups = [Group(str(i), i) for i in range(len(networks))]
        self.weights: dict[Network, PackedWeights] = {}
        self.members: dict[Network, list[int]] = {}
        for part in plan(networks, self.groups, "forward", 1).parts:
            self.members[part.network] = [int(group.name) for group in part.groups]
            shared = branches if branches and branches.part.network == part.network else None
            kind = ModuleWeights if isinstance(part.network, Unplanned) else PackedWeights
            self.weights[part.network] = shared or kind(part, len(part.groups), dtype, device)
        # Networks of one architecture run together; put them back into the order they were given in
        order = [i for members in self.members.values() for i in members]
        self.order = torch.tensor(order, device=device).argsort() if order != sorted(order) else None

    def slot(self, number: int) -> int:
        """Where network ``number`` is in the packed weights of its architecture."""
        return self.members[self.networks[number]].index(number)

    def write(self, number: int, source: nn.Module | State) -> None:
        """Pack the weights of network ``number``, of its module or state dict; one without a plan needs the module."""
        weights, slot = self.weights[self.networks[number]], self.slot(number)
        if isinstance(weights, ModuleWeights):
            weights.fill(slot, source)
        else:
            weights.write(slot, state_of(source) if isinstance(source, nn.Module) else source)

    def plan(self, batch: int) -> None:
        """Take ``batch`` images at a time from now on."""
        parts = plan(self.networks, self.groups, "forward", batch, self.execution.fusions).parts
        self.passes = [Pass(part, None, self.weights[part.network], self.execution) for part in parts]

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (E, B, classes) of images (B, H, W, C) in [0, 1]."""
        return self.in_order([run.forward(x[None]) for run in self.passes])

    def in_order(self, outputs: Sequence[Tensor]) -> Tensor:
        """Logits of all networks in order, of what the passes have given."""
        logits = torch.cat([*outputs]) if len(outputs) > 1 else outputs[0]
        return logits if self.order is None else logits.index_select(0, self.order)

"""Weights of networks that change every step: one launch for all layers gives what layer by layer gives."""

from __future__ import annotations

import copy
from math import prod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.slots import BranchSlots, PlainSlots
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.engine.weights import pack
from fastensdistill.kernels.branch_rows import branch_rows_kernel
from fastensdistill.kernels.launch import record_launches
from fastensdistill.kernels.pack import pack_kernel
from fastensdistill.kernels.sgd import sgd_kernel
from fastensdistill.kernels.unfold import unfold_factors_kernel, unfold_kernel
from fastensdistill.network.nodes import Linear
from fastensdistill.network.plan import plan, teach_groups
from fastensdistill.network.trace import trace
from tests.compare import check_close
from tests.engine.cases import batch, setting, teach_setting
from tests.kernels import layouts
from tests.network.models import Odd, moved

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def odd(seed: int):
    """Biases, BatchNorms that nothing carries, and a linear layer over 3x3 positions."""
    torch.manual_seed(seed)
    return moved(Odd(), seed)


def branch_slots(training: bool, dtype: torch.dtype, first: int) -> BranchSlots:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    student, _, config = setting(K=3, dtype=wide, teacher=odd, student=odd)
    step = FusedStep(student, copy.deepcopy(_), config, image_shape=(3, 12, 12))
    step.load(batch(0, size=12, dtype=wide))
    writer = step.trained.slots if training else step.perturber.slots.branches
    return BranchSlots(writer.weights.part, step.parameters, dtype, first)


def plain_slots(dtype: torch.dtype) -> PlainSlots:
    networks = [odd(m).to(torch.float64 if dtype == torch.float64 else torch.float32) for m in range(3)]
    network = trace(networks[0], (3, 12, 12))
    groups, way = teach_groups(3)["forward"]
    (part,) = plan([network], groups, way, 2).parts
    return PlainSlots(part, FlatParameters(networks, network, ranked=False), dtype)


def write_layers(slots: BranchSlots | PlainSlots) -> None:
    """Both packings of every layer, one layer after the other, from views alone."""
    parameters = slots.parameters
    if isinstance(slots, BranchSlots):
        first, folded = slots.first, layouts.folded(parameters.layout, parameters.values, slots.deviations)
        offsets = {layer.name: layer.weight for layer in parameters.layout.layers}
    else:
        first = 0
    for name, layer in slots.weights.layers.items():
        node, shape = parameters.network.by_name[name], parameters.shapes[f"{name}.weight"]
        if isinstance(slots, BranchSlots):
            W = folded[:, offsets[name] : offsets[name] + prod(shape)].unflatten(1, shape)
        else:
            W = parameters.view(parameters.values, f"{name}.weight")
        own = slice(first, first + len(W))
        W = W.unflatten(2, node.in_shape) if isinstance(node, Linear) else W
        packed = W.permute(0, 3, 4, 2, 1)  # taps or positions, channels in, channels out
        if isinstance(node, Linear):
            layer.forward[own, 0].unflatten(1, packed.shape[1:4]).copy_(packed)
            layer.gradient[own, 0].unflatten(2, packed.shape[1:4]).copy_(packed.permute(0, 4, 1, 2, 3))
        else:
            layer.forward[own].unflatten(1, packed.shape[1:3]).copy_(packed)
            layer.gradient[own].unflatten(1, packed.shape[1:3]).copy_(packed.flip(1, 2).transpose(3, 4))


WRITERS = {
    "training branches": lambda dtype: branch_slots(True, dtype, 0),
    "evaluated branches": lambda dtype: branch_slots(False, dtype, 0),
    "branches from slot 2 on": lambda dtype: branch_slots(False, dtype, 2),
    "copies": plain_slots,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("writer", WRITERS)
def test_at_once_is_layer_by_layer(writer, dtype):
    """Bit by bit, where neither the kernels nor a compiled extension run."""
    slots = WRITERS[writer](dtype)
    results = []
    slots.write()  # in evaluation mode the branches' factors too
    for write in (slots.write, lambda: write_layers(slots)):
        for layer in slots.weights.layers.values():
            layer.forward.fill_(torch.nan)
            layer.gradient.fill_(torch.nan)
        with torch.no_grad():
            write()
        results.append({name: (w.forward.clone(), w.gradient.clone()) for name, w in slots.weights.layers.items()})
    assert slots.weights.layers["hidden"].forward.shape[1:] == (1, 90, 12)
    for name, (forward, gradient) in results[0].items():
        for a, b in zip((forward, gradient), results[1][name], strict=True):
            first = getattr(slots, "first", 0)
            assert a[:first].isnan().all()
            assert not a[first:].isnan().any()
            check_close(name, a[first:], b[first:], 2**-7 if dtype == torch.bfloat16 else 0.0)


def test_copies_are_packed_as_frozen_networks_are():
    slots = plain_slots(torch.float64)
    slots.write()
    parameters = slots.parameters
    states = [
        {**{name: parameters.view(parameters.values, name)[i] for name in parameters.shapes}, **parameters.buffers[i]}
        for i in range(3)
    ]
    expected = pack(slots.weights.part, states, torch.float64)
    for name, layer in expected.layers.items():
        mine = slots.weights.layers[name]
        for key in ("forward", "gradient", "bias"):
            if getattr(layer, key) is not None:
                assert torch.equal(getattr(mine, key), getattr(layer, key)), (name, key)


class Kernels(TorchDispatchMode):
    """Names of what would be launched beside the recorded kernels: everything but views and empty memory."""

    FREE = ("view", "detach", "slice", "select", "unbind", "empty", "expand", "split", "as_strided", "new_empty")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in self.FREE:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def launched(body) -> tuple[list[object], list[str]]:
    body()  # tables are built by the first call
    with torch.no_grad(), record_launches() as launches, Kernels() as kernels:
        body()
    return [launch.kernel for launch in launches], kernels.seen


def after_backward(step: FusedStep | FusedTeachStep) -> None:
    step.trained.finish()
    step.trained.update(step.rate, 0.9, 5e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_parameters_take_a_handful_of_launches(precision):
    student, teachers, config = setting(dtype=torch.float32)
    config.precision = precision
    step = FusedStep(student, teachers, config)
    step.load(batch(0, dtype=torch.float32))
    for writer in (step.trained.slots, step.perturber.slots.branches):
        assert launched(writer.write) == ([branch_rows_kernel, pack_kernel], [])
    unfold = [unfold_kernel, unfold_factors_kernel]
    assert launched(lambda: after_backward(step)) == ([*unfold, sgd_kernel, sgd_kernel], [])
    networks, config = teach_setting(dtype=torch.float32)
    config.precision = precision
    teach = FusedTeachStep(networks, config, image_shape=(3, 6, 6))
    teach([batch(m, dtype=torch.float32) for m in range(3)])
    assert launched(teach.trained.slots.write) == ([pack_kernel], [])
    assert launched(lambda: after_backward(teach)) == ([unfold_kernel, sgd_kernel], [])

"""Weights of networks that change every step: one launch for all layers gives what layer by layer gives."""

from __future__ import annotations

from math import prod

import pytest
import torch

from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.packed import TrainedWeights, pack
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.kernels.branch_rows import branch_rows_kernel
from fastensdistill.kernels.pack import pack_kernel
from fastensdistill.kernels.sgd import sgd_kernel
from fastensdistill.kernels.unfold import unfold_factors_kernel, unfold_kernel
from fastensdistill.network.nodes import Linear
from fastensdistill.network.plan import plan, teach_groups
from fastensdistill.network.trace import trace
from tests.compare import check_close
from tests.engine.cases import batch, packed, packed_for_evaluation, setting, teach_setting, update
from tests.engine.launched import launched
from tests.kernels import layouts
from tests.network.models import Odd, moved
from tests.untyped import present

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def odd(seed: int):
    """Biases, BatchNorms that nothing carries, and a linear layer over 3x3 positions."""
    torch.manual_seed(seed)
    return moved(Odd(), seed)


def branches(training: bool, dtype: torch.dtype, first: int) -> TrainedWeights:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    student, teachers, config = setting(K=3, dtype=wide, teacher=odd, student=odd)
    step = FusedStep(student, teachers, config, image_shape=(3, 12, 12))
    step.load(batch(0, size=12, dtype=wide))
    weights = packed(step) if training else packed_for_evaluation(step)
    return TrainedWeights(present(weights).part, step.parameters, dtype, first)


def copies(dtype: torch.dtype) -> TrainedWeights:
    networks = [odd(m).to(torch.float64 if dtype == torch.float64 else torch.float32) for m in range(3)]
    network = trace(networks[0], (3, 12, 12))
    groups, way = teach_groups(3)["forward"]
    (part,) = plan([network], groups, way, 2).parts
    return TrainedWeights(part, FlatParameters(networks, network, ranked=False), dtype)


def write_layers(weights: TrainedWeights) -> None:
    """Both packings of every layer, one layer after the other, from views alone."""
    parameters, first = weights.parameters, weights.first
    if parameters.ranked:
        folded = layouts.folded(parameters.layout, parameters.values, present(weights.packed_deviations))
        offsets = {layer.name: layer.weight for layer in parameters.layout.layers}
    for name, layer in weights.layers.items():
        node, shape = parameters.network.by_name[name], parameters.shapes[f"{name}.weight"]
        if parameters.ranked:
            W = folded[:, offsets[name] : offsets[name] + prod(shape)].unflatten(1, shape)
        else:
            W = parameters.view(parameters.values, f"{name}.weight")
        written = slice(first, first + len(W))
        W = W.unflatten(2, node.in_shape) if isinstance(node, Linear) else W
        order = W.permute(0, 3, 4, 2, 1)  # taps or positions, channels in, channels out
        if isinstance(node, Linear):
            layer.forward[written, 0].unflatten(1, order.shape[1:4]).copy_(order)
            layer.gradient[written, 0].unflatten(2, order.shape[1:4]).copy_(order.permute(0, 4, 1, 2, 3))
        else:
            layer.forward[written].unflatten(1, order.shape[1:3]).copy_(order)
            layer.gradient[written].unflatten(1, order.shape[1:3]).copy_(order.flip(1, 2).transpose(3, 4))


WRITERS = {
    "training branches": lambda dtype: branches(True, dtype, 0),
    "evaluated branches": lambda dtype: branches(False, dtype, 0),
    "branches from slot 2 on": lambda dtype: branches(False, dtype, 2),
    "copies": copies,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("writer", WRITERS)
def test_at_once_is_layer_by_layer(writer, dtype):
    """Bit by bit, where neither the kernels nor a compiled extension run."""
    weights = WRITERS[writer](dtype)
    results = []
    weights.refresh()  # in evaluation mode the branches' factors too
    for write in (weights.refresh, lambda: write_layers(weights)):
        for layer in weights.layers.values():
            layer.forward.fill_(torch.nan)
            layer.gradient.fill_(torch.nan)
        with torch.no_grad():
            write()
        results.append({name: (w.forward.clone(), w.gradient.clone()) for name, w in weights.layers.items()})
    assert weights.layers["hidden"].forward.shape[1:] == (1, 90, 12)
    for name, (forward, gradient) in results[0].items():
        for a, b in zip((forward, gradient), results[1][name], strict=True):
            assert a[: weights.first].isnan().all()
            assert not a[weights.first :].isnan().any()
            check_close(name, a[weights.first :], b[weights.first :], 2**-7 if dtype == torch.bfloat16 else 0.0)


def test_copies_are_packed_as_frozen_networks_are():
    weights = copies(torch.float64)
    weights.refresh()
    parameters = weights.parameters
    states = [
        {**{name: parameters.view(parameters.values, name)[i] for name in parameters.shapes}, **parameters.buffers[i]}
        for i in range(3)
    ]
    expected = pack(weights.part, states, torch.float64, "cpu")
    for name, layer in expected.layers.items():
        mine = weights.layers[name]
        for key in ("forward", "gradient", "bias"):
            if getattr(layer, key) is not None:
                assert torch.equal(getattr(mine, key), getattr(layer, key)), (name, key)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_parameters_take_a_handful_of_launches(precision):
    student, teachers, config = setting(dtype=torch.float32)
    config.precision = precision
    step = FusedStep(student, teachers, config)
    step.load(batch(0, dtype=torch.float32))
    for weights in (packed(step), packed_for_evaluation(step)):
        assert launched(present(weights).refresh) == ([branch_rows_kernel, pack_kernel], [])
    unfold = [unfold_kernel, unfold_factors_kernel]
    assert launched(lambda: update(step)) == ([*unfold, sgd_kernel, sgd_kernel], [])
    networks, config = teach_setting(dtype=torch.float32)
    config.precision = precision
    teach = FusedTeachStep(networks, config, image_shape=(3, 6, 6))
    teach([batch(m, dtype=torch.float32) for m in range(3)])
    assert launched(packed(teach).refresh) == ([pack_kernel], [])
    assert launched(lambda: update(teach)) == ([unfold_kernel, sgd_kernel], [])

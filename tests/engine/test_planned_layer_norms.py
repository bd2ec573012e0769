"""A LayerNorm among a plan's functions is found, and its kernel's op gives what PyTorch's own gives."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastensdistill.engine import planned_functions, planned_layer_norms
from fastensdistill.engine.planned_layer_norms import LayerNorm, layer_norm_of
from fastensdistill.kernels.layer_norm import MOST_CHANNELS
from fastensdistill.network.expression import Call, ListOf, Own, Value
from fastensdistill.network.launch import Launch, Step, grad
from fastensdistill.network.nodes import Function
from tests.compare import check_close
from tests.kernels.both import values
from tests.network.nodes_by_hand import CASES
from tests.untyped import untyped

C = 6
OWN = Own("n.weight"), Own("n.bias")
CALL = Call(F.layer_norm, (Value(0), (C,), *OWN, 1e-6))
NODE = Function("n", ("x",), (C, 3, 5), CALL, ("last",), "last", ("n.weight", "n.bias"), (), ((C,), (C,)))
TOKENS = replace(NODE, shape=(C, 15, 1), layouts=("tokens",), layout="tokens")
FOUND = LayerNorm("n.weight", "n.bias", 1e-6)


def test_a_layer_norm_over_channels_is_found_however_it_is_written():
    plain = Call(F.layer_norm, (Value(0), ListOf((C,))), (("eps", 1e-6),))
    flat = replace(NODE, shape=(C, 1, 1), layouts=("flat",), layout="flat")
    assert layer_norm_of(NODE) == layer_norm_of(TOKENS) == layer_norm_of(flat) == FOUND
    assert layer_norm_of(replace(NODE, expression=plain)) == LayerNorm(None, None, 1e-6)
    image = Call("permute", (CALL, 0, 3, 1, 2))
    assert layer_norm_of(replace(NODE, expression=image, layout="image")) == FOUND
    for more in ((1,), (1, -1)):
        vector = replace(NODE, shape=(C, 1, 1), expression=Call("flatten", (image, *more)), layout="flat")
        assert layer_norm_of(vector) == FOUND
        assert layer_norm_of(replace(vector, shape=(C, 3, 5))) is None
    named = Call(F.layer_norm, (Value(0),), (("normalized_shape", (C,)), ("weight", OWN[0]), ("bias", OWN[1])))
    assert layer_norm_of(replace(NODE, expression=named)) == FOUND._replace(eps=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"expression": Call(F.layer_norm, (Value(0), (5, C), *OWN))},
        {"expression": Call(F.layer_norm, (Value(0), (C,), OWN[0], None))},
        {"expression": Call(F.layer_norm, (Call(torch.neg, (Value(0),)), (C,), *OWN))},
        {"expression": Call(F.rms_norm, (Value(0), (C,), OWN[0]))},
        {"layouts": ("image",)},
        {"layout": "image", "expression": Call("permute", (CALL, 0, 3, 2, 1))},
        {"layouts": ("flat",), "layout": "flat"},
        {"shape": (MOST_CHANNELS + 1, 1, 1), "expression": Call(F.layer_norm, (Value(0), (MOST_CHANNELS + 1,), *OWN))},
    ],
    ids=[
        "more-dimensions",
        "no-bias",
        "of-an-expression",
        "another-norm",
        "over-columns",
        "columns-first",
        "over-all",
        "too-many",
    ],
)
def test_what_is_no_layer_norm_over_channels_stays_pytorchs(other):
    assert layer_norm_of(replace(NODE, **other)) is None


def test_those_of_the_networks_written_by_hand_are_found():
    """So the passes of these networks, which are compared with autograd, go through the kernel's op."""
    nodes = [node for by_hand, size in CASES.values() for node in by_hand.network(size).nodes]
    norms = [n for n in nodes if isinstance(n, Function) and getattr(n.expression, "function", None) is F.layer_norm]
    assert len(norms) >= 5
    assert None not in map(layer_norm_of, norms)


class Run(SimpleNamespace):
    """As much of a part's run as functions use."""

    def node(self, name: str) -> Function:
        return self.of

    def read(self, name: str) -> torch.Tensor:
        return self.buffers[name]

    def write(self, steps: tuple[Step, ...], *results: torch.Tensor) -> None:
        self.buffers.update({step.arg: result for step, result in zip(steps, results, strict=True)})

    def gradient(self, name: str) -> torch.Tensor | None:
        return self.gradients.get(grad(name))


def run(slots: int, sets: int, training: bool, gradients: dict[str, torch.Tensor], of: Function = NODE) -> Any:
    shape = (2, 2, 3, 5, C)
    tensors = {own.name: values(slots, C, seed=seed).double() for seed, own in enumerate(OWN)}
    weights = SimpleNamespace(tensors=tensors, dtype=torch.float64)
    d = values(*shape, seed=3).double().view(2, 2, *of.shape[1:], C)
    buffers = {"x": values(*shape, seed=2).double(), grad("n"): d}
    part = SimpleNamespace(training=training, sets=sets, batch=2)
    index = torch.tensor([slots - 1, 0], dtype=torch.int32)
    given = {"buffers": buffers, "gradients": gradients, "add": True}
    return Run(of=of, weights=weights, weight_index=index, part=part, groups=2, **given)


@pytest.mark.parametrize(
    ("slots", "sets", "training"),
    [(1, 1, True), (3, 2, False), (2, 2, True), (2, 1, True)],
    ids=["student", "teachers", "networks-in-training", "student-with-slots"],
)
@pytest.mark.parametrize("wanted", ["all", "input", "parameters"])
@pytest.mark.parametrize("of", [NODE, TOKENS], ids=["same-shape", "image-as-tokens"])
def test_its_op_gives_what_pytorchs_function_gives(slots, sets, training, wanted, of):
    stores = (Step("store", grad("x")),) if wanted != "parameters" else ()
    writes = tuple(grad(own.name) for own in OWN) if wanted != "input" else ()
    forward = Launch("function", "n", ("x",), ("n",), epilogue=(Step("store", "n"),))
    backward = Launch("function gradient", "n", (grad("n"), "x"), writes, epilogue=stores)
    found = []
    for module in (planned_layer_norms, planned_functions):
        given = {grad("n.bias"): torch.ones(sets, C, dtype=torch.float64)} if writes else {}
        one = run(slots, sets, training, given, of)
        untyped(module).function(one, forward)
        untyped(module).function_gradient(one, backward)
        found.append(one.buffers | given)
    assert found[0].keys() == found[1].keys()
    for name, expected in found[1].items():
        check_close(name, found[0][name], expected, 1e-12)

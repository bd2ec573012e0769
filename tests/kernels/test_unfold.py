"""Un-fold of gradients in the kernels' order, against autograd through the folded layers."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import record_launches
from fastensdistill.kernels.layout import (
    GradientLayout,
    Layout,
    Order,
    Partials,
    layer_bias,
    layer_weight,
    weight_partials,
)
from fastensdistill.kernels.unfold import unfold_factors_kernel, unfold_gradients, unfold_kernel
from tests.compare import check_close
from tests.kernels import layouts
from tests.kernels.both import DEVICE, run_kernel
from tests.untyped import present, untyped

POSITIONS = {"fc": 6}  # of the linear layer of the one case that these lack
CASES = [*(case for case in layouts.CASES if case != "two-tables"), "positions", *layouts.GROUPED]


def problem(case: str, dtype: torch.dtype) -> tuple[Layout, dict[str, Tensor]]:
    if case != "positions":
        return layouts.problem(case, dtype)
    weights = [("conv", (7, 3, 3, 3), True), ("fc", (35, 7 * 6), True), ("last", (4, 35), False)]
    layout = Layout.build(weights, 5, 2, POSITIONS)
    g = torch.Generator().manual_seed(1)
    sizes = {
        "parameters": (layout.size,),
        "deviations": (2, layout.factors),
        "branch_gradients": (2, layout.ranked),
    }
    drawn = {name: torch.randn(*size, generator=g, dtype=torch.float64) for name, size in sizes.items()}
    return layout, {name: value.to(dtype) for name, value in drawn.items()}


# How the layers of a case leave their gradients, in turn from one that the case's name decides on
WAYS = [
    Partials(9),
    Partials(3, Order(64, 64, True)),
    Partials(2, Order(32, 16, True)),
    Partials(4, Order(16, 32)),
    Partials(),
    Partials(1, Order(8, 4)),
]


def memory_of(layout: Layout, K: int, first: int) -> GradientLayout:
    """The layers in these ways, one after the other from ``first`` on; those over positions in the op's own order."""
    every = {layer.name: WAYS[(first + i) % len(WAYS)] for i, layer in enumerate(layout.layers)}
    every |= {layer.name: Partials(5) for layer in layout.layers if layer.positions > 1}
    return layout.gradients(K, every)


class Left(NamedTuple):
    """What the kernels leave, NaN between them, where it lies, and the sums over splits one after the other."""

    flat: Tensor
    memory: GradientLayout
    added: Tensor  # [K, ranked]


def in_kernel_order(layout: Layout, gradients: Tensor, first: int) -> Left:
    """[K, ranked] in the parameters' order → flat, element by element as the documentation says."""
    K = len(gradients)
    memory = memory_of(layout, K, first)
    flat, added = gradients.new_full((memory.size,), float("nan")), torch.zeros_like(gradients)
    generator = torch.Generator().manual_seed(2)
    for layer, place in zip(layout.layers, memory.places, strict=True):
        P, Co = layer.positions, layer.out_channels
        shape = Co, layer.in_channels // P, layer.taps * P
        own = slice(layer.weight, layer.weight + layer.weight_size)
        W, size = gradients[:, own].view(K, *shape), prod(place.order.shape(shape[2], shape[1], Co))
        to = [place.order.element(*shape[::-1], tap, i, o) for o, i, tap in product(*map(range, shape))]
        # of all splits but the last drawn values, and there the rest
        parts = [0.03 * torch.randn(W.shape, generator=generator).to(W.dtype) for _ in range(place.splits - 1)]
        parts.append(W - sum(parts, torch.zeros_like(W)))
        for n, part in enumerate(parts):
            added[:, own] += part.flatten(1)
            for k in range(K):
                flat[torch.tensor(to) + (place.weight + (n * K + k) * size)] = part[k].flatten()
        if layer.bias >= 0:
            own = slice(layer.bias, layer.bias + Co)
            flat[place.bias : place.bias + K * Co] = gradients[:, own].flatten()
            added[:, own] = gradients[:, own]
    return Left(flat.to(DEVICE), memory, added)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # the interpreter's
@pytest.mark.parametrize("case", CASES)
def test_branches(case):
    """Kernels and reference are the adjoint of folding; what is not a layer's stays; twice the same bits."""
    layout, t = problem(case, torch.float32)
    p, d = (t[name].double().requires_grad_() for name in ("parameters", "deviations"))
    layouts.folded(layout, p, d).backward(t["branch_gradients"].double())
    expected = present(p.grad)[: layout.ranked], d.grad

    def run(call, dtype):
        gradients, memory, _ = in_kernel_order(layout, t["branch_gradients"].to(dtype), CASES.index(case))
        given = [t[name].to(DEVICE, dtype) for name in ("parameters", "deviations")]
        gradient = torch.full_like(given[0], float("nan"))
        factors = call(unfold_gradients, gradients, memory, *given, layout, gradient)
        assert gradient[layout.ranked :].isnan().all()
        return gradient[: layout.ranked], factors

    actual = run(run_kernel, torch.float32)
    for one, other in zip(actual, run(run_kernel, torch.float32), strict=True):
        assert torch.equal(one, other)
    reference = run(lambda op, *args: op(*args), torch.float64)
    for i, name in enumerate(("gradient", "factor_gradients")):
        check_close(f"{name}, reference", reference[i], present(expected[i]), 1e-12)
        check_close(f"{name}, kernels", actual[i], present(expected[i]), 5e-6)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # the interpreter's
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("call", [run_kernel, lambda op, *args: op(*args)], ids=["kernel", "reference"])
def test_plain_networks(case, call):
    """The gradients of copies without factors are summed one after the other, to the bit, and put in order,
    [copies, *shape] per weight; nothing else moves."""
    layout, t = problem(case, torch.float32)
    gradients, memory, g = in_kernel_order(layout, t["branch_gradients"], CASES.index(case))
    K = len(g)
    expected = torch.full((K * layout.size,), 7.0)
    for layer in layout.layers:
        W = g[:, layer.weight : layer.weight + layer.weight_size]
        expected[K * layer.weight : K * (layer.weight + layer.weight_size)] = W.flatten()
    gradient = torch.full_like(expected, 7.0, device=DEVICE)
    none = call(unfold_gradients, gradients, memory, torch.empty_like(gradient), None, layout, gradient)
    assert none.numel() == 0
    assert torch.equal(gradient.cpu(), expected)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # the interpreter's
@pytest.mark.parametrize("case", ["linear", "tiles", "positions", "both", "small-groups"])
@pytest.mark.parametrize("call", [run_kernel, lambda op, *args: op(*args)], ids=["kernel", "reference"])
def test_branches_of_several_networks(case, call):
    """To the bit those of each network alone."""
    layout, t = problem(case, torch.float32)
    copies, K = 3, len(t["deviations"])
    generator = torch.Generator().manual_seed(3)
    parameters = torch.randn(copies, layout.size, generator=generator)
    deviations = 0.3 * torch.randn(copies * K, layout.factors, generator=generator)
    drawn = 0.1 * torch.randn(copies * K, layout.ranked, generator=generator)
    flat, first = torch.zeros(copies * layout.size), CASES.index(case)
    views = [(layer_weight, layer) for layer in layout.layers]
    views += [(layer_bias, layer) for layer in layout.layers if layer.bias >= 0]
    for view, layer in views:
        for i in range(copies):
            view(flat, layer, copies)[i] = view(parameters[i], layer)[0]
    gradients, memory, _ = in_kernel_order(layout, drawn, first)
    gradient = torch.full_like(flat, torch.nan, device=DEVICE)
    factors = call(unfold_gradients, gradients, memory, flat.to(DEVICE), deviations.to(DEVICE), layout, gradient)
    for i in range(copies):
        own = slice(i * K, (i + 1) * K)
        gradients, memory, _ = in_kernel_order(layout, drawn[own], first)
        # the same partial results as among those of all
        every, everything, _ = in_kernel_order(layout, drawn, first)
        for layer, place, of_all in zip(layout.layers, memory.places, everything.places, strict=True):
            part = weight_partials(every, layer, of_all, copies * K)[:, own]
            weight_partials(gradients, layer, place, K).copy_(part)
        one = torch.full((layout.size,), torch.nan, device=DEVICE)
        given = parameters[i].to(DEVICE), deviations[own].to(DEVICE)
        assert torch.equal(call(unfold_gradients, gradients, memory, *given, layout, one), factors[own])
        for view, layer in views:
            assert torch.equal(view(gradient, layer, copies)[i], view(one, layer)[0]), layer.name


def test_launches():
    layout, t = problem("many-layers", torch.float32)
    flat, memory = t["parameters"], layout.gradients(2)
    gradients = torch.zeros(memory.size)
    with record_launches() as launches:
        unfold_gradients(gradients, memory, flat, t["deviations"], layout, flat.clone())
        unfold_gradients(gradients, memory, flat.repeat(2), None, layout, flat.repeat(2))
    assert [launch.kernel for launch in launches] == [unfold_kernel, unfold_factors_kernel, unfold_kernel]
    assert [launch.grid for launch in launches] == [(12, 1), (24, 2), (12, 2)]


def test_room_for_gradients():
    layout, _ = problem("positions", torch.float32)
    order = Order(2, 4, True)
    memory = layout.gradients(2, {"conv": Partials(3, order), "last": Partials(2)})
    conv, fc, last = memory.places
    assert (conv.splits, conv.order, fc.splits, fc.order, last.order) == (3, order, 1, Order(7, 35), Order(35, 4))
    sizes = 3 * 2 * (2 * 2 * 9 * 8), 2 * 7, 2 * 35 * 42, 2 * 35, 2 * 2 * 4 * 35
    starts = [conv.weight, conv.bias, fc.weight, fc.bias, last.weight]
    for start, size, after in zip(starts, sizes, [*starts[1:], memory.size], strict=True):
        assert start % 32 == 0, "kernels store runs of 128 bytes"
        assert 0 <= after - start - size < 32
    assert weight_partials(torch.empty(memory.size), layout.layers[0], conv, 2).shape == (3, 2, 2, 2, 9, 4, 2)
    with pytest.raises(InputError, match="'fc' is over 6 positions; expected no Order"):
        layout.gradients(2, {"fc": Partials(1, order)})
    with pytest.raises(InputError, match="'last' leaves 0 x 280 values"):
        layout.gradients(2, {"last": Partials(0)})


L, V = problem("one-branch", torch.float32)
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "gradients": ({"gradients": torch.zeros(3)}, r"gradients has shape \(3,\); expected \(640,\)"),
    "networks": ({"memory": L.gradients(2)}, "memory is for 2 layers of 2 networks; expected 2 of 1"),
    "gradient": ({"gradient": torch.zeros(603)}, r"gradient has shape \(603,\); expected \(612,\)"),
    "strided": ({"gradient": torch.zeros(L.size, 2)[:, 0]}, "gradient is not contiguous"),
    "dtype": ({"gradients": torch.zeros(640).double()}, "gradients has dtype torch.float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    changed, message = REFUSED[case]
    given: dict[str, object] = {
        "gradients": torch.zeros(640),
        "memory": L.gradients(1),
        "parameters": V["parameters"],
        "deviations": V["deviations"],
        "layout": L,
        "gradient": torch.zeros(L.size),
    }
    with pytest.raises(InputError, match=message):
        unfold_gradients(**untyped(given | changed))

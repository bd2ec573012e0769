"""Fold, un-fold, optimiser step and packing against plain layers, autograd and torch.optim.SGD."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.rank_one import (
    Layout,
    fold_rank_one,
    pack_rank_one,
    rank_one_step,
    unfold_rank_one,
)
from tests.compare import check_close

# id: (K, plain, [(name, weight shape, groups, bias)]) — why
CASES = {
    "linear": (2, 0, [("fc", (10, 7), 1, True)]),
    "stem": (3, 5, [("stem", (16, 3, 3, 3), 1, False)]),  # three input channels
    "grouped": (2, 4, [("conv", (12, 5, 3, 3), 3, True), ("depthwise", (6, 1, 5, 5), 6, False)]),
    "tiles": (2, 3, [("conv", (70, 41, 3, 3), 1, False), ("down", (65, 33, 1, 1), 1, True)]),  # tiles cut short
    "wide-kernel": (2, 0, [("patch", (5, 3, 8, 8), 1, True)]),  # few channels fit in a tile
    "one-branch": (1, 9, [("a", (8, 8, 3, 3), 1, False), ("fc", (3, 8), 1, True)]),
    "many-layers": (2, 7, [(f"conv{i}", (4 + i % 3, 3, 1, 1 + i % 2), 1, i % 4 == 0) for i in range(45)]),  # two tables
}
DTYPES = {torch.float64: 1e-9, torch.float32: 5e-6}


def problem(case: str, dtype: torch.dtype, slots: int | None = None) -> tuple[Layout, dict[str, Tensor]]:
    K, plain, weights = CASES[case]
    layout = Layout.build(weights, plain, slots or K)
    g = torch.Generator().manual_seed(K + plain + layout.size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return layout, {
        "parameters": normal(layout.size),
        "momentum_buffer": normal(layout.size),
        "deviations": 0.3 * normal(K, layout.factors),
        "deviation_buffer": normal(K, layout.factors),
        "branch_gradients": 0.1 * normal(K, layout.ranked),
        "plain_gradients": normal(plain),
    }


def folded_by_layer(layout: Layout, parameters: Tensor, deviations: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """(W_k [K, Co, Ci/groups, taps], b_k [K, Co]) of every layer, from the formula with explicit channels."""
    result = []
    for layer in layout.layers:
        W = parameters[layer.weight : layer.weight + layer.weight_size]
        W = W.view(layer.out_channels, layer.group_channels, layer.taps)
        r = 1 + deviations[:, layer.r : layer.r + layer.in_channels]
        s = 1 + deviations[:, layer.s : layer.s + layer.out_channels]
        per_group = layer.out_channels // layer.groups
        channel = torch.tensor(
            [[o // per_group * layer.group_channels + i for i in range(layer.group_channels)] for o in range(len(W))]
        )
        b = None if layer.bias < 0 else s * parameters[layer.bias : layer.bias + layer.out_channels]
        result.append((s[:, :, None, None] * W * r[:, channel][..., None], b))
    return result


def flat(layout: Layout, folded: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    parts = [part.flatten(1) for pair in folded for part in pair if part is not None]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_fold_equals_the_formula(case, dtype, uninitialised_is_nan):
    layout, t = problem(case, dtype)
    expected = flat(layout, folded_by_layer(layout, t["parameters"].double(), t["deviations"].double()))
    check_close("folded", fold_rank_one(t["parameters"], t["deviations"], layout), expected, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_unfold_is_the_adjoint(case, dtype, uninitialised_is_nan):
    layout, t = problem(case, dtype)
    p, d = t["parameters"].double().requires_grad_(), t["deviations"].double().requires_grad_()
    flat(layout, folded_by_layer(layout, p, d)).backward(t["branch_gradients"].double())
    gradient, factors = unfold_rank_one(t["branch_gradients"], t["parameters"], t["deviations"], layout)
    check_close("gradient", gradient, p.grad[: layout.ranked], DTYPES[dtype])
    check_close("factor_gradients", factors, d.grad, DTYPES[dtype])


def test_branch_layer_is_the_plain_layer_between_factors():
    """s ∘ (W * (r ∘ x) + b) is the folded layer, for a grouped convolution."""
    layout, t = problem("grouped", torch.float64)
    layer, K = layout.layers[0], 2
    x = torch.randn(3, layer.in_channels, 6, 6, dtype=torch.float64)
    W = t["parameters"][: layer.weight_size].view(12, 5, 3, 3)
    b = t["parameters"][layer.bias : layer.bias + 12]
    folded = fold_rank_one(t["parameters"], t["deviations"], layout)
    for k in range(K):
        r, s = (1 + t["deviations"][k, at : at + n] for at, n in ((layer.r, 15), (layer.s, 12)))
        expected = s.view(-1, 1, 1) * F.conv2d(r.view(-1, 1, 1) * x, W, b, groups=3)
        W_k = folded[k, : layer.weight_size].view(12, 5, 3, 3)
        actual = F.conv2d(x, W_k, folded[k, layer.bias : layer.bias + 12], groups=3)
        check_close(f"branch {k}", actual, expected, 1e-12)


def unpacked(layout: Layout, packed: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
    """A layer's slots of both packings, as [slots, Co, Ci/groups, taps]."""
    layer = layout.layers[layer_index]
    both = []
    for buffer, is_gradient in zip(packed, (False, True), strict=True):
        slots = buffer[layer.packed : layer.packed + layout.slots * layer.weight_size]
        if is_gradient:
            shape = (-1, layer.taps, layer.out_channels // layer.groups, layer.groups, layer.group_channels)
            w = slots.view(shape).flip(1).permute(0, 3, 2, 4, 1).flatten(1, 2)
        else:
            w = slots.view(-1, layer.taps, layer.group_channels, layer.out_channels).permute(0, 3, 2, 1)
        both.append(w)
    return both[0], both[1]


def check_packed(layout: Layout, t: dict[str, Tensor], packed: Tensor, first_slot: int) -> None:
    """Slots of both packings hold W_k rounded to bf16; the slots of others hold the sevens they were filled with."""
    K = t["deviations"].shape[0]
    for index, (W_k, _) in enumerate(folded_by_layer(layout, t["parameters"].double(), t["deviations"].double())):
        for name, slots in zip(("packed", "packed_gradient"), unpacked(layout, packed, index), strict=True):
            mine = slots[first_slot : first_slot + K].double()
            worst = ((mine - W_k).abs() - W_k.abs() / 256).max().item()  # half a unit of bf16's eight bits
            assert worst < 1e-6, f"{name} of layer {index}: {worst} beyond the rounding"
            others = torch.cat([slots[:first_slot], slots[first_slot + K :]])
            assert (others == 7).all(), f"{name} of layer {index} wrote another slot"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_packing(case, dtype):
    K = CASES[case][0]
    layout, t = problem(case, dtype, slots=K + 3)
    packed = torch.full((2, layout.packed_size), 7.0, dtype=torch.bfloat16)
    pack_rank_one(t["parameters"], t["deviations"], layout, packed[0], packed[1], first_slot=2)
    check_packed(layout, t, packed, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_step_is_torch_sgd(case, dtype):
    """Two steps against torch.optim.SGD on parameters and deviations, gradients by autograd, then the packing."""
    layout, t = problem(case, dtype)
    K = t["deviations"].shape[0]
    lr, momentum, decay = 0.1, 0.9, 5e-3
    p, d = (t[name].double().clone().requires_grad_() for name in ("parameters", "deviations"))
    groups = [{"params": [p]}, {"params": [d], "lr": K * lr, "weight_decay": decay / K}]
    sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True, weight_decay=decay)
    for name in ("momentum_buffer", "deviation_buffer"):
        t[name].zero_()
    packed = torch.full((2, layout.packed_size), 7.0, dtype=torch.bfloat16)
    for _ in range(2):
        sgd.zero_grad()
        flat(layout, folded_by_layer(layout, p, d)).backward(t["branch_gradients"].double())
        p.grad[layout.ranked :] = t["plain_gradients"]
        sgd.step()
        rate = torch.tensor(lr, dtype=dtype)
        options = {"momentum": momentum, "weight_decay": decay}
        rank_one_step(*t.values(), rate, layout, packed[0], packed[1], **options)
    check_close("parameters", t["parameters"], p, DTYPES[dtype])
    check_close("deviations", t["deviations"], d, DTYPES[dtype])
    check_close("momentum_buffer", t["momentum_buffer"], sgd.state[p]["momentum_buffer"], DTYPES[dtype])
    check_close("deviation_buffer", t["deviation_buffer"], sgd.state[d]["momentum_buffer"], DTYPES[dtype])
    check_packed(layout, t, packed, 0)


def test_gradcheck_and_second_derivative():
    layout, t = problem("grouped", torch.float64)
    p, d = t["parameters"].requires_grad_(), t["deviations"].requires_grad_()
    assert torch.autograd.gradcheck(lambda p, d: fold_rank_one(p, d, layout), (p, d))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(fold_rank_one(p, d, layout).sum(), p, create_graph=True)
    total = fold_rank_one(p, d, layout).sum()
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_full_graph_compile():
    layout, t = problem("one-branch", torch.float64)
    p, d = t["parameters"].requires_grad_(), t["deviations"].requires_grad_()
    expected = torch.autograd.grad(fold_rank_one(p, d, layout).exp().sum(), (p, d))
    compiled = torch.compile(lambda p, d: fold_rank_one(p, d, layout).exp().sum(), fullgraph=True, backend="aot_eager")
    for name, a, e in zip("pd", torch.autograd.grad(compiled(p, d), (p, d)), expected, strict=True):
        check_close(name, a, e, 1e-12)


def test_operands_that_are_not_contiguous():
    layout, t = problem("tiles", torch.float64)
    p = torch.stack([t["parameters"]] * 2, 1)[:, 0]
    d = t["deviations"].t().contiguous().t()
    g = t["branch_gradients"].t().contiguous().t()
    expected = unfold_rank_one(t["branch_gradients"], t["parameters"], t["deviations"], layout)
    for name, a, e in zip("gf", unfold_rank_one(g, p, d, layout), expected, strict=True):
        check_close(name, a, e, 1e-12)
    check_close("fold", fold_rank_one(p, d, layout), fold_rank_one(t["parameters"], t["deviations"], layout), 1e-12)


def test_layout_offsets():
    layout = Layout.build([("a", (4, 3, 3, 3), 1, False), ("b", (2, 4), 1, True)], plain=5, slots=2)
    a, b = layout.layers
    assert (a.weight, a.bias, a.r, a.s) == (0, -1, 0, 3)
    assert (b.weight, b.bias, b.r, b.s) == (108, 116, 7, 11)
    assert (layout.ranked, layout.size, layout.factors) == (118, 123, 13)
    assert (a.packed, b.packed, layout.packed_size) == (0, 256, 320)  # 2·108 and 2·8 values, up to multiples of 64


L, V = problem("one-branch", torch.float32)
PACKED = torch.zeros(2, L.packed_size, dtype=torch.bfloat16)


def step_with(**changed):
    values = {**V, "learning_rate": torch.tensor(0.1), **changed}
    rank_one_step(*values.values(), L, PACKED[0], PACKED[1])


REFUSED = {
    "bf16-parameters": (lambda: fold_rank_one(V["parameters"].bfloat16(), V["deviations"], L), "dtype torch.bfloat16"),
    "short-parameters": (lambda: fold_rank_one(V["parameters"][1:], V["deviations"], L), r"expected \(612,\)"),
    "flat-deviations": (lambda: fold_rank_one(V["parameters"], V["deviations"][0], L), r"expected \[K, 27\]"),
    "double-deviations": (lambda: fold_rank_one(V["parameters"], V["deviations"].double(), L), "torch.float64"),
    "other-device": (lambda: fold_rank_one(V["parameters"], V["deviations"].to("meta"), L), "deviations is on meta"),
    "gradients": (
        lambda: unfold_rank_one(V["deviations"], V["parameters"], V["deviations"], L),
        "branch_gradients has",
    ),
    "plain": (lambda: step_with(plain_gradients=torch.zeros(3)), r"plain_gradients has shape \(3,\); expected \(9,\)"),
    "rate": (lambda: step_with(learning_rate=torch.zeros(1)), r"learning_rate has shape \(1,\)"),
    "strided": (
        lambda: step_with(parameters=torch.zeros(L.size, 2)[:, 0]),
        "parameters is not contiguous",
    ),
    "packed-dtype": (
        lambda: pack_rank_one(V["parameters"], V["deviations"], L, PACKED[0].float(), PACKED[1]),
        "packed has dtype torch.float32",
    ),
    "slot": (
        lambda: pack_rank_one(V["parameters"], V["deviations"], L, PACKED[0], PACKED[1], 1),
        "first_slot is 1 with 1 branches; the layout has 1 slots",
    ),
    "no-layers": (lambda: Layout.build([], 5), "no layers"),
    "layer": (lambda: Layout.build([("bad", (4, 3, 3), 1, False)]), "layer 'bad' has weight shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        call()

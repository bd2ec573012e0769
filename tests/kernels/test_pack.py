"""Packing of all layers at once: reference against explicit indices, the kernel against the reference, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels import layout as layouts
from fastensdistill.kernels.launch import record_launches
from fastensdistill.kernels.layout import Layout
from fastensdistill.kernels.pack import pack_kernel, pack_weights
from tests.compare import check_close
from tests.kernels.both import DEVICE, run_kernel, values
from tests.untyped import untyped

# id: ([(name, weight shape, bias)], {name: positions}, {name: channel groups}) — why
NETWORKS = {
    "stem": ([("stem", (16, 3, 3, 3), False)], {}),  # three input channels
    "odd": ([("a", (17, 3, 3, 3), True), ("b", (5, 17, 1, 1), False), ("fc", (7, 5), True)], {}),
    "tiles": ([("conv", (70, 41, 3, 3), False), ("down", (33, 65, 1, 1), True)], {}),  # tiles cut short
    "round": ([("conv", (64, 32, 3, 3), False)], {}),
    "even-kernel": ([("patch", (5, 3, 4, 4), True)], {}),
    "flat": ([("conv", (6, 3, 3, 3), False), ("hidden", (10, 6 * 9), True), ("fc", (3, 10), True)],
             {"hidden": 9}),  # a linear layer over 3x3 positions
    "depthwise": ([("a", (34, 1, 3, 3), True), ("b", (5, 1, 5, 7), False)], {}, {"a": 34, "b": 5}),  # above 32 taps
    "groups": ([("stem", (6, 3, 3, 3), False), ("a", (34, 3, 3, 2), True), ("b", (66, 17, 1, 1), False),
                ("double", (8, 1, 3, 3), False)], {}, {"a": 2, "b": 3, "double": 4}),
    "many": ([(f"conv{i}", (4 + i % 3, 3, 1, 1 + i % 2), i % 4 == 0) for i in range(12)], {}),
}  # fmt: skip
# id: (networks, spare slots before, spare slots after)
PLACES = {"one": (1, 0, 0), "first-slot-2": (3, 2, 1)}
# Triton's interpreter, of a loop whose bounds are loaded
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(case: str, K: int, ranked: bool, slots: int, dtype=torch.float32) -> tuple[Layout, Tensor, Any]:
    weights, *other = untyped(NETWORKS[case])
    layout = Layout.build(weights, 3, slots, *other)
    copies = 1 if ranked else K
    parameters = values(copies * layout.size).to(dtype)
    return layout, parameters, 0.3 * values(K, layout.factors, seed=1).to(dtype) if ranked else None


def expected(layout: Layout, parameters: Tensor, deviations: Tensor | None, K: int, first: int, dtype, fill):
    """Both packings, element by element from the definition."""
    forward, gradient = (torch.full((layout.packed_size,), fill, dtype=dtype) for _ in range(2))
    copies = 1 if deviations is not None else K
    for layer in layout.layers:
        Co, J, P = layer.out_channels, layer.in_channels, layer.positions
        for k in range(K):
            at = copies * layer.weight + (k * layer.weight_size if copies > 1 else 0)
            W = parameters[at : at + layer.weight_size].view(Co, J, layer.taps)
            if deviations is not None:
                n = layer.channel_groups
                r, s = 1 + deviations[k, layer.r : layer.r + n * J], 1 + deviations[k, layer.s : layer.s + Co]
                r = torch.stack([r[o * n // Co * J : (o * n // Co + 1) * J] for o in range(Co)])
                W = s[:, None, None] * W * r[:, :, None]
            W = W.to(dtype)
            start = layer.packed + (first + k) * layer.weight_size
            slot = slice(start, start + layer.weight_size)
            f, g = forward[slot].view(-1, Co), gradient[slot].view(-1, J)
            for t in range(layer.taps):
                for j in range(J):
                    row = j % P * (J // P) + j // P  # c·P + p → p·C + c; P = 1 leaves j
                    f[t * J + row] = W[:, j, t]
                    g[(layer.taps - 1 - t) * Co : (layer.taps - t) * Co, row] = W[:, j, t]
    return forward, gradient


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ranked", [True, False], ids=["branches", "copies"])
@pytest.mark.parametrize("case", NETWORKS)
def test_the_reference_is_the_definition(case, ranked, place):
    K, first, spare = PLACES[place]
    for dtype, wide in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        layout, parameters, deviations = problem(case, K, ranked, first + K + spare, wide)
        packed = [torch.full((layout.packed_size,), 7.0, dtype=dtype) for _ in range(2)]
        untyped(pack_weights)(parameters, deviations, layout, *packed, first_slot=first)
        for actual, right in zip(packed, expected(layout, parameters, deviations, K, first, dtype, 7.0), strict=True):
            assert torch.equal(actual, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ranked", [True, False], ids=["branches", "copies"])
@pytest.mark.parametrize("case", NETWORKS)
def test_the_kernel_is_the_reference(case, ranked, place, dtype):
    """Bit by bit, in memory that starts as NaN; the slots of others stay NaN. The interpreter cuts bf16 off instead
    of rounding it: one unit there."""
    K, first, spare = PLACES[place]
    layout, parameters, deviations = problem(case, K, ranked, first + K + spare)
    right = [torch.full((layout.packed_size,), torch.nan, dtype=dtype) for _ in range(2)]
    untyped(pack_weights)(parameters, deviations, layout, *right, first_slot=first)
    packed = [torch.full((layout.packed_size,), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    given = None if deviations is None else deviations.to(DEVICE)
    run_kernel(
        torch.ops.fastensdistill.pack_weights,
        parameters.to(DEVICE),
        given,
        *packed,
        layout.fields,
        first,
        K,
        1 if ranked else K,
    )
    for name, actual, wanted in zip(("packed", "packed_gradient"), packed, right, strict=True):
        cut = dtype == torch.bfloat16 and DEVICE == "cpu"
        gap = (actual.cpu().float() - wanted.float()).abs()
        same = (gap <= cut * wanted.float().abs() / 128) | (actual.cpu().isnan() & wanted.isnan())
        assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} values differ"


@pytest.mark.parametrize("call", [run_kernel, lambda op, *args, **more: op(*args, **more)], ids=["kernel", "reference"])
@pytest.mark.parametrize("case", ["odd", "flat", "groups"])
def test_branches_of_several_networks(case, call):
    """To the bit those of each network alone."""
    copies, K, first = 3, 2, 1
    layout, parameters, _ = problem(case, copies, False, first + copies * K)
    deviations = 0.3 * values(copies * K, layout.factors, seed=1)
    packed = [torch.full((layout.packed_size,), torch.nan, device=DEVICE) for _ in range(2)]
    call(pack_weights, parameters.to(DEVICE), deviations.to(DEVICE), layout, *packed, first_slot=first)
    right = [torch.full((layout.packed_size,), torch.nan, device=DEVICE) for _ in range(2)]
    for i in range(copies):
        own = torch.zeros(layout.size)
        for layer in layout.layers:
            at = slice(layer.weight, layer.weight + layer.weight_size)
            own[at] = layouts.layer_weight(parameters, layer, copies)[i].flatten()
        rows = deviations[i * K : (i + 1) * K]
        call(pack_weights, own.to(DEVICE), rows.to(DEVICE), layout, *right, first_slot=first + i * K)
    for actual, wanted in zip(packed, right, strict=True):
        assert torch.equal(actual.nan_to_num(7), wanted.nan_to_num(7))
    with pytest.raises(InputError, match="of 5 branches and parameters of 3 networks"):
        untyped(pack_weights)(parameters, deviations[:5], layout, *packed)


def test_the_public_function_launches_one_kernel_whose_table_is_built_once(monkeypatch):
    layout, parameters, deviations = problem("odd", 2, True, 2)
    packed = [torch.zeros(layout.packed_size, dtype=torch.float16) for _ in range(2)]
    with record_launches() as launches:
        untyped(pack_weights)(parameters, deviations, layout, *packed)
        monkeypatch.setattr(layouts.torch, "tensor", None)  # a second table could not be made
        untyped(pack_weights)(parameters, deviations, layout, *packed)
    assert [launch.kernel for launch in launches] == [pack_kernel] * 2
    assert launches[0].arguments["p_table"] is launches[1].arguments["p_table"]
    assert launches[0].grid == (len(layout.layers), 2)


def test_offsets():
    layout = Layout.build([("a", (4, 3, 3, 3), False), ("b", (2, 4), True)], plain=5, slots=2)
    a, b = layout.layers
    assert (a.weight, a.bias, a.r, a.s) == (0, -1, 0, 3)
    assert (b.weight, b.bias, b.r, b.s) == (108, 116, 7, 11)
    assert (layout.ranked, layout.size, layout.factors) == (118, 123, 13)
    assert (a.packed, b.packed, layout.packed_size) == (0, 256, 320)  # 2·108 and 2·8 values, up to multiples of 64


def test_a_packed_branch_is_the_plain_layer_between_factors():
    """s ∘ (W * (r ∘ x)) is the convolution with what is packed."""
    layout, parameters, deviations = problem("odd", 2, True, 2, torch.float64)
    layer = layout.layers[0]
    packed = [torch.zeros(layout.packed_size, dtype=torch.float64) for _ in range(2)]
    untyped(pack_weights)(parameters, deviations, layout, *packed)
    x = torch.randn(3, layer.in_channels, 6, 6, dtype=torch.float64)
    W = parameters[: layer.weight_size].view(17, 3, 3, 3)
    slots = packed[0][layer.packed : layer.packed + 2 * layer.weight_size].view(2, 9, 3, 17)
    for k, W_k in enumerate(slots.permute(0, 3, 2, 1)):
        r, s = ((1 + deviations[k, at : at + n]).view(-1, 1, 1) for at, n in ((layer.r, 3), (layer.s, 17)))
        actual = F.conv2d(x, W_k.reshape(17, 3, 3, 3))
        check_close(f"branch {k}", actual, s * F.conv2d(r * x, W), 1e-12)


def test_branches_of_a_student_as_their_own_op():
    layout, parameters, deviations = problem("tiles", 3, True, 4)
    one, other = ([torch.zeros(layout.packed_size, dtype=torch.bfloat16) for _ in range(2)] for _ in range(2))
    untyped(pack_weights)(parameters, deviations, layout, *one, first_slot=1)
    torch.ops.fastensdistill.pack_rank_one(parameters, deviations, *other, layout.dense_fields, 1)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_kernels_asked_for_on_the_cpu_come_before_the_extension():
    layout, parameters, deviations = problem("tiles", 3, True, 4)
    packed = [torch.zeros(layout.packed_size, dtype=torch.bfloat16) for _ in range(2)]
    with record_launches() as launches:
        untyped(pack_weights)(parameters, deviations, layout, *packed)
    assert [launch.kernel for launch in launches] == [pack_kernel]


L, V, D = problem("flat", 2, True, 2)
PACKED = torch.zeros(2, L.packed_size)
REFUSED = {
    "parameters": (lambda: pack_weights(V[1:], D, L, *PACKED), "parameters has shape"),
    "flat-deviations": (lambda: pack_weights(V, D[0], L, *PACKED), r"deviations has shape .*; expected \[K, 8\d\]"),
    "other-dtype": (lambda: pack_weights(V, D.double(), L, *PACKED), "deviations has dtype torch.float64"),
    "other-device": (lambda: pack_weights(V, D.to("meta"), L, *PACKED), "deviations is on meta"),
    "no-layers": (lambda: Layout.build([], 5), "no layers"),
    "layer": (lambda: Layout.build([("bad", (4, 3, 3), False)]), "layer 'bad' has weight shape"),
    "copies": (lambda: pack_weights(V[:-1].repeat(2), None, L, *PACKED), "parameters has shape"),
    "half-parameters": (lambda: pack_weights(V.half(), D, L, *PACKED), "dtype torch.float16"),
    "two-dtypes": (lambda: pack_weights(V, D, L, PACKED[0], PACKED[1].half()), "one for both packings"),
    "integers": (lambda: pack_weights(V, D, L, PACKED[0].int(), PACKED[1].int()), "packed has dtype torch.int32"),
    "size": (lambda: pack_weights(V, D, L, PACKED[0][1:], PACKED[1]), "packed has dtype"),
    "strided": (lambda: pack_weights(V, D, L, PACKED.t().contiguous().t()[0], PACKED[1]), "not contiguous"),
    "slot": (lambda: untyped(pack_weights)(V, D, L, *PACKED, first_slot=1), "first_slot is 1 with 2 branches"),
    "copies-past-the-slots": (lambda: pack_weights(V.repeat(3), None, L, *PACKED), "first_slot is 0 with 3 branches"),
    "positions": (
        lambda: Layout.build([("fc", (4, 10), True)], positions={"fc": 3}), "over 3 positions"
    ),
    "positions-of-a-convolution": (
        lambda: Layout.build([("conv", (4, 9, 1, 1), True)], positions={"conv": 9}), "expected a linear layer"
    ),
    "32-bit-offsets": (
        lambda: Layout.build([("fc", (2**15, 2**15), True)], slots=2), "expected less than 2147483648"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        call()

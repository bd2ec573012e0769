"""Activations and their gradients: kernels against references, references against PyTorch's autograd in float64."""

from typing import Any

import pytest
import torch
from torch import nn

from fastensdistill.errors import InputError
from fastensdistill.kernels.activation import KINDS, activation, named, parsed
from fastensdistill.kernels.activation_gradient import activation_gradient
from fastensdistill.kernels.batch_norm_backward import batch_norm_backward
from fastensdistill.kernels.elementwise_gradient import ROWS_BLOCK
from fastensdistill.kernels.reference import wide
from tests.compare import check_close
from tests.kernels.both import DEVICE, SHAPES, TOLERANCE, check_op, each_dtype, run_kernel, values
from tests.untyped import present, untyped

MODULES = {
    "relu": nn.ReLU(), "relu6": nn.ReLU6(), "silu": nn.SiLU(), "hardswish": nn.Hardswish(), "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"), "sigmoid": nn.Sigmoid(), "hardsigmoid": nn.Hardsigmoid(),
    "tanh": nn.Tanh(), "leaky_relu": nn.LeakyReLU(), "leaky_relu(0.2)": nn.LeakyReLU(0.2), "mish": nn.Mish(),
    "elu": nn.ELU(), "elu(0.5)": nn.ELU(0.5),
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", MODULES)
# kinks, values around 0 (where a difference cancels), and values whose exp, square or cube is past float32
KINKS = (0.0, 6.0, -3.0, 3.0)
NEAR = tuple(sign * x for sign in (-1, 1) for x in (1e-6, 1e-3, 0.2499, 0.2501, 0.7, 2.999, 5.999, 6.001, 12.0, 19.9))
FAR = tuple(sign * x for sign in (-1, 1) for x in (20.1, 41.0, 89.0, 1e4, 1e12, 1e20, 1e30))


def by_autograd(kind: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = MODULES[kind](x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def column(points: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(points, dtype=dtype).view(1, 1, -1, 1, 1)


def test_every_kind_is_tested():
    assert {parsed(kind)[0] for kind in MODULES} == set(KINDS)


@each_kind
def test_values_and_derivatives_are_pytorchs(kind):
    """At kinks exactly; elsewhere relative to each value, and in the kernel to the largest of its neighbourhood."""
    for points in (KINKS, NEAR, FAR):
        x = column(points, torch.float64)
        y, slope = by_autograd(kind, x)
        if kind == "gelu_tanh":  # PyTorch's own is NaN where the cube overflows
            slope = torch.where(slope.isfinite(), slope, (x > 0).double())
        one = torch.ones_like(x)
        torch.testing.assert_close(activation(x, kind=kind), y, rtol=1e-14, atol=0)
        torch.testing.assert_close(activation_gradient(one, x, kind=kind).d, slope, rtol=1e-14, atol=0)
        low, low_one = x.float().to(DEVICE), one.float().to(DEVICE)
        found = run_kernel(activation, low, kind=kind), run_kernel(activation_gradient, low_one, low, kind=kind).d
        allowed: dict[str, Any] = {"rtol": 2e-6, "atol": 1e-7 if points is KINKS else 2e-6}
        torch.testing.assert_close(found[0].cpu(), y.float(), **allowed)
        torch.testing.assert_close(found[1].cpu(), slope.float(), **allowed)


@each_dtype
@pytest.mark.parametrize("kind", ["relu", "relu6", "hardswish", "hardsigmoid", "leaky_relu", "elu"])
def test_at_a_kink_the_kernel_takes_the_same_side_as_pytorch(kind, dtype):
    """In PyTorch's own dtype; the sides are further apart than a rounding."""
    x = column(KINKS, dtype)
    found = run_kernel(activation_gradient, torch.ones_like(x).to(DEVICE), x.to(DEVICE), kind=kind).d.cpu()
    torch.testing.assert_close(found, by_autograd(kind, x)[1], rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", ["tanh", "elu", "mish", "silu", "gelu"])
def test_small_values_keep_their_digits(kind):
    """Relative to each value: tanh(1e-6) is not 0, as a difference of two numbers near 1 would have it."""
    x = column((-1e-6, -1e-3, -0.1, 1e-6, 1e-3, 0.1), torch.float64)
    low = run_kernel(activation, x.float().to(DEVICE), kind=kind)
    torch.testing.assert_close(low.cpu(), by_autograd(kind, x)[0].float(), rtol=2e-6, atol=0)


@each_kind
def test_not_a_number_is_passed_on(kind):
    x = column((float("nan"), 1.0), torch.float32).to(DEVICE)
    assert run_kernel(activation, x, kind=kind).isnan().flatten().tolist() == [True, False]


@each_dtype
@each_kind
def test_the_kernels_are_their_references(kind, dtype):
    for shape, shared in zip(SHAPES.values(), (True, False, False), strict=True):
        groups, channels = shape[0], shape[4]
        z, residual, d, more = (values(*shape, dtype=dtype, seed=seed, scale=2) for seed in range(4))
        rows = [values(1 if shared else groups, channels, seed=seed) for seed in range(4, 7)]
        norm: dict[str, Any] = {"mean": rows[2], "inv_std": 0.5 + rows[2].abs()}
        options: dict[str, Any] = {"kind": kind, "tolerance": 2 * TOLERANCE[dtype]}
        affine: dict[str, Any] = {"scale": rows[0], "shift": rows[1]}
        check_op(activation, z, **options, **affine, residual=residual)
        found = check_op(activation_gradient, d, z, **options, **affine, **norm, residual=more)
        assert found.statistics.shape[1] == -(-shape[1] * shape[2] * shape[3] // ROWS_BLOCK)
    check_op(activation, z, **options)
    assert check_op(activation_gradient, d, z, **options).statistics is None


@each_kind
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_behind_a_training_batch_norm_it_is_autograds(kind, shared):
    """Value, gradient and the BatchNorm's own gradients through the sums, in float64."""
    groups, channels = 2, 3
    sets = 1 if shared else groups
    shape = (groups, 2, 3, 5, channels)
    z, d, residual = (values(*shape, seed=seed).double() for seed in range(3))
    layers = [nn.BatchNorm2d(channels).double().train() for _ in range(sets)]
    weight, bias = (values(sets, channels, seed=seed).double() for seed in (3, 4))
    for layer, one, other in zip(layers, weight, bias, strict=True):
        present(layer.weight).data.copy_(one)
        present(layer.bias).data.copy_(other)
    leaf = z.clone().requires_grad_()
    parts = leaf.view(sets, -1, 3, 5, channels).permute(0, 1, 4, 2, 3)
    x = torch.stack([layer(part) for layer, part in zip(layers, parts, strict=True)])
    y = MODULES[kind](x.permute(0, 1, 3, 4, 2).reshape(shape))
    expected = torch.autograd.grad(y, [leaf, *[p for layer in layers for p in layer.parameters()]], d + residual)

    together = z.view(sets, -1, channels)
    mean, inv_std = together.mean(1), (together.var(1, correction=0) + 1e-5).rsqrt()
    scale = weight * inv_std
    affine = {"kind": kind, "scale": scale, "shift": bias - scale * mean}
    check_close("y", activation(z, **affine), y, 1e-12)
    with_more = activation(z, **affine, residual=residual)
    check_close("y + residual", with_more, y + residual, 1e-12)
    u = activation_gradient(d, z, **affine, residual=residual, mean=mean, inv_std=inv_std)
    check_close("u", u.d.sum((1, 2, 3)).sum(0) if shared else u.d.sum((1, 2, 3)),
                expected[2] if shared else torch.stack(expected[2::2]), 1e-9)  # fmt: skip
    count = together.shape[1]
    found = batch_norm_backward(u.d, z, present(u.statistics), count, weight, mean, inv_std)
    check_close("dz", found.d, expected[0], 1e-9)
    check_close("d_weight", found.d_weight, torch.stack(expected[1::2]), 1e-9)
    check_close("d_bias", found.d_bias, torch.stack(expected[2::2]), 1e-9)


def test_one_set_of_rows_serves_all_groups():
    z, rows = values(3, 2, 2, 2, 5), [values(1, 5, seed=seed) for seed in range(2)]
    y = activation(z, kind="silu", scale=rows[0], shift=rows[1])
    assert torch.equal(y, activation(z, kind="silu", scale=rows[0].repeat(3, 1), shift=rows[1].repeat(3, 1)))
    check_close("y", y, torch.nn.functional.silu(z * wide(rows[0]) + wide(rows[1])), 1e-6)


def test_names_of_kinds():
    assert [named("silu"), named("leaky_relu", 0.01), named("elu", 1), named("leaky_relu", 0.2)] == [
        "silu", "leaky_relu", "elu", "leaky_relu(0.2)"]  # fmt: skip
    assert [parsed(named("leaky_relu", a)) for a in (0.01, 0.2, -1e-5)] == [
        ("leaky_relu", a) for a in (0.01, 0.2, -1e-5)
    ]
    assert parsed("silu") == ("silu", 0.0)


def test_refusals():
    z, row = values(2, 1, 3, 3, 8), torch.ones(1, 8)
    for kind, message in (
        ("swish", "unknown activation 'swish'"),
        ("silu(2)", "silu takes no parameter"),
        ("elu(x)", "elu takes a number"),
        ("elu(", r"unknown activation 'elu\('"),
    ):
        with pytest.raises(InputError, match=message):
            activation(z, kind=kind)
        with pytest.raises(InputError, match=message):
            activation_gradient(z, z, kind=kind)
    with pytest.raises(InputError, match="residual has shape"):
        activation(z, kind="silu", residual=z[:1])
    with pytest.raises(InputError, match="scale and shift must be given together"):
        untyped(activation)(z, kind="silu", scale=row)
    with pytest.raises(InputError, match="z has shape"):
        activation_gradient(z, z[:1], kind="silu")
    with pytest.raises(InputError, match="mean and inv_std"):
        activation_gradient(z, z, kind="silu", mean=row, inv_std=torch.ones(3, 8))
    with pytest.raises(InputError, match="not contiguous"):
        activation(z.transpose(2, 3), kind="silu")

import pytest
import torch
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.kernels.batch_norm import batch_norm_apply, batch_norm_statistics
from fastensdistill.kernels.batch_norm_backward import batch_norm_backward, batch_norm_coefficients
from fastensdistill.kernels.batch_norm_sums import batch_norm_sums
from fastensdistill.kernels.elementwise_gradient import ROWS_BLOCK, elementwise_gradient
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.reference import pack_mask, wide
from fastensdistill.models.layers import BatchNorm2d
from tests.compare import check_close
from tests.kernels.both import TOLERANCE, check_op, each_dtype, each_shape, each_sharing, values
from tests.untyped import present, untyped


def _rows(sets: int, channels: int, seed: int) -> torch.Tensor:
    return 0.5 + values(sets, channels, seed=seed).abs()


@each_dtype
@each_sharing
@each_shape
def test_sums(shape, shared, dtype):
    """Rows as the statistics take them, which are those of the values; a mean far from 0 costs no digits."""
    sets, channels = 1 if shared else shape[0], shape[4]
    z = values(*shape, dtype=dtype) + 30
    center = 30 + values(sets, channels, seed=1, scale=0.1)
    sums = check_op(batch_norm_sums, z, center, tolerance=1e-5)
    assert sums.shape[:2] == (shape[0], -(-shape[1] * shape[2] * shape[3] // ROWS_BLOCK))
    every = z.double().view(sets, -1, channels)
    unit, mean = torch.ones(sets, channels), center.clone()
    found = batch_norm_statistics(sums, every.shape[1], unit, unit, mean, unit.clone(), eps=1e-5)
    check_close("mean", found.mean, every.mean(1), 1e-6)
    check_close("inv_std", found.inv_std, (every.var(1, correction=0) + 1e-5).rsqrt(), 1e-3)


def test_sums_refuse():
    with pytest.raises(InputError, match="center has shape"):
        batch_norm_sums(values(2, 3, 4, 5, 6), values(2, 5))


@each_sharing
@pytest.mark.parametrize(("rows", "channels"), [(3, 20), (700, 33)], ids=["few", "several-blocks"])
def test_statistics(shared, rows, channels):
    groups = 2
    sets = 1 if shared else groups
    partials = values(groups, rows, 2, channels)
    partials[:, :, 1] = partials[:, :, 1].abs() + 1
    parameters = [_rows(sets, channels, seed) for seed in range(4)]
    check_op(batch_norm_statistics, partials, 30 * rows, *parameters)
    check_op(batch_norm_statistics, partials, 30 * rows, *parameters, correction=1.25)


@pytest.mark.parametrize(("sets", "each", "channels"), [(2, 3, 20), (3, 2, 33)])
def test_several_sets_of_several_groups(sets, each, channels):
    """Kernels as the reference; and to the bit each set's own, a row for every one of its groups."""
    groups, rows, count = sets * each, 5, 90
    partials = values(groups, rows, 2, channels)
    partials[:, :, 1] = partials[:, :, 1].abs() + 1
    parameters = [_rows(sets, channels, seed) for seed in range(4)]
    check_op(batch_norm_statistics, partials, count, *parameters)
    d, z = (values(groups, 1, 3, 5, channels, seed=s) for s in range(2))
    alone = [
        batch_norm_statistics(partials[q * each : (q + 1) * each], count, *(p[q : q + 1].clone() for p in parameters))
        for q in range(sets)
    ]
    together = batch_norm_statistics(partials, count, *(p.clone() for p in parameters))
    for name, found in together._asdict().items():
        assert torch.equal(found, torch.cat([getattr(one, name) for one in alone]).repeat_interleave(each, 0)), name
    given = parameters[0], together.mean, together.inv_std
    check_op(batch_norm_coefficients, partials, count, *given, tolerance=2e-5)
    check_op(batch_norm_backward, d, z, partials, count, *given, tolerance=2e-5)
    found = batch_norm_backward(d, z, partials, count, *given)
    for q, one in enumerate(alone):
        own = slice(q * each, (q + 1) * each)
        expected = batch_norm_backward(d[own], z[own], partials[own], count, given[0][q : q + 1], one.mean, one.inv_std)
        assert torch.equal(found.d[own], expected.d)
        assert torch.equal(found.d_weight[q : q + 1], expected.d_weight)
        assert torch.equal(found.d_bias[q : q + 1], expected.d_bias)
    with pytest.raises(InputError, match="expected \\(a divisor of"):
        batch_norm_statistics(partials, count, *[_rows(4, channels, seed) for seed in range(4)])


@each_dtype
@each_sharing
@each_shape
def test_apply(shape, shared, dtype):
    groups, images, height, width, channels = shape
    scale, shift = (values(1 if shared else groups, channels, seed=s) for s in (1, 2))
    z = values(*shape, dtype=dtype)
    options = {"tolerance": TOLERANCE[dtype]}
    check_op(batch_norm_apply, z, scale, shift, mask=True, **options)
    check_op(batch_norm_apply, z, scale, shift, residual=values(*shape, dtype=dtype, seed=3), relu=False, **options)
    small = values(groups, images, 2 * height - 1, 2 * width, -(-channels // 2), dtype=dtype)
    check_op(batch_norm_apply, z, scale, shift, residual=small, residual_stride=2, mask=True, **options)


@each_dtype
@each_sharing
@each_shape
def test_backward(shape, shared, dtype):
    groups, channels = shape[0], shape[4]
    sets = 1 if shared else groups
    d, z, residual = (values(*shape, dtype=dtype, seed=s) for s in range(3))
    mean, inv_std, weight = values(sets, channels), _rows(sets, channels, 1), _rows(sets, channels, 2)
    options = {"tolerance": TOLERANCE[dtype]}
    mask = pack_mask(values(*shape, seed=4) > 0)
    sums = elementwise_gradient(d, z=z, mean=mean, inv_std=inv_std, mask=mask, residual=residual)
    positions = shape[1] * shape[2] * shape[3]
    count = positions * groups // sets
    check_op(batch_norm_backward, sums.d, z, sums.statistics, count, weight, mean, inv_std, **options)
    more = {"residual": residual, **options}
    check_op(batch_norm_backward, sums.d, z, sums.statistics, count, weight, mean, inv_std, **untyped(more))


@each_sharing
def test_coefficients(shared):
    """They are those of the gradient, and d_weight and d_bias are its own, on top of what was there."""
    groups, channels, count = 2, 33, 60
    sets = 1 if shared else groups
    partials, d, z = (
        values(groups, 700, 2, channels),
        values(groups, 1, 3, 5, channels),
        values(groups, 1, 3, 5, channels),
    )
    rows = values(sets, channels), _rows(sets, channels, 1), _rows(sets, channels, 2)
    found = check_op(batch_norm_coefficients, partials, count, *rows, tolerance=2e-5)
    expected = batch_norm_backward(d, z, partials, count, *rows)
    a, b, c = (wide(row) for row in found[:3])
    assert torch.equal(a * d + b * z + c, expected.d)
    assert torch.equal(found.d_weight, expected.d_weight)
    old = [values(sets, channels, seed=8), values(sets, channels, seed=9)]
    sums = [one.clone() for one in old]
    more = batch_norm_coefficients(partials, count, *rows, d_weight=sums[0], d_bias=sums[1], add=True)
    assert more.d_weight is sums[0]
    assert torch.equal(more.d_weight, old[0] + expected.d_weight)
    assert torch.equal(more.d_bias, old[1] + expected.d_bias)


@each_sharing
def test_whole_layer_is_the_papers_batch_norm(shared):
    """Convolution's sums, statistics, apply and backward against BatchNorm2d and autograd, in float64."""
    groups, images, size, channels, out = 2, 3, 5, 4, 6
    sets = 1 if shared else groups
    x = values(groups, images, size, size, channels).double()
    kernels, weight_index = values(groups, 9, channels, out).double(), torch.arange(groups, dtype=torch.int32)
    parameters = [_rows(sets, out, seed).double() for seed in range(4)]
    weight, bias, running_mean, running_var = parameters
    layers = [BatchNorm2d(out).double().train() for _ in range(sets)]
    for q, layer in enumerate(layers):
        for mine, theirs in zip(
            parameters, (layer.weight, layer.bias, layer.running_mean, layer.running_var), strict=True
        ):
            present(theirs).data.copy_(mine[q])

    result = grouped_conv(x, kernels, weight_index, kernel=3, padding=1, center=running_mean)
    count = images * size * size * groups // sets
    statistics = batch_norm_statistics(present(result.statistics), count, *parameters)
    y = batch_norm_apply(result.z, statistics.scale, statistics.shift, mask=True)

    z = result.z.clone().requires_grad_()
    together = z.view(sets, -1, size, size, out)
    expected = [F.relu(layer(part.permute(0, 3, 1, 2))) for layer, part in zip(layers, together, strict=True)]
    expected_y = torch.stack(expected).permute(0, 1, 3, 4, 2).reshape(z.shape)
    check_close("y", y.y, expected_y, 1e-12)
    check_close("running mean", running_mean, torch.stack([present(layer.running_mean) for layer in layers]), 1e-12)
    check_close("running variance", running_var, torch.stack([present(layer.running_var) for layer in layers]), 1e-12)

    d = values(*z.shape, seed=9).double()
    grads = torch.autograd.grad(expected_y, [z, *[p for layer in layers for p in (layer.weight, layer.bias)]], d)
    sums = elementwise_gradient(d, z=result.z, mean=statistics.mean, inv_std=statistics.inv_std, mask=y.mask)
    out_ = batch_norm_backward(
        sums.d, result.z, present(sums.statistics), count, weight, statistics.mean, statistics.inv_std
    )
    check_close("dz", out_.d, grads[0], 1e-10)
    check_close("dγ", out_.d_weight, torch.stack(grads[1::2]), 1e-10)
    check_close("dβ", out_.d_bias, torch.stack(grads[2::2]), 1e-10)
    assert bias.shape == out_.d_bias.shape


def test_variance_survives_a_large_mean():
    """Sums about the running mean: Σz² − mean² in float32 would lose everything at mean 1e4, deviation 1."""
    z = 1e4 + values(1, 2, 8, 8, 16)
    identity = torch.eye(16)[None, None].contiguous()
    center = torch.full((1, 16), 1e4)
    sums = grouped_conv(z, identity, torch.zeros(1, dtype=torch.int32), kernel=1, center=center).statistics
    ones = torch.ones(1, 16)
    statistics = batch_norm_statistics(present(sums), 128, ones, ones.clone(), center.clone(), ones.clone())
    var = (1 / statistics.inv_std).square() - 1e-5
    check_close("variance", var[0], z.double().flatten(0, 3).var(0, correction=0), 2e-3)


def test_refusals():
    z, row = values(2, 1, 3, 3, 8), torch.ones(1, 8)
    with pytest.raises(InputError, match="given together"):
        untyped(batch_norm_apply)(z, row, None)
    with pytest.raises(InputError, match=r"scale and shift has shape \(3, 8\)"):
        batch_norm_apply(z, torch.ones(3, 8), torch.ones(3, 8))
    with pytest.raises(InputError, match="running_var has shape"):
        batch_norm_statistics(torch.ones(2, 4, 2, 8), 4, row, row, row, torch.ones(2, 8))
    with pytest.raises(InputError, match="z has shape"):
        batch_norm_backward(z, z[:1], torch.ones(2, 1, 2, 8), 9, row, row, row)
    with pytest.raises(InputError, match="residual has shape"):
        batch_norm_backward(z, z, torch.ones(2, 1, 2, 8), 9, row, row, row, residual=z[:1])
    with pytest.raises(InputError, match="partials has shape"):
        batch_norm_coefficients(torch.ones(2, 2, 8), 9, row, row, row)
    with pytest.raises(InputError, match="mean has shape"):
        batch_norm_coefficients(torch.ones(2, 1, 2, 8), 9, row, torch.ones(2, 8), row)

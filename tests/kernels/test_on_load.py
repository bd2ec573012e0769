"""What convolutions take in as they load: BatchNorm-ReLU, the gradient of a BatchNorm, a shortcut as second source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.batch_norm import batch_norm_apply
from fastensdistill.kernels.batch_norm_backward import batch_norm_backward
from fastensdistill.kernels.conv_data_gradient import conv_data_gradient, flip_weight
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient
from fastensdistill.kernels.elementwise_gradient import elementwise_gradient
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.halo_conv import halo_conv, halo_data_gradient
from fastensdistill.kernels.reference import pack_mask, wide
from fastensdistill.kernels.vendor_conv import vendor_conv, vendor_data_gradient, vendor_weight_gradient
from tests.compare import check_close
from tests.kernels.both import TOLERANCE, check_op, run_kernel, values
from tests.kernels.convs import CASES, SLOTS, STEMS, Case, operands
from tests.untyped import present, untyped

# by groups: a slot each, as in training mode, where statistics are by group and by slot at once
ODD, STRIDED = CASES[4], CASES[2]
each = pytest.mark.parametrize(
    ("case", "shared"), [(ODD, False), (STRIDED, True), (CASES[3], True), (STEMS[1], False)], ids=str
)


def own_slots(case: Case, dtype: torch.dtype | None = None) -> tuple[Any, Any, Any, Any]:
    """x, weights and slots of a part in training mode, where group g has slot g; and a gradient of the result."""
    x, weight, _ = operands(case, case.groups)
    d = values(case.groups, case.images, *case.out, case.out_channels, dtype=case.dtype, seed=7)
    x, weight, d = (t.to(dtype or case.dtype) for t in (x, weight, d))
    return x, weight, torch.arange(case.groups, dtype=torch.int32), d


def norm_rows(rows: int, channels: int, *names: str) -> dict[str, Any]:
    return {name: values(rows, channels, seed=20 + i) for i, name in enumerate(names)}


def in_norm(case: Case, rows: int) -> dict[str, Any]:
    return {**norm_rows(rows, case.channels, "in_scale", "in_shift"), "in_relu": True}


@each
def test_the_relu_of_a_prologue(case, shared):
    """Forward and weight gradient; the shift's positive values would show at the border if padding came before it."""
    x, weight, weight_index, d = own_slots(case)
    options = in_norm(case, 1 if shared else case.groups)
    tolerance = 2 * TOLERANCE[case.dtype]
    given: dict[str, Any] = {**case.shape, **options}
    check_op(grouped_conv, x, weight, weight_index, **given, center=torch.ones(1, case.out_channels),
             tolerance=tolerance)  # fmt: skip
    check_op(conv_weight_gradient, x, d, **given, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_values_are_those_of_batch_norm_and_then_the_convolution_bit_by_bit(dtype):
    """Rounded once, after the ReLU, as the launch rounds that this prologue replaces."""
    x, weight, weight_index, d = own_slots(ODD, dtype)
    options = in_norm(ODD, ODD.groups)
    applied = batch_norm_apply(x, options["in_scale"], options["in_shift"], relu=True).y
    one = grouped_conv(x, weight, weight_index, **ODD.shape, **options).z
    assert torch.equal(one, grouped_conv(applied, weight, weight_index, **ODD.shape).z)
    one = conv_weight_gradient(x, d, **ODD.shape, **options)
    assert torch.equal(one, conv_weight_gradient(applied, d, **ODD.shape))
    assert not torch.equal(one, conv_weight_gradient(x, d, **ODD.shape))
    for op, vendor in ((grouped_conv, vendor_conv), (conv_weight_gradient, vendor_weight_gradient)):
        arguments = (x, weight, weight_index) if op is grouped_conv else (x, d)
        results = [untyped(f)(*arguments, **ODD.shape, **options) for f in (op, vendor)]
        a, e = (result if isinstance(result, Tensor) else result.z for result in results)
        check_close("vendor", a, e, 3e-2 if dtype.itemsize == 2 else 1e-5)


def test_nan_passes_the_relu_of_a_prologue():
    x, weight, weight_index, d = own_slots(CASES[0])
    x[0, 1, 4, 4, 3] = float("nan")
    options = in_norm(CASES[0], 1)
    z = run_kernel(grouped_conv, x, weight, weight_index, **CASES[0].shape, **options).z
    assert z[0, 1, 3:6, 3:6].isnan().all()
    assert z.isnan().sum() == 9 * 16
    gradient = run_kernel(conv_weight_gradient, x, d, **CASES[0].shape, **options)
    assert gradient.isnan().sum() == 9 * 16
    assert gradient[0, :, 3].isnan().all()


def of_norm(d: Tensor, rows: int) -> dict[str, Any]:
    """z and coefficients of a BatchNorm's gradient, in d's dtype and float32."""
    z = values(*d.shape, seed=8).to(d.dtype)
    return {"norm_z": z, **norm_rows(rows, d.shape[4], "norm_a", "norm_b", "norm_c")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_gradient_of_a_norm_on_load_is_that_norms_own(dtype):
    """Bit by bit: d is rounded once, as ``batch_norm_backward`` stores it."""
    x, weight, weight_index, d = own_slots(ODD, dtype)
    G, C = ODD.groups, ODD.out_channels
    z, high = values(*d.shape, seed=8).to(dtype), torch.float64 if dtype == torch.float64 else torch.float32
    gamma, mean, inv_std = (values(G, C, seed=i).to(high) for i in (1, 2, 3))
    n, sums = d[0, ..., 0].numel(), values(G, 4, 2, C).to(high)
    plain = batch_norm_backward(d, z, sums, n, gamma, mean, inv_std)
    a = gamma * inv_std
    b = -a * inv_std * plain.d_weight / n
    on_load: dict[str, Any] = {"norm_z": z, "norm_a": a, "norm_b": b, "norm_c": -a * plain.d_bias / n - b * mean}
    size: dict[str, Any] = {"in_size": (ODD.height, ODD.width), **ODD.shape}
    one = conv_data_gradient(d, flip_weight(weight), weight_index, **size, **on_load).d
    assert torch.equal(one, conv_data_gradient(plain.d, flip_weight(weight), weight_index, **size).d)
    assert torch.equal(
        conv_weight_gradient(x, d, **ODD.shape, **on_load), conv_weight_gradient(x, plain.d, **ODD.shape)
    )


SHORTCUTS = [  # of the second source: its groups, its stride, how much it lacks of stride times the result
    (1, 1, 0),
    (2, 2, 1),
    (2, 3, 2),
]


@pytest.mark.parametrize(("groups", "stride", "less"), SHORTCUTS)
def test_a_second_source_is_the_residual_of_another_convolution(groups, stride, less):
    case = ODD._replace(dtype=torch.float64)
    x, weight, weight_index = operands(case)
    H, W = (stride * size - less for size in case.out)
    second = values(groups, case.images, H, W, 7, seed=4).double()
    second_weight, second_bias = values(SLOTS, 1, 7, case.out_channels).double(), values(SLOTS, case.out_channels)
    epilogue: dict[str, Any] = {
        "relu": True,
        "mask": True,
        "center": values(1, case.out_channels),
        "bias": second_bias + 1,
    }
    other = grouped_conv(second, second_weight, weight_index, kernel=1, stride=stride, bias=second_bias).z
    expected = grouped_conv(x, weight, weight_index, **case.shape, **epilogue, residual=other)
    found = grouped_conv(
        x, weight, weight_index, **case.shape, **epilogue, second=second, second_weight=second_weight,
        second_bias=second_bias, second_stride=stride,
    )  # fmt: skip
    for name, one, e in zip(found._fields, found, expected, strict=True):
        assert (one is None) == (e is None)
        if one is not None and e is not None:
            check_close(name, one.double(), e.double(), 1e-13)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("case", [ODD, STRIDED], ids=lambda case: case.name)
def test_a_second_source_of_the_data_gradient_is_autograds(case, stride):
    """Both convolutions read x: its gradient by both, and what the epilogue makes of it."""
    case = case._replace(dtype=torch.float64)
    x, weight, weight_index = operands(case)
    second_weight = values(SLOTS, 1, case.channels, 5).double()
    x.requires_grad_()
    y = convolved(x, weight, weight_index, case)
    s = torch.einsum("gnhwc,gcd->gnhwd", x[:, :, ::stride, ::stride], second_weight[weight_index.long(), 0])
    d, second = values(*y.shape, seed=7).double(), values(*s.shape, seed=8).double()
    (expected,) = torch.autograd.grad((y * d).sum() + (s * second).sum(), x)
    mask = pack_mask(values(*x.shape, seed=9) > 0)
    size: dict[str, Any] = {"in_size": (case.height, case.width), **case.shape}
    found = conv_data_gradient(
        d, flip_weight(weight), weight_index, **size, mask=mask, second=second, second_stride=stride,
        second_weight=flip_weight(second_weight),
    )  # fmt: skip
    check_close("d", found.d, elementwise_gradient(expected, mask=mask).d, 1e-12)


def convolved(x: Tensor, weight: Tensor, weight_index: Tensor, case: Case) -> Tensor:
    """The convolution in differentiable PyTorch."""
    outputs = []
    for g, slot in enumerate(weight_index.tolist()):
        kernel = weight[slot].unflatten(0, (case.kernel, case.kernel)).permute(3, 2, 0, 1)
        image = x[g].permute(0, 3, 1, 2)
        y = torch.nn.functional.conv2d(image, kernel, stride=case.stride, padding=case.padding)
        outputs.append(y.permute(0, 2, 3, 1))
    return torch.stack(outputs)


def from_z(shape: tuple[int, ...], rows: int, dtype: torch.dtype) -> dict[str, Any]:
    C = shape[-1]
    batch = {"mean": values(rows, C), "inv_std": 0.5 + values(rows, C, seed=1).abs()}
    return {"z": values(*shape, dtype=dtype, seed=3), **batch, **norm_rows(rows, C, "mask_scale", "mask_shift")}


def bits_of(options: dict[str, Any]) -> dict[str, Any]:
    """The same with the mask as bits."""
    z = options["z"].double() * wide(options["mask_scale"]) + wide(options["mask_shift"])
    return {k: v for k, v in options.items() if not k.startswith("mask_")} | {"mask": pack_mask(z > 0)}


@pytest.mark.parametrize(
    ("case", "shared"),
    [(ODD, True), (STRIDED, False), (CASES[3], True), (CASES[1]._replace(channels=72), False)],  # in two halves
    ids=str,
)
def test_the_mask_of_a_data_gradient_from_z(case, shared):
    _, weight, weight_index, d = own_slots(case)
    shape = (case.groups, case.images, case.height, case.width, case.channels)
    options = {
        **from_z(shape, 1 if shared else case.groups, case.dtype),
        "residual": values(*shape, dtype=case.dtype, seed=2),
        "residual_first": True,
    }
    size: dict[str, Any] = {"in_size": (case.height, case.width), **case.shape}
    given: Any = (d, flip_weight(weight), weight_index)
    result = check_op(conv_data_gradient, *given, **size, **options, tolerance=TOLERANCE[case.dtype])
    bits = untyped(conv_data_gradient)(*given, **size, **bits_of(options))
    assert torch.equal(result.d, bits.d)
    assert torch.equal(result.statistics, present(bits.statistics))
    vendor = vendor_data_gradient(*given, **size, **options)
    check_close("vendor", vendor.d, result.d, 1e-2 if case.dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 20), (3, 1, 1, 1, 9), (1, 3, 16, 11, 16)], ids=str)
def test_the_mask_of_an_elementwise_gradient_from_z(shape, dtype):
    d, options = values(*shape, dtype=dtype), from_z(shape, shape[0], dtype)
    result = check_op(elementwise_gradient, d, **options, tolerance=TOLERANCE[dtype])
    bits = elementwise_gradient(d, **bits_of(options))
    assert torch.equal(result.d, bits.d)
    assert torch.equal(result.statistics, present(bits.statistics))


def launcher_cases() -> dict[str, tuple]:
    """Operands that have a reference only, in the place where a Triton kernel would run."""
    x, weight, weight_index, d = own_slots(CASES[0])
    back, size = (d, flip_weight(weight), weight_index), {"in_size": (8, 8), **CASES[0].shape}
    second = {"second": x, "second_weight": weight[:, :1].contiguous()}
    return {
        "conv second": (grouped_conv, (x, weight, weight_index), {**CASES[0].shape, **second}, "no second"),
        "data gradient second": (conv_data_gradient, back, {**size, **second}, "no second"),
        "data gradient norm": (conv_data_gradient, back, {**size, **of_norm(d, 2)}, "no norm_z"),
        "weight gradient norm": (conv_weight_gradient, (x, d), {**CASES[0].shape, **of_norm(d, 1)}, "no norm_z"),
    }


@pytest.mark.parametrize("name", list(launcher_cases()))
def test_triton_refuses_what_only_references_compute(name):
    op, arguments, options, message = launcher_cases()[name]
    op(*arguments, **options)
    with pytest.raises(InputError, match=message):
        run_kernel(op, *arguments, **options)


def refused() -> dict[str, tuple]:
    """op, its operands, options, what the message says."""
    x, weight, weight_index, d = own_slots(CASES[0])
    forward, back = (
        (grouped_conv, (x, weight, weight_index)),
        (conv_data_gradient, (d, flip_weight(weight), weight_index)),
    )
    weights, elementwise = (conv_weight_gradient, (x, d)), (elementwise_gradient, (x,))
    one, row = weight[:, :1].contiguous(), torch.ones(1, 16)
    norm, z = of_norm(d, 2), from_z(tuple(x.shape), 2, torch.float32)
    masked = {name: value for name, value in z.items() if name not in ("mean", "inv_std", "z")}
    return {
        "a relu alone": (*forward, {"in_relu": True}, "in_relu is given without"),
        "a relu alone, weights": (*weights, {"in_relu": True}, "in_relu is given without"),
        "second without weights": (*forward, {"second": x}, "must be given together"),
        "weights without second": (*back, {"second_weight": one}, "must be given together"),
        "a bias without second": (*forward, {"second_bias": row}, "second_bias is given without"),
        "second of another size": (
            *forward, {"second": x, "second_weight": one, "second_stride": 2}, "at stride 2 does not fit",
        ),
        "second for one group": (*back, {"second": d[:1], "second_weight": one}, "does not fit"),
        "3x3 weights": (*forward, {"second": x, "second_weight": weight}, r"expected \(2, 1, 16, 16\)"),
        "second in another dtype": (*forward, {"second": x.half(), "second_weight": one}, "second is torch.float16"),
        "stride 0": (*forward, {"second": x, "second_weight": one, "second_stride": 0}, "expected at least 1"),
        "half a norm": (*back, {"norm_z": d}, "norm_z, norm_a, norm_b and norm_c must be given together"),
        "a norm's z of another size": (*weights, norm | {"norm_z": d[:1]}, "norm_z is torch.float32 of shape"),
        "a norm's z in another dtype": (*back, norm | {"norm_z": d.half()}, "norm_z is torch.float16"),
        "rows of another width": (*weights, norm | {"norm_b": row[:, :3]}, "norm_a and norm_b have shapes"),
        "a mask twice": (
            *elementwise, z | {"mask": torch.zeros(*x.shape[:4], 2, dtype=torch.uint8)}, "expected one of them",
        ),
        "a mask without z": (*elementwise, masked, "expected mean's, which is None"),
        "rows unlike the mean's": (*elementwise, z | {"mean": row, "inv_std": row}, "expected mean's"),
        "half a mask": (*elementwise, {k: v for k, v in z.items() if k != "mask_shift"}, "given together"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(refused()))
def test_refusals(name):
    op, arguments, options, message = refused()[name]
    shape: dict[str, Any] = {} if op is elementwise_gradient else dict(CASES[0].shape)
    shape = {"in_size": (8, 8), **shape} if op is conv_data_gradient else shape
    with pytest.raises(InputError, match=message):
        op(*arguments, **shape, **options)


def test_other_implementations_refuse_in_one_line():
    x, weight, weight_index, d = (t.bfloat16() if t.is_floating_point() else t for t in own_slots(CASES[0]))
    second = {"second": x, "second_weight": weight[:, :1].contiguous()}
    shape: dict[str, Any] = CASES[0].shape
    back, size = (d, flip_weight(weight), weight_index), shape | {"in_size": (8, 8)}
    z = from_z(tuple(x.shape), 1, torch.bfloat16)
    for op, arguments, options in (
        (halo_conv, (x, weight, weight_index), {**shape, **second}),
        (halo_conv, (x, weight, weight_index), {**shape, **in_norm(CASES[0], 1)}),
        (halo_data_gradient, back, {**size, **second}),
        (halo_data_gradient, back, {**size, **of_norm(d, 1)}),
        (halo_data_gradient, back, {**size, **z}),
        (vendor_conv, (x, weight, weight_index), {**shape, **second}),
        (vendor_data_gradient, back, {**size, **of_norm(d, 1)}),
        (vendor_weight_gradient, (x, d), {**shape, **of_norm(d, 1)}),
    ):
        with pytest.raises(InputError, match=r"has no \w+; another implementation computes it$"):
            op(*arguments, **options)

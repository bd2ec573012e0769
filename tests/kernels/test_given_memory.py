"""Gradients of parameters written into given memory, or added to what is there: kernels and references, bit by bit."""

from __future__ import annotations

import pytest
import torch

from fastensdistill.errors import InputError
from fastensdistill.kernels.batch_norm_backward import batch_norm_backward
from fastensdistill.kernels.conv_weight_gradient import (
    WeightGradientShape,
    conv_weight_gradient,
    weight_gradient_operands,
    weight_gradient_partials,
)
from fastensdistill.kernels.head_backward import head_backward
from fastensdistill.kernels.launch import record_launches
from fastensdistill.kernels.operands import Window
from fastensdistill.kernels.tiles import assume_arch
from fastensdistill.kernels.vendor_conv import VENDOR
from fastensdistill.kernels.wgmma_weight_gradient import cut_of, partial_count, wgmma_weight_gradient
from tests.compare import check_close
from tests.kernels.both import DEVICE, run_kernel, values
from tests.untyped import untyped

X, D = values(2, 3, 5, 4, 6), values(2, 3, 5, 4, 10)  # 60 positions: several programs add up their shares
SMALL = values(2, 1, 3, 2, 6), values(2, 1, 3, 2, 10)  # one program's share is the result
ROW, PARTIALS = values(1, 10).abs(), values(2, 4, 2, 10)
LOGITS, CLASSIFIER, POOLED = values(2, 3, 7), values(2, 10, 7), values(2, 3, 10)
SLOTS = torch.tensor([1, 0], dtype=torch.int32)
NORM = (D, D, PARTIALS, 60, ROW, ROW, ROW)
# name: the op, its operands, and the results that can be given memory
CALLS = {
    "weight": (conv_weight_gradient, (X, D), {"kernel": 3, "padding": 1}, ("out",)),
    "weight, one program": (conv_weight_gradient, SMALL, {"kernel": 3, "padding": 1}, ("out",)),
    "norm": (batch_norm_backward, NORM, {}, ("d_weight", "d_bias")),
    "head": (head_backward, (LOGITS, D, CLASSIFIER, SLOTS), {"pooled": POOLED}, ("d_weight", "d_bias")),
}


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # the interpreter's
@pytest.mark.parametrize("call", [run_kernel, lambda op, *args, **kw: op(*args, **kw)], ids=["kernel", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_written_or_added(name, call):
    op, operands, options, outputs = untyped(CALLS[name])
    operands = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in operands]
    options = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in options.items()}

    def run(**given):
        result = call(op, *operands, **options, **given)
        return [result] if outputs == ("out",) else [getattr(result, output) for output in outputs]

    plain = run()
    given = {output: torch.full_like(value, float("nan")) for output, value in zip(outputs, plain, strict=True)}
    for memory, result, expected in zip(given.values(), run(**given), plain, strict=True):
        assert result.data_ptr() == memory.data_ptr()
        assert torch.equal(memory, expected)
    before = {output: values(*value.shape, seed=3).to(DEVICE) for output, value in given.items()}
    there = {output: value.clone() for output, value in before.items()}
    run(**there, add=True)
    for output, expected in zip(outputs, plain, strict=True):
        assert torch.equal(there[output], before[output] + expected)
    for result, expected in zip(run(add=True), plain, strict=True):  # to nothing
        assert torch.equal(result, expected)


def test_a_share_is_written_where_it_belongs():
    """Without partial sums there is one launch, and with memory for them; with ``add`` a second one."""
    whole, several = torch.empty(2, 9, 6, 10), torch.empty(4, 2, 9, 6, 10)
    for operands, out, splits in ((SMALL, whole, 1), ((X, D), several, 4), (SMALL, several, 4)):
        for add in (False, True):
            with record_launches() as launches:
                conv_weight_gradient(*operands, kernel=3, padding=1, out=out, add=add)
            assert len(launches) == 1 + add
            assert (launches[0].arguments["p_partial"] is out) == (not add)
            assert add or launches[0].grid[1] == splits
    with record_launches() as launches:
        conv_weight_gradient(X, D, kernel=3, padding=1, out=whole)
    assert len(launches) == 2


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # the interpreter's
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("way", ["kernel", "reference", "vendor"])
def test_partial_results(way, count):
    """So many as there is memory for add up to the gradient, and more than there are steps are 0; with ``add`` all goes
    on top of the first."""
    calls = {"kernel": run_kernel, "reference": lambda op, *args, **kw: op(*args, **kw)}
    call = calls.get(way, lambda op, *args, **kw: VENDOR[op](*args, **kw))
    x, d = X.to(DEVICE), D.to(DEVICE)
    expected = conv_weight_gradient(X.double(), D.double(), kernel=3, padding=1)
    out = torch.full((count, 2, 9, 6, 10), float("nan"), device=DEVICE)
    assert call(conv_weight_gradient, x, d, kernel=3, padding=1, out=out) is out
    check_close("sum", out.double().sum(0), expected, 2e-6)
    if way == "kernel":  # 60 positions are two steps of 32
        assert [bool(part.any()) for part in out] == [True, True, False, False, False][:count]
    before = values(*out.shape, seed=3).to(DEVICE)
    there = before.clone()
    call(conv_weight_gradient, x, d, kernel=3, padding=1, out=there, add=True)
    check_close("on top", there[0], before[0].double() + expected, 2e-6)
    assert torch.equal(there[1:], before[1:])


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, (5, 4)), (3, 2, (9, 8)), (1, 1, (5, 4)), (3, 1, (1, 2))])
def test_how_many_partial_results_there_will_be(kernel, stride, size):
    """What a launch makes is what is said beforehand, on every device that has the kernel."""
    window = Window(kernel, stride, kernel // 2)
    x = values(2, 3, *size, 6)
    d = torch.zeros(2, 3, *window.sizes(x), 10)
    for device, arch, dtype in (("cpu", 0, torch.float32), ("meta", 90, torch.bfloat16)):
        a, b = x.to(dtype), d.to(dtype)
        shape = WeightGradientShape(tuple(x.shape), 2, 10, window, dtype, torch.device(device))
        with record_launches() as launches, assume_arch(arch):
            said = weight_gradient_partials(shape)
            conv_weight_gradient(a, b, kernel=kernel, stride=stride, padding=kernel // 2)
        assert launches[0].grid[1] == said
        assert weight_gradient_partials(shape._replace(dtype=torch.float64)) == 1
    assert weight_gradient_partials(shape._replace(device=torch.device("cpu"))) == 1, "the reference has one"


@pytest.mark.parametrize("more", [0, 1])
def test_partial_results_of_the_wgmma_kernel(more):
    """Into memory for as many as it has without a copy; else their sum in the first, and zeros."""
    x, d = values(2, 3, 5, 4, 16, dtype=torch.bfloat16), values(2, 3, 5, 4, 32, dtype=torch.bfloat16)
    window = Window(3, 1, 1)
    shape = WeightGradientShape(tuple(x.shape), 2, 32, window, torch.bfloat16, torch.device("cpu"))
    count = partial_count(shape)
    assert count == cut_of(weight_gradient_operands(x, d, kernel=3, padding=1)[0], window).partials > 1
    expected = conv_weight_gradient(x.double(), d.double(), kernel=3, padding=1)
    out = torch.full((count + more, 2, 9, 16, 32), float("nan"))
    assert wgmma_weight_gradient(x, d, kernel=3, padding=1, out=out) is out
    check_close("sum", out.double().sum(0), expected, 1e-5)
    before = values(*out.shape, seed=3)
    there = before.clone()
    wgmma_weight_gradient(x, d, kernel=3, padding=1, out=there, add=True)
    check_close("on top", there[0], before[0].double() + expected, 1e-5)
    assert torch.equal(there[1:], before[1:])


def test_refusals():
    with pytest.raises(InputError, match=r"out is torch.float32 of shape \(2, 6, 9, 10\), expected torch.float32 \(2,"):
        conv_weight_gradient(X, D, kernel=3, padding=1, out=torch.zeros(2, 6, 9, 10))
    with pytest.raises(InputError, match=r"d_bias is torch.float64 of shape \(1, 10\), expected torch.float32"):
        batch_norm_backward(*NORM, d_bias=torch.zeros(1, 10).double())
    strided = torch.zeros(2, 7, 10).transpose(1, 2)
    with pytest.raises(InputError, match=r"d_weight is .* contiguous"):
        head_backward(LOGITS, D, CLASSIFIER, SLOTS, pooled=POOLED, d_weight=strided)

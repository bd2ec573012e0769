"""Convolutions with channel groups, dilation and rectangular windows against autograd, network by network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError
from fastensdistill.kernels.conv_data_gradient import flip_weight
from fastensdistill.kernels.general_conv import general_conv, general_data_gradient, general_weight_gradient
from fastensdistill.method.rank_one_layer import RankOneLayer
from tests.compare import check_close
from tests.untyped import present

# id: (input and output channels of a group, channel groups, kernel, stride, padding, dilation, images are shared) — why
CASES: dict[str, Any] = {
    "dilated": (5, 7, 1, (3, 3), (1, 1), (2, 2), (2, 2), True),
    "rectangular": (3, 5, 2, (1, 7), (1, 1), (0, 3), (1, 1), False),
    "three groups": (3, 2, 3, (3, 2), (2, 1), (1, 2), (1, 2), False),  # all pairs differ
    "depthwise": (1, 1, 9, (5, 5), (2, 2), (2, 2), (1, 1), False),
    "two outputs an input": (1, 2, 9, (3, 3), (1, 1), (0, 0), (1, 1), True),
    "no reach": (2, 2, 2, (1, 1), (3, 2), (0, 0), (1, 1), False),  # strides leave inputs that no output sees
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}
N, H, W, K = 2, 7, 9, 3
INDEX = [2, 0]  # of three slots, the branches of a layer, those that are networks here


def branches(case: str) -> tuple[RankOneLayer, dict[str, Any]]:
    """A layer of three branches, whose effective weights are those of the slots, and the options of the kernels."""
    inputs, outputs, g, kernel, stride, padding, dilation, _ = CASES[case]
    torch.manual_seed(len(case))
    conv = nn.Conv2d(g * inputs, g * outputs, kernel, stride, padding, dilation, g).double()
    layer = RankOneLayer(conv, K).requires_grad_(False)
    for deviations in (layer.delta_r, layer.delta_s):
        deviations.uniform_(-0.5, 0.5)
    options = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "channel_groups": g}
    return layer, options


@pytest.mark.parametrize("case", CASES)
def test_all_three_are_pytorchs_own(case, monkeypatch):
    """In every dtype; memory that is not written would be NaN."""
    layer, options = branches(case)
    weight, bias = layer.effective(layer.r, layer.s)
    shared = CASES[case][7]
    images = torch.randn(1 if shared else 2, N, weight.shape[2] * layer.groups, H, W, dtype=torch.float64)
    leaves = [images.expand(2, -1, -1, -1, -1).clone().requires_grad_(), weight[INDEX].requires_grad_()]
    y = torch.stack([layer.apply_weight(w, b, x) for x, w, b in zip(*leaves, present(bias)[INDEX], strict=True)])
    grad_y = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, leaves, grad_y)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for dtype, tolerance in TOLERANCE.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x, d = (t.permute(0, 1, 3, 4, 2).contiguous().to(dtype) for t in (images, grad_y))
        packed = weight.permute(0, 3, 4, 2, 1).flatten(1, 2).contiguous().to(dtype)
        index = torch.tensor(INDEX, dtype=torch.int32)
        torch.use_deterministic_algorithms(True)
        try:
            z = general_conv(x, packed, index, bias=present(bias).to(wide), **options).z
            back = general_data_gradient(d, flip_weight(packed), index, in_size=(H, W), **options).d
            gradient = general_weight_gradient(x, d, **options)
        finally:
            torch.use_deterministic_algorithms(False)
        assert (z.dtype, back.dtype, gradient.dtype) == (dtype, dtype, wide)
        assert z.is_contiguous()
        assert back.is_contiguous()
        check_close("z", z.permute(0, 1, 4, 2, 3), y, tolerance)
        check_close("d", back.permute(0, 1, 4, 2, 3), dx, tolerance)
        wanted = dw.permute(0, 3, 4, 2, 1).flatten(1, 2)
        check_close("weight gradient", gradient, wanted, tolerance)
        memory = torch.full((2, *gradient.shape), 3.0, dtype=wide)[0]
        assert general_weight_gradient(x, d, out=memory, add=True, **options) is memory
        check_close("on top", memory - 3, gradient, tolerance)
        general_weight_gradient(x, d, out=memory.fill_(torch.nan), **options)
        assert torch.equal(memory, gradient)


def test_without_a_bias_and_with_one_for_all():
    layer, options = branches("three groups")
    weight = layer.effective(layer.r, layer.s)[0].permute(0, 3, 4, 2, 1).flatten(1, 2).contiguous()
    x, index = torch.randn(2, N, H, W, 9, dtype=torch.float64), torch.tensor([1, 1], dtype=torch.int32)
    plain, one = general_conv(x, weight, index, **options), torch.randn(1, 6, dtype=torch.float64)
    assert plain[1:] == (None, None, None)
    check_close("bias of all", general_conv(x, weight, index, bias=one, **options).z, plain.z + one[0], 1e-12)


def test_an_image_in_float32_and_its_gradient():
    """The image is float32 however the weights are multiplied, and so is what its gradient may be asked for in."""
    layer, options = branches("dilated")
    weight = layer.effective(layer.r, layer.s)[0].permute(0, 3, 4, 2, 1).flatten(1, 2).contiguous().bfloat16()
    x, index = torch.randn(1, N, H, W, 5), torch.tensor(INDEX, dtype=torch.int32)
    z = general_conv(x, weight, index, **options).z
    assert torch.equal(z, general_conv(x.bfloat16(), weight, index, **options).z)
    result = general_data_gradient(z, flip_weight(weight), index, in_size=(H, W), out_dtype=torch.float32, **options)
    assert result.d.dtype == torch.float32


def test_shapes_without_memory():
    _, options = branches("three groups")
    x, d, index = (torch.empty(shape, device="meta") for shape in ((2, N, H, W, 9), (2, N, 4, 11, 6), (2,)))
    weight, index = torch.empty(3, 6, 3, 6, device="meta"), index.int()
    assert general_conv(x, weight, index, bias=torch.empty(3, 6, device="meta"), **options).z.shape == d.shape
    back = general_data_gradient(d, weight.transpose(2, 3).contiguous(), index, in_size=(H, W), **options).d
    assert back.shape == x.shape
    assert general_weight_gradient(x, d, **options).shape == (2, 6, 3, 6)


X, D, V, INDICES = (
    torch.zeros(2, N, H, W, 6),
    torch.zeros(2, N, 5, 7, 4),
    torch.zeros(3, 9, 3, 4),
    torch.arange(2).int(),
)
OPTIONS: Any = {"kernel": (3, 3), "channel_groups": 2}
FLIPPED = V.transpose(2, 3).contiguous()


def three(x: Tensor = X, d: Tensor = D, weight: Tensor = V, **changes: Any) -> list[Any]:
    options = OPTIONS | changes
    return [
        lambda: general_conv(x, weight, INDICES, **options),
        lambda: general_data_gradient(d, FLIPPED, INDICES, in_size=(H, W), **options),
        lambda: general_weight_gradient(x, d, **options),
    ]


REFUSED = {
    "taps": (three(kernel=(3, 2))[:2], "weights of 9 taps"),
    "groups": (three(channel_groups=3)[:1], "do not fit 6 channels"),
    "channels": (three(x=torch.zeros(2, N, H, W, 5))[::2], "do not fit 5 channels"),
    "outputs": (three(d=torch.zeros(2, N, 5, 7, 3))[2:], "from 3 to 3 channels"),
    "size": (three(dilation=(2, 2))[1:], "do not give"),
    "images": (three(d=torch.zeros(2, 3, 5, 7, 4))[2:], "do not give"),
    "networks": (three(x=X.repeat(2, 1, 1, 1, 1))[::2], "1 groups"),
    "gradients": (three(d=D[:1])[1:2], "expected 2 groups of 4 channels"),
    "stride": (three(stride=(0, 1)), "expected a pair of at least"),
    "precision": (three(precision="half"), "precision"),
    "too small": (three(x=torch.zeros(2, N, 2, 9, 6))[:1], "expected 2 or 1 groups of images that fit"),
    "memory": ([lambda: general_weight_gradient(X, D, out=torch.zeros(2, 9, 6, 4), **OPTIONS)], "out is"),
    "strided": (three(x=X.transpose(2, 3))[::2], "not contiguous"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    calls, message = REFUSED[case]
    for call in calls:
        with pytest.raises(InputError, match=message):
            call()

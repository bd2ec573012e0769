"""A network of depthwise, grouped and dilated convolutions with something that PyTorch computes at its end.

Written down as a plan would read it, and run by hand, as one would run it.
"""

from __future__ import annotations

from operator import add, getitem, mul

import torch
from torch import Tensor, nn

from fastensdistill.kernels.general_conv import general_conv, general_data_gradient, general_weight_gradient
from fastensdistill.network.expression import Call, Own, Slice, Value, evaluate, logical, physical
from fastensdistill.network.launch import grad
from fastensdistill.network.nodes import Conv, Function, GeneralConv, Input, Layer, Network, Node, Norm, PointConv

SIDE = 9


class General(nn.Module):
    """Convolutions with ReLUs between them, one of which a BatchNorm follows if ``norm``, on images (3, 9, 9)."""

    order: Tensor
    table: Tensor

    def __init__(self, norm: bool = False):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pairs = nn.Conv2d(6, 10, (1, 3), padding=(0, 1), groups=2, bias=False)
        self.bn = nn.BatchNorm2d(10) if norm else None
        self.wide = nn.Conv2d(10, 20, 3, padding=2, dilation=2, groups=10)  # two outputs for every input
        self.point = nn.Linear(20, 9)
        self.three = nn.Conv2d(9, 6, 3, stride=(2, 1), groups=3)
        self.scale = nn.Parameter(torch.randn(6, 1, 1))
        self.register_buffer("order", torch.tensor([3, 0, 5, 1, 4, 2]), persistent=False)
        self.register_buffer("table", torch.randn(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pairs(self.depth(self.stem(x).relu()).relu())
        x = self.wide((x if self.bn is None else self.bn(x)).relu()).relu()
        x = self.three(self.point(x.movedim(1, 3)).relu().movedim(3, 1))
        return (x[:, self.order] * self.scale + self.table).flatten(1)


def network(norm: bool = False) -> Network:
    """The nodes of :class:`General` but for its ReLUs."""
    s, before = SIDE, "bn" if norm else "pairs"
    chosen = Call(getitem, (Value(0), (Slice(None, None, None), Own("order"))))
    tail = Call(add, (Call(mul, (chosen, Own("scale"))), Own("table")))
    nodes: list[Node] = [
        Input("input", (), (3, s, s)),
        Conv("stem", ("input",), (6, s, s), (3, s, s), True, 3, 1, 1),
        GeneralConv("depth", ("stem",), (6, s, s), (6, s, s), True, (3, 3), (1, 1), (1, 1), (1, 1), 6),
        GeneralConv("pairs", ("depth",), (10, s, s), (6, s, s), False, (1, 3), (1, 1), (0, 1), (1, 1), 2),
        Norm("bn", ("pairs",), (10, s, s), 1e-5, 0.1, True),
        GeneralConv("wide", (before,), (20, s, s), (10, s, s), True, (3, 3), (1, 1), (2, 2), (2, 2), 10),
        PointConv("point", ("wide",), (9, s, s), (20, s, s), True),
        GeneralConv("three", ("point",), (6, 4, 7), (9, s, s), True, (3, 3), (2, 1), (0, 0), (1, 1), 3),
        Function(
            "tail", ("three",), (6, 4, 7), tail, ("image",), "image",
            trained=("scale",), constants=("order", "table"), tensors=((6, 1, 1), (6,), (6, 1, 1)),
        ),
    ]  # fmt: skip
    return Network(tuple(node for node in nodes if norm or not isinstance(node, Norm)), "tail")


def options(layer: Layer) -> dict:
    """What the kernels want to know of it."""
    if isinstance(layer, GeneralConv):
        same = {name: getattr(layer, name) for name in ("kernel", "stride", "padding", "dilation")}
        return same | {"channel_groups": layer.groups}
    assert isinstance(layer, Conv)
    return {"kernel": (layer.kernel,) * 2, "stride": (layer.stride,) * 2, "padding": (layer.padding,) * 2}


def forward(net: Network, weights, index: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Values (G, N, H, W, C) of every layer after its ReLU, of the last one before what PyTorch computes."""
    values = {"input": images}
    for layer in net.layers:
        packed, x = weights.layers[layer.name], values[[*values][-1]]
        z = general_conv(x, packed.forward, index, bias=packed.bias, **options(layer)).z
        values[layer.name] = z if layer.name == "three" else z.relu()
    return values


def last(net: Network, value: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """What the node ``tail`` makes of (N, H, W, C) with these tensors, as a batch of logits."""
    tail = net.by_name["tail"]
    assert isinstance(tail, Function)
    y = physical(evaluate(tail.expression, [logical(value, "image")], tensors), "image")
    return y.permute(0, 3, 1, 2).flatten(1)


def backward(net: Network, weights, values: dict[str, Tensor], d: Tensor, gradients: dict[str, Tensor]) -> None:
    """From the gradient (K, N, …) of what :func:`last` gives for all branches at once to those of the parameters."""
    K, N = d.shape[:2]
    shared = {name: tensor[0].detach() for name, tensor in weights.tensors.items()}
    scale, x = shared["scale"].requires_grad_(), values["three"].flatten(0, 1).requires_grad_()
    with torch.enable_grad():
        d_scale, d_x = torch.autograd.grad(last(net, x, shared), [scale, x], d.flatten(0, 1))
    gradients[grad("scale")].copy_(d_scale[None])
    d = d_x.unflatten(0, (K, N)).contiguous()
    names, index = [*values], torch.arange(K, dtype=torch.int32)
    for layer in net.layers[::-1]:
        source = values[names[names.index(layer.name) - 1]]
        if layer.bias:
            gradients[grad(f"{layer.name}.bias")].copy_(d.sum((1, 2, 3)))
        general_weight_gradient(source, d, out=gradients[grad(f"{layer.name}.weight")], **options(layer))
        size = (source.shape[2], source.shape[3])
        d = general_data_gradient(d, weights.layers[layer.name].gradient, index, in_size=size, **options(layer)).d
        d = d * (source > 0)

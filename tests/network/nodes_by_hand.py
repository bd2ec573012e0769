"""Networks with the nodes that no kernel of a dense convolution makes, written out by hand beside their modules.

So what is tested is the plan and the passes, whatever the recorder makes of a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastensdistill.models.layers import Normalize
from fastensdistill.network.expression import Call, ListOf, Own, Value
from fastensdistill.network.nodes import (
    Activation,
    Add,
    Affine,
    Conv,
    Dropout,
    Function,
    Gate,
    GeneralConv,
    Input,
    Linear,
    Logits,
    Network,
    Node,
    Norm,
    PointConv,
    Pool,
    ReLU,
    Shape,
)
from tests.network.models import moved


class ByHand(NamedTuple):
    """A module's class, and the network that it is for images of a size."""

    kind: Callable[[], nn.Module]
    network: Callable[[int], Network]

    def module(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return moved(self.kind(), seed)


class Writer:
    """Collects nodes; a method for each kind returns the name of its value."""

    def __init__(self, size: int, channels: int = 3):
        self.nodes: list[Node] = [Input("input", (), (channels, size, size))]

    def shape(self, name: str) -> Shape:
        return next(node.shape for node in self.nodes if node.name == name)

    def put(self, node: Node) -> str:
        self.nodes.append(node)
        return node.name

    def affine(self, name: str, x: str) -> str:
        return self.put(Affine(name, (x,), self.shape(x)))

    def conv(self, name: str, x: str, out: int, kernel: int = 1, stride: int = 1, padding: int = 0, bias=True) -> str:
        C, H, W = self.shape(x)
        h, w = ((s + 2 * padding - kernel) // stride + 1 for s in (H, W))
        return self.put(Conv(name, (x,), (out, h, w), (C, H, W), bias, kernel, stride, padding))

    def point(self, name: str, x: str, out: int) -> str:
        return self.put(PointConv(name, (x,), (out, *self.shape(x)[1:]), self.shape(x), True))

    def general(self, name: str, x: str, out: int, groups: int, kernel=(3, 3), stride=(1, 1), padding=(1, 1),
                dilation=(1, 1), bias=False) -> str:  # fmt: skip
        C, H, W = self.shape(x)
        every = zip((H, W), kernel, stride, padding, dilation, strict=True)
        h, w = ((s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in every)
        shape = (out, h, w)
        return self.put(GeneralConv(name, (x,), shape, (C, H, W), bias, kernel, stride, padding, dilation, groups))

    def norm(self, name: str, x: str) -> str:
        return self.put(Norm(name, (x,), self.shape(x), 1e-5, 0.1, True))

    def relu(self, name: str, x: str) -> str:
        return self.put(ReLU(name, (x,), self.shape(x)))

    def activation(self, name: str, x: str, kind: str) -> str:
        return self.put(Activation(name, (x,), self.shape(x), kind))

    def gate(self, name: str, x: str, g: str) -> str:
        return self.put(Gate(name, (x, g), self.shape(x)))

    def add(self, name: str, x: str, y: str) -> str:
        return self.put(Add(name, (x, y), self.shape(x)))

    def drop(self, name: str, x: str, p: float, over: str, scaled: bool = True) -> str:
        return self.put(Dropout(name, (x,), self.shape(x), p, over, scaled))

    def mean(self, name: str, x: str) -> str:
        return self.put(Pool(name, (x,), (self.shape(x)[0], 1, 1), "adaptive", self.shape(x)))

    def pool(self, name: str, x: str, kind: str, kernel: int, stride: int) -> str:
        C, H, W = self.shape(x)
        h, w = ((s - kernel) // stride + 1 for s in (H, W))
        return self.put(Pool(name, (x,), (C, h, w), kind, (C, H, W), kernel, stride))

    def function(self, name: str, inputs: tuple[str, ...], shape: Shape, expression, layouts, layout, trained=(),
                 constants=(), tensors=()) -> str:  # fmt: skip
        return self.put(Function(name, inputs, shape, expression, layouts, layout, trained, constants, tensors))

    def concatenated(self, name: str, *inputs: str) -> str:
        channels = sum(self.shape(x)[0] for x in inputs)
        shape, values = (channels, *self.shape(inputs[0])[1:]), tuple(Value(i) for i in range(len(inputs)))
        call = Call(torch.cat, (ListOf(values), 1))
        return self.function(name, inputs, shape, call, ("image",) * len(inputs), "image")

    def layer_norm(self, name: str, x: str, layout: str = "last") -> str:
        C = self.shape(x)[0]
        call = Call(F.layer_norm, (Value(0), (C,), Own(f"{name}.weight"), Own(f"{name}.bias"), 1e-6))
        names = f"{name}.weight", f"{name}.bias"
        return self.function(name, (x,), self.shape(x), call, (layout,), layout, names, (), ((C,), (C,)))

    def linear(self, name: str, x: str, out: int) -> str:
        return self.put(Linear(name, (x,), (out, 1, 1), self.shape(x), True))

    def logits(self, name: str, x: str) -> str:
        return self.put(Logits(name, (x,), self.shape(x)))

    def network(self) -> Network:
        return Network(tuple(self.nodes), self.nodes[-1].name)


def drops(module: nn.Module) -> bool:
    """Whether it draws."""
    return module.training and vars(module).get("drops", True)


class Mobile(nn.Module):
    """A MobileNet-like block: an expansion, depthwise, squeeze and excitation, Hardswish, a projection, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
        self.stem, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.up, self.bn2 = nn.Conv2d(6, 10, 1, bias=False), nn.BatchNorm2d(10)
        self.dw, self.bn3 = nn.Conv2d(10, 10, (5, 3), 1, (2, 1), groups=10, bias=False), nn.BatchNorm2d(10)
        self.fc1, self.fc2 = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1)
        self.down, self.bn4 = nn.Conv2d(10, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.dw2, self.bn5 = nn.Conv2d(6, 6, 3, 2, 1, groups=6), nn.BatchNorm2d(6)
        self.hidden, self.classifier = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn1(self.stem(self.normalize(x))))
        y = F.silu(self.bn2(self.up(x)))
        y = F.hardswish(self.bn3(self.dw(y)))
        y = y * F.hardsigmoid(self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True)))))
        x = x + self.bn4(self.down(y))
        x = F.relu(self.bn5(self.dw2(x)))
        return self.classifier(F.dropout(F.hardswish(self.hidden(x.mean((2, 3)))), 0.3, drops(self)))


def mobile(size: int) -> Network:
    w = Writer(size)
    x = w.activation(
        "h1", w.norm("bn1", w.conv("stem", w.affine("normalize", "input"), 6, 3, 1, 1, False)), "hardswish"
    )
    y = w.activation("h2", w.norm("bn2", w.conv("up", x, 10, bias=False)), "silu")
    y = w.general("dw", y, 10, 10, (5, 3), (1, 1), (2, 1))
    y = w.activation("h3", w.norm("bn3", y), "hardswish")
    g = w.relu("r1", w.conv("fc1", w.mean("squeeze", y), 4))
    y = w.gate("gate", y, w.activation("h4", w.conv("fc2", g, 10), "hardsigmoid"))
    x = w.add("add", x, w.norm("bn4", w.conv("down", y, 6, bias=False)))
    x = w.relu("r2", w.norm("bn5", w.general("dw2", x, 6, 6, (3, 3), (2, 2), bias=True)))
    x = w.activation("h5", w.linear("hidden", w.mean("pool", x), 9), "hardswish")
    w.linear("classifier", w.drop("drop", x, 0.3, "value"), 5)
    return w.network()


def stochastic_depth(x: Tensor, p: float, active: bool) -> Tensor:
    if not active:
        return x
    return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - p).div_(1 - p)


class ConvNext(nn.Module):
    """ConvNeXt-like blocks: 7x7 depthwise with a bias, LayerNorm, two linear layers, layer scale, stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8, 1e-6)
        self.dw = nn.ModuleList(nn.Conv2d(8, 8, 7, padding=3, groups=8) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(8, 1e-6) for _ in range(2))
        self.up, self.down = (nn.ModuleList(nn.Linear(*io) for _ in range(2)) for io in ((8, 12), (12, 8)))
        self.gamma = nn.ParameterList(nn.Parameter(torch.full((8, 1, 1), 0.5)) for _ in range(2))
        self.last, self.classifier = nn.LayerNorm(8, 1e-6), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for i in range(2):
            y = self.norm[i](self.dw[i](x).permute(0, 2, 3, 1))
            y = self.down[i](F.gelu(self.up[i](y))).permute(0, 3, 1, 2)
            x = x + stochastic_depth(self.gamma[i] * y, 0.4, drops(self))
        return self.classifier(self.last(x.mean((2, 3))))


def convnext(size: int) -> Network:
    w = Writer(size)
    x = w.layer_norm("norm0", w.conv("stem", "input", 8, 2, 2))
    for i in range(2):
        y = w.general(f"dw.{i}", x, 8, 8, (7, 7), (1, 1), (3, 3), bias=True)
        y = w.activation(f"gelu.{i}", w.point(f"up.{i}", w.layer_norm(f"norm.{i}", y), 12), "gelu")
        y, own = w.point(f"down.{i}", y, 8), (f"gamma.{i}",)
        call = Call(torch.mul, (Own(f"gamma.{i}"), Value(0)))
        y = w.function(f"scale.{i}", (y,), w.shape(y), call, ("image",), "image", own, (), ((8, 1, 1),))
        x = w.add(f"add.{i}", x, w.drop(f"drop.{i}", y, 0.4, "image"))
    w.linear("classifier", w.layer_norm("last", w.mean("pool", x)), 5)
    return w.network()


class Dense(nn.Module):
    """A DenseNet-like block: concatenations of concatenations, read by several; BatchNorm behind them; Dropout2d."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3, padding=1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(11), nn.Conv2d(11, 6, 1, bias=False)
        self.bn4, self.grouped = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, 2, 2, 2, 2, bias=False)
        self.bn5, self.classifier = nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.dropout2d(self.conv1(F.relu(self.bn1(x))), 0.3, drops(self))
        a = torch.cat([x, y], 1)
        y = self.conv2(F.leaky_relu(self.bn2(a)))
        a = torch.cat([a, y], 1)
        x = F.avg_pool2d(self.conv3(torch.relu(self.bn3(a))), 2)
        x = self.bn5(self.grouped(F.relu6(self.bn4(x))))
        return self.classifier(F.relu(x)).mean((2, 3))


def dense(size: int) -> Network:
    w = Writer(size)
    x = w.conv("stem", "input", 5, 3, 1, 1, False)
    y = w.conv("conv1", w.relu("r1", w.norm("bn1", x)), 3, 3, 1, 1, False)
    a = w.concatenated("cat1", x, w.drop("drop", y, 0.3, "channel"))
    y = w.conv("conv2", w.activation("l2", w.norm("bn2", a), "leaky_relu"), 3, 3, 1, 1, False)
    a = w.concatenated("cat2", a, y)
    x = w.pool("avg", w.conv("conv3", w.relu("r3", w.norm("bn3", a)), 6, bias=False), "avg", 2, 2)
    x = w.activation("l4", w.norm("bn4", x), "relu6")
    x = w.norm("bn5", w.general("grouped", x, 4, 2, (3, 3), (2, 2), (2, 2), (2, 2)))
    w.logits("logits", w.mean("pool", w.conv("classifier", w.relu("r5", x), 5)))
    return w.network()


def shuffled(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class Shuffle(nn.Module):
    """A ShuffleNet-like unit: halves of the channels, one through a branch, put together and shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.pw1, self.bn1 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.dw, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, groups=4, bias=False), nn.BatchNorm2d(4)
        self.pw2, self.bn3 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.max_pool2d(F.relu(self.bn0(self.stem(x))), 3, 2), 0.1, drops(self))
        a, b = x.chunk(2, 1)
        b = F.relu(self.bn1(self.pw1(b)))
        b = F.relu(self.bn3(self.pw2(self.bn2(self.dw(b)))))
        return self.classifier(shuffled(torch.cat([a, b], 1), 2).mean((2, 3)))


def shuffle(size: int) -> Network:
    w = Writer(size)
    x = w.pool("max", w.relu("r0", w.norm("bn0", w.conv("stem", "input", 8, 3, 1, 1, False))), "max", 3, 2)
    x = w.drop("drop", x, 0.1, "value")
    a, b = (
        w.function(f"half.{i}", (x,), (4, *w.shape(x)[1:]), Call(torch.narrow, (Value(0), 1, 4 * i, 4)), ("image",),
                   "image")
        for i in range(2)
    )  # fmt: skip
    b = w.relu("r1", w.norm("bn1", w.conv("pw1", b, 4, bias=False)))
    b = w.norm("bn2", w.general("dw", b, 4, 4))
    b = w.relu("r3", w.norm("bn3", w.conv("pw2", b, 4, bias=False)))
    both = w.concatenated("cat", a, b)
    x = w.function("shuffle", (both,), w.shape(both), Call(shuffled, (Value(0), 2)), ("image",), "image")
    w.linear("classifier", w.mean("pool", x), 5)
    return w.network()


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Vision(nn.Module):
    """A ViT-like block: patches, a class token and position embeddings, attention, two linear layers, a token read."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 10, 8))
        self.norm1, self.q, self.k, self.v = nn.LayerNorm(8, 1e-6), *(nn.Linear(8, 8) for _ in range(3))
        self.proj, self.norm2 = nn.Linear(8, 8), nn.LayerNorm(8, 1e-6)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        y = self.norm1(x)
        x = x + F.dropout(self.proj(attention(self.q(y), self.k(y), self.v(y), 2)), 0.2, drops(self))
        x = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return self.classifier(x[:, 0])


def tokens(x: Tensor, token: Tensor, position: Tensor) -> Tensor:
    return torch.cat([token.expand(len(x), -1, -1), x], 1) + position


def vision(size: int) -> Network:
    w = Writer(size)
    x = w.conv("patch", "input", 8, 2, 2)
    L = w.shape(x)[1] * w.shape(x)[2] + 1
    names = "token", "position"
    call = Call(tokens, (Value(0), *map(Own, names)))
    x = w.function("tokens", (x,), (8, L, 1), call, ("tokens",), "tokens", names, (), ((1, 1, 8), (1, L, 8)))
    y = w.layer_norm("norm1", x, "tokens")
    q, k, v = (w.point(name, y, 8) for name in "qkv")
    call = Call(attention, (Value(0), Value(1), Value(2), 2))
    y = w.function("attention", (q, k, v), (8, L, 1), call, ("tokens",) * 3, "tokens")
    x = w.add("add1", x, w.drop("drop", w.point("proj", y, 8), 0.2, "value"))
    y = w.activation("gelu", w.point("up", w.layer_norm("norm2", x, "tokens"), 12), "gelu_tanh")
    x = w.add("add2", x, w.point("down", y, 8))
    call = Call(torch.select, (Value(0), 1, 0))
    w.linear("classifier", w.function("first", (x,), (8, 1, 1), call, ("tokens",), "flat"), 5)
    return w.network()


class Strange(nn.Module):
    """Odd places: a value read by four, twice by one; a gate of the same input; functions of the image; BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
        self.bn0, self.stem = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, padding=1)
        self.table: Tensor
        self.mix: Tensor
        self.register_buffer("table", torch.tensor([2, 0, 1, 5, 4, 3]))
        self.register_buffer("mix", torch.linspace(-1, 1, 6).view(6, 1, 1))
        self.bn1, self.dilated = nn.BatchNorm2d(6), nn.Conv2d(6, 6, (3, 1), (2, 1), (2, 0), (2, 1), bias=False)
        self.bn2, self.bn3 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        image, x = x, self.normalize(x)
        x = self.stem(self.bn0(x) + F.silu(x) + image)
        y = x * x + torch.sigmoid(x)
        y = self.bn1(y[:, self.table] * self.mix)
        z = y * F.sigmoid(y.mean((2, 3), keepdim=True)) + y
        g = z.mean((2, 3), keepdim=True)
        z = F.dropout2d(z * (g * g), 0.25, drops(self))
        z = F.mish(self.bn2(self.dilated(F.gelu(z))))
        z = z + F.adaptive_avg_pool2d(self.bn3(F.elu(x)), (z.shape[2], z.shape[3]))
        return self.last(F.hardsigmoid(z)).amax((2, 3))


def strange(size: int) -> Network:
    w = Writer(size)
    x = w.affine("normalize", "input")
    x = w.add("a0", w.add("a1", w.norm("bn0", x), w.activation("f0", x, "silu")), "input")
    x = w.conv("stem", x, 6, 3, 1, 1)
    y = w.function("square", (x, x), w.shape(x), Call(torch.mul, (Value(0), Value(1))), ("image", "image"), "image")
    y = w.add("a2", y, w.activation("f1", x, "sigmoid"))
    call = Call(torch.mul, (Call(torch.index_select, (Value(0), 1, Own("table"))), Own("mix")))
    y = w.function("mixed", (y,), w.shape(y), call, ("image",), "image", (), ("table", "mix"), ((6,), (6, 1, 1)))
    y = w.norm("bn1", y)
    z = w.add("a3", w.gate("g1", y, w.activation("f2", w.mean("m1", y), "sigmoid")), y)
    g = w.mean("m2", z)
    z = w.drop("drop", w.gate("g3", z, w.gate("g2", g, g)), 0.25, "channel")
    z = w.general("dilated", w.activation("f3", z, "gelu"), 6, 1, (3, 1), (2, 1), (2, 0), (2, 1))
    z = w.activation("f4", w.norm("bn2", z), "mish")
    y = w.norm("bn3", w.activation("f5", x, "elu"))
    z = w.add("a4", z, w.put(Pool("resized", (y,), w.shape(z), "adaptive", w.shape(y))))
    z = w.conv("last", w.activation("f6", z, "hardsigmoid"), 5)
    z = w.function("largest", (z,), (5, 1, 1), Call(torch.amax, (Value(0), (2, 3))), ("image",), "flat")
    w.logits("logits", z)
    return w.network()


CASES = {
    "mobile": (ByHand(Mobile, mobile), 7),
    "convnext": (ByHand(ConvNext, convnext), 7),
    "dense": (ByHand(Dense, dense), 7),
    "shuffle": (ByHand(Shuffle, shuffle), 8),
    "vision": (ByHand(Vision, vision), 7),
    "strange": (ByHand(Strange, strange), 6),
}
"""By name, and the size of its images."""


def without_dropout(module: nn.Module) -> nn.Module:
    """``module``, which from here on drops nothing in training either."""
    for layer in module.modules():
        vars(layer)["drops"] = False
    return module

"""Each kind of layer as nodes, which compute what its module does: in both modes, for one image and for four."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from fastensdistill.network.nodes import Activation, Conv, Dropout, Function, GeneralConv, PointConv
from fastensdistill.network.trace import trace
from tests.network.interpret import interpret
from tests.network.models import moved


class Net(nn.Module):
    """A convolution (3 → 4) of an image 7x9, ``then``, and, where that gives an image, its mean and a linear layer."""

    def __init__(self, then, classes=4, **layers):
        super().__init__()
        self.stem, self.then = nn.Conv2d(3, 4, 3, padding=1), then
        self.head = nn.Linear(classes, 2)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        x = self.then(self, self.stem(x))
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)


class Same(nn.Conv2d):
    """Padded by its own forward pass, more on one side than on the other."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 1, 2)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class DropPath(nn.Module):
    """As timm's."""

    def __init__(self, drop_prob, scale_by_keep):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        if not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * (kept.div_(1 - self.drop_prob) if self.scale_by_keep else kept)


class BatchNormAct(nn.BatchNorm2d):
    """As timm's: BatchNorm, dropout and an activation in one layer."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


def attention(s, x):
    B, C, H, W = x.shape
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([s.token.expand(B, -1, -1), x], dim=1) + s.position
    q, k, v = s.qkv(s.norm(x)).reshape(B, H * W + 1, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
    x = x + s.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, -1, C))
    return x[:, 0]


def last(s, x):
    y = s.norm(x.permute(0, 2, 3, 1))
    return x + (s.scale * s.narrow(F.gelu(s.wide(y)))).permute(0, 3, 1, 2)


def shuffled(s, x):
    a, b = x.chunk(2, dim=1)
    x = torch.cat((a, s.c(b)), 1)
    B, C, H, W = x.size()
    return x.view(B, 2, C // 2, H, W).transpose(1, 2).contiguous().view(B, -1, H, W)


def gated(s, x):
    g = s.c(F.adaptive_avg_pool2d(x, 1)).sigmoid()
    return x * g.expand_as(x)


def eca(s, x):
    g = s.c(x.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid().view(x.shape[0], -1, 1, 1)
    return x * g


def in_place(s, x):
    x += 1
    x = x.mul_(2)
    x = F.hardtanh(x, -1.0, 2.0, True)
    return F.relu6(s.c(x), inplace=True)


CASES = {
    # module, counts of nodes besides Input, the stem, the mean and the head
    "relu6 by its limits": (Net(lambda s, x: F.hardtanh(x, 0.0, 6.0)), {"Activation": 1}),
    "hardtanh": (Net(lambda s, x: F.hardtanh(x, -1.0, 1.0)), {"Function": 1, "Pool": -1}),
    "gelu, tanh": (Net(lambda s, x: s.a(x), a=nn.GELU("tanh")), {"Activation": 1}),
    "slope": (Net(lambda s, x: s.a(x), a=nn.LeakyReLU(0.2, inplace=True)), {"Activation": 1}),
    "elu": (Net(lambda s, x: s.a(x), a=nn.ELU(0.5)), {"Activation": 1}),
    "prelu": (Net(lambda s, x: s.a(x), a=nn.PReLU(4)), {"Function": 1, "Pool": -1}),
    "groups": (Net(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, 3, groups=2)), {"GeneralConv": 1}),
    "dilated": (Net(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, 3, dilation=2)), {"GeneralConv": 1}),
    "dilated 1x1": (Net(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, 1, dilation=2)), {"Conv": 1}),
    "rectangular": (Net(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, (1, 3), (1, 2), (0, 1))), {"GeneralConv": 1}),
    "same": (Net(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, 3, padding="same", dilation=2)), {"GeneralConv": 1}),
    "same, even": (Net(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, 2, padding="same")), {"Conv": 1, "Function": 1}),
    "valid": (Net(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, 3, padding="valid")), {"Conv": 1}),
    "circular": (Net(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="circular")),
                 {"Conv": 1, "Function": 1}),
    "own padding": (Net(lambda s, x: s.c(x), c=Same(4, 4, 3, 2, groups=4)), {"GeneralConv": 1, "Function": 1}),
    "a weight of no layer": (Net(lambda s, x: F.conv2d(x, s.w), w=nn.Parameter(torch.rand(4, 4, 1, 1))),
                             {"Function": 1, "Pool": -1}),
    "pools": (Net(lambda s, x: F.max_pool2d(F.avg_pool2d(s.p(x), 3, 1, 1), (1, 2)), p=nn.MaxPool2d(2, ceil_mode=True)),
              {"Function": 1, "Pool": -1}),
    "norm and activation": (Net(lambda s, x: s.n(x), n=BatchNormAct(4)), {"Norm": 1, "Activation": 1}),
    "norm of features": (Net(lambda s, x: s.n(x.mean((2, 3))), n=nn.BatchNorm1d(4)), {"Norm": 1}),
    "norm of a row": (Net(lambda s, x: s.n(x.flatten(2)).view(-1, 4, 7, 9), n=nn.BatchNorm1d(4)),
                      {"Norm": 1}),
    "group norm": (Net(lambda s, x: s.n(x), n=nn.GroupNorm(2, 4)), {"Function": 1, "Pool": -1}),
    "last": (Net(last, norm=nn.LayerNorm(4), wide=nn.Linear(4, 6), narrow=nn.Linear(6, 4), scale=nn.Parameter(
        torch.ones(4))), {"Function": 2, "PointConv": 2, "Activation": 1, "Add": 1}),
    "attention": (Net(attention, norm=nn.LayerNorm(4), qkv=nn.Linear(4, 12), out=nn.Linear(4, 4), token=nn.Parameter(
        torch.rand(1, 1, 4)), position=nn.Parameter(torch.rand(1, 64, 4))),
        {"Function": 4, "PointConv": 2, "Add": 1, "Pool": -1}),
    "shuffled": (Net(shuffled, c=nn.Conv2d(2, 2, 1)), {"Function": 2, "Conv": 1, "Pool": -1}),
    "gate": (Net(gated, c=nn.Conv2d(4, 4, 1)), {"Pool": 1, "Conv": 1, "Activation": 1, "Gate": 1}),
    "gate by a row": (Net(eca, c=nn.Conv1d(1, 1, 3, padding=1)), {"Pool": 1, "Function": 1, "Gate": 1}),
    "in place": (Net(in_place, c=nn.Conv2d(4, 4, 1)), {"Function": 1, "Conv": 1, "Activation": 1}),
    "number": (Net(lambda s, x: sum([x, x]) * torch.full((1,), 0.5)), {"Add": 1, "Function": 1, "Pool": -1}),
    "halves": (Net(lambda s, x: torch.cat([s.c(x[..., :4]), x[..., 4:]], -1), c=nn.Conv2d(4, 4, 1)),
               {"Function": 2, "Conv": 1, "Pool": -1}),
    "dropout": (Net(lambda s, x: s.e(F.dropout(s.d(x), 0.1, s.training)), d=nn.Dropout2d(0.3), e=nn.Dropout(0.0)),
                {"Dropout": 2}),
    "dropout of features": (Net(lambda s, x: s.d(s.c(x).flatten(1)), 252, c=nn.Conv2d(4, 4, 1), d=nn.Dropout(0.3)),
                            {"Dropout": 1, "Conv": 1, "Pool": -1}),
    "drop path": (Net(lambda s, x: s.e(x + s.d(x)), d=DropPath(0.3, False), e=DropPath(0.3, True)),
                  {"Dropout": 2, "Add": 1}),
    "stochastic depth": (Net(lambda s, x: x + s.d(x), d=StochasticDepth(0.5, "row")), {"Dropout": 1, "Add": 1}),
    "no linear end": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                      {"ReLU": 1, "Logits": 1, "Linear": -1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_nodes_compute_what_the_module_does(case):
    module, counts = CASES[case]
    network = trace(module, (3, 7, 9), trains=True)
    found = Counter(type(node).__name__ for node in network.nodes)
    found.subtract({"Input": 1, "Conv": 1, "Pool": 1, "Linear": 1})
    assert {kind: count for kind, count in found.items() if count} == counts
    assert trace(module.train(), (3, 7, 9)) == network.evaluated
    own = moved(module, 3)
    state = {name: value.detach().clone() for name, value in own.state_dict().items()}
    for training in (False, True):
        for batch in (1, 4):
            x = torch.rand(batch, 3, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
            own.load_state_dict(state)
            own.train(training)
            if training and batch == 1 and "norm of features" in case:
                continue
            with torch.no_grad():
                torch.manual_seed(5)
                expected = own(x)
                torch.manual_seed(5)
                actual = interpret(network if training else network.evaluated, state, x, training)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def node(case, kind, where=(3, 7, 9)):
    (found,) = [n for n in trace(CASES[case][0], where, trains=True).nodes if type(n) is kind and n.name != "stem"]
    return found


def test_what_the_nodes_say():
    assert node("rectangular", GeneralConv) == GeneralConv(
        "c", ("stem",), (4, 7, 5), (4, 7, 9), True, (1, 3), (1, 2), (0, 1), (1, 1), 1
    )
    assert node("same", GeneralConv).padding == (2, 2)
    assert node("own padding", GeneralConv).depthwise
    assert node("dilated 1x1", Conv).name == "c"
    assert node("slope", Activation).kind == "leaky_relu(0.2)"
    assert node("stochastic depth", Dropout) == Dropout("d", ("stem",), (4, 7, 9), 0.5, "image", True, "image")
    assert node("dropout of features", Dropout).layout == "flat"
    prelu = node("prelu", Function)
    assert (prelu.name, prelu.layouts, prelu.layout, prelu.trained, prelu.tensors) == (
        "mean", ("image",), "flat", ("a.weight",), ((4,),)
    )  # fmt: skip
    wide, narrow = [n for n in trace(CASES["last"][0], (3, 7, 9)).nodes if isinstance(n, PointConv)]
    assert (wide.name, wide.shape, wide.weight_shape, narrow.shape) == ("wide", (6, 7, 9), (6, 4), (4, 7, 9))

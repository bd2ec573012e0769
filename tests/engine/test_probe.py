"""Networks that do more than their recorded operations say: refused by name, and left exactly as they were."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torchvision.ops import StochasticDepth

from fastensdistill.engine import probe
from fastensdistill.engine.probe import compared, construction
from fastensdistill.errors import InputError
from fastensdistill.network.trace import trace
from tests.network import models
from tests.untyped import untyped

SIZE = (3, 8, 8)


class Net(nn.Module):
    """conv, BatchNorm, ReLU, ``then``, mean, linear."""

    def __init__(self, then=lambda self, x: x, train=None, **attributes):
        super().__init__()
        self.conv, self.bn, self.classifier = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.then, self.to_train = then, train
        for name, value in attributes.items():
            setattr(self, name, value)

    def train(self, mode=True):
        super().train(mode)
        if self.to_train:
            self.to_train(self)
        return self

    def forward(self, x):
        return self.classifier(self.then(self, F.relu(self.bn(self.conv(x)))).mean((2, 3)))


class Twice(Net):
    """The image goes through two convolutions, as in RepVGG's first block."""

    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.classifier(F.relu(self.bn(self.conv(x)) + self.other(x)).mean((2, 3)))


def changed(change, **options):
    net = Net(**options)
    change(net)
    return net


def without_gradient(self, x):
    with torch.no_grad():
        return self.conv2(x)


def counting(self, x):
    self.seen += 1
    return x


def moving(self, x):
    self.shift += 1
    return x


def noisy(self, x):
    torch.rand(1), random.random()
    return x


def noisy_in_training(self, x):
    if self.training:
        torch.rand(1)
    return self.d(x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def by_isinstance(self, x):
    return self.conv2(x) if isinstance(x, torch.Tensor) else x


def half_hidden(self, x):
    F.relu(self.conv2(x), inplace=True)
    return x


def tied(net):
    net.conv2.weight = net.conv.weight


class Called(nn.ReLU):
    def __call__(self, x):
        return super().__call__(x) * 2


class Scaled(torch.autograd.Function):
    """The identity, with twice the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


REFUSED = {
    # what stands in no operation
    "forward hook": (changed(lambda n: n.bn.register_forward_hook(lambda m, i, o: 2 * o)), "'bn': has a forward hook"),
    "pre-hook": (changed(lambda n: n.conv.register_forward_pre_hook(lambda m, i: i)), "'conv': has a forward pre"),
    "hook of all": (changed(lambda n: n.register_forward_hook(lambda m, i, o: o)), "outermost module: has a f"),
    "backward hook": (changed(lambda n: n.bn.register_full_backward_hook(lambda m, i, o: i)), "has a backward hook"),
    "hook of a gradient": (changed(lambda n: n.conv.weight.register_hook(lambda g: 0 * g)), "'conv.weight' has a hook"),
    "weight norm": (changed(lambda n: parametrizations.weight_norm(n.conv)), "'conv': its 'weight' is parametrised"),
    "spectral norm": (changed(lambda n: parametrizations.spectral_norm(n.conv)), "its 'weight' is parametrised"),
    "old spectral norm": (changed(lambda n: nn.utils.spectral_norm(n.conv)), "'conv': has a forward pre-hook"),
    "pruned": (changed(lambda n: prune.l1_unstructured(n.conv, "weight", 0.5)), "'conv': has a forward pre-hook"),
    "replaced forward": (changed(lambda n: setattr(n.bn, "forward", lambda x: 2 * x)), "'bn': its 'forward' was repl"),
    "replaced train": (changed(lambda n: setattr(n, "train", lambda mode=True: n)), "its 'train' was replaced"),
    "call": (Net(lambda s, x: s.act(x), act=Called()), "module 'act': Called has a __call__ of its own"),
    "half precision": (Net().half(), "'conv.weight' is torch.float16; the fused engine expects float32"),
    "mixed precision": (changed(lambda n: n.conv.double()), "is torch.float32 on cpu, but 'conv.weight' torch.float64"),
    # modes
    "frozen BatchNorm": (Net(train=lambda n: n.bn.eval()), "'bn', operation 'bn': BatchNorm stays in evaluation"),
    "BatchNorm that trains": (Net(train=lambda n: n.bn.train()), "BatchNorm stays in training mode while the network"),
    "frozen in forward": (Net(lambda s, x: (s.bn.eval(), x)[1]), "BatchNorm stays in evaluation mode"),
    "dropout that stays": (Net(lambda s, x: F.dropout(x, 0.5, True)), "drops values with p=0.5 in evaluation mode too"),
    "dropout by default": (Net(lambda s, x: F.dropout(x)), "drops values with p=0.5 in evaluation mode too"),
    "layer that stays": (
        Net(lambda s, x: s.d(x), lambda n: n.d.train(), d=nn.Dropout(0.1)),
        "module 'd', operation 'dropout': drops values with p=0.1",
    ),
    "by mode": (Net(lambda s, x: F.relu(x) if s.training else x), "has other operations in training than"),
    # settings
    "momentum": (changed(lambda n: setattr(n.bn, "momentum", None)), "BatchNorm with momentum=None"),
    "no statistics": (changed(lambda n: setattr(n, "bn", nn.BatchNorm2d(4, track_running_stats=False))), "stats=False"),
    "no shift": (changed(lambda n: setattr(n.bn, "bias", None)), "BatchNorm with bias=None"),
    "thinned": (changed(lambda n: setattr(n.conv, "weight", nn.Parameter(torch.rand(4, 2, 3, 3)))), "has shape (4, 2"),
    "indices": (Net(lambda s, x: s.p(x), p=nn.MaxPool2d(2, return_indices=True)), "has no attribute 'mean'"),
    "a weight that is computed": (
        Net(lambda s, x: s.c(x), c=Standardised(4, 4, 1)),
        "computes with 'c.weight', a layer's",
    ),
    "statistics of instances": (
        Net(lambda s, x: s.i(x), i=nn.InstanceNorm2d(4, track_running_stats=True)),
        "module 'i', operation 'instance_norm': overwrites a tensor of the module",
    ),
    "used twice": (
        Net(lambda s, x: x * s.w + s.c(x * s.w), w=nn.Parameter(torch.rand(4, 1, 1)), c=nn.Conv2d(4, 4, 1)),
        "'w' is used by more than one operation",
    ),
    # tensors
    "attribute": (Net(lambda s, x: x + s.shift, shift=torch.ones(4, 1, 1)), "neither a parameter nor a buffer"),
    "hidden parameter": (
        Net(lambda s, x: x + s.hidden[0], hidden=[torch.ones(4, 1, 1, requires_grad=True)]),
        "neither a parameter nor a buffer",
    ),
    "noise of the host": (
        Net(lambda s, x: x + torch.rand(4, 1, 1)),
        "draws random numbers in evaluation mode",
    ),
    "named as the image": (Net(lambda s, x: s.input(x), input=nn.Conv2d(4, 4, 1)), "has the name of the image"),
    "hidden overwriting": (
        Net(half_hidden, conv2=nn.Conv2d(4, 4, 1)),
        "gives no gradient of 'conv2.weight' in training mode",
    ),
    # what only the numbers show
    "random": (Net(noisy), "draws random numbers in evaluation mode"),
    "random where dropout is": (
        Net(noisy_in_training, d=nn.Dropout(0.1)),
        "draws other random numbers in training mode",
    ),
    "over images": (
        Net(lambda s, x: x - x.mean(0, keepdim=True)),
        "logits of one image by itself, in evaluation mode,: ",
    ),
    "counter": (Net(counting, seen=0), "'seen' changes from 0 to 1 in a forward"),
    "buffer": (changed(lambda n: n.register_buffer("shift", torch.zeros(2)), then=moving), "its 'shift' changes in"),
    "by what it is given": (Net(by_isinstance, conv2=nn.Conv2d(4, 4, 1)), "logits in evaluation mode: apart by"),
    "without gradient": (Net(without_gradient, conv2=nn.Conv2d(4, 4, 1)), "gives no gradient of 'image' in"),
}


def everything(net):
    """All that a caller could notice of ``net`` and of the generators."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    flags = [p.requires_grad for p in net.parameters()]
    attributes = [sorted(vars(m)) for m in net.modules()]
    generators = torch.get_rng_state().tolist(), random.getstate(), untyped(np.random.get_state())[1].tolist()
    return state, (modes, flags, attributes, getattr(net, "seen", 0), generators)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_left_as_it_was(case):
    net, message = REFUSED[case]
    (state, rest), kind = everything(net), type(net).__name__
    with pytest.raises(InputError) as error:
        compared(net, SIZE, trains=True)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{kind}: ")
    assert "\n" not in str(error.value)
    after, others = everything(net)
    assert rest == others
    assert all(torch.equal(value, state[name]) for name, value in after.items())


@pytest.mark.parametrize(
    "net",
    [
        models.odd(), models.vgg(), models.resnet(), models.preresnet(), models.padded(), Net(),
        Net(lambda s, x: F.dropout2d(F.dropout(x, 0.2, s.training), 0.3, s.training)),
        Net(lambda s, x: s.d(F.gelu(x * s.w)), w=nn.Parameter(torch.rand(4, 1, 1)), d=StochasticDepth(0.4, "row")),
        Twice(),
        Net(lambda s, x: F.avg_pool2d(x, 2, 2, 0, False, False)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
                      nn.Flatten(), nn.Linear(4, 2)),
        changed(lambda n: nn.init.zeros_(n.classifier.weight)),
        changed(lambda n: n.conv.weight.requires_grad_(False)),
        changed(lambda n: nn.init.constant_(n.conv.weight, float("nan"))),
    ],
    ids=["odd", "vgg", "resnet", "preresnet", "padded", "plain", "dropout", "stochastic depth", "image read twice",
         "counting", "in place", "zero", "frozen", "nan"],
)  # fmt: skip
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_right_networks_pass(net, context, monkeypatch):
    monkeypatch.setattr(probe, "_compared", type(probe._compared)())
    state, rest = everything(net)
    with context():
        network = compared(net, (3, 9, 9) if type(net) is models.Odd else (3, 20, 20), trains=True)
    after, others = everything(net)
    assert rest == others
    assert all(torch.equal(value.nan_to_num(), state[name].nan_to_num()) for name, value in after.items())
    assert all(p.grad is None for p in net.parameters())
    assert network.output == "classifier" if isinstance(net, Net) else list(dict(net.named_modules()))[-1]


def test_what_is_only_evaluated_may_train_otherwise():
    assert compared(Net(train=lambda n: n.bn.eval()), SIZE) == compared(Net(), SIZE)
    with pytest.raises(InputError, match="gives no gradients"):
        compared(Silent(), SIZE)
    assert compared(Silent(), SIZE, gradient=False)


class Silent(Net):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def test_a_gradient_of_its_own_is_seen():
    class Reversed(Net):
        def forward(self, x):
            return super().forward(x) if isinstance(x, torch.fx.Proxy) else Scaled.apply(super().forward(x))

    assert compared(Reversed(), SIZE, gradient=False)
    with pytest.raises(InputError, match=r"gradient of the image: apart by 1e.00 from what the layers"):
        compared(Reversed(), SIZE)


def test_hooks_of_every_module_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        with pytest.raises(InputError, match="a forward hook is registered for every module"):
            trace(Net(), SIZE)
    finally:
        handle.remove()


def test_compared_once_and_again_when_anything_differs(monkeypatch):
    runs = []
    monkeypatch.setattr(probe._Probe, "run", lambda self, *a: runs.append(a))
    net = models.preresnet(11)
    for _ in range(2):
        compared(net, (3, 11, 11))
        compared(copy.deepcopy(net), (3, 11, 11))
    assert len(runs) == 1
    compared(net, (3, 11, 11), trains=True)
    untyped(net).drop_rate = 0.5
    compared(net, (3, 11, 11))
    assert len(runs) == 3
    assert construction(net) is not None
    net.kept = torch.zeros(1)
    assert construction(net) is None


def test_the_engine_raises_nothing_else():
    """Whatever a network does when it is copied or recorded, one line says so."""

    class Uncopied(Net):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies\nof this")

    class Failing(Net):
        def train(self, mode=True):
            raise KeyError("mode")

    with pytest.raises(InputError, match=r"^Uncopied cannot be copied: no copies$"):
        compared(Uncopied(), SIZE)
    with pytest.raises(InputError, match=r"^Failing: cannot be traced after module '': 'mode'$"):
        compared(Failing(), SIZE)
    with pytest.raises(InputError, match=r"^Net: cannot be traced after module 'p': argument of type: <class 'set'>"):
        compared(Net(lambda s, x: s.p(x), p=nn.MaxPool2d(untyped({2}))), SIZE)

"""What an ``nn.Module`` is traced into, and the one error for what cannot be."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.models import create_model
from fastensdistill.models.layers import Normalize
from fastensdistill.network.nodes import Add, Affine, Conv, Dropout, Linear, Norm, Pad, Pool, ReLU
from fastensdistill.network.trace import trace
from tests.network import models


@pytest.mark.parametrize(
    ("name", "million"),
    [
        # counted by hand from the papers' descriptions
        ("wrn28_1", 54.97),
        ("wrn28_4", 845.62),
        ("wrn28_10", 5243.39),
        ("resnet32", 68.87),
        ("resnet32x2", 269.41),
        ("resnet32x4", 1066.87),
    ],
)
def test_multiply_accumulates_of_the_papers_networks(name, million):
    assert round(trace(create_model(name, 100), (3, 32, 32)).macs / 1e6, 2) == million


@pytest.mark.parametrize(
    ("name", "size", "counts"),
    [
        # convolutions, norms, ReLUs, additions, poolings; linear layers
        ("resnet18", 224, (20, 20, 17, 8, 2, 1)),
        ("resnet34", 224, (36, 36, 33, 16, 2, 1)),
        ("resnet50", 224, (53, 53, 49, 16, 2, 1)),
        ("resnet18", 32, (20, 20, 17, 8, 1, 1)),  # the last image is 1x1: its pooling is absorbed
        ("vgg11_bn", 224, (8, 8, 10, 0, 5, 3)),  # ends at 7x7, as the adaptive pooling wants
        ("vgg11_bn", 32, (8, 8, 10, 0, 6, 3)),  # ends at 1x1, which the adaptive pooling repeats
    ],
)
def test_torchvision(name, size, counts):
    network = trace(getattr(torchvision.models, name)(num_classes=10), (3, size, size))
    kinds = (Conv, Norm, ReLU, Add, Pool, Linear)
    assert tuple(sum(isinstance(node, kind) for node in network.nodes) for kind in kinds) == counts
    assert not any(isinstance(node, Dropout) for node in network.nodes)
    assert all(node.unbiased for node in network.nodes if isinstance(node, Norm))


def test_nodes_of_a_network_with_everything():
    network = trace(models.odd(), (3, 9, 9))
    found = [(type(node), node.name, node.inputs, node.shape) for node in network.nodes[1:]]
    assert found == [
        (Affine, "normalize", ("input",), (3, 9, 9)),
        (Conv, "a", ("normalize",), (6, 9, 9)),
        (Norm, "bn1", ("a",), (6, 9, 9)),
        (Norm, "bn2", ("a",), (6, 9, 9)),
        (Add, "add", ("bn1", "bn2"), (6, 9, 9)),
        (ReLU, "relu", ("add",), (6, 9, 9)),
        (Conv, "b", ("relu",), (6, 9, 9)),
        (Add, "add#2", ("b", "add"), (6, 9, 9)),
        (ReLU, "relu#2", ("add#2",), (6, 9, 9)),
        (Add, "add#3", ("relu#2", "a"), (6, 9, 9)),
        (Pool, "max_pool2d", ("add#3",), (6, 9, 9)),
        (Norm, "bn3", ("max_pool2d",), (6, 9, 9)),
        (Conv, "c", ("bn3",), (10, 5, 5)),
        (Norm, "bn4", ("c",), (10, 5, 5)),
        (Pool, "avg_pool2d", ("bn4",), (10, 2, 2)),
        (ReLU, "relu#3", ("avg_pool2d",), (10, 2, 2)),
        (Pool, "adaptive_avg_pool2d", ("relu#3",), (10, 3, 3)),
        (Linear, "hidden", ("adaptive_avg_pool2d",), (12, 1, 1)),
        (ReLU, "relu#4", ("hidden",), (12, 1, 1)),
        (Linear, "classifier", ("relu#4",), (5, 1, 1)),
    ]
    assert [node.unbiased for node in network.nodes if isinstance(node, Norm)] == [False, True, False, True]
    assert [node.bias for node in network.nodes if isinstance(node, Conv)] == [True, True, True]


def test_equal_architectures_are_equal_networks():
    first, second = trace(models.resnet(0), (3, 8, 8)), trace(models.resnet(1), (3, 8, 8))
    assert first == second
    assert first != trace(models.preresnet(0), (3, 8, 8))
    assert sum(isinstance(node, Pad) for node in first.nodes) == 1


class Lambda(nn.Module):
    """conv1 (3 → 4), then ``then``, then the mean and a linear layer."""

    def __init__(self, then, **layers):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.classifier = nn.Linear(4, 2)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.then = then

    def forward(self, x):
        return self.classifier(self.then(self, self.conv1(x)).mean((2, 3)))


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)
        self.classifier = nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x)
        y = self.relu(x)
        return self.classifier((x + y).mean((2, 3)))


def branching(self, x):
    return x if x.sum() > 0 else -x


class TwoImages(nn.Module):
    def forward(self, x, y):
        return x + y


def stacked(self, x):
    """Two images become one, which an odd number of images does not allow."""
    return x.reshape(x.shape[0] // 2, 8, 8, 8)


def by_the_batch(self, x):
    return x if x.shape[0] > 1 else -x


def counted(self, x):
    return x * sum(1 for _ in range(x.shape[0]))


def assigned(self, x):
    x[:, 0] = 0
    return x


def halved(self, x):
    y = x[:, :2]
    y += 1
    return x


REFUSED = [
    (Lambda(branching), "cannot be traced after module 'conv1': symbolically traced variables"),
    (Lambda(by_the_batch), "cannot be traced after module 'conv1': depends on the number of images"),
    (Lambda(counted), "cannot be traced after module 'conv1': depends on the number of images"),
    (Lambda(lambda s, x: x * len(x)), "cannot be traced after module 'conv1': depends on the number of images"),
    (Lambda(lambda s, x: x * x.mean().item()), "the outermost module, operation 'item': RuntimeError: "),
    (Lambda(stacked), "the outermost module, operation 'reshape': RuntimeError: shape '[1, 8, 8, 8]' is invalid"),
    (Lambda(lambda s, x: s.conv2(s.conv2(x)), conv2=nn.Conv2d(4, 4, 1)), "a layer with parameters is used twice"),
    (Lambda(lambda s, x: s.bn(x), bn=nn.BatchNorm2d(4, affine=False)), "BatchNorm with affine=False, weight=None"),
    (Lambda(lambda s, x: s.p(x), p=nn.MaxPool2d(9)), "a window of 9 does not fit into an image of 8x8"),
    (Lambda(lambda s, x: s.p(x), p=nn.AvgPool2d((1, 9))), "module 'p', operation 'avg_pool2d': RuntimeError: "),
    (Lambda(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, (1, 9))), "a window of 1x9 does not fit into an image of 8x8"),
    (Lambda(lambda s, x: s.c(x), c=nn.Conv2d(5, 4, 3, groups=1)), "takes 5 channels, but its input has 4"),
    (Lambda(lambda s, x: s.n(x), n=Normalize((0.5,) * 4, (1.0,) * 4)), "normalisation must stand behind the image"),
    (Lambda(lambda s, x: x + s.t, t=torch.ones(4, 1, 1)), "tensor that is neither a parameter nor a buffer"),
    (Lambda(lambda s, x: torch.bernoulli(x.sigmoid())), "operation 'bernoulli': draws random numbers"),
    (Lambda(lambda s, x: F.alpha_dropout(x, 0.5, True)), "operation 'alpha_dropout': draws random numbers"),
    (Lambda(lambda s, x: F.rrelu(x, training=True)), "operation 'rrelu': draws random numbers"),
    (Lambda(lambda s, x: F.scaled_dot_product_attention(x, x, x, None, 0.1)), "drops values with p=0.1 inside of att"),
    (Lambda(lambda s, x: F.batch_norm(x, None, None, training=True)), "takes statistics over the images of a batch"),
    (Lambda(lambda s, x: x.as_strided((3, 4, 8, 8), (1, 1, 1, 1))), "looks at a value by its strides"),
    (Lambda(assigned), "operation 'setitem': overwrites in place what 'mean' reads afterwards"),
    (Lambda(halved), "operation 'iadd': overwrites in place what 'mean' reads afterwards"),
    (Lambda(lambda s, x: x + s.n.add_(1), n=nn.Parameter(torch.ones(1))), "operation 'add_': overwrites a tensor of"),
    (
        Lambda(lambda s, x: x + s.c(x.mean(0)), c=nn.Conv2d(4, 4, 1)),
        "takes a tensor of shape (4, 8, 8); expected one row for",
    ),
    (Lambda(lambda s, x: x.sum(0, keepdim=True)), "does not return one tensor of shape (batch, classes)"),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "does not return one tensor of shape (batch, classes)"),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(6, 2)), "does not return one tensor of shape (batch, classes)"),
    (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm2d(4)),
        "a tensor of shape (batch, 144); expected image",
    ),
    (nn.Sequential(nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(4, 2)), "takes 5 channels, but its input has 3"),
    (TwoImages(), "missing 1 required positional argument: 'y'"),
    (Overwriting(), "module 'relu', operation 'relu': overwrites in place what 'add' reads afterwards"),
]


@pytest.mark.parametrize(("module", "message"), REFUSED, ids=[message[-40:] for _, message in REFUSED])
def test_refusals_name_the_module_and_the_operation(module, message):
    with pytest.raises(InputError) as error:
        trace(module, (3, 8, 8))
    assert message in str(error.value)
    assert str(error.value).startswith(type(module).__name__ + ": ")
    assert "\n" not in str(error.value)

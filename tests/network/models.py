"""Networks of the tests, small, with every parameter and statistic moved off its initial value."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from fastensdistill.models.layers import BatchNorm2d, Normalize, PadShortcut
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.models.resnet import ResNet


class Odd(nn.Module):
    """What the others lack: sums, ReLUs and BatchNorms in unusual places, functional forms, biases, mean pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
        self.a = nn.Conv2d(3, 6, 3, padding=1, bias=True)
        self.b = nn.Conv2d(6, 6, 1)
        self.bn1, self.bn2, self.bn3 = BatchNorm2d(6), nn.BatchNorm2d(6), BatchNorm2d(6)
        self.c = nn.Conv2d(6, 10, 5, stride=2, padding=2)
        self.bn4 = nn.BatchNorm2d(10)
        self.hidden = nn.Linear(90, 12)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.normalize(x))
        y = self.bn1(x) + self.bn2(x)  # two BatchNorms of one value
        z = torch.relu(self.b(F.relu(y)) + y).add(x)  # a sum, a ReLU, a sum; three readers of y and x
        z = F.max_pool2d(z, 3, stride=1, padding=1)
        z = self.bn3(z)  # BatchNorm after a pooling, no ReLU after it
        z = F.avg_pool2d(self.bn4(self.c(z)), 2).relu()
        z = F.adaptive_avg_pool2d(z, (3, 3))
        return self.classifier(F.dropout(self.hidden(z.flatten(1)).relu(), 0.0))


class Padded(nn.Module):
    """Zero-padded shortcuts in unusual places.

    One without a stride, beside a BatchNorm, two in one sum, with a strided 1x1 convolution, before a convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.wide, self.bn2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.strided, self.bn3 = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.pad1, self.pad2, self.pad3, self.pad4 = (PadShortcut(s, 2) for s in (1, 2, 2, 2))
        self.shortcut, self.pad5, self.pad6 = nn.Conv2d(10, 12, 1, stride=2), PadShortcut(2, 2), PadShortcut(1, 1)
        self.last, self.classifier = nn.Conv2d(13, 5, 3, padding=1), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = self.bn2(self.wide(x)) + self.pad1(x)
        x = self.strided(F.relu(self.bn3(x))) + self.pad2(x)
        x = F.relu(self.pad3(x) + self.pad4(x))
        x = self.shortcut(x) + self.pad5(x)
        return self.classifier(F.relu(self.last(self.pad6(x))).mean((2, 3)))


class Shortcuts(nn.Module):
    """Blocks whose 1x1 shortcuts stand where those of the others do not.

    Before the main convolution, of an activated input that both read, with a bias, in front of a BatchNorm; two of
    them in one sum; a bottleneck, whose main convolutions are 1x1, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.down1, self.main1 = nn.Conv2d(4, 6, 1, 2), nn.Conv2d(4, 6, 3, 2, 1, bias=False)
        self.bn2, self.main2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(6)
        self.down2, self.down_bn = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.narrow, self.bn4 = nn.Conv2d(6, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.middle, self.bn5 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.wide, self.bn6 = nn.Conv2d(2, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.one, self.other = nn.Conv2d(8, 5, 1, bias=False), nn.Conv2d(8, 5, 1, 1, bias=False)
        self.bn7, self.classifier = nn.BatchNorm2d(5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        s = self.down1(x)  # before the main branch
        x = self.main2(F.relu(self.bn2(self.main1(x)))) + s
        x = F.relu(self.bn3(x))
        s = self.down_bn(self.down2(x))
        y = F.relu(self.bn4(self.narrow(x)))
        y = self.bn6(self.wide(F.relu(self.bn5(self.middle(y)))))
        x = F.relu(y + s)
        x = F.relu(self.bn7(self.one(x) + self.other(x)))
        return self.classifier(x.mean((2, 3)))


def moved(module: nn.Module, seed: int) -> nn.Module:
    """``module`` in float64 with random scales, shifts, biases, factors and running statistics."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            if name.endswith(("running_var", "bn.weight")):
                value.copy_(0.5 + noise)
            elif "normalize" not in name and value.is_floating_point():
                value.add_(0.3 * (noise - 0.5) if value.dim() < 3 else 0.1 * (noise - 0.5))
    return module


def preresnet(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return moved(PreResNet(7, blocks=(1, 2), in_planes=4, widen=2, **options), seed)


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return moved(ResNet(7, blocks=(2, 1), in_planes=4), seed)


def odd(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return moved(Odd(), seed)


def padded(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return moved(Padded(), seed)


def shortcuts(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return moved(Shortcuts(), seed)


def resnet18(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return moved(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=7), seed)


def vgg(seed: int = 0) -> nn.Module:
    """torchvision's VGG-BN, narrow: its layers and head, a fraction of the weights."""
    torch.manual_seed(seed)
    layers = torchvision.models.vgg.make_layers([8, "M", 8, 12, "M", 12], batch_norm=True)
    model = torchvision.models.vgg.VGG(layers, num_classes=7, dropout=0.0)
    model.avgpool = nn.AdaptiveAvgPool2d(3)
    model.classifier[0], model.classifier[3] = nn.Linear(108, 20), nn.Linear(20, 16)
    model.classifier[6] = nn.Linear(16, 7)
    return moved(model, seed)

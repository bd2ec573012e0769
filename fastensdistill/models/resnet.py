"""Post-activation residual networks for small images: ResNet-32xk (docs/method.md, Networks)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastensdistill.models.layers import BatchNorm2d, Normalize, PadShortcut, conv3x3, initialize


class Block(nn.Module):
    """conv3x3(stride)-BN-ReLU-conv3x3-BN, add the shortcut, ReLU. The shortcut has no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else PadShortcut(stride, out_channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class ResNet(nn.Module):
    """conv3x3-BN-ReLU, groups of residual blocks, global mean, linear. Input (B, channels, H, W) in [0, 1].

    The stem has ``in_planes`` channels, group i ``in_planes·widen·2^i`` and stride 2 but for the first.
    ResNet-32xk is ``blocks=(5, 5, 5), widen=k``.
    """

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int] = (5, 5, 5),
        widen: int = 1,
        in_planes: int = 16,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.25, 0.25, 0.25),
    ):
        super().__init__()
        self.normalize = Normalize(mean, std)
        channels = in_planes
        self.stem = conv3x3(len(mean), channels)
        self.bn = BatchNorm2d(channels)
        self.relu = nn.ReLU()
        groups = []
        for i, count in enumerate(blocks):
            width = in_planes * widen * 2**i
            layers = []
            for j in range(count):
                layers.append(Block(channels, width, stride=2 if i > 0 and j == 0 else 1))
                channels = width
            groups.append(nn.Sequential(*layers))
        self.groups = nn.Sequential(*groups)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.relu(self.bn(self.stem(self.normalize(x)))))
        return self.classifier(self.flatten(self.pool(x)))

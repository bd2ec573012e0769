"""Pre-activation residual networks for small images: PreResNet and Wide ResNet WRN-28-k (docs/method.md, Networks)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastensdistill.models.layers import BatchNorm2d, Normalize, conv1x1, conv3x3, initialize


class PreActBlock(nn.Module):
    """BN-ReLU-conv3x3(stride)-BN-ReLU-conv3x3 plus the shortcut, which takes the raw block input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(out_channels, out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.bn1(x)))
        y = self.conv2(self.relu2(self.bn2(y)))
        return y + self.shortcut(x)


class PreResNet(nn.Module):
    """conv3x3, groups of pre-activation blocks, BN-ReLU, global mean, linear. Input (B, channels, H, W) in [0, 1].

    ``blocks`` gives the number of blocks of each group; group i has width ``in_planes·widen·2^i`` and stride 2 but for
    the first. WRN-28-k is ``blocks=(4, 4, 4), in_planes=16, widen=k``.
    """

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int] = (4, 4, 4),
        widen: int = 1,
        in_planes: int = 16,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.25, 0.25, 0.25),
    ):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stem = conv3x3(len(mean), in_planes)
        channels = in_planes
        groups = []
        for i, count in enumerate(blocks):
            width = in_planes * widen * 2**i
            layers = []
            for j in range(count):
                layers.append(PreActBlock(channels, width, stride=2 if i > 0 and j == 0 else 1))
                channels = width
            groups.append(nn.Sequential(*layers))
        self.groups = nn.Sequential(*groups)
        self.bn = BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.stem(self.normalize(x)))
        return self.classifier(self.flatten(self.pool(self.relu(self.bn(x)))))

"""Networks by name. ``create_model("wrn28_4", num_classes=100)``; :data:`MODELS` lists the names.

Our own networks normalise their input themselves; torchvision's and timm's are wrapped in :class:`Normalized`, so
every model takes images in [0, 1]. A created model carries its :class:`ModelSpec` as ``model.spec``, which is what a
saved file needs to build it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastensdistill.errors import InputError, unknown
from fastensdistill.models.layers import Normalize
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.models.resnet import ResNet

TORCHVISION = ("resnet18", "resnet34", "resnet50", "mobilenet_v2", "vgg11_bn", "densenet121")


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model again: its name in the registry and the arguments it was created with."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


class Normalized(nn.Module):
    """A network from elsewhere behind its image normalisation: (B, channels, H, W) in [0, 1] → logits (B, C)."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.normalize(x))


def image_size(name: str) -> int:
    """Height and width of the images that the architecture ``name`` was made for."""
    return 224 if name in TORCHVISION else 32


def _torchvision(name: str, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    import torchvision

    _require_three_channels(name, mean)
    return Normalized(torchvision.models.get_model(name, weights=None, num_classes=num_classes), mean, std)


def _timm(name: str, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise InputError(f"model 'timm/{name}' needs timm: pip install 'fastensdistill[timm]'") from None
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    return Normalized(timm.create_model(name, num_classes=num_classes, in_chans=len(mean)), mean, std)


def _require_three_channels(name: str, mean: Sequence[float]) -> None:
    if len(mean) != 3:
        raise InputError(f"model {name!r} takes images of 3 channels; these have {len(mean)}")


MODELS: dict[str, Callable[..., nn.Module]] = {
    "preresnet": PreResNet,
    "wrn28_1": partial(PreResNet, widen=1),
    "wrn28_2": partial(PreResNet, widen=2),
    "wrn28_4": partial(PreResNet, widen=4),
    "wrn28_10": partial(PreResNet, widen=10),
    "resnet": ResNet,
    "resnet32": partial(ResNet, widen=1),
    "resnet32x2": partial(ResNet, widen=2),
    "resnet32x4": partial(ResNet, widen=4),
    **{name: partial(_torchvision, name) for name in TORCHVISION},
}


def create_model(
    name: str,
    num_classes: int,
    *,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
    **arguments: Any,
) -> nn.Module:
    """A freshly initialised model from :data:`MODELS` or ``timm/<name>``.

    ``mean`` and ``std`` normalise images in [0, 1] and set the number of input channels. ``arguments`` are the
    model's own (``blocks``, ``widen``, ``in_planes`` for PreResNet and ResNet).
    Raises InputError for an unknown name or arguments the model does not take.
    """
    if num_classes < 2:
        raise InputError(f"num_classes={num_classes}: expected at least 2")
    if len(mean) != len(std) or any(s <= 0 for s in std):
        raise InputError(f"mean={tuple(mean)}, std={tuple(std)}: expected one of each per channel, std above 0")
    build = partial(_timm, name.removeprefix("timm/")) if name.startswith("timm/") else MODELS.get(name)
    if build is None:
        raise unknown("model", name, MODELS)
    mean, std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
    try:
        model = build(num_classes=num_classes, mean=mean, std=std, **arguments)
    except TypeError as error:
        raise InputError(f"model {name!r} does not take {arguments}: {error}") from error
    model.__dict__["spec"] = ModelSpec(name, {"num_classes": num_classes, "mean": mean, "std": std, **arguments})
    return model


def _named(name: str) -> Callable[..., nn.Module]:
    def create(num_classes: int, **arguments: Any) -> nn.Module:
        return create_model(name, num_classes, **arguments)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"``create_model({name!r}, num_classes, ...)``."
    return create


preresnet = _named("preresnet")
wrn28_1 = _named("wrn28_1")
wrn28_2 = _named("wrn28_2")
wrn28_4 = _named("wrn28_4")
wrn28_10 = _named("wrn28_10")
resnet = _named("resnet")
resnet32 = _named("resnet32")
resnet32x2 = _named("resnet32x2")
resnet32x4 = _named("resnet32x4")

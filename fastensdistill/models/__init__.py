"""Networks by name. ``create_model("wrn28_4", num_classes=100)``; :data:`MODELS` lists ours and common others.

Our own networks normalise their input themselves; torchvision's and timm's are wrapped in :class:`Normalized`, so
every model takes images in [0, 1]. A created model carries its :class:`ModelSpec` as ``model.spec``, which is what a
saved file needs to build it again.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from fastensdistill.errors import InputError, unknown
from fastensdistill.models.layers import Normalize
from fastensdistill.models.normalisation import FRESH, per_channel, published, timm_config
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.models.resnet import ResNet

# The common ones of torchvision's classification models; all of them are understood
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
    if name.startswith("timm/"):
        config = timm_config(name)
        return 224 if config is None else config.input_size[-1]
    if name in MODELS and name not in TORCHVISION:
        return 32
    return 299 if name == "inception_v3" else 224


def takes_colour(name: str) -> bool:
    """Whether the architecture ``name`` takes images of three channels and no others: torchvision's do."""
    return not name.startswith("timm/") and (name in TORCHVISION or name not in MODELS)


def torchvision_models() -> list[str]:
    """All of torchvision's image classifiers."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _torchvision(name: str, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    import torchvision

    _require_three_channels(name, mean)
    # Their auxiliary heads are for training from scratch on ImageNet: in training mode they return no logits
    more: dict[str, Any] = {"googlenet": {"aux_logits": False, "init_weights": True},
                            "inception_v3": {"aux_logits": False, "init_weights": True}}.get(name, {})  # fmt: skip
    return Normalized(torchvision.models.get_model(name, weights=None, num_classes=num_classes, **more), mean, std)


def _timm(name: str, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    timm = _require_timm(name)
    try:
        return Normalized(timm.create_model(name, num_classes=num_classes, in_chans=len(mean)), mean, std)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"model 'timm/{name}' with {len(mean)} channels cannot be made: {first}") from error


def _require_timm(name: str) -> Any:
    try:
        import timm
    except ImportError:
        raise InputError(f"model 'timm/{name}' needs timm: pip install 'fastensdistill[timm]'") from None
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    return timm


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


SHAPED = tuple(name for name, build in MODELS.items() if isinstance(build, type))
"""The models whose shape (``blocks``, ``widen``, ``in_planes``) the caller sets."""


def create_model(
    name: str,
    num_classes: int,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    **arguments: Any,
) -> nn.Module:
    """A freshly initialised model: one of :data:`MODELS`, any other classifier of torchvision, or ``timm/<name>``.

    ``mean`` and ``std`` normalise images in [0, 1] and set the number of input channels. Unset: what published weights
    of torchvision's and timm's models expect; for ours three channels of 0.5 and 0.25. ``arguments`` are the model's
    own (``blocks``, ``widen``, ``in_planes`` for PreResNet and ResNet).
    Raises InputError for an unknown name or arguments the model does not take.
    """
    build = _builder(name)
    if not isinstance(num_classes, Integral) or isinstance(num_classes, bool) or num_classes < 2:
        raise InputError(f"num_classes={num_classes!r}: expected a whole number of at least 2")
    num_classes = int(num_classes)
    usual = published(name) or FRESH
    means, stds = per_channel(usual[0] if mean is None else mean, usual[1] if std is None else std)
    try:
        model = build(num_classes=num_classes, mean=means, std=stds, **arguments)
    except TypeError as error:
        raise InputError(f"model {name!r} does not take {arguments}: {error}") from error
    model.__dict__["spec"] = ModelSpec(name, {"num_classes": num_classes, "mean": means, "std": stds, **arguments})
    return model


def check_name(name: str) -> None:
    """Raise InputError for a model that is not known; which of ``timm/<name>`` there are is asked when one is made."""
    if not isinstance(name, str):
        raise InputError(f"model is a {type(name).__name__}: expected a name, such as 'wrn28_4'")
    if name in MODELS or name.startswith("timm/"):
        return
    others = torchvision_models()
    if name not in others:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.5)
        raise unknown("model", name, MODELS if near else {*MODELS, *others})


def __getattr__(name: str) -> Callable[..., nn.Module]:  # for type checkers: the functions are made below
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _builder(name: str) -> Callable[..., nn.Module]:
    check_name(name)
    if name.startswith("timm/"):
        _require_timm(name.removeprefix("timm/"))
        return partial(_timm, name.removeprefix("timm/"))
    return MODELS.get(name, partial(_torchvision, name))


def _named(name: str) -> Callable[..., nn.Module]:
    def create(num_classes: int, **arguments: Any) -> nn.Module:
        return create_model(name, num_classes, **arguments)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"``create_model({name!r}, num_classes, ...)``."
    return create


# ``models.wrn28_4(num_classes=100)``: a function for each of ours
globals().update({name: _named(name) for name in MODELS if name not in TORCHVISION})

"""Layers with weights of their own, dropout and the repository's own layers, read into nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from fastensdistill.models.layers import BatchNorm2d, Normalize, PadShortcut
from fastensdistill.network.expression import Call, ListOf, Own
from fastensdistill.network.nodes import (
    Affine,
    Conv,
    Dropout,
    GeneralConv,
    Layer,
    Linear,
    Norm,
    Pad,
    Pair,
    PointConv,
    Shape,
)
from fastensdistill.network.recording import drops_images
from fastensdistill.network.values import Values
from fastensdistill.network.views import Ref, seen_as


def settings(values: Mapping[str, Any]) -> str:
    """As one writes them in Python."""
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def read_layer(values: Values, op: fx.Node, layer: nn.Module) -> None:
    """The call of a module that was recorded as a whole."""
    name = str(op.target)
    x = op.args[0] if op.args else op.kwargs.get("input", next(iter(op.kwargs.values()), None))
    if isinstance(layer, Normalize):
        ref = values.ref(x, "image")
        values.put(op, Affine(values.free_name(name), (ref.name,), values.shapes[ref.name]), "image")
    elif isinstance(layer, PadShortcut):
        ref, s = values.ref(x, "image"), layer.stride
        channels, height, width = shape = values.shapes[ref.name]
        out = (channels + layer.new_channels, -(-height // s), -(-width // s))
        values.put(op, Pad(values.free_name(name), (ref.name,), out, shape, s), "image")
    elif isinstance(layer, nn.Conv2d):
        read_conv(values, op, layer, x)
    elif isinstance(layer, nn.Linear):
        linear(values, op, layer, name, x)
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        batch_norm(values, op, layer, x)
    else:
        assert drops_images(layer)
        drop_images(values, op, layer, x)


def unused(values: Values, name: str) -> str:
    """``name``, for a node with parameters. Raises InputError where there is one of this name."""
    if name in values.nodes:
        is_image = not values.nodes[name].inputs
        raise values.refuse("has the name of the image" if is_image else "a layer with parameters is used twice")
    return name


def weighs(values: Values, layer: Any, expected: tuple[int, ...]) -> None:
    """Refuse a weight whose shape is not ``expected``."""
    if tuple(layer.weight.shape) != expected:
        raise values.refuse(f"its weight has shape {tuple(layer.weight.shape)}; expected {expected}")


def pair(value: Any) -> Pair:
    """One number for rows and one for columns."""
    first, *others = tuple(value) if isinstance(value, tuple | list) else (value, value)
    return int(first), int((others or [first])[0])


def read_conv(values: Values, op: fx.Node, layer: nn.Conv2d, x: Any) -> None:
    """A Conv2d as PyTorch computes it, padded in whatever way."""
    name, padding, mode = str(op.target), layer.padding, layer.padding_mode
    # ((left, right), (top, bottom)) as for F.pad
    sides = [int(n) for n in layer._reversed_padding_repeated_twice]
    symmetric = sides[0::2] == sides[1::2]
    if mode == "zeros" and (symmetric or not isinstance(padding, str)):
        conv(values, op, layer, name, x, layer.stride, (sides[2], sides[0]), layer.dilation)
        return
    ref = values.ref(x, "image")
    channels, height, width = values.shapes[ref.name]
    options = () if mode == "zeros" else (("mode", mode),)
    padded = Call(F.pad, (ref, ListOf(tuple(sides))), options)
    shape = (values.shape(x)[0], channels, height + sides[2] + sides[3], width + sides[0] + sides[1])
    x = values.function(padded, shape, ["image"], base=f"{name}.pad")
    conv(values, op, layer, name, x, layer.stride, (0, 0), layer.dilation)


def conv(
    values: Values, op: fx.Node, layer: nn.Conv2d, name: str, x: Any, stride: Any, padding: Any, dilation: Any
) -> None:
    """The convolution of ``x``, which is recorded or a node's value, with the weight of ``layer``, called ``name``."""
    unused(values, name)
    ref = x if isinstance(x, Ref) else values.ref(x, "image")
    shape, groups = values.shapes[ref.name], layer.groups
    if layer.in_channels != shape[0]:
        raise values.refuse(f"takes {layer.in_channels} channels, but its input has {shape[0]}")
    kernel, stride, padding, dilation = pair(layer.kernel_size), pair(stride), pair(padding), pair(dilation)
    dilation = tuple(1 if k == 1 else d for k, d in zip(kernel, dilation, strict=True))
    weighs(values, layer, (layer.out_channels, layer.in_channels // groups, *kernel))
    window = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    out = (layer.out_channels, *out_size(values, shape, window, stride, padding))
    bias = layer.bias is not None
    square = all(first == second for first, second in (kernel, stride, padding))
    if groups == 1 and dilation == (1, 1) and square:
        node: Layer = Conv(name, (ref.name,), out, shape, bias, kernel[0], stride[0], padding[0])
    else:
        node = GeneralConv(name, (ref.name,), out, shape, bias, kernel, stride, padding, dilation, groups)
    values.put(op, node, "image")


def out_size(values: Values, shape: Shape, window: Sequence[int], stride: Pair, padding: Pair) -> Pair:
    """Height and width after windows have gone over an image of ``shape``."""
    height, width = ((n + 2 * p - w) // s + 1 for n, w, s, p in zip(shape[1:], window, stride, padding, strict=True))
    if min(height, width) < 1:
        text = f"{window[0]}" if window[0] == window[1] else f"{window[0]}x{window[1]}"
        raise values.refuse(f"a window of {text} does not fit into an image of {shape[1]}x{shape[2]}")
    return height, width


def linear(values: Values, op: fx.Node, layer: nn.Linear, name: str, x: Any) -> None:
    """A linear layer over all values of an image, or over the channels at every position."""
    bias = layer.bias is not None
    if not values.has_rows(x):
        if values.trains or not values.is_tensor(x):
            values.ref(x)
            raise values.refuse("takes something other than a tensor computed before")
        own = (Own(f"{name}.weight"), Own(f"{name}.bias") if bias else None)
        values.held[op] = Call(F.linear, (values.inline(x), *own))
        return
    unused(values, name)
    ref = values.ref(x, "last", "tokens", "flat")
    C, H, W = shape = values.shapes[ref.name]
    if ref.layout == "flat":
        weighs(values, layer, (layer.out_features, C * H * W))
        values.put(op, Linear(name, (ref.name,), (layer.out_features, 1, 1), shape, bias), "flat")
    else:
        weighs(values, layer, (layer.out_features, C))
        values.put(op, PointConv(name, (ref.name,), (layer.out_features, H, W), shape, bias), ref.layout)


def batch_norm(values: Values, op: fx.Node, layer: nn.BatchNorm1d | nn.BatchNorm2d, x: Any) -> None:
    """BatchNorm with all it can have, in the mode of the whole network."""
    settled = {"track_running_stats": layer.track_running_stats, "affine": layer.affine}
    wrong: dict[str, Any] = {key: has for key, has in settled.items() if not has}
    tensors = ("weight", "bias", "running_mean", "running_var", "momentum")
    wrong |= {key: None for key in tensors if getattr(layer, key) is None}
    if wrong:
        raise values.refuse(
            f"BatchNorm with {settings(wrong)}; expected scale and shift, running statistics and a momentum"
        )
    if layer.training != values.training:
        kept, other = ("training", "evaluates") if layer.training else ("evaluation", "trains")
        raise values.refuse(f"BatchNorm stays in {kept} mode while the network {other}")
    assert layer.momentum is not None
    name = unused(values, str(op.target))
    turned = isinstance(layer, nn.BatchNorm1d) and values.is_tensor(x) and len(values.shape(x)) == 3
    if turned:  # (images, C, L)
        ref = turn(values, x)
    else:
        ref = values.vector(x) if isinstance(layer, nn.BatchNorm1d) else values.ref(x, "image")
    shape = values.shapes[ref.name]
    weighs(values, layer, (shape[0],))
    unbiased = type(layer) is not BatchNorm2d
    values.put(op, Norm(name, (ref.name,), shape, layer.eps, layer.momentum, unbiased), ref.layout)
    if turned:
        values.held[op] = Call("transpose", (Ref(name, "tokens"), 1, 2))


def turn(values: Values, x: fx.Node) -> Ref:
    """The value (images, C, L) as tokens (images, L, C)."""
    n, channels, length = values.shape(x)
    turned = Call("transpose", (values.inline(x), 1, 2))
    return seen_as(turned, values.shapes, 3, channels * length) or values.function(
        turned, (n, length, channels), ["tokens"], base=f"{values.base}.transpose"
    )


def drop(values: Values, op: fx.Node, x: Any, p: float, active: bool, over: str = "value", scaled: bool = True) -> None:
    """Dropout; one that is there to drop something ends an expression in evaluation mode too."""
    if not values.is_tensor(x):
        raise values.refuse("takes something other than a tensor computed before")
    if not p > 0:
        values.held[op] = values.held[x]
        return
    if active and not values.training:
        raise values.refuse(f"drops values with p={p} in evaluation mode too")
    ref = values.ref(x, "image") if over == "channel" else values.ref(x)
    values.held[op] = ref
    if active or not values.training:
        shape, name = values.shapes[ref.name], values.free_name()
        values.put(op, Dropout(name, (ref.name,), shape, float(p), over, scaled, ref.layout), ref.layout)


def drop_images(values: Values, op: fx.Node, layer: Any, x: Any) -> None:
    """timm's DropPath or torchvision's StochasticDepth."""
    mode = getattr(layer, "mode", "row")
    if mode != "row":
        raise values.refuse(f"stochastic depth with mode={mode!r}; expected 'row', which draws for each image")
    p = getattr(layer, "drop_prob", None) or getattr(layer, "p", None) or 0.0
    drop(values, op, x, p, layer.training, "image", bool(getattr(layer, "scale_by_keep", True)))

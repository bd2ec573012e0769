"""What convolutions take in as they load, so that no launch of its own has to write it: found in the graph of a part.

    norms       BatchNorm in training mode and ReLU, where every reader of the result is a convolution that can
    gradients   the gradient A·d + B·z + C of a BatchNorm in training mode right behind a convolution that can
    seconds     a 1x1 convolution that is only added to another one's result: a second source of that one's sum
    joined      the same for the gradient of what two convolutions read, one of them a 1x1 shortcut

What a convolution can is a question of its implementation: ``plan`` asks :data:`Fusions`, ``engine.dispatch`` answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fastensdistill.network.launch import Part
from fastensdistill.network.nodes import Add, Affine, Conv, Input, Network, Norm, ReLU


@dataclass(frozen=True)
class Abilities:
    """What an implementation of a convolution computes beside the convolution.

    Args:
        norm: BatchNorm and ReLU of its input, as it is loaded forward and in the weight gradient; the data gradient
            takes the mask of that ReLU from the same input.
        norm_gradient: the gradient of the BatchNorm behind it, as data and weight gradient load.
        second: a second source, forward. second_gradient: one of the data gradient.
    """

    norm: bool = False
    norm_gradient: bool = False
    second: bool = False
    second_gradient: bool = False


Fusions = Callable[[Part, Conv], Abilities]
NONE, ALL = Abilities(), Abilities(True, True, True, True)


def nothing(part: Part, node: Conv) -> Abilities:
    """No implementation takes anything in."""
    return NONE


@dataclass
class OnLoad:
    """What the convolutions of a part take in.

    Attributes:
        norms: by the name of the ReLU, its BatchNorm.
        gradients: by the name of the convolution, the BatchNorm behind it.
        seconds: by the name of the addition, the 1x1 convolution whose result is not stored.
        joined: by the name of the convolution whose data gradient takes it in, the 1x1 convolution.
    """

    norms: dict[str, Norm] = field(default_factory=dict)
    gradients: dict[str, Norm] = field(default_factory=dict)
    seconds: dict[str, Conv] = field(default_factory=dict)
    joined: dict[str, Conv] = field(default_factory=dict)


def find_on_load(part: Part, fusions: Fusions, absorbed: set[str]) -> OnLoad:
    """What the convolutions of ``part`` take in; never nodes that the head has ``absorbed``."""
    network, found = part.network, OnLoad()
    can = {node.name: fusions(part, node) for node in network.nodes if isinstance(node, Conv)}
    if part.training:
        for norm in network.norms:
            relu, source = network.sole(norm.name), network.by_name[norm.inputs[0]]
            if isinstance(relu, ReLU) and relu.name not in absorbed and not isinstance(source, Input | Affine):
                readers = network.consumers[relu.name]
                if readers and all(isinstance(node, Conv) and can[node.name].norm for node in readers):
                    found.norms[relu.name] = norm
    for add, main, shortcut in blocks(part):
        one, other = can[main.name], can[shortcut.name]
        if one.second and other.second and shortcut.inputs[0] not in found.norms:
            found.seconds[add.name] = shortcut
    for main, shortcut in pairs(network):
        if can[main.name].second_gradient and can[shortcut.name].second_gradient:
            found.joined.setdefault(main.name, shortcut)
    if part.training:
        stored = {shortcut.name for shortcut in found.joined.values()}  # its gradient is read as it stands
        for norm in network.norms:
            conv = network.by_name[norm.inputs[0]]
            behind = isinstance(conv, Conv) and network.sole(conv.name) is norm and not conv.bias
            if behind and can[conv.name].norm_gradient and conv.name not in stored:
                found.gradients[conv.name] = norm
    return found


def blocks(part: Part) -> Iterator[tuple[Add, Conv, Conv]]:
    """Sums of two convolutions that nothing else reads: the sum, its main convolution and its 1x1 shortcut.

    The shortcut is the one whose input comes first, which is there when the main one runs.
    """
    network, place = part.network, {node.name: i for i, node in enumerate(part.network.nodes)}
    for add in network.nodes:
        if isinstance(add, Add):
            convs = [conv_of(part, value) for value in add.inputs if network.sole(value) is add]
            two = [conv for conv in convs if conv]
            if len(two) == 2 and two[0] is not two[1]:
                shortcut, main = sorted(two, key=lambda conv: place[conv.inputs[0]])
                image = isinstance(network.by_name[shortcut.inputs[0]], Input | Affine)
                if is_shortcut(shortcut) and place[shortcut.inputs[0]] < place[main.inputs[0]] and not image:
                    yield add, main, shortcut


def pairs(network: Network) -> Iterator[tuple[Conv, Conv]]:
    """Two convolutions that read the same value at the same stride, the second of them 1x1 and on its way to a sum."""
    for value, readers in network.consumers.items():
        convs = [node for node in readers if isinstance(node, Conv)]
        image = isinstance(network.by_name[value], Input | Affine)
        if len(convs) == 2 and convs[0].stride == convs[1].stride and not image:
            to_sum = [conv for conv in convs if is_shortcut(conv) and reaches_sum(network, conv)]
            if len(to_sum) == 1:
                yield next(conv for conv in convs if conv is not to_sum[0]), to_sum[0]


def is_shortcut(conv: Conv) -> bool:
    """Whether the convolution is 1x1, at every or every so-manieth position."""
    return conv.kernel == 1 and conv.padding == 0


def reaches_sum(network: Network, conv: Conv) -> bool:
    """Whether all that is done to the result before a sum takes it is BatchNorm."""
    user = network.sole(conv.name)
    if isinstance(user, Norm):
        user = network.sole(user.name)
    return isinstance(user, Add)


def conv_of(part: Part, value: str) -> Conv | None:
    """The convolution whose launch computes ``value``, with a BatchNorm in its weights or without."""
    node = part.network.by_name[value]
    if part.folded(node):
        node = part.network.by_name[node.inputs[0]]
    return node if isinstance(node, Conv) else None

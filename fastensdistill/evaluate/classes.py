"""Check that a network and the data have the same classes and image size; put logits in the data's class order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.data.sources import Dataset
from fastensdistill.errors import InputError
from fastensdistill.method.modes import evaluating
from fastensdistill.method.student import Student

SHOWN = 3  # names of classes in a line


class Reordered(nn.Module):
    """A network whose logits (..., C) are put in another order: class j is the network's class ``order[j]``."""

    order: Tensor

    def __init__(self, network: nn.Module, order: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).index_select(-1, self.order)


def check_card(card: dict[str, Any], data: Dataset, path: Path) -> tuple[list[int] | None, list[str]]:
    """Compare what a network's ``card`` says with ``data``; keys that it lacks are not compared, and grey images fit a
    colour network, which gets them repeated.

    Returns:
        For each class of the data its number in the network, or None where they are the same; and what to tell.

    Raises:
        InputError: images of another size or with other channels, or other classes.
    """
    notes: list[str] = []
    for key, name, found in (
        ("channels", "channels", data.channels), ("image_size", "size (height, width)", data.image_size),
    ):  # fmt: skip
        expected = card.get(key)
        expected = tuple(expected) if isinstance(expected, list) else expected
        if expected is not None and expected != found and not (key == "channels" and (expected, found) == (3, 1)):
            raise InputError(f"{path} was made for images of {name} {expected}; {data.name} has {found}")
    classes = card.get("classes")
    if not classes:
        return None, notes
    order = match_classes(tuple(map(str, classes)), data.classes, path, data.name)
    if order is not None:
        notes.append(
            f"{path} has its classes in another order ({listed(classes)}) than {data.name} ({listed(data.classes)}): "
            "its logits were put in the data's order"
        )
    elsewhere = card.get("data") not in (None, data.name)
    if is_numbered(classes) or is_numbered(data.classes):
        if order is None and (elsewhere or is_numbered(classes) != is_numbered(data.classes)):
            notes.append(
                f"{path} was made on {card.get('data', 'data')} (classes {listed(classes)}); that they are the classes "
                f"of {data.name} ({listed(data.classes)}) cannot be seen, as numbers are no names"
            )
    elif elsewhere:
        notes.append(f"{path} was made on {card['data']}, whose classes are those of {data.name}")
    return order, notes


def check_teachers(networks: Iterable[nn.Module], data: Dataset) -> None:
    """Raise InputError for a network from a file that says it was made for other classes, another order of them or
    other images than the data's."""
    for i, network in enumerate(networks):
        card = getattr(network, "card", None)
        if isinstance(card, dict) and check_card(card, data, Path(f"teacher {i}"))[0] is not None:
            raise InputError(
                f"teacher {i} has its classes in another order ({listed(card['classes'])}) than {data.name} "
                f"({listed(data.classes)}): expected the same; the command line's distill reorders its logits"
            )


def match_classes(own: Sequence[str], wanted: Sequence[str], path: Path, name: str) -> list[int] | None:
    """For each class in ``wanted`` its place in ``own``; None where they are in one order or cannot be compared.

    Case, spaces, underscores and hyphens do not count. Raises InputError for other classes, or another number of them.
    """
    if len(own) != len(wanted):
        raise InputError(f"{path} has {len(own)} classes ({listed(own)}); {name} has {len(wanted)} ({listed(wanted)})")
    mine, theirs = [_plain(c) for c in own], [_plain(c) for c in wanted]
    if set(mine) != set(theirs) and (is_numbered(own) or is_numbered(wanted)):
        return None
    if len(set(mine)) < len(mine) or len(set(theirs)) < len(theirs):
        mine, theirs = list(own), list(wanted)
    if mine == theirs:
        return None
    lacking = [c for c, plain in zip(wanted, theirs, strict=True) if plain not in mine]
    if lacking or len(set(mine)) < len(mine):
        raise InputError(
            f"{path} has other classes ({listed(own)}) than {name} ({listed(wanted)}): it does not know "
            f"{lacking[0] if lacking else 'one of two of one name'!r}"
        )
    return [mine.index(c) for c in theirs]


def is_numbered(classes: Sequence[str]) -> bool:
    """Whether the names are only the numbers 0, 1, 2, ... in order, which every set without names has."""
    return [str(c) for c in classes] == [str(i) for i in range(len(classes))]


def listed(classes: Sequence[str]) -> str:
    """The first few classes and the last, for a line."""
    names = [str(c) for c in classes]
    return ", ".join(names if len(names) <= SHOWN + 2 else [*names[:SHOWN], "...", names[-1]])


def reordered(network: nn.Module, order: Sequence[int], image_shape: tuple[int, ...]) -> nn.Module:
    """``network``, of which nobody else keeps a reference, with its logits in another order of classes.

    Where the last linear layer gives the logits its rows are put in that order, so the network stays of a kind that
    every engine knows; otherwise the logits are.
    """
    index = torch.tensor(order)
    if isinstance(network, Student):
        network.register_forward_hook(lambda module, images, logits: logits.index_select(-1, index.to(logits.device)))
        return network
    layers = [m for m in network.modules() if type(m) is nn.Linear and m.out_features == len(order)]
    if layers:
        images = torch.rand(4, *image_shape, generator=torch.Generator().manual_seed(0))
        head, back = layers[-1], torch.argsort(index)
        with evaluating(network), torch.no_grad():
            before = network(images)[..., index]
            _permute(head, index)
            if torch.allclose(network(images), before, rtol=1e-5, atol=1e-6 * float(before.abs().max())):
                return network
            _permute(head, back)
    return Reordered(network, index)


def _permute(layer: nn.Linear, order: Tensor) -> None:
    layer.weight.copy_(layer.weight[order])
    if layer.bias is not None:
        layer.bias.copy_(layer.bias[order])


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()

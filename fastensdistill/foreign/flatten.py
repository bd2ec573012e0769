"""Flatten the contents of a file to a table of tensors, each under the path of keys that leads to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastensdistill.foreign.leaf import Leaf
from fastensdistill.foreign.pickles import Stub

DEEPEST = 60  # levels of nesting
MANY = 1_000_000  # tensors


@dataclass
class FileTensor:
    """A tensor under its path. ``home`` is the path of the mapping it stands in; ``parts`` name the entries that it was
    made of, where it stands in no file as it is (a weight of weight norm)."""

    leaf: Leaf
    home: str
    parts: tuple[str, ...] = ()


@dataclass
class _Walk:
    found: dict[str, FileTensor] = field(default_factory=dict)
    above: set[int] = field(default_factory=set)

    def visit(self, node: Any, path: tuple[str, ...], home: str | None, depth: int = 0) -> None:
        if isinstance(node, Leaf):
            if path:
                self.found.setdefault(".".join(path), FileTensor(node, home or ""))
            return
        if id(node) in self.above or depth > DEEPEST or len(self.found) > MANY:
            return
        self.above.add(id(node))
        # The objects within an object, such as a network's layers, are one home together
        stub = isinstance(node, Stub)
        own = home if stub and home is not None else ".".join(path)
        for key, value in children(node):
            shared = isinstance(value, Leaf) or (stub and isinstance(value, Stub))
            self.visit(value, (*path, key), own if shared else None, depth + 1)
        self.above.discard(id(node))


def children(node: Any) -> Iterator[tuple[str, Any]]:
    """What stands below ``node``, each under its key."""
    if isinstance(node, dict):
        yield from ((k.decode("latin1") if isinstance(k, bytes) else str(k), v) for k, v in node.items())
    elif isinstance(node, list | tuple):
        yield from ((str(i), v) for i, v in enumerate(node))
    elif isinstance(node, Stub):
        states = node.state if isinstance(node.state, tuple) else (node.state,)
        state = {k: v for s in states if isinstance(s, dict) for k, v in s.items()}
        if isinstance(state.get("_modules"), dict):  # an nn.Module
            passing = state.get("_non_persistent_buffers_set")
            skip = passing if isinstance(passing, list | tuple | set) else ()
            for kind in ("_parameters", "_buffers", "_modules"):
                owned = state.get(kind)
                if isinstance(owned, dict):
                    yield from ((str(k), v) for k, v in owned.items() if k not in skip)
            return
        yield from ((str(k), v) for k, v in state.items())
        yield from ((str(k), v) for k, v in node.items.items())
        if not state and not node.items:
            yield from ((str(i), v) for i, v in enumerate(node.args))


def flatten(content: Any) -> dict[str, FileTensor]:
    """Every tensor of a file under its path, and the weights that parametrisations stand for under theirs."""
    walk = _Walk()
    walk.visit(content, (), None)
    return baked(walk.found)


def baked(found: dict[str, FileTensor]) -> dict[str, FileTensor]:
    """``found``, the published names of DenseNet's layers mended, with the weights added that pairs of tensors make:
    weight norm, spectral norm and pruning, by their old names and as parametrisations."""
    # torchvision's published DenseNets say norm.1 where the network says norm1
    mended = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)", r"\1", k): v for k, v in found.items()}
    more = {}
    for name in mended:
        for ending, others, make in RULES:
            stem = name.removesuffix(ending)
            if stem == name or any(stem + other not in mended for other in others):
                continue
            kept = (name, *(stem + other for other in others))
            plain = re.sub(r"(^|\.)parametrizations\.(\w+)$", r"\1\2", stem)
            leaves = [mended[k].leaf for k in kept]
            if plain not in mended and all(leaf.shape is not None for leaf in leaves):
                more[plain] = FileTensor(make(*leaves), mended[name].home, kept)
    return mended | more


def _weight_norm(g: Leaf, v: Leaf) -> Leaf:
    def read() -> Tensor:
        magnitude, direction = g.read(), v.read()
        over = [d for d, n in enumerate(magnitude.shape) if n == 1] if magnitude.ndim else list(range(direction.ndim))
        return direction * (magnitude / torch.linalg.vector_norm(direction, dim=over, keepdim=bool(magnitude.ndim)))

    return Leaf(v.shape, v.dtype, read)


def _masked(original: Leaf, mask: Leaf) -> Leaf:
    return Leaf(original.shape, original.dtype, lambda: original.read() * mask.read())


def _spectral_norm(original: Leaf, u: Leaf, v: Leaf) -> Leaf:
    def read() -> Tensor:
        weight, left, right = original.read(), u.read(), v.read()
        first = len(weight) == len(left) and weight[0].numel() == len(right)
        matrix = weight.flatten(1) if first else weight.transpose(0, 1).flatten(1)
        return weight / torch.dot(left, torch.mv(matrix, right))

    return Leaf(original.shape, original.dtype, read)


# An ending, the others that stand beside it, and what they make together under the name without it
RULES: tuple[tuple[str, tuple[str, ...], Callable[..., Leaf]], ...] = (
    (".original0", (".original1",), _weight_norm),
    (".original", (".0._u", ".0._v"), _spectral_norm),
    ("_g", ("_v",), _weight_norm),
    ("_orig", ("_mask",), _masked),
    ("_orig", ("_u", "_v"), _spectral_norm),
)

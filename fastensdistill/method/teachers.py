"""Teachers: M frozen networks of one task, each with its own architecture and normalisation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError
from fastensdistill.method.calls import call
from fastensdistill.method.copying import copy_network
from fastensdistill.method.inspection import check_output
from fastensdistill.method.modes import set_mode, without_weight_gradients
from fastensdistill.method.student import Single, Student
from fastensdistill.models.wrappers import unwrap

HALF = (torch.float16, torch.bfloat16)


class Teachers(nn.Module):
    """M frozen networks, in evaluation mode for good. ``teachers(x, members=[a, b])`` evaluates only those.

    ``networks`` (a sequence, a mapping whose values they are, an iterator, other Teachers) take images (B, channels,
    H, W) in [0, 1], so each normalises them in its own way, and return logits (B, C) with the same C, alone or as
    ``method.outputs.logits_of`` finds them. What is held are copies, as the networks are now: those that were given
    may be trained on, and stay in their mode and on their device. The copies keep ``requires_grad`` too, so that a
    student can be made of one, but no gradient reaches their parameters, and ``train()`` leaves them in evaluation
    mode. ``copy=False`` takes the networks themselves, which nobody else uses then.
    What is held is float32 where float16 or bfloat16 was given, value for value; ``notes`` has a line for each such
    network.

    Raises InputError for what is no such sequence, and for a network or its equal twice: equal teachers do not
    disagree, and there is nothing to learn from them that one does not teach.
    """

    def __init__(
        self, networks: Sequence[nn.Module] | Mapping[str, nn.Module] | Iterable[nn.Module], *, copy: bool = True
    ):
        super().__init__()
        given = [_network(i, network) for i, network in enumerate(_listed(networks))]
        if not given:
            raise InputError("no teachers given: expected at least one network")
        check_distinct(given, "teachers", equal=True)
        held = [copy_network(network, name=f"teacher {i}") for i, network in enumerate(given)] if copy else given
        self.notes = [note for i, network in enumerate(held) for note in _widened(network, f"teacher {i}")]
        for network in held:
            set_mode(network, False)
        self.networks = nn.ModuleList(held)
        self.training = self.networks.training = False

    def __len__(self) -> int:
        return len(self.networks)

    def train(self, mode: bool = True) -> Teachers:
        return self

    def forward(self, x: Tensor, members: Sequence[int] | None = None) -> Tensor:
        chosen = range(len(self)) if members is None else members
        if not isinstance(x, Tensor):
            raise InputError(f"images are a {type(x).__name__}; expected a tensor (B, channels, H, W)")
        if not chosen or any(not 0 <= m < len(self) for m in chosen):
            raise InputError(f"members={list(chosen)}: expected indices from 0 to {len(self) - 1}")
        with without_weight_gradients(self):
            logits = [call(self.networks[m], x, f"teacher {m}") for m in chosen]
        if len({z.shape for z in logits}) > 1:
            shapes = ", ".join(f"teacher {m} {tuple(z.shape)}" for m, z in zip(chosen, logits, strict=True))
            raise InputError(f"teachers return logits of several shapes: {shapes}; expected one")
        return torch.stack(logits)

    def check(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Raise InputError unless every teacher turns images (channels, H, W) into ``num_classes`` logits each."""
        for i, network in enumerate(self.networks):
            check_output(network, f"teacher {i}", image_shape, [num_classes])

    @staticmethod
    @torch.no_grad()
    def check_output(
        network: nn.Module, name: str, image_shape: tuple[int, int, int], expected: tuple[int, ...]
    ) -> None:
        """Raise InputError unless one image (channels, H, W) gives logits of the ``expected`` shape, (..., 1, C)."""
        check_output(network, name, image_shape, [*expected[:-2], expected[-1]])


def check_distinct(networks: Sequence[nn.Module], what: str, *, equal: bool) -> None:
    """Raise InputError for one network twice among ``what``, and with ``equal`` for two that hold the same."""
    for j, other in enumerate(networks):
        for i, network in enumerate(networks[:j]):
            same = "one network" if network is other or _same_parameters(network, other) else ""
            if not same and equal and _equal(network, other):
                same = "equal in every weight"
            if same:
                raise InputError(
                    f"{what} {i} and {j} are {same} ({type(network).__name__}): expected networks that differ, there "
                    "is no disagreement to learn from"
                )


def _listed(networks: Any) -> list[Any]:
    if isinstance(networks, Teachers):
        return list(networks.networks)
    if isinstance(networks, Mapping | nn.ModuleDict):
        return list(networks.values())
    if isinstance(networks, nn.Module) and not isinstance(networks, nn.ModuleList):
        raise InputError(f"teachers are one {type(networks).__name__}: expected a sequence of networks")
    if isinstance(networks, str) or not isinstance(networks, Iterable):
        what = f"{networks!r}" if isinstance(networks, str) else f"a {type(networks).__name__}"
        raise InputError(f"teachers are {what}: expected a sequence of networks; load_teachers reads files")
    return list(networks)


def _network(index: int, network: Any) -> nn.Module:
    """The plain network that teacher ``index`` was given as."""
    if isinstance(network, type):
        raise InputError(f"teacher {index} is the class {network.__name__}: expected a network of this class")
    if not isinstance(network, nn.Module):
        raise InputError(
            f"teacher {index} is a {type(network).__name__}: expected an nn.Module; load_teachers reads files"
        )
    network = unwrap(network)
    if isinstance(network, Single):
        network = network.module
    if isinstance(network, Student):
        raise InputError(f"teacher {index} is a {network.kind} student: expected one ordinary network, its average()")
    if isinstance(network, Teachers | nn.ModuleList | nn.ModuleDict):
        raise InputError(f"teacher {index} is a {type(network).__name__}: expected one network")
    return network


def _widened(network: nn.Module, name: str) -> list[str]:
    """Make parameters and buffers of half precision float32, in place; what to say of that, a line or none."""
    tensors = [t for own in (network.parameters(), network.buffers()) for t in own if t.is_floating_point()]
    dtypes = dict.fromkeys(str(t.dtype) for t in tensors)
    if not any(t.dtype in HALF for t in tensors):
        return []
    network._apply(lambda t: t.float() if t.dtype in HALF else t)  # one way to do it: .to() would narrow float64
    return [f"{name} ({type(network).__name__}) is of {' and '.join(dtypes)}: a copy of it in torch.float32 is used"]


def _same_parameters(one: nn.Module, other: nn.Module) -> bool:
    """Whether both are made of the very same parameters, all of them."""
    own, others = ({id(p) for p in network.parameters()} for network in (one, other))
    return bool(own) and own == others and type(one) is type(other) and _equal(one, other)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks of one class hold equal tensors, and at least one, and are built and set alike."""
    if type(one) is not type(other) or repr(one) != repr(other):
        return False
    a, b = one.state_dict(), other.state_dict()
    if not a or a.keys() != b.keys() or not all(_same(a[k], b[k]) for k in a):
        return False
    pairs = zip(one.modules(), other.modules(), strict=True)
    return all(_same(_settings(m), _settings(n)) for m, n in pairs)


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside its parameters, buffers and submodules, such as a mean that is no buffer."""
    simple = (bool, int, float, str, tuple, list, Tensor)
    return {
        k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training" and isinstance(v, simple)
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        known = one.device == other.device and one.shape == other.shape and not one.is_meta
        return known and bool(torch.equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)

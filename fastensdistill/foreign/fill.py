"""Give a network the tensors of a file, all of them or none, and say in one line what does not fit."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError
from fastensdistill.foreign.flatten import FileTensor
from fastensdistill.foreign.names import Match, Shape, counts, match, plain_ones
from fastensdistill.method.copying import check_complete
from fastensdistill.models import Normalized

# Heads for training alone, which a network made for use does not have
AUXILIARY = re.compile(r"(^|\.)(AuxLogits|aux1|aux2)\.")


def fill(network: nn.Module, found: Mapping[str, FileTensor], path: str | Path, name: str) -> None:
    """Write the tensors of the file at ``path`` into ``network``, in its own dtypes; ``name`` is the network's.

    Raises InputError where names are missing or left over, shapes differ, or a value is not finite; the network is
    then as it was.
    """
    check_complete(network)
    state = network.state_dict()
    wanted = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)}
    m = find(network, found, wanted)
    check(m, wanted, path, name)
    choose(m, path)
    values = {}
    for k, entry in m.entries.items():
        values[k] = _converted(entry.leaf.read(), state[k], k.removeprefix(m.outer), path)
    allocate(network, set(values), path, name)
    try:
        network.load_state_dict(values, strict=False)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit {name}: {' '.join(str(error).split())}") from error


def find(network: nn.Module, found: Mapping[str, FileTensor], wanted: Mapping[str, Shape]) -> Match:
    """The match of a file and a network, whose own outermost prefix the file may lack."""
    optional = [k for k in wanted if k.startswith("normalize.") or counts(k)]
    best = match(found, wanted, optional)
    firsts = {k.split(".")[0] for k in wanted if k not in optional}
    if isinstance(network, Normalized) or len(firsts) == 1:
        first = "network" if isinstance(network, Normalized) else firsts.pop()
        inner = {k.removeprefix(f"{first}."): v for k, v in wanted.items() if k.startswith(f"{first}.")}
        other = match(found, inner, [k.removeprefix(f"{first}.") for k in optional])
        best.outer = f"{first}." if isinstance(network, Normalized) else ""
        if other.fitting > best.fitting:
            other.outer = f"{first}."
            outer = {f"{first}.{k}": e for k, e in other.entries.items()}
            for m in other.others:
                m.entries = {f"{first}.{k}": e for k, e in m.entries.items()}
            other.entries, best = outer, other
    best.extra = [k for k in best.extra if not AUXILIARY.search(k)]
    return best


def check(m: Match, wanted: Mapping[str, Shape], path: str | Path, name: str) -> None:
    """Raise InputError unless every tensor is there, fits, and is none too many."""
    optional = {k for k in wanted if k.startswith("normalize.") or counts(k)}
    missing = sorted(set(wanted) - set(m.entries) - optional)
    needed = len(set(wanted) - optional)
    if not m.entries and (missing or m.held):
        example = f", such as {missing[0].removeprefix(m.outer)!r}" if missing else ""
        raise InputError(
            f"{path} does not fit {name}: it holds none of its {needed} tensors{example}; it has "
            f"{', '.join(map(repr, m.held))}"
        )
    if missing or m.extra:
        example = missing[0].removeprefix(m.outer) if missing else sorted(m.extra)[0]
        example = example.removeprefix(f"{m.where}.") if m.where else example
        kind = "is missing" if missing else "is unknown"
        raise InputError(
            f"{path} does not fit {name}: of its {needed} tensors {len(missing)} are missing, and {len(m.extra)} are "
            f"unknown; {example!r} {kind}"
        )
    for k, entry in m.entries.items():
        if entry.leaf.problem:
            shown = k.removeprefix(m.outer)
            raise InputError(f"{path} cannot be used: {shown!r} is {entry.leaf.problem}; expected an ordinary tensor")
    wrong = [k for k, e in m.entries.items() if wanted[k] not in (None, e.leaf.shape) and not counts(k)]
    if wrong:
        k = wrong[0]
        has, expected = m.entries[k].leaf.shape or (), wanted[k] or ()
        one_layer = len({w.rpartition(".")[0] for w in wrong}) == 1
        classes = one_layer and has and expected and has[1:] == expected[1:]
        hint = f" (it has {has[0]} classes, not {expected[0]})" if classes else ""
        shown = k.removeprefix(m.outer)
        raise InputError(f"{path} does not fit {name}: {shown} has shape {has}, expected {expected}{hint}")


def choose(m: Match, path: str | Path) -> None:
    """Say which weights of several are read. Raises InputError where none of them is the plain network's.

    Two that hold the same values are one.
    """
    others = [o for o in m.others if not _equal(m, o)]
    if not others:
        return
    where = [o.where or "the outermost names" for o in (m, *others)]
    if len(plain_ones(o.where for o in (m, *others))) != 1:
        raise InputError(
            f"{path} holds fitting weights {len(where)} times, under {', '.join(where)}: save those that are meant to "
            "a file of their own"
        )
    print(f"{path}: read the weights under {where[0]}, not those under {', '.join(where[1:])}", file=sys.stderr)


def allocate(network: nn.Module, given: set[str], path: str | Path, name: str) -> None:
    """Memory on the CPU for what stands on the meta device, and for what cannot be written element by element.

    Raises InputError where a tensor without values would remain: one that is in no state dict.
    """
    new: dict[int, Tensor] = {}
    for prefix, module in network.named_modules():
        for tensors in (module._parameters, module._buffers):
            for k, t in tensors.items():
                full = f"{prefix}.{k}" if prefix else k
                if t is None or not (t.is_meta or _overlaps(t)):
                    continue
                if t.is_meta and full not in given and not counts(full):
                    raise InputError(f"{full!r} of {name} is on the meta device and not in {path}: nothing fills it")
                if id(t) not in new:
                    values = torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t.detach().clone().contiguous()
                    new[id(t)] = nn.Parameter(values, t.requires_grad) if isinstance(t, nn.Parameter) else values
                tensors[k] = new[id(t)]
        for k, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise InputError(f"the tensor {k!r} of {type(module).__name__} is on the meta device: nothing fills it")


def _overlaps(t: Tensor) -> bool:
    return t.layout == torch.strided and any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True))


def _converted(value: Tensor, target: Tensor, k: str, path: str | Path) -> Tensor:
    """``value`` in the dtype of ``target``."""
    if value.shape != target.shape and value.numel() == target.numel() == 1:  # a counter as NumPy stores it
        value = value.reshape(target.shape)
    if counts(k):  # scripts that cast every tensor cast these too
        return value.to(target.dtype)
    if value.is_floating_point() != target.is_floating_point() or value.is_complex() != target.is_complex():
        raise InputError(f"{path} cannot be used: {k!r} is {value.dtype}, expected {target.dtype}")
    if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
        raise InputError(f"{path} holds values that are not finite, in {k!r}")
    if value.dtype == target.dtype:
        return value
    converted = value.to(target.dtype)
    if converted.is_floating_point() and not bool(torch.isfinite(converted).all()):
        raise InputError(f"{path}: {k!r} holds values that {target.dtype} cannot")
    return converted


def _equal(a: Match, b: Match) -> bool:
    if set(a.entries) != set(b.entries):
        return False
    same: Callable[[str], bool] = lambda k: torch.equal(a.entries[k].leaf.read(), b.entries[k].leaf.read())  # noqa: E731
    return all(same(k) for k in a.entries if not counts(k))

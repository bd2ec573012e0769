"""Save and load networks: a safetensors file with the tensors and, as metadata, a card that says how to build it.

Foreign files load too (:mod:`fastensdistill.foreign`): nothing in them is run, and the names of wrappers and of the
mappings that training scripts nest the weights in are found and taken off.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastensdistill.errors import InputError
from fastensdistill.files import expanded
from fastensdistill.foreign.fill import check, fill, find
from fastensdistill.foreign.flatten import FileTensor, flatten
from fastensdistill.foreign.formats import find_file, is_safetensors, read_any
from fastensdistill.foreign.leaf import Leaf
from fastensdistill.method.calls import device_of, dtype_of
from fastensdistill.method.copying import copy_network
from fastensdistill.method.modes import set_mode
from fastensdistill.method.student import STUDENTS, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import Normalized, create_model
from fastensdistill.models.normalisation import per_channel, published, same
from fastensdistill.models.wrappers import unwrap
from fastensdistill.tensor_files import read_card as read_card
from fastensdistill.tensor_files import read_tensors as read_tensors
from fastensdistill.tensor_files import save_tensors as save_tensors

NORMALISATION = ("mean", "std")


def save_network(path: str | Path, network: nn.Module, card: Mapping[str, Any] | None = None) -> None:
    """Save a network, or a student, with all that :func:`load_network` needs to build it again.

    Tensors stand under the names of the network's own class: a strict ``load_state_dict`` of that class takes the
    file. Where a :class:`Normalized` surrounds it, the normalisation stands in the card.
    """
    if not isinstance(network, nn.Module):
        raise InputError(f"the network to save is a {type(network).__name__}: expected an nn.Module")
    network = unwrap(network)
    inner = unwrap(network.module) if isinstance(network, Student) else network
    spec = getattr(inner, "spec", None)
    full: dict[str, Any] = {"model": spec.name if spec else None, "arguments": spec.arguments if spec else {}}
    bare = inner
    if isinstance(inner, Normalized):
        bare = inner.network
        values = {name: getattr(inner.normalize, name).flatten().tolist() for name in NORMALISATION}
        if spec:  # its numbers are not rounded to float32
            values = {k: spec.arguments[k] if same(spec.arguments[k], v) else v for k, v in values.items()}
            full["arguments"] = full["arguments"] | values
        full["normalisation"] = values
    kinds = {p.dtype for p in inner.parameters() if p.is_floating_point()}
    if len(kinds) == 1 and kinds != {torch.float32}:
        full["dtype"] = str(kinds.pop()).removeprefix("torch.")
    full |= {"class": f"{type(bare).__module__}.{type(bare).__qualname__}", **(card or {})}
    if isinstance(network, Student):
        full |= {"student": network.kind, "branches": network.branches}
    save_tensors(path, (network if isinstance(network, Student) else bare).state_dict(), full)


def load_network(path: str | Path, model: str | nn.Module | None = None, **arguments: Any) -> nn.Module:
    """A network, or a student, from a file, in evaluation mode.

    Files written by this package say what they hold, and that is what is built; ``model`` and ``arguments`` may be
    left out, and must agree where they are given. For foreign ones ``model`` is a registry name, and ``arguments`` go
    to :func:`create_model`: ``num_classes`` is read off the file if it is not given, and so are ``mean`` and ``std``
    where it holds them; else they are those of the published weights for torchvision's and timm's models (which is
    said), and must be given for ours. Given a module, a copy of it is filled; with ``mean`` and ``std``, which are of
    pixels in [0, 1], it comes behind that normalisation.
    Raises InputError for files that are missing, damaged or do not fit.
    """
    network = load(path, model, arguments)
    network.__dict__["card"] = read_card(find_file(path))  # for which images and classes, which a trainer compares
    return network


def load(
    path: str | Path, model: str | nn.Module | None, arguments: Mapping[str, Any],
    fallback: tuple[Sequence[float], Sequence[float]] | None = None,
) -> nn.Module:  # fmt: skip
    """:func:`load_network` with a mean and a std for our own models where neither the user nor the file gives any."""
    path = find_file(path)
    card = read_card(path)
    arguments = {k: v for k, v in arguments.items() if v is not None}
    if {"mean", "std"} & set(arguments):
        mean, std = per_channel(arguments.get("mean"), arguments.get("std"))
        arguments |= {"mean": mean, "std": std}
    if model is not None and not isinstance(model, str | nn.Module):
        given = getattr(model, "__name__", type(model).__name__)
        raise InputError(f"model is {given}: expected a model's name, or an nn.Module to fill")
    if isinstance(model, nn.Module):
        return _into_module(path, card, model, arguments)
    if card.get("model"):
        return _own(path, card, model, arguments)
    if model is None:
        _entries(path)  # something is wrong with the file itself, most often
        own = f", only the class {card['class']}" if card.get("class") else ""
        raise InputError(
            f"{path} does not say which model it holds{own}: pass model=, a name or an nn.Module (--teacher-model NAME "
            "for distill, --model NAME for evaluate and export)"
        )
    return _named(path, model, arguments, fallback)


def load_teachers(
    model: str | nn.Module | Sequence[str | nn.Module] | None = None,
    files: str | Path | Sequence[str | Path] | None = None,
    **arguments: Any,
) -> Teachers:
    """M teachers from files or modules, frozen and in evaluation mode.

    ``load_teachers("wrn28_4", ["t0.safetensors", "t1.safetensors"])``: one architecture, a file per member.
    ``load_teachers(["wrn28_4", "resnet18"], files)``: an architecture per member (names or modules to fill).
    ``load_teachers([net0, net1])``: modules as they are. ``load_teachers(files=[...])``: files of this package, which
    say what they hold; their normalisation may differ. A folder that ``teach`` wrote stands for its files.
    ``arguments`` go to :func:`load_network`.
    Raises InputError for missing or damaged files, or keys and shapes that do not fit.
    """
    if files is None:
        modules = [model] if isinstance(model, str | nn.Module) else list(model or ())
        named = [m for m in modules if not isinstance(m, nn.Module)]
        if named:
            raise InputError(f"teachers {named} are names; expected files to load, or modules")
        if arguments:
            raise InputError(f"{', '.join(arguments)} given without files: modules are taken as they are")
        return Teachers([m for m in modules if isinstance(m, nn.Module)])
    files = [f for path in ([files] if isinstance(files, str | Path) else files) for f in members(expanded(path))]
    models = [model] * len(files) if model is None or isinstance(model, str | nn.Module) else list(model)
    if len(models) != len(files):
        raise InputError(f"{len(models)} models for {len(files)} files: expected one model, or one for each file")
    return Teachers([load_network(f, m, **arguments) for f, m in zip(files, models, strict=True)])


def teacher_files(folder: Path) -> list[Path]:
    """``teacher-0.safetensors``, ``teacher-1.safetensors``, ... in their order."""
    return sorted(folder.glob("teacher-*.safetensors"), key=lambda f: int(re.sub(r"\D", "", f.stem) or 0))


def members(path: Path) -> list[Path]:
    """The files that ``path``, a file or a folder of ``teach``, stands for. Raises InputError for another folder."""
    path = expanded(path)
    if not path.is_dir():
        return [path]
    found = teacher_files(path)
    if not found:
        raise InputError(f"{path} holds no teacher-*.safetensors: expected a folder that teach wrote")
    return found


def _entries(path: Path) -> dict[str, FileTensor]:
    if is_safetensors(path):
        tensors, _ = read_tensors(path)
        return flatten({name: Leaf.of(t) for name, t in tensors.items()})
    found = flatten(read_any(path))
    if not found:
        raise InputError(f"{path} holds no state dict: expected a mapping of names to tensors")
    return found


def _own(path: Path, card: dict[str, Any], model: str | None, arguments: dict[str, Any]) -> nn.Module:
    """The network of a file that says what it holds. Raises InputError where what the user says differs."""
    network = create_model(card["model"], **card["arguments"])
    kept = card["arguments"]
    for name in NORMALISATION:
        if name in arguments and not same(arguments[name], kept[name]):
            raise InputError(f"{path} says {name}={tuple(kept[name])} itself: not {name}={arguments[name]}")
    shape = {k: v for k, v in arguments.items() if k not in NORMALISATION}
    if model not in (None, card["model"]) or shape:
        common = kept if model in (None, card["model"]) else {k: kept[k] for k in ("num_classes", *NORMALISATION)}
        asked = _skeleton(model or card["model"], {**common, **shape})
        if _shapes(asked) != _shapes(network):
            said = ", ".join([model or card["model"], *(f"{k}={v}" for k, v in shape.items())])
            details = "".join(f", {k}={v}" for k, v in kept.items() if k not in NORMALISATION)
            raise InputError(f"{path} holds {card['model']}{details}: not {said}")
    if "dtype" in card:
        network = network.to(getattr(torch, card["dtype"]))
    if "student" in card:
        network = STUDENTS[card["student"]](network, card["branches"])
    fill(network, _entries(path), path, card["model"])
    return set_mode(network, False)


def _into_module(path: Path, card: dict[str, Any], model: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    """A copy of ``model`` that holds the weights of the file, behind the normalisation that is given or in its card."""
    others = [k for k in arguments if k not in NORMALISATION]
    if others:
        raise InputError(f"{', '.join(others)} given with a {type(model).__name__}: expected only mean and std")
    network = copy_network(unwrap(model))
    if "student" in card and not isinstance(network, Student):
        network = STUDENTS[card["student"]](network, card["branches"])
    fill(network, _entries(path), path, _name(network))
    normalised = isinstance(network, Normalized) or getattr(network, "spec", None) or isinstance(network, Student)
    kept = card.get("normalisation")
    if normalised:
        if arguments:
            raise InputError(f"mean and std given with a {_name(network)}, which normalises its images itself")
        return set_mode(network, False)
    if kept and arguments and not all(same(arguments[k], kept[k]) for k in NORMALISATION):
        raise InputError(f"{path} says mean={tuple(kept['mean'])} itself: not mean={arguments['mean']}")
    values = arguments or kept
    if not values:
        return set_mode(network, False)
    device, dtype = device_of(network), dtype_of(network)
    return set_mode(Normalized(network, values["mean"], values["std"]).to(device, dtype), False)


def _named(
    path: Path, model: str, arguments: dict[str, Any], fallback: tuple[Sequence[float], Sequence[float]] | None
) -> nn.Module:
    """A model of the registry with the weights of a foreign file."""
    found = _entries(path)
    few, more = (_skeleton(model, {**arguments, "num_classes": n}) for n in (2, 3))
    shapes, larger = _shapes(few), _shapes(more)
    heads = [k for k in shapes if shapes[k] != larger[k]]
    m = find(few, found, {k: None if k in heads else v for k, v in shapes.items()})
    if "num_classes" not in arguments:
        if not m.entries or heads[0] not in m.entries:
            check(m, shapes, path, model)
            raise InputError(f"no {' or '.join(heads)} in {path} to read the number of classes off; pass num_classes=")
        arguments["num_classes"] = max((m.entries[heads[0]].leaf.shape or (0,))[0], 2)
    inside = [m.entries[f"normalize.{name}"].leaf.read().flatten().tolist() for name in NORMALISATION
              if f"normalize.{name}" in m.entries]  # fmt: skip
    if len(inside) == 2:
        own = dict(zip(NORMALISATION, inside, strict=True))
        if "mean" in arguments and not all(same(arguments[k], own[k]) for k in NORMALISATION):
            raise InputError(f"{path} holds mean={tuple(own['mean'])} itself: not mean={arguments['mean']}")
        arguments |= own
    elif "mean" not in arguments:
        usual: tuple[Sequence[float], Sequence[float]] | None = published(model)
        whose = f"that of published {model} weights" if usual else "the data's"
        usual = usual or fallback
        if usual is None:
            raise InputError(
                f"{path} does not say the normalisation that {model} was trained with: pass mean= and std=, a value "
                "per channel of pixels in [0, 1]; usual are ImageNet's (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225)"
            )
        mean, std = usual
        print(
            f"{path} does not say its normalisation: taken is {whose}, mean {_short(mean)}, std {_short(std)}; "
            "mean and std give another", file=sys.stderr,
        )  # fmt: skip
        arguments |= {"mean": mean, "std": std}
    network = create_model(model, **arguments)
    fill(network, found, path, model)
    return set_mode(network, False)


def _skeleton(model: str, arguments: dict[str, Any]) -> nn.Module:
    """The model without memory for its weights: only names and shapes."""
    try:
        with torch.device("meta"):
            return create_model(model, **arguments)
    except NotImplementedError:  # RegNets compute their widths from tensors
        return create_model(model, **arguments)


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in network.state_dict().items()}


def _short(values: Sequence[float]) -> str:
    return " ".join(f"{v:.3f}" for v in values)


def _name(network: nn.Module) -> str:
    module = network.module if isinstance(network, Student) else network
    spec = getattr(module, "spec", None)
    return spec.name if spec else type(module).__name__

"""Networks in files: one safetensors file holds the tensors and, in its metadata, a card that says how to build it.

Foreign state dicts (.safetensors, or .pt/.pth read with ``weights_only=True``, so nothing is unpickled but tensors)
load too, with the prefixes that wrappers leave (``module.``, ``_orig_mod.``, ``model.``, ``net.``) taken off.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastensdistill.errors import InputError
from fastensdistill.files import write_atomically
from fastensdistill.method.student import STUDENTS, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import Normalized, create_model

FORMAT = "fastensdistill-1"
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # the last two are attributes of a LightningModule
NESTED = ("state_dict", "model_state_dict", "model", "network", "net")  # where a training script keeps it


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write tensors and a JSON card as one safetensors file, atomically."""
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    seen: set[int] = set()
    for name, t in flat.items():
        if t.data_ptr() in seen and t.numel():
            flat[name] = t.clone()
        seen.add(t.data_ptr())
    metadata = {"format": FORMAT, "card": json.dumps(card, default=_jsonable)}
    write_atomically(path, save(flat, metadata=metadata))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and its card ({} for a foreign file). Raises InputError for a missing or damaged file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, json.loads(metadata["card"]) if metadata.get("format") == FORMAT else {}
        except (SafetensorError, json.JSONDecodeError, KeyError, OSError) as error:
            raise InputError(f"{path} is truncated or not a safetensors file: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # RuntimeError, UnpicklingError, EOFError, ValueError, ...: all of them a damaged file
        # Not PyTorch's own words: they advise to load the file in spite of what may be in it
        found = "it holds other objects than tensors" if zipfile.is_zipfile(path) else "it is truncated or another file"
        raise InputError(
            f"{path} cannot be read as a state dict without unpickling code, {found}; "
            "expected what torch.save(network.state_dict(), FILE) writes"
        ) from error
    return _state_dict(loaded, path), {}


def save_network(path: str | Path, network: nn.Module, card: Mapping[str, Any] | None = None) -> None:
    """Save a network, or a student, with all that :func:`load_network` needs to build it again."""
    inner = network.module if isinstance(network, Student) else network
    spec = getattr(inner, "spec", None)
    full: dict[str, Any] = {
        "model": spec.name if spec else None,
        "arguments": spec.arguments if spec else {},
        "class": f"{type(inner).__module__}.{type(inner).__qualname__}",
        **(card or {}),
    }
    if isinstance(network, Student):
        full |= {"student": network.kind, "branches": network.branches}
    save_tensors(path, network.state_dict(), full)


def load_network(path: str | Path, model: str | nn.Module | None = None, **arguments: Any) -> nn.Module:
    """A network, or a student, from a file, in evaluation mode.

    Files written by this package say what they hold, and that is what is built. For foreign ones ``model`` is a
    registry name, and ``arguments`` go to :func:`create_model` (``num_classes`` is read off the file if it is not
    given). Given a module, a copy of it is filled. Raises InputError for files that are missing, damaged or do not fit.
    """
    tensors, card = read_tensors(path)
    if isinstance(model, nn.Module):
        network = copy.deepcopy(model)
    elif card.get("model"):
        network = create_model(card["model"], **card["arguments"])
    elif model is None:
        own = f", only the class {card['class']}" if card.get("class") else ""
        raise InputError(
            f"{path} does not say which model it holds{own}: pass model=, a name or an nn.Module (--teacher-model NAME "
            "for distill, --model NAME for evaluate and export)"
        )
    else:
        if "num_classes" not in arguments:
            arguments["num_classes"] = _count_classes(model, tensors, arguments)
        network = create_model(model, **arguments)
    if "student" in card:
        network = STUDENTS[card["student"]](network, card["branches"])
    _fill(network, tensors, path)
    return network.eval()


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
    ``arguments`` go to :func:`create_model` for foreign files.
    Raises InputError for missing or damaged files, or keys and shapes that do not fit.
    """
    if files is None:
        modules = [model] if isinstance(model, str | nn.Module) else list(model or ())
        named = [m for m in modules if not isinstance(m, nn.Module)]
        if named:
            raise InputError(f"teachers {named} are names; expected files to load, or modules")
        return Teachers([m for m in modules if isinstance(m, nn.Module)])
    files = [f for path in ([files] if isinstance(files, str | Path) else files) for f in members(Path(path))]
    models = [model] * len(files) if model is None or isinstance(model, str | nn.Module) else list(model)
    if len(models) != len(files):
        raise InputError(f"{len(models)} models for {len(files)} files: expected one model, or one for each file")
    return Teachers([load_network(f, m, **arguments) for f, m in zip(files, models, strict=True)])


def teacher_files(folder: Path) -> list[Path]:
    """``teacher-0.safetensors``, ``teacher-1.safetensors``, ... in their order."""
    return sorted(folder.glob("teacher-*.safetensors"), key=lambda f: int(re.sub(r"\D", "", f.stem) or 0))


def members(path: Path) -> list[Path]:
    """The files that ``path``, a file or a folder of ``teach``, stands for. Raises InputError for another folder."""
    if not path.is_dir():
        return [path]
    found = teacher_files(path)
    if not found:
        raise InputError(f"{path} holds no teacher-*.safetensors: expected a folder that teach wrote")
    return found


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise InputError(f"{path} holds no state dict: expected a mapping of names to tensors")
    return {k: v for k, v in loaded.items() if isinstance(v, Tensor)}


def _strip(tensors: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Take off wrapper prefixes until the names fit; a prefix the network itself uses stays."""
    for _ in range(4):
        if set(tensors) & wanted:
            break
        prefix = next((p for p in PREFIXES if tensors and all(k.startswith(p) for k in tensors)), None)
        if prefix is None:
            break
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors


def _fill(network: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    wanted = network.state_dict()
    inner = {k.removeprefix("network.") for k in wanted} if isinstance(network, Normalized) else set()
    tensors = _strip(tensors, set(wanted) | inner)
    if isinstance(network, Normalized) and not any(k.startswith("network.") for k in tensors):
        tensors = {f"network.{k}": v for k, v in tensors.items()}
    # What a foreign file may lack: our normalisation, which is not trained, and BatchNorm's counters.
    optional = {k for k in wanted if k.startswith("normalize.") or k.endswith("num_batches_tracked")}
    missing, extra = set(wanted) - set(tensors) - optional, set(tensors) - set(wanted)
    wrong = [k for k in wanted if k in tensors and tensors[k].shape != wanted[k].shape]
    module = network.module if isinstance(network, Student) else network
    spec = getattr(module, "spec", None)
    name = spec.name if spec else type(module).__name__
    if missing or extra:
        example = sorted(missing or extra)[0]
        raise InputError(
            f"{path} does not fit {name}: {len(missing)} tensors missing, {len(extra)} unknown, {example!r} among them"
        )
    if wrong:
        k = wrong[0]
        raise InputError(
            f"{path} does not fit {name}: {k} has shape {tuple(tensors[k].shape)}, expected {tuple(wanted[k].shape)}"
        )
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise InputError(f"{path} holds values that are not finite, in {bad[0]!r}")
    network.load_state_dict(tensors, strict=False)


def _count_classes(model: str, tensors: dict[str, Tensor], arguments: dict[str, Any]) -> int:
    """The number of classes of the file: the rows of the matrix that another number of classes would change."""
    few, more = (create_model(model, num_classes=n, **arguments).state_dict() for n in (2, 3))
    changed = [k for k in few if few[k].ndim == 2 and few[k].shape != more[k].shape]
    names = [name for k in changed for name in (k, k.removeprefix("network."))]
    found = [len(v) for k, v in tensors.items() if any(k.endswith(name) for name in names)]
    if not found:
        raise InputError(f"no {' or '.join(changed)} in the file to read the number of classes off; pass num_classes=")
    return found[0]


def _jsonable(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)

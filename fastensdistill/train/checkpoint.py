"""A run's state in one file: tensors in safetensors, the rest as JSON in its card. Nothing is ever unpickled.

Written atomically, so a run killed at any moment, even while writing, leaves the previous checkpoint whole. Of several
processes the first writes it; what differs in the others (:func:`own_part`) lies beside its state under ``processes``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastensdistill.config import DistillRun, TeachRun, TrainConfig
from fastensdistill.data.sources import Dataset
from fastensdistill.engine import parallel
from fastensdistill.engine.common import precision_on
from fastensdistill.errors import InputError
from fastensdistill.settings import settings_of
from fastensdistill.weights import read_tensors, save_tensors

CHECKPOINT = "checkpoint.safetensors"
# What may differ between a run and its continuation. Another engine changes the last bits, not the method; the kind of
# device must be the same, since its generators' states are of no use to another.
FREE = {
    "out", "resume", "tensorboard", "report", "device", "engine", "teachers", "teacher_ema", "root", "unfinished",
    "seeds",
}  # fmt: skip
# What a run from before there was a setting trained with, where its default is left to another setting.
OFF: dict[str, Any] = {"cutout": 0, "erasing": 0, "trivial_augment": False}


def flatten(tree: dict[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split nested dictionaries into tensors and plain values, both under names joined by ``/``."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            inner = flatten(value, f"{name}/")
            tensors |= inner[0]
            values |= inner[1]
        elif isinstance(value, Tensor):
            tensors[name] = value
        else:
            values[name] = value
    return tensors, values


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten` for one of its two parts, or both merged."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, key = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
    return tree


def save_checkpoint(folder: Path, state: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    """Write ``state`` to a run's folder, atomically, with the ``fingerprint`` that a continuation must have."""
    tensors, values = flatten(state)
    save_tensors(folder / CHECKPOINT, tensors, {"kind": "checkpoint", "values": values, "fingerprint": fingerprint})


def load_checkpoint(folder: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The state in a run folder. Raises InputError where it is missing, damaged, or of a run with other settings."""
    tensors, card = read_tensors(folder / CHECKPOINT)
    if card.get("kind") != "checkpoint":
        raise InputError(f"{folder / CHECKPOINT} is not the checkpoint of a run")
    check_continuation(folder, card["fingerprint"], fingerprint)
    return unflatten(tensors | card["values"])


def check_continuation(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError unless the run in ``folder``, of the settings ``before``, can go on with those of ``now``.

    A setting that the run does not know, as it is younger than the run, was not used: that is its default.
    """
    defaults = {s.name: s.default for cls in (TeachRun, DistillRun) for s in settings_of(cls).values()} | OFF
    younger = {key: defaults[key] for key in now if key in defaults and key not in before}
    before, now = (json.loads(json.dumps(each, default=str)) for each in (before | younger, now))
    # In the settings' order, as some follow from those before them (milestones from a schedule) and were not asked for
    for key in dict.fromkeys([*defaults, *sorted({*before, *now})]):
        if before.get(key) != now.get(key):
            raise InputError(
                f"the run in {folder} was started with {key}={before.get(key)!r}, "
                f"not {now.get(key)!r}: resume it with the same setting, or choose another folder"
            )


def fingerprint(
    config: TrainConfig, device: torch.device, data: Dataset, networks: Iterable[nn.Module]
) -> dict[str, Any]:
    """What must be the same for a run to continue, and in all of its processes: settings, kind of device, number of
    processes, images, networks it learns from; of precision "auto" what it means on ``device``."""
    settings = {k: v for k, v in asdict(config).items() if k not in FREE}
    return {
        **settings, "precision": precision_on(config, device), "device": device.type,
        "processes": parallel.processes(), "images": digest_data(data), "teachers": digest_networks(networks),
    }  # fmt: skip


def check_same(fingerprints: list[dict[str, Any]]) -> None:
    """Raise InputError unless all processes train the same; ``fingerprints`` are theirs, in order."""
    first = fingerprints[0]
    for i, other in enumerate(fingerprints):
        for key in sorted(set(first) | set(other)):
            if first.get(key) != other.get(key):
                raise InputError(f"process {i} has {key}={other.get(key)!r}; expected {first.get(key)!r}, process 0's")


def own_part(state: dict[str, Any], networks: dict[str, nn.Module]) -> dict[str, Any]:
    """What is a process's own in the ``state`` of a run, on the CPU: running statistics and generators.

    Parameters and the optimiser's state are the same in all of them, and so is the order of the images.
    """
    buffers = {name: dict(network.named_buffers()) for name, network in networks.items()}
    return {
        "networks": {
            name: {k: v.cpu() for k, v in whole.items() if k in buffers[name]}
            for name, whole in state["networks"].items()
        },
        "step": {k: v.cpu() for k, v in state["step"].items() if k in ("pick", "noise")},
        "random": state["random"],
    }


def with_own_part(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """The state of process ``rank`` from that of a run."""
    own = state.get("processes", {}).get(str(rank), {})
    networks = own.get("networks", {})
    return {
        **state,
        "networks": {name: whole | networks.get(name, {}) for name, whole in state["networks"].items()},
        "step": state["step"] | own.get("step", {}),
        "random": own.get("random", state["random"]),
    }


def digest_data(data: Dataset) -> str:
    """A digest of all images and labels: a run is continued with the same ones."""
    digest = hashlib.sha256()
    for split in (data.train, data.validation, data.test):
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(np.ascontiguousarray(split.labels).data)
    return digest.hexdigest()[:16]


def digest_networks(networks: Iterable[nn.Module]) -> str:
    """A digest of all weights and buffers of ``networks``, by name."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def finished(folder: Path) -> tuple[bool, int, int]:
    """Whether the run in ``folder`` has come to its end, its steps so far, and its steps in all; reads no tensors.

    (False, 0, 0) where it has not saved a checkpoint; a run of an older version, which did not say how many steps there
    are in all, counts as unfinished with 0 of them. Raises InputError for a damaged file.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return False, 0, 0
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {})["card"])
        step, total = int(card["values"]["step_index"]), int(card["values"].get("total_steps", 0))
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{path} is truncated or not the checkpoint of a run: {error}") from error
    return step >= total > 0, step, total


def random_state(device: torch.device) -> dict[str, Tensor]:
    """PyTorch's global generators, which dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put PyTorch's global generators back to :func:`random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

"""Tensors in files: safetensors with a JSON card in the metadata. Foreign files of tensors are read too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.files import write_atomically
from fastensdistill.foreign.flatten import flatten
from fastensdistill.foreign.formats import find_file, is_safetensors, read_any, read_metadata, read_safetensors

FORMAT = "1"  # under our own key; readers of others look for "format": "pt"
OLD_FORMAT = "fastensdistill-1"  # under "format"


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write tensors and a JSON card as one safetensors file, atomically.

    Tensors that share memory are written one by one. Sparse and complex ones are stored as dense and real ones, and
    come back as they were. Raises InputError for what has no values to store.
    """
    flat: dict[str, Tensor] = {}
    stored_as: dict[str, list[str]] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        t = _storable(name, tensor)
        if t.is_complex() or t.layout != torch.strided:
            stored_as[name] = [str(t.layout).removeprefix("torch."), "complex" if t.is_complex() else "real"]
            t = t.to_dense() if t.layout != torch.strided else t
            t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
        t = t.contiguous()
        memory = t.untyped_storage().data_ptr()
        flat[name] = t.clone() if memory in seen else t
        seen.add(memory)
    metadata = {"format": "pt", "fastensdistill": FORMAT, "card": json.dumps(card, default=_jsonable)}
    if stored_as:
        metadata["stored_as"] = json.dumps(stored_as)
    try:
        data = save(flat, metadata=metadata)
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{path} cannot be written: {' '.join(str(error).split())}") from error
    write_atomically(path, data)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and its card ({} for a foreign file). Raises InputError for a missing or damaged file."""
    path = find_file(path)
    if not is_safetensors(path):
        return {name: entry.leaf.read() for name, entry in flatten(read_any(path)).items() if entry.leaf.shape}, {}
    tensors, metadata = read_safetensors(path)
    for name, (layout, numbers) in json.loads(metadata.get("stored_as", "{}")).items():
        t = torch.view_as_complex(tensors[name]) if numbers == "complex" else tensors[name]
        tensors[name] = t if layout == "strided" else t.to_sparse(layout=getattr(torch, layout))
    return tensors, _card(metadata, path)


def read_card(path: str | Path) -> dict[str, Any]:
    """What a file of this package says of itself; {} for a foreign one. The tensors are not read."""
    path = find_file(path)
    return _card(read_metadata(path), path)


def _storable(name: str, tensor: Any) -> Tensor:
    problem = f"a {type(tensor).__name__}" if not isinstance(tensor, Tensor) else ""
    if not problem and tensor.is_meta:
        problem = "on the meta device, without values"
    elif not problem and (tensor.is_quantized or tensor.is_nested):
        problem = "quantised" if tensor.is_quantized else "nested"
    elif not problem and hasattr(tensor, "full_tensor"):  # a DTensor
        tensor = tensor.full_tensor()
    if problem:
        raise InputError(f"{name!r} cannot be saved, it is {problem}: expected an ordinary tensor")
    return tensor.detach().cpu()


def _card(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    if metadata.get("format") != OLD_FORMAT and "fastensdistill" not in metadata:
        return {}
    try:
        card = json.loads(metadata["card"])
    except (json.JSONDecodeError, KeyError) as error:
        raise InputError(f"{path} is damaged: its card is not JSON") from error
    if not isinstance(card, dict):
        raise InputError(f"{path} is damaged: its card is a {type(card).__name__}, not an object")
    return card


def _jsonable(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)

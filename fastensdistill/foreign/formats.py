"""Recognise the format of a weight file by its content, not its suffix (people rename files), and read it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.files import expanded
from fastensdistill.foreign.leaf import Leaf
from fastensdistill.foreign.pickles import read_pickle, read_stored

EXPECTED = "expected weights: .safetensors, what torch.save writes, or an .npz"
# How a file begins that is something else, and what that is
OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a git-LFS pointer, not the file it stands for: git lfs pull fetches that"),
    (b"\x89HDF", "is an HDF5 file (Keras)"),
    (b"\x93NUMPY", "is a single NumPy array"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it first"),
    (b"Rar!", "is a RAR archive: unpack it first"),
    (b"GGUF", "is a GGUF file"),
    (b"\x89PNG", "is an image"),
    (b"\xff\xd8\xff", "is an image"),
    (b"%PDF", "is a PDF"),
)
UNPACK: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", gzip.decompress),
    (b"BZh", bz2.decompress),
    (b"\xfd7zXZ", lzma.decompress),
    (b"\x78\x01", zlib.decompress),
    (b"\x78\x5e", zlib.decompress),
    (b"\x78\x9c", zlib.decompress),
    (b"\x78\xda", zlib.decompress),
)
# A damaged file makes its readers raise nearly anything
DAMAGE = (
    pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError,
    OverflowError, MemoryError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, NotImplementedError,
)  # fmt: skip


def find_file(path: str | Path) -> Path:
    """``path`` with ``~`` replaced. Raises InputError unless it is a file that holds something."""
    if not isinstance(path, str | bytes | os.PathLike):
        raise InputError(f"the file of weights is a {type(path).__name__}: expected a path")
    path = expanded(os.fsdecode(path))
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder: expected a file of weights")
        if not path.is_file():
            raise InputError(f"no such file: {path}")
        with open(path, "rb") as file:
            if not file.read(1):
                raise InputError(f"{path} is empty: {EXPECTED}")
    except OSError as error:
        raise InputError(f"{str(path)[:200]} cannot be read: {error.strerror}") from error
    return path


def is_safetensors(path: Path) -> bool:
    """Whether the content is that of a safetensors file, whatever its name: a length, and JSON."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 2**27


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata. Raises InputError for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, OSError) as error:
        raise InputError(f"{path} is truncated or not a safetensors file: {error}") from error


def read_any(path: Path) -> Any:
    """What a file holds: nested mappings, lists and stubs with a :class:`Leaf` for every tensor.

    Nothing in it is run or imported. Raises InputError for a damaged file and for anything but weights.
    """
    with open(path, "rb") as file:
        start = file.read(4096)
    if is_safetensors(path):
        return {name: Leaf.of(t) for name, t in read_safetensors(path)[0].items()}
    unpack = next((unpack for magic, unpack in UNPACK if start.startswith(magic)), None)
    if unpack is None:
        return _read(lambda: open(path, "rb"), start, str(path))
    try:
        data = unpack(path.read_bytes())
    except (OSError, *DAMAGE) as error:
        raise InputError(f"{path} is compressed, and truncated or damaged: {EXPECTED}") from error
    if data[8:9] == b"{":
        return {name: Leaf.of(t) for name, t in _unpacked_safetensors(data, path).items()}
    return _read(lambda: io.BytesIO(data), data[:4096], f"{path}, unpacked,")


def _read(opened: Callable[[], BinaryIO], start: bytes, name: str) -> Any:
    """The same of a file that ``opened()`` gives, begins with ``start`` and is called ``name`` in errors."""
    try:
        if start[:2] == b"PK":
            return _read_zip(opened, name)
        with opened() as file:
            _refuse_others(file, start, name)
            return read_pickle(file)
    except DAMAGE as error:
        pickled = start[:1] == b"\x80" or start[:2] == b"PK"
        what = "is truncated or damaged" if pickled else f"holds no weights (it begins with {start[:12]!r})"
        raise InputError(f"{name} {what}: {EXPECTED}") from error


def _unpacked_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return load(data)
    except SafetensorError as error:
        raise InputError(f"{path}, unpacked, is truncated or not a safetensors file: {error}") from error


def _refuse_others(file: BinaryIO, start: bytes, name: str) -> None:
    found = next((what for magic, what in OTHERS if start.startswith(magic)), None)
    text = start.lstrip().lower()
    if re.match(rb"<(!doctype|html|\?xml|head|body)", text):
        found = "is a web page, as a download that failed leaves it"
    elif text[:1] in b"{[" and text and b"\0" not in start:
        index = b"weight_map" in file.read()
        found = "is an index of several files of weights: join them first" if index else "is JSON text"
    elif start[257:262] == b"ustar":
        found = "is a tar archive: unpack it first"
    elif start[4:8] == b"TFL3":
        found = "is a TFLite model"
    elif start[:1] == b"\x08" and re.search(rb"pytorch|onnx|tf2onnx|skl2onnx", start[:200]):
        found = "is an ONNX model"
    elif b"joblib.numpy_pickle" in start:
        found = "is a file of joblib's with arrays of its own format: write it with torch.save or numpy.savez"
    if found:
        raise InputError(f"{name} {found}; {EXPECTED}")


def _read_zip(opened: Callable[[], BinaryIO], name: str) -> Any:
    try:
        archive = zipfile.ZipFile(opened())
    except zipfile.BadZipFile as error:
        raise InputError(f"{name} is truncated: a zip file, as torch.save writes it, without its end") from error
    names = archive.namelist()
    pickles = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
    if pickles:
        return _read_torch(archive, pickles[0].removesuffix("data.pkl"), set(names), name)
    if names and all(n.endswith(".npy") for n in names):
        return _read_npz(opened)
    if any(n.endswith(("models/model.json", "/archive_format", "serialized_exported_program.json")) for n in names):
        raise InputError(f"{name} is a program of torch.export, not weights: {EXPECTED}")
    inside = f" of {names[0]}" if names else ", an empty one"
    raise InputError(f"{name} is a zip archive{inside}, not weights: unpack it first; {EXPECTED}")


def _read_torch(archive: zipfile.ZipFile, root: str, names: set[str], name: str) -> Any:
    def stored(key: str) -> bytes:
        try:
            return archive.read(f"{root}data/{key}")
        except (OSError, *DAMAGE) as error:
            raise InputError(f"{name} is truncated or damaged: the values of tensor {key} cannot be read") from error

    order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else sys.byteorder
    if order != sys.byteorder:
        raise InputError(f"{name} was written on a {order}-endian machine; this one is {sys.byteorder}-endian")
    return read_stored(io.BytesIO(archive.read(f"{root}data.pkl")), stored)


def _read_npz(opened: Callable[[], BinaryIO]) -> dict[str, Leaf]:
    found = {}
    with np.load(opened(), allow_pickle=False) as arrays:
        for name in arrays.files:
            try:
                array = arrays[name]
                found[name] = Leaf.of(torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape))
            except (TypeError, ValueError):  # objects, text
                found[name] = Leaf.unreadable("a NumPy array of objects or text")
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, {} of any other. Raises InputError for a damaged one."""
    if not is_safetensors(path):
        return {}
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return header.get("__metadata__") or {}
    except (ValueError, OSError, AttributeError) as error:
        raise InputError(f"{path} is truncated or not a safetensors file: {error}") from error

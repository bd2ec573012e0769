"""Export a network: safetensors with a JSON card, a ``torch.export`` program, ONNX. Each is reloaded and compared.

Files appear under their final names only after they passed, so a folder never holds an export that was not checked.
"""

from __future__ import annotations

import copy
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError, unknown
from fastensdistill.files import write_atomically
from fastensdistill.method.student import Student
from fastensdistill.models import ModelSpec
from fastensdistill.weights import load_network, save_network

FORMATS = ("safetensors", "torch", "onnx")
# Largest difference of the logits, relative to their root mean square. ONNX Runtime has kernels of its own.
TOLERANCE = {"safetensors": 0.0, "torch": 1e-5, "onnx": 1e-4}


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how far its logits are from the network's (relative, over the checked images)."""

    format: str
    path: Path
    error: float


def export_network(
    network: nn.Module, folder: Path | str, *, images: Tensor, formats: str | Sequence[str] = FORMATS[:2],
    card: dict[str, Any] | None = None, name: str = "network",
) -> list[Exported]:  # fmt: skip
    """Export ``network`` to ``folder`` and check every file on ``images`` (N ≥ 2, channels, H, W) in [0, 1].

    The exported network takes any batch size. Raises InputError for an unknown format, a student that is not averaged,
    fewer than two images, a missing extra, and an export that cannot be made or does not give the same logits.
    """
    formats = [formats] if isinstance(formats, str) else list(formats)
    for f in formats:
        if f not in FORMATS:
            raise unknown("export format", f, FORMATS)
    if isinstance(network, Student):
        raise InputError(f"a {network.kind} student is not one ordinary network: export its average()")
    if len(images) < 2:
        raise InputError(f"{len(images)} images to check the export on; expected at least 2")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise InputError(f"cannot make the folder {folder}: {failure.strerror}") from failure
    network = copy.deepcopy(network).eval().cpu()  # the caller's stays where and as it is
    images = images.cpu().float()
    with torch.no_grad():
        expected = network(images)
    done = []
    # The exporters' warnings about their own insides tell the user nothing: what counts is compared below
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        warnings.simplefilter("ignore")
        for f in formats:
            write, read, suffix = _WAYS[f]
            path = Path(temporary) / f"{name}{suffix}"
            try:
                write(network, path, images, card or {})
            except (OSError, RuntimeError) as failure:  # a full disk, or a network that the exporter cannot follow
                first = next(iter(str(getattr(failure, "strerror", None) or failure).splitlines()), "no reason given")
                raise InputError(f"the {f} export could not be made in {folder}: {first}") from failure
            error = _error(read(path, network, images).detach(), expected)
            if not error <= TOLERANCE[f]:
                raise InputError(
                    f"the {f} export gives other logits: relative error {error:.1e}, allowed {TOLERANCE[f]:.0e}"
                )
            done.append((f, path, error))
        results = []
        for f, path, error in done:
            os.replace(path, folder / path.name)
            results.append(Exported(f, folder / path.name, error))
    if "safetensors" in formats:
        text = json.dumps(full_card(network, images, card or {}), indent=2)
        write_atomically(folder / f"{name}.json", text.encode())
    return results


def full_card(network: nn.Module, images: Tensor, card: dict[str, Any]) -> dict[str, Any]:
    """What a stranger needs to use the weights: architecture, input, normalisation, classes, metrics."""
    spec = getattr(network, "spec", None) or ModelSpec("", {})
    return {
        "architecture": spec.name or type(network).__qualname__,
        "arguments": spec.arguments,
        "parameters": sum(p.numel() for p in network.parameters()),
        "input": {
            "shape": ["batch", *images.shape[1:]],
            "range": [0.0, 1.0],
            "normalisation": "inside the network",
            "mean": spec.arguments.get("mean"),
            "std": spec.arguments.get("std"),
        },
        "output": "logits (batch, classes)",
        **card,
    }


def _write_safetensors(network: nn.Module, path: Path, images: Tensor, card: dict[str, Any]) -> None:
    save_network(path, network, card)


def _read_safetensors(path: Path, network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        # A registry model is built anew from the file alone; for a network of the user's own only its weights are read.
        return load_network(path, None if getattr(network, "spec", None) else network)(images)


def _write_torch(network: nn.Module, path: Path, images: Tensor, card: dict[str, Any]) -> None:
    program = torch.export.export(network, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    buffer = io.BytesIO()  # onto a full disk PyTorch's own writer ends the whole process
    torch.export.save(program, buffer, extra_files={"card.json": json.dumps(full_card(network, images, card))})
    path.write_bytes(buffer.getvalue())


def _read_torch(path: Path, network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(images)


def _write_onnx(network: nn.Module, path: Path, images: Tensor, card: dict[str, Any]) -> None:
    _require_onnx()
    torch.onnx.export(
        network, (images[:2],), path, dynamo=True, external_data=False, verbose=False, input_names=["images"],
        output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )  # fmt: skip


def _read_onnx(path: Path, network: nn.Module, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"onnx export needs {error.name}: pip install 'fastensdistill[onnx]'") from None


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return float("inf")
    return float((actual - expected).abs().max() / expected.square().mean().sqrt().clamp_min(1e-12))


_Way = tuple[Callable[..., None], Callable[..., Tensor], str]
_WAYS: dict[str, _Way] = {
    "safetensors": (_write_safetensors, _read_safetensors, ".safetensors"),
    "torch": (_write_torch, _read_torch, ".pt2"),
    "onnx": (_write_onnx, _read_onnx, ".onnx"),
}

"""Export a network: safetensors with a JSON card, a ``torch.export`` program, ONNX. Each is reloaded and compared.

Files appear under their final names only after they passed, so a folder never holds an export that was not checked.
"""

from __future__ import annotations

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
from safetensors.torch import load_file
from torch import Tensor, nn

from fastensdistill.errors import InputError, unknown
from fastensdistill.files import expanded, write_atomically
from fastensdistill.method.calls import call, dtype_of, habits_of
from fastensdistill.method.copying import copy_network
from fastensdistill.method.modes import set_mode
from fastensdistill.method.outputs import logits_of
from fastensdistill.method.student import MultiHead, RankOneLayer, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import ModelSpec, Normalized
from fastensdistill.models.wrappers import unwrap, unwrap_inside
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
    """Export ``network`` to ``folder`` and check every file on ``images`` (N ≥ 2, channels, H, W) in [0, 1], float.

    What torch.compile, DataParallel and the like wrap is exported without them. ``name.safetensors`` holds the names of
    the network's own class, for a strict ``load_state_dict``; the programs (.pt2, .onnx) take float32 images, in a
    batch of any size, and give float32 logits, whatever the network's dtype. ``name.json`` says the rest: classes,
    normalisation, what each file expects.
    Raises InputError for an unknown format or none, a student that is not averaged, an ensemble, fewer than two images,
    a missing extra, and an export that cannot be made or does not give the same logits.
    """
    formats = _formats(formats)
    if not name or Path(name).name != name:
        raise InputError(f"name={name!r}: expected the name of a file, without its folder")
    network = _single(network)
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"the images to check the export on are {found}: expected a tensor of floats in [0, 1]")
    if len(images) < 2:
        raise InputError(f"{len(images)} images to check the export on; expected at least 2")
    folder = expanded(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise InputError(f"cannot make the folder {folder}: {failure.strerror}") from failure
    network = set_mode(unwrap_inside(copy_network(network)), False).cpu()  # the caller's stays where and as it is
    # As files hold weights: in another layout the last digits are others
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    images = images.detach().cpu().float()
    expected = _call(network, images)
    about = full_card(network, images, card or {})
    done = []
    # The exporters' warnings about their own insides tell the user nothing: what counts is compared below
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        warnings.simplefilter("ignore")
        for f in formats:
            write, read, suffix = _WAYS[f]
            path = Path(temporary) / f"{name}{suffix}"
            try:
                write(network, path, images, about if f != "safetensors" else card or {})
                logits = read(path, network, images).detach()
            except InputError:
                raise
            except Exception as failure:  # a full disk, or a network that the exporter or the runtime cannot follow
                first = next(iter(str(getattr(failure, "strerror", None) or failure).splitlines()), "no reason given")
                raise InputError(f"the {f} export could not be made in {folder}: {first}") from failure
            error, allowed = _error(logits, expected), _allowed(f, network)
            if not error <= allowed:
                raise InputError(
                    f"the {f} export gives other logits: relative error {error:.1e}, allowed {allowed:.0e}"
                )
            done.append((f, path, error))
        results = []
        for f, path, error in done:
            os.replace(path, folder / path.name)
            results.append(Exported(f, folder / path.name, error))
    write_atomically(folder / f"{name}.json", json.dumps(about, indent=2, default=str).encode())
    return results


def full_card(network: nn.Module, images: Tensor, card: dict[str, Any]) -> dict[str, Any]:
    """What a stranger needs to use the weights: architecture, input, normalisation, classes, metrics."""
    spec = getattr(network, "spec", None) or ModelSpec("", {})
    bare, outside = network, isinstance(network, Normalized)
    mean, std = spec.arguments.get("mean"), spec.arguments.get("std")
    if isinstance(network, Normalized):
        bare = network.network
        layer = network.normalize
        mean, std = mean or layer.mean.flatten().tolist(), std or layer.std.flatten().tolist()
    own = f"{type(bare).__module__}.{type(bare).__qualname__}"
    return {
        "architecture": spec.name or type(bare).__qualname__,
        "arguments": spec.arguments,
        "class": own,
        "dtype": str(dtype_of(network)).removeprefix("torch."),
        "parameters": sum(p.numel() for p in network.parameters()),
        "input": {
            "shape": ["batch", *images.shape[1:]],
            "range": [0.0, 1.0] if float(images.min()) >= 0 and float(images.max()) <= 1 else None,
            "normalisation": "inside the programs (.pt2, .onnx); before the class of the .safetensors, whose weights "
            "are for (image - mean) / std" if outside else "inside the network",
            "mean": mean,
            "std": std,
        },
        "output": "logits (batch, classes)",
        "weights": f"a strict load_state_dict of {own} takes safetensors.torch.load_file(FILE); "
        "fastensdistill.load_network(FILE) builds a network by name with its normalisation",
        **card,
    }  # fmt: skip


class _Program(nn.Module):
    """A network of another dtype, with more outputs or that writes into its images: float32 images to float32 logits,
    and the images stay."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.dtype = network, dtype_of(network)

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images.clone().to(self.dtype))).float()


@torch.no_grad()
def _program(network: nn.Module, images: Tensor) -> nn.Module:
    plain = dtype_of(network) == torch.float32 and isinstance(network(images.clone()), Tensor)
    return network if plain and not any(habits.writes for habits in habits_of(network)) else _Program(network).eval()


@torch.no_grad()
def _call(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, C). Raises InputError for a network that cannot take the images, or gives something else."""
    logits = call(network, images)
    if logits.ndim != 2 or len(logits) != len(images):
        own = type(network).__name__
        raise InputError(f"{own} returns shape {tuple(logits.shape)}: expected logits ({len(images)}, classes)")
    return logits.float()


def _formats(given: Any) -> list[str]:
    formats = [given] if isinstance(given, str) else list(given or ())
    for f in formats:
        if not isinstance(f, str) or f not in FORMATS:
            raise unknown("export format", str(f), FORMATS)
    if not formats:
        raise InputError(f"no export formats given: expected any of {', '.join(FORMATS)}")
    return list(dict.fromkeys(formats))


def _single(network: Any) -> nn.Module:
    """The network inside its wrappers. Raises InputError for what is not one ordinary network with values."""
    if not isinstance(network, nn.Module):
        raise InputError(
            f"the network to export is a {type(network).__name__}: expected an nn.Module; load_network reads files"
        )
    network = unwrap(network)
    if isinstance(network, Student):
        use = {"latent-be": "export its average()", "single": "export its module"}
        advice = use.get(network.kind, "it is an ensemble, which stays one")
        raise InputError(f"a {network.kind} student is not one ordinary network: {advice}")
    if isinstance(network, Teachers):
        raise InputError(f"{len(network)} teachers are not one network: export one of them, or distil them into one")
    if any(isinstance(m, Student | RankOneLayer | MultiHead) for m in network.modules()):
        raise InputError(
            f"{type(network).__name__} has layers of a student with branches: export the student's average()"
        )
    if any(t.is_meta for t in (*network.parameters(), *network.buffers())):
        raise InputError(f"{type(network).__name__} is on the meta device, without values to export")
    return network


def _write_safetensors(network: nn.Module, path: Path, images: Tensor, card: dict[str, Any]) -> None:
    save_network(path, network, card)


def _read_safetensors(path: Path, network: nn.Module, images: Tensor) -> Tensor:
    # A registry model is built anew from the file alone; for a network of the user's own only its weights are read
    bare = network.network if isinstance(network, Normalized) else network
    bare_again = copy_network(bare)
    bare_again.load_state_dict(load_file(path), strict=True)
    return _call(load_network(path, None if getattr(network, "spec", None) else bare_again), images)


def _write_torch(network: nn.Module, path: Path, images: Tensor, card: dict[str, Any]) -> None:
    program = torch.export.export(
        _program(network, images[:2]), (images[:2].clone(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    buffer = io.BytesIO()  # onto a full disk PyTorch's own writer ends the whole process
    torch.export.save(program, buffer, extra_files={"card.json": json.dumps(card, default=str)})
    path.write_bytes(buffer.getvalue())


def _read_torch(path: Path, network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(images.clone())


def _write_onnx(network: nn.Module, path: Path, images: Tensor, card: dict[str, Any]) -> None:
    _require_onnx()
    import onnx

    torch.onnx.export(
        _program(network, images[:2]), (images[:2].clone(),), path, dynamo=True, external_data=False, verbose=False,
        input_names=["images"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )  # fmt: skip
    model = onnx.load(path)
    said = {"card": card, "classes": card.get("classes"), **{k: card["input"][k] for k in ("mean", "std", "range")}}
    onnx.helper.set_model_props(model, {k: json.dumps(v, default=str) for k, v in said.items() if v is not None})
    onnx.save(model, path)


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


def _allowed(f: str, network: nn.Module) -> float:
    """Half precision rounds every layer: other kernels differ by its resolution."""
    return max(TOLERANCE[f], 16 * torch.finfo(dtype_of(network)).eps) if f == "onnx" else TOLERANCE[f]


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

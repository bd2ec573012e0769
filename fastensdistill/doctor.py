"""``fastensdistill doctor``: what is installed, what was built, and what can be used here."""

from __future__ import annotations

import importlib
import platform
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import torch

import fastensdistill
from fastensdistill.engine import proof
from fastensdistill.engine.dispatch import PREDICTED, TABLE
from fastensdistill.kernels import extension, ops
from fastensdistill.kernels.launch import HAS_TRITON

PACKAGES = (
    "torch", "torchvision", "triton", "numpy", "pillow", "safetensors", "PyYAML", "rich", "scikit-learn",
    "matplotlib", "nvidia-ml-py",
)  # fmt: skip
EXTRAS = {"tensorboard": "tensorboard", "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "timm": "timm"}


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def facts() -> list[tuple[str, str]]:
    """Name and finding, in the order they are printed."""
    rows = [
        ("fastensdistill", f"{fastensdistill.__version__} in {Path(fastensdistill.__file__).parent}"),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    rows += [(p, version(p) or "missing") for p in PACKAGES]
    rows += [(p, version(p) or f"not installed; pip install 'fastensdistill[{e}]'") for p, e in EXTRAS.items()]
    rows += _extension()
    rows += [(f"ops on {kind}", _implementations(device)) for device, kind in (("cpu", "a CPU"), ("cuda", "CUDA"))]
    predicted = sorted({f"sm_{row.arch} by {row.implementation}" for row in PREDICTED})
    rows.append(("convolutions", f"{len(TABLE)} measured choices; predicted on {', '.join(predicted)}"))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            rows.append((f"cuda:{i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
            rows.append(("", f"wgmma kernels: {proof.state(torch.device('cuda', i))}"))
        rows.append(("CUDA", f"{torch.version.cuda}, driver {_driver()}"))
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        threads = torch.get_num_threads()
        own = f"{threads} thread{'s' * (threads > 1)}"
        rows.append(("GPU", f"none found ({built}); training runs on the CPU, {own}"))
    captured, fused = "captured (the reference's step as CUDA graphs)", "fused (CUDA graph of Triton kernels)"
    if not HAS_TRITON:
        fused += ", not here: Triton is not installed"
    elif not torch.cuda.is_available():
        fused += ", not here: no CUDA device"
    captured += "" if torch.cuda.is_available() else ", not here: no CUDA device"
    rows.append(("engines", f"reference; {captured}; {fused}"))
    return rows


def _extension() -> list[tuple[str, str]]:
    found = extension.describe()
    own = f"CUDA ops, {found['library']}" if found["loaded"] else "none; Triton kernels and references in Python serve"
    rows = [("extension", own)]
    if found["reason"]:
        rows.append(("", str(found["reason"])))
    built = found["built_with"]
    if built:
        shown = (f"{k} {', '.join(v) if isinstance(v, list) else v}" for k, v in built.items())
        rows.append(("", f"built with {'; '.join(shown)}"))
    return rows


def _implementations(device: str) -> str:
    """How many ops of the fused engine are computed by what on such a device."""
    importlib.import_module("fastensdistill.engine.fused")  # defines them
    count = Counter(ops.implementation(name, device, torch.float32) for name in ops.PORTABLE)
    return ", ".join(f"{count[name]} {name}" for name in ops.ORDER if count[name])


def print_report() -> None:
    """Print the facts, a line each."""
    rows = facts()
    width = max(len(name) for name, _ in rows)
    for name, finding in rows:
        print(f"{name:{width}}  {finding}")
    sys.stdout.flush()


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception as error:  # NVML raises its own errors where there is no driver library
        return f"unknown ({error})"

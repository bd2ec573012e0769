"""The compiled extension that may implement the ops: loaded, and described.

Every op is defined from Python (``ops.define``) and serves any device; the extension, where it was built (see
``setup.py``), adds kernels for CUDA tensors, which the dispatcher prefers. Nothing is compiled at import.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

# Part of the library's file name. Raised whenever a schema changes, so that a build of another interface is left aside.
INTERFACE = 5
DISABLE = "FASTENSDISTILL_NO_EXTENSION"
LIBRARY = Path(__file__).with_name(f"_extension_v{INTERFACE}.so")
BUILD_REPORT = Path(__file__).with_name("_build.json")


def _load() -> str | None:
    """Loads the library; returns the reason when there is none to load."""
    if os.environ.get(DISABLE, "0") not in ("", "0"):
        return f"switched off by {DISABLE}"
    if not LIBRARY.exists():
        return None if BUILD_REPORT.exists() else "not built: the package was not installed with pip"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        reason = f"built but not loadable: {error}"
        warnings.warn(f"fastensdistill extension {reason}; Triton kernels and references in Python serve", stacklevel=2)
        return reason
    return None


_reason = _load()


def describe() -> dict[str, Any]:
    """What implements the ops.

    Returns:
        ``loaded``: whether the library is in use; for CUDA tensors, others have no kernels in it. ``reason``: why it is
        not, else None. ``library``: its path or None. ``torch``: the version in use. ``built_with``: compiler, PyTorch,
        nvcc and GPU architectures of the build, where recorded.
    """
    report: dict[str, Any] = json.loads(BUILD_REPORT.read_text()) if BUILD_REPORT.exists() else {}
    return {
        "loaded": _reason is None and LIBRARY.exists(),
        "reason": _reason or report.get("reason"),
        "library": str(LIBRARY) if LIBRARY.exists() else None,
        "torch": torch.__version__,
        "built_with": {key: report[key] for key in ("compiler", "torch", "nvcc", "architectures") if key in report},
    }


def serves(name: str, device: str) -> bool:
    """Whether the library in use implements ``fastensdistill::name`` for tensors on ``device``, such as "cuda"."""
    if _reason is not None or not LIBRARY.exists() or device != "cuda":
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastensdistill::{name}", "CUDA")

"""How an op is defined, and what computes it.

For every op the first of these that there is for its tensors:

    extension   a kernel of the compiled extension (``extension.py``), which PyTorch's dispatcher prefers
    triton      the op's Triton kernel, where kernels run (``launch.py``) and no tensor that it always takes is float64
    reference   the equations in plain PyTorch, any device and dtype
"""

import inspect
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastensdistill.kernels import extension
from fastensdistill.kernels.launch import kept_to_reference, runs_kernel

NAMESPACE = "fastensdistill"
ORDER = ("extension", "triton", "reference")
# Every op's name → what serves without the extension; of those among them that have one, the launcher of its kernel
PORTABLE: dict[str, Callable[..., Any]] = {}
LAUNCHERS: dict[str, Callable[..., Any]] = {}


def nothing(*operands: Any) -> None:
    """The results of an op that only writes into its operands."""


def define(
    name: str,
    reference: Callable[..., Any],
    empty: Callable[..., Any] = nothing,
    launcher: Callable[..., Any] | None = None,
    *,
    mutates: tuple[str, ...] = (),
) -> Any:
    """Define ``torch.ops.fastensdistill.name`` and return it; its schema is the reference's signature.

    Args:
        reference: the op in plain PyTorch, called by position. A parameter that is a NamedTuple stands for its fields:
            operands that travel together are one parameter of the function and several of the schema. Where two
            parameters have a field of the same name, it has the parameter's name before it in the schema.
        empty: the results unwritten, of the same operands: the op's fake, and where a launcher gets its memory.
        launcher: launches the op's Triton kernel, same operands and results.
        mutates: names of the operands that it writes into.

    The op has no gradient unless one is registered for it. Tensors that require one are refused in a RuntimeError.
    """
    signature = inspect.signature(reference, eval_str=True)
    packings: list[tuple[Any, int, int]] = []  # the NamedTuple or None, and where its fields are in the schema
    fields: list[inspect.Parameter] = []
    names = Counter(field for p in signature.parameters.values() for field in getattr(p.annotation, "_fields", ()))
    for parameter in signature.parameters.values():
        together = parameter.annotation if hasattr(parameter.annotation, "_fields") else None
        hints = {parameter.name: parameter.annotation} if together is None else typing.get_type_hints(together)
        inside = {f"{parameter.name}_{name}" if names[name] > 1 else name: kind for name, kind in hints.items()}
        packings.append((together, len(fields), len(fields) + len(inside)))
        fields += [parameter.replace(name=field, annotation=kind) for field, kind in inside.items()]
    tensors = [position for position, field in enumerate(fields) if field.annotation is Tensor]

    def packed(operands: Sequence[Any]) -> list[Any]:
        return [operands[i] if together is None else together(*operands[i:j]) for together, i, j in packings]

    def run(*operands: Any) -> Any:
        required = [operands[position] for position in tensors]
        if torch.is_grad_enabled() and any(x.requires_grad for x in required):
            raise RuntimeError(f"{name} has no gradient; give it detached tensors, or call it under torch.no_grad()")
        kernel = launcher is not None and _runs_kernel(name, required[0].device.type, *[x.dtype for x in required])
        return (launcher if kernel else reference)(*packed(operands))  # type: ignore[misc]

    def prototype() -> None: ...

    prototype.__signature__ = signature.replace(parameters=fields)  # type: ignore[attr-defined]
    schema = torch.library.infer_schema(prototype, mutates_args=mutates)
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"{NAMESPACE}::{name}", "default", run)
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *operands: empty(*packed(operands)))
    PORTABLE[name] = run
    if launcher is not None:
        LAUNCHERS[name] = launcher
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _runs_kernel(name: str, device: str, *dtypes: torch.dtype) -> bool:
    return not kept_to_reference(name) and runs_kernel(device, *dtypes)


def implementation(name: str, device: str, *dtypes: torch.dtype) -> str:
    """What computes the op ``name`` on tensors of these dtypes on ``device``, such as "cuda", of the three above."""
    if extension.serves(name, device):
        return "extension"
    return "triton" if name in LAUNCHERS and _runs_kernel(name, device, *dtypes) else "reference"


def absent(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What an op returns in the place of a result nobody asked for (ops return fixed tuples)."""
    return x.new_empty(0, dtype=dtype)


def present(x: Tensor) -> Tensor | None:
    """A result, or None where it is absent."""
    return x if x.numel() else None


def refuse_second_derivative(name: str) -> None:
    """For the top of a ``backward`` that hands out a saved gradient: as a constant it would be silently wrong there."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} is differentiable once: its gradient has no graph, so create_graph=True is refused")

"""Check that each branch of a student computes the same as the plain network with that branch's weights.

A network may bring its branches together where nobody sees it: tokens before the batch, crops stacked into it, the
statistics of a batch, attention over the images. Then a branch learns from the others, and no averaged network is what
was trained. So branches with factors of their own are compared with their merged networks on a few images, layer by
layer, in evaluation and in training mode; and the average with the branches where all are equal.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastensdistill.errors import InputError
from fastensdistill.method.base import Single, Student
from fastensdistill.method.calls import call
from fastensdistill.method.computed_weights import HOOKS
from fastensdistill.method.copying import copy_network
from fastensdistill.method.hydra import Hydra, MultiHead
from fastensdistill.method.modes import set_mode
from fastensdistill.method.rank_one_layer import RankOneLayer

IMAGES = 2
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}  # of the largest value; what is mixed is off by its own size
REDUCED = 0.1  # in other dtypes
DRAWS = ("bernoulli", "rand", "rand_like", "randn", "randn_like", "uniform", "normal")
Seen = list[tuple[str, Tensor]]  # what the layers got, in the order they were called


def check_once(student: Student, x: Tensor) -> None:
    """:func:`check_branches` for images of a size that the student has not been called with, without its hooks.

    Nothing is done where ``x`` has no values: while the call is compiled, traced, captured or transformed.
    """
    shape = tuple(x.shape[1:])
    if shape in student.checked or type(x) not in (Tensor, nn.Parameter) or len(shape) != 3 or x.is_meta:
        return
    transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    check_branches(student, shape, hooks=False)


@torch.no_grad()
def check_branches(student: Student, image_shape: Sequence[int], *, hooks: bool = True) -> None:
    """Raise InputError unless a student's branches are their merged networks, and equal ones their average.

    ``image_shape`` is (channels, H, W). On copies with factors moved off one, on a few images, in both modes with
    BatchNorm's own statistics left out; the student is left as it is, and so is every generator. Without ``hooks``,
    the network's forward hooks do not run. Nothing is said about a network that cannot be run on such images at all.
    """
    if isinstance(student, Single):
        return
    moved: Any = copy_network(student, forget=True)
    if not hooks:
        _remove_hooks(moved)
    moved.checked.add(tuple(image_shape))  # it is called below
    first = next(moved.parameters())
    images = _images((IMAGES, *image_shape), first)
    chosen = sorted({0, student.branches - 1})
    _move_factors(moved)
    with _undisturbed(first.device):
        for i, k in enumerate(chosen):  # one network at a time: together they are large
            network = moved.branch(k)
            for training in (False, True):
                _compare(moved, network, chosen, i, images, training)
        if not isinstance(moved, Hydra):
            _move_factors(moved, apart=False)
            network = moved.train().average()
            _compare(moved, network, chosen, 0, images, False)
    student.checked.add(tuple(image_shape))


def _compare(student: Student, network: nn.Module, chosen: list[int], at: int, images: Tensor, training: bool) -> None:
    """The branch ``chosen[at]`` of ``student`` against ``network``, layer by layer and in what they return."""
    mode = "training" if training else "evaluation"
    trouble = f"{type(student.module).__name__} cannot be a {student.kind} student"
    paths = [path for path, m in student.module.named_modules() if isinstance(m, RankOneLayer | MultiHead)]
    try:
        _set_mode(network, training)
        alone, output = _run(partial(call, network), network, paths, images)
    except Exception:  # the network's own trouble with such images; its call will say so
        return
    _set_mode(student, training)
    try:
        seen, logits = _run(student, student.module, paths, images, branches=chosen)
    except InputError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{trouble}: alone it runs, with branches it does not ({reason})") from error
    if [path for path, _ in seen] != [path for path, _ in alone]:
        raise InputError(f"{trouble}: in {mode} mode it calls other layers with branches than alone")
    for (path, together), (_, own) in zip(seen, alone, strict=True):
        shared = isinstance(student, Hydra) or not together.ndim
        if not _close(together if shared else together.chunk(len(chosen))[at], own):
            raise InputError(
                f"{trouble}: in {mode} mode layer {path!r} gets an input of shape {tuple(together.shape)} for "
                f"{len(chosen)} branches of {len(images)} images, in which branch {chosen[at]} is not what it is "
                "alone; expected inputs branch by branch, and no image that sees others"
            )
    if not _close(logits[at], output):
        raise InputError(
            f"{trouble}: in {mode} mode branch {chosen[at]} returns other logits than its own network; expected what "
            "follows the last layer to treat every image by itself"
        )


def _run(
    called: Callable[..., Tensor], network: nn.Module, paths: Sequence[str], images: Tensor, **arguments: Any
) -> Any:
    """What the layers at ``paths`` of ``network`` get, and what ``called`` returns."""
    seen: Seen = []

    def recorder(path: str) -> Any:
        def record(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.extend((path, t.detach().clone()) for t in (*args, *kwargs.values()) if isinstance(t, Tensor))

        return record

    handles = [
        network.get_submodule(path).register_forward_pre_hook(recorder(path), with_kwargs=True, prepend=True)
        for path in paths
    ]
    random.seed(0)
    try:
        with Unrandom():
            return seen, called(images.clone(), **arguments)
    finally:
        for handle in handles:
            handle.remove()


def _close(found: Any, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    a, b = found.double(), expected.double()
    scale = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
    allowed = TOLERANCE.get(expected.dtype, REDUCED) * scale
    return torch.allclose(a, b, rtol=0, atol=allowed, equal_nan=True)


def _images(shape: Sequence[int], like: Tensor) -> Tensor:
    """Images in [0, 1] that differ, without a generator."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((count * 12.9898).sin() * 0.5 + 0.5).view(tuple(shape)).to(like)


def _move_factors(student: Student, apart: bool = True) -> None:
    """Give the factors values off one, other ones in each branch or the same in all."""
    for i, layer in enumerate(m for m in student.modules() if isinstance(m, RankOneLayer)):
        for j, factor in enumerate((layer.delta_r, layer.delta_s)):
            rows = len(factor) if apart else 1
            count = torch.arange(rows * factor.shape[1], dtype=torch.float64) + 7 * i + 3 * j
            factor.copy_((0.2 * (count * 78.233).sin()).view(rows, -1).expand_as(factor))


def _set_mode(network: nn.Module, training: bool) -> None:
    """What keeps running statistics stays in evaluation: branches share those of a batch by design, and a spectral
    norm moves on with every call."""
    set_mode(network, training)
    for m in network.modules():
        if "running_mean" in m._buffers or "running_var" in m._buffers:
            m.training = False
        elif isinstance(m, RankOneLayer) and m.has_computed_weight():
            m.layer.eval()


def _remove_hooks(network: nn.Module) -> None:
    for m in network.modules():
        m._forward_hooks.clear()
        m._backward_hooks.clear()
        m._backward_pre_hooks.clear()
        for key in [key for key, hook in m._forward_pre_hooks.items() if not isinstance(hook, HOOKS)]:
            del m._forward_pre_hooks[key]


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Full precision inside, and every generator afterwards where it was."""
    state = random.getstate()
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            yield
        finally:
            random.setstate(state)


class Unrandom(TorchFunctionMode):
    """Nothing is drawn: dropout keeps everything, other draws are one (bernoulli) or a half."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if "dropout" in name and args and isinstance(args[0], Tensor):
            return args[0]
        if name == "scaled_dot_product_attention":
            kwargs["dropout_p"] = 0.0
        out = func(*args, **kwargs)
        if name.rstrip("_") in DRAWS and isinstance(out, Tensor) and out.is_floating_point():
            out.fill_(1.0 if "bernoulli" in name else 0.5)
        return out

"""Data parallel training under ``torchrun``: gradients are averaged between un-fold and update.

Process 0's weights and momentum are everybody's at the start. Every process draws its own pair and noise and keeps its
own BatchNorm statistics, as the authors' code does, unless they are to be synchronised; the parameters stay equal,
because all take the same steps from there. NCCL's all-reduce can be captured in a graph.

What hosts tell one another (errors, signals, states) goes over gloo: it waits for no device.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastensdistill.errors import InputError

T = TypeVar("T")


class Releasable(Protocol):
    """What holds something of a process group that has to go before the group does."""

    def release(self) -> None: ...


_alone = False
# The default group, and one of the same processes over gloo. Weakly: a gloo group that something still refers to when
# the interpreter ends aborts the process, about every fifteenth time; whoever destroys the default group ends both.
_hosts: tuple[Any, Any] = (None, None)
# Captured graphs that exchange tensors: NCCL waits for the last of them before it lets a process leave.
_graphs: weakref.WeakSet[Releasable] = weakref.WeakSet()


def processes() -> int:
    """How many processes train together: 1 unless ``torch.distributed`` has been initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """This process among them; 0 where there is one."""
    return dist.get_rank() if processes() > 1 else 0


def launched() -> int:
    """How many processes were started together, ``torchrun``'s WORLD_SIZE; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def join() -> None:
    """Form the process group of a ``torchrun`` launch, unless there is one already or only one process was started.

    NCCL carries what lies on GPUs, gloo the rest; the group ends with the process. Raises InputError where the
    environment describes no group.
    """
    if launched() > 1 and dist.is_available() and not dist.is_initialized():
        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"WORLD_SIZE={launched()}, but no process group can be formed: {reason}") from error
        atexit.register(_leave)


def check_device(device: torch.device) -> None:
    """Raise InputError for a process group, made by its user, that carries nothing on ``device``."""
    if processes() > 1 and dist.get_backend() == "nccl" and device.type != "cuda":
        raise InputError(f"the process group's backend is nccl; expected gloo for device {device.type}")


def released_before_leaving(graph: Releasable) -> None:
    """Call ``graph.release()`` before the process group ends, if it is still there."""
    _graphs.add(graph)


def _leave() -> None:
    if dist.is_initialized():
        for graph in list(_graphs):
            graph.release()
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process trains by itself: nothing is averaged or waited for."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def average(values: Tensor) -> None:
    """The mean of ``values`` over all processes, in place; nothing where there is one."""
    count = processes()
    if count > 1:
        dist.all_reduce(values)
        values.div_(count)


def least(values: Tensor) -> None:
    """The smallest of all processes, in place; nothing where there is one."""
    if processes() > 1:
        dist.all_reduce(values, dist.ReduceOp.MIN)


@torch.no_grad()
def same_start(tensors: Iterable[Tensor]) -> None:
    """Process 0's values for everybody, in place, whatever the tensors' memory layout."""
    if processes() > 1:
        for tensor in tensors:
            values = tensor.detach().contiguous()
            dist.broadcast(values, 0)
            if values.data_ptr() != tensor.data_ptr():
                tensor.copy_(values)


def exchange(value: T) -> list[T]:
    """What every process gives here, in the order of ranks; tensors in it must lie on the CPU.

    Where a process came to :func:`together` with an error instead, that error is raised.
    """
    return [value] if processes() == 1 else _exchange(value, None)


def from_first(value: T) -> T:
    """What process 0 gives here, for everybody."""
    if processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0, group=_host_group())
    return box[0]


def anyone(value: T | None) -> T | None:
    """The value of the first process that has one, for all of them."""
    return next((given for given in exchange(value) if given is not None), None)


@contextmanager
def together() -> Iterator[None]:
    """An InputError or OSError inside, on any process, is raised on all of them: nobody waits for one that has left.

    Who had it raises it as it is; the others one of the same kind that names the process. Where several had one, the
    first counts. Inside, processes may only wait for each other over gloo, by :func:`exchange` and its like.
    """
    try:
        yield
    except (InputError, OSError) as error:
        if processes() > 1 and not hasattr(error, "process"):
            _exchange(None, error)
        raise
    if processes() > 1:
        _exchange(None, None)


def raised_elsewhere(error: BaseException) -> bool:
    """Whether ``error`` is another process's, of which :func:`together` told this one: that one reports it."""
    return getattr(error, "process", rank()) != rank()


def _exchange(value: Any, error: Exception | None) -> list[Any]:
    told = None if error is None else (_kind(error), str(error))
    everybody: list[Any] = [None] * processes()
    dist.all_gather_object(everybody, (value, told), group=_host_group())
    for i, (_, theirs) in enumerate(everybody):
        if theirs is not None:
            kind, message = theirs
            raised: Any = error if error is not None and i == rank() else kind(f"process {i}: {message}")
            raised.process = i
            raise raised
    return [given for given, _ in everybody]


def _kind(error: Exception) -> type[Exception]:
    return type(error) if isinstance(error, InputError) else InputError


def _host_group() -> Any:
    global _hosts
    world, hosts = (reference and reference() for reference in _hosts)
    if world is not dist.group.WORLD or hosts is None:
        world, hosts = dist.group.WORLD, dist.new_group(backend="gloo")
        _hosts = (weakref.ref(world), weakref.ref(hosts))
    return hosts

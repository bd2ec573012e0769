"""What in a step waits for the device: which module reads on the host what was computed, and by which operation.

Such a step cannot be captured as a graph: what the host decides by values would be decided once, by those of the
capture. A small step is run under a watch, on copies and on any device; on a CPU, where nothing waits, the operations
are the same. Beside what reads, the watch sees what changes in Python or is drawn from the host's generators.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastensdistill.errors import InputError

UNIQUE = "unique()"
READS = {
    "_local_scalar_dense": "item(), float(), int() or a condition",
    "is_nonzero": "a condition",
    "equal": "torch.equal()",
    "nonzero": "nonzero() or where() of one argument",
    "masked_select": "masked_select()",
    "_unique": UNIQUE,
    "_unique2": UNIQUE,
    "unique_dim": UNIQUE,
    "unique_consecutive": UNIQUE,
    "unique_dim_consecutive": UNIQUE,
    "bincount": "bincount()",
    "_linalg_check_errors": "a function of torch.linalg that checks its result",
}
"""ATen's operations that hand values, or shapes that depend on them, to the host, as they are written in Python."""
METHODS = {
    Tensor.cpu: "cpu()",
    Tensor.numpy: "numpy()",
    Tensor.tolist: "tolist()",
    Tensor.__array__: "a conversion to NumPy",
}
COPIES = ("_to_copy", "copy_", "_copy_from")


class HostReadError(InputError):
    """A step that was to be captured reads values on the host."""


class HostReads:
    """Within, keeps in ``found``, a line each, what would keep the step from being captured.

    ``named`` are the networks by what to call them ("teacher 1", "the student"); with ``refuse`` the first read raises
    HostReadError instead.
    """

    def __init__(self, named: Mapping[str, nn.Module], device: torch.device, refuse: bool = False):
        self.named, self.device, self.refuse = named, device, refuse
        self.found: list[str] = []
        self.inside: list[nn.Module] = []  # the modules whose forward runs
        self.paths = {m: (name, path) for name, network in named.items() for path, m in network.named_modules()}

    def __enter__(self) -> HostReads:
        self.counts, self.drawn = self._counts(), self._generators()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._followed())
            stack.enter_context(_Methods(self))
            stack.enter_context(_Operations(self))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.stack.close()
        if kind is None:
            self._see_draws()
            for (module, name), value in self._counts().items():
                if self.counts.get((module, name), value) != value:
                    self.report(self.name(module), f"changes its attribute {name!r} in Python")

    @contextlib.contextmanager
    def _followed(self) -> Iterator[None]:
        """``inside`` is what it says."""

        def enters(module: nn.Module, arguments: Any) -> None:
            self._see_draws()
            self.inside.append(module)

        def leaves(module: nn.Module, arguments: Any, output: Any) -> None:
            self._see_draws()
            if module in self.inside:
                while self.inside.pop() is not module:
                    pass

        hooks = [
            every_module.register_module_forward_pre_hook(enters),
            every_module.register_module_forward_hook(leaves, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _counts(self) -> dict[tuple[nn.Module, str], Any]:
        """What modules keep in Python."""
        return {
            (module, name): value
            for module in self.paths
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str)
        }

    def _generators(self) -> dict[str, Any]:
        """Where the host's generators are. A graph draws from the device's."""
        numpy: Any = np.random.get_state()
        drawn: dict[str, Any] = {"Python's": random.getstate(), "NumPy's": (numpy[1].tobytes(), numpy[2:])}
        return drawn if self.device.type == "cpu" else drawn | {"PyTorch's": torch.get_rng_state().numpy().tobytes()}

    def _see_draws(self) -> None:
        """Report what runs now if it has drawn on the host since this was last asked."""
        before, self.drawn = self.drawn, self._generators()
        for whose, state in self.drawn.items():
            if state != before[whose]:
                self.report(self.where(), f"draws from {whose} generator on the host")

    def name(self, module: nn.Module) -> str:
        """``module`` for a line of text, by the network that it is in."""
        owner, path = self.paths.get(module, ("", ""))
        kind = type(module).__name__
        return f"{owner}: {path} ({kind})" if path else f"{owner} ({kind})" if owner else kind

    def where(self) -> str:
        """What runs now."""
        known = next((m for m in reversed(self.inside) if m in self.paths), None)
        if known is not None:
            return self.name(known)
        node = torch._C._current_autograd_node()
        return "the step" if node is None else f"the backward pass, in {node.name()}"

    def report(self, where: str, what: str) -> None:
        """Keep the line, or raise it."""
        line = f"{where} {what}"
        if self.refuse:
            raise HostReadError(line)
        if line not in self.found:
            self.found.append(line)

    def read(self, how: str) -> None:
        """Report what runs now as reading values on the host, ``how`` says by what."""
        self.report(self.where(), f"reads values on the host by {how}")

    def check(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Report ``func``, one of ATen's operations that was called, if it has to wait for the device."""
        name, given = func.overloadpacket.__name__, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in READS:
            self.read(READS[name])
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.read("repeat_interleave() without output_size")
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_") and self._masked(name, args):
            self.read("a mask as an index")
        elif name == "lift_fresh" and (given[0].device.type != "cpu" or (self.device.type == "cpu" and given[0].ndim)):
            self.report(self.where(), "makes a tensor of values on the host")
        elif name in COPIES and len({x.device for x in (*given, *tree_leaves(result))}) > 1:
            self.report(self.where(), "copies between the host and the device")

    @staticmethod
    def _masked(name: str, args: Any) -> bool:
        """Whether an index of this operation is a mask, which one value alone is written through without a wait."""
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        filled = name != "index" and len(args[1]) == len(masks) == 1 and args[2].numel() == 1
        return bool(masks) and not filled


class _Methods(TorchFunctionMode):
    """Sees methods of tensors that on a CPU are no operation."""

    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS and args[0].device.type == self.reads.device.type:
            self.reads.read(METHODS[func])
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Sees ATen's operations, those of the backward pass too."""

    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.reads.check(func, args, kwargs, result)
        return result

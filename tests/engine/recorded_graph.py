"""A stand-in for CUDA graphs on a CPU: the operations of one run, recorded as ATen's, and run again without Python.

What is decided on the host while it is recorded stays as it was, as in a graph: a replay follows the tensors alone.
Results are written to where the recorded ones lie. Generators are not recorded: a replay draws on, as a graph with
registered generators does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastensdistill.engine.captured import CapturedReferenceStep, CapturedTeachStep
from fastensdistill.engine.graph import Results, warm_up
from fastensdistill.engine.host_reads import HostReads
from tests.untyped import untyped


class Recording(TorchDispatchMode):
    """Records what is called within."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        views = [value.alias_info for value in func._schema.returns]
        if not any(info is not None and not info.is_write for info in views):
            self.calls.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            for own, new in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(own, Tensor) and own is not new:
                    own.copy_(new)


class RecordedGraphs:
    """In the place of ``engine.graph.Graphs``: the first call warms up and records a body, later ones replay."""

    captured, error = True, ""

    def __init__(self, state: Callable[[], Sequence[Tensor]], around: Callable[[], Any]):
        """``around()`` is a context that what is recorded runs in."""
        self.state, self.around, self.made = state, around, dict[Hashable, tuple[Recording, Results]]()
        self.replayed: list[Hashable] = []

    def prepare(
        self, key: Hashable, body: Callable[[], Results], generators: Sequence[torch.Generator]
    ) -> Callable[[], Results]:
        def replay() -> Results:
            self.replayed.append(key)
            recording, results = self.made[key]
            recording.replay()
            return {name: value.clone() for name, value in results.items()}

        if key not in self.made:
            drawn = [*generators, torch.default_generator]
            warm_up(body, self.state, drawn)
            before = [tensor.clone() for tensor in self.state()], [generator.get_state() for generator in drawn]
            with self.around(), Recording() as recording:
                results = body()
            for tensor, value in zip(self.state(), before[0], strict=True):  # a capture computes nothing
                tensor.copy_(value)
            for generator, value in zip(drawn, before[1], strict=True):
                generator.set_state(value)
            self.made[key] = recording, {name: value.detach() for name, value in results.items()}
        return replay


def recorded(step: CapturedReferenceStep | CapturedTeachStep, named: dict[str, nn.Module]) -> RecordedGraphs:
    """Graphs by the stand-in, which refuses what the host would read, for ``step``."""
    bodies = step.bodies
    graphs = RecordedGraphs(bodies.state, lambda: HostReads(named, torch.device("cpu"), refuse=True))
    bodies.graphs = untyped(graphs)
    return graphs

"""A step captured once as a CUDA graph and replayed: nothing is launched, allocated or decided by the host afterwards.

The body reads and writes tensors that never move, and generators registered with the graph, whose offsets then live on
the device. Warm-up runs (which compile kernels) change weights and generators; both are put back before the capture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2
Results = dict[str, Tensor]


def warm_up(
    body: Callable[[], Results], state: Callable[[], Sequence[Tensor]], generators: Sequence[torch.Generator]
) -> None:
    """Run ``body`` a few times and restore what it changed: the tensors of ``state`` and the generators."""
    tensors = state()
    before = [tensor.clone() for tensor in tensors]
    seeds = [generator.get_state() for generator in generators]
    for _ in range(WARM_UP):
        body()
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)
    for generator, seed in zip(generators, seeds, strict=True):
        generator.set_state(seed)


class Graphs:
    """Captured bodies by a key, made when first asked for, in one pool of memory."""

    def __init__(self, state: Callable[[], Sequence[Tensor]], device: torch.device):
        self.state, self.device = state, device
        self.pool = torch.cuda.graph_pool_handle()
        self.made: dict[Hashable, Captured] = {}

    def __call__(self, key: Hashable, body: Callable[[], Results], generators: Sequence[torch.Generator]) -> Results:
        """One run of ``body``, which has to be the same whenever ``key`` is."""
        if key not in self.made:
            self.made[key] = Captured(body, self.state, generators, self.device, self.pool)
        return self.made[key]()


class Captured:
    """``captured()`` does what ``body()`` does: the first call captures it, later ones replay.

    Where the capture fails, it says so in one line and every step is launched from Python: slower, never different.
    ``state`` lists the tensors that the body changes. Results are copies, which the next replay leaves alone; nothing
    else outlives a replay, so that graphs of one ``pool`` may share their memory.
    """

    def __init__(
        self,
        body: Callable[[], Results],
        state: Callable[[], Sequence[Tensor]],
        generators: Sequence[torch.Generator],
        device: torch.device,
        pool: Any = None,
    ):
        self.body, self.state, self.generators, self.device = body, state, generators, device
        self.pool = pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.names: list[str] = []
        self.results = torch.empty(0)
        self.failed = False

    def __call__(self) -> Results:
        if self.graph is None and not self.failed:
            self._capture()
        if self.graph is None:
            return self.body()
        self.graph.replay()
        return dict(zip(self.names, self.results.clone().unbind(), strict=True))

    def _capture(self) -> None:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                warm_up(self.body, self.state, self.generators)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                graph.register_generator_state(generator)
            try:
                with torch.cuda.graph(graph, pool=self.pool):
                    results = self.body()
                    self.results = torch.stack([value.float() for value in results.values()])
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                warnings.warn(f"the step could not be captured and is launched from Python: {reason}", stacklevel=3)
                self.failed = True
                return
            self.names, self.graph = list(results), graph

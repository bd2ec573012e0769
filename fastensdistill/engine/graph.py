"""A step captured once as a CUDA graph and replayed: nothing is launched, allocated or decided by the host afterwards.

The body reads and writes tensors that never move, and generators registered with the graph, whose offsets then live on
the device. Warm-up runs (which compile kernels) change weights and generators; both are put back before the capture.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastensdistill.engine.parallel import processes, released_before_leaving

WARM_UP = 2
Results = dict[str, Tensor]
# Graphs whose capture failed, kept for good: the allocators, of pinned memory too, may go on asking whether they record
_abandoned: list[torch.cuda.CUDAGraph] = []


def gathered(results: Results) -> Tensor:
    """A step's scalars, or its rows of them, in one tensor, which a replay hands out as one copy."""
    if not results:
        return torch.empty(0)
    return torch.stack([value.float() for value in results.values()])


def warm_up(
    body: Callable[[], Results], state: Callable[[], Sequence[Tensor]], generators: Sequence[torch.Generator]
) -> None:
    """Run ``body`` a few times and restore, after an error too, the tensors of ``state`` and the generators."""
    tensors = state()
    before = [tensor.clone() for tensor in tensors]
    seeds = [generator.get_state() for generator in generators]
    try:
        for _ in range(WARM_UP):
            body()
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        for generator, seed in zip(generators, seeds, strict=True):
            generator.set_state(seed)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collect garbage now and none within: a collection may free another graph, a block of memory or an event, and
    what the driver is asked for that spoils a capture."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graphs:
    """Captured bodies by a key, in one pool of memory."""

    def __init__(self, state: Callable[[], Sequence[Tensor]], device: torch.device):
        self.state, self.device = state, device
        self.pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()  # graphs captured on one stream share the pool's memory
        self.made: dict[Hashable, Captured] = {}

    def prepare(self, key: Hashable, body: Callable[[], Results], generators: Sequence[torch.Generator]) -> Captured:
        """Capture ``body``, which has to be the same whenever ``key`` is, unless that has been done."""
        if key not in self.made:
            made = Captured(body, self.state, generators, self.device, self.pool, self.stream)
            self.made[key] = made
            made.prepare()
        if self.made[key].failed:
            for other in self.made.values():  # they share generators, which only graphs or only launches can draw from
                other.give_up()
        return self.made[key]

    @property
    def captured(self) -> bool | None:
        """Whether all are replayed; None before their first capture has ended."""
        found = [made.captured for made in self.made.values()]
        return False if False in found else True if found and all(found) else None

    @property
    def error(self) -> str:
        """Why a capture failed; "" where none did."""
        return next((made.error for made in self.made.values() if made.error), "")


class Capturing:
    """What a step says about its graphs; ``capture`` is whether it is to be captured at all."""

    capture: bool
    graphs: Any = None  # Graphs or Captured; None as long as there are none

    @property
    def captured(self) -> bool | None:
        """True where steps are replayed from a graph, False where every op is launched from Python (on a CPU, with
        ``capture=False``, or because a capture failed), None as long as no step has shown it."""
        if not self.capture:
            return False
        return None if self.graphs is None else self.graphs.captured

    @property
    def capture_error(self) -> str:
        """Why the capture failed, in a line; "" where none has."""
        return "" if self.graphs is None else self.graphs.error


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
        stream: torch.cuda.Stream | None = None,
    ):
        self.body, self.state, self.generators, self.device = body, state, generators, device
        self.pool, self.stream = pool, stream
        self.graph: torch.cuda.CUDAGraph | None = None
        self.names: list[str] = []
        self.results = torch.empty(0)
        self.failed = False
        self.error = ""  # why the capture failed

    def __call__(self) -> Results:
        self.prepare()
        if self.graph is None:
            return self.body()
        self.graph.replay()
        return dict(zip(self.names, self.results.clone().unbind(), strict=True))

    def prepare(self) -> None:
        """Warm up and capture, unless that has been done."""
        if self.graph is None and not self.failed:
            self._capture()

    @property
    def captured(self) -> bool | None:
        """Whether it is replayed; None before a capture."""
        return False if self.failed else None if self.graph is None else True

    def give_up(self) -> None:
        """Launch from Python from now on."""
        self.failed, self.graph = True, None

    def release(self) -> None:
        """Destroy the graph; the next call captures anew."""
        if self.graph is not None:
            self.graph.reset()
            self.graph = None

    def _capture(self) -> None:
        with torch.cuda.device(self.device):
            stream = self.stream or torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # Around the capture too: one that fails leaves its stream the current one
            with torch.cuda.stream(stream), uncollected():
                warm_up(self._run, self.state, self._all_generators())
                gc.collect()  # what the warm-up left, so that its memory is there for the graph
                self._record(stream)
            torch.cuda.current_stream().wait_stream(stream)

    def _run(self) -> Results:
        """All that is captured, so that no kernel has to be loaded inside the capture."""
        results = self.body()
        self.results = gathered(results)
        return results

    def _all_generators(self) -> list[torch.Generator]:
        """The given ones and the device's own, which PyTorch registers with every graph."""
        return [*self.generators, torch.cuda.default_generators[torch.cuda.current_device()]]

    def _record(self, stream: torch.cuda.Stream) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            # thread_local: what other threads ask the device meanwhile (NCCL's watchdog does) spoils nothing
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                results = self._run()
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a spoiled capture raises too, without saying why
            self.error = next(iter(str(cause).splitlines()), type(cause).__name__)
            self._put_right(graph)
            warnings.warn(f"the step could not be captured and is launched from Python: {self.error}", stacklevel=5)
            return
        self.names, self.graph = list(results), graph
        if processes() > 1:
            released_before_leaving(self)

    def _put_right(self, graph: torch.cuda.CUDAGraph) -> None:
        """What PyTorch leaves as it is when a capture fails: generators and allocator still serve the capture."""
        self.failed = True
        _abandoned.append(graph)
        for generator in self._all_generators():
            generator.graphsafe_set_state(generator.clone_state())
        try:
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), self.pool)
        except RuntimeError:
            graph.reset()  # the capture had been ended: it had recorded everything up to an error in Python

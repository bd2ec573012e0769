"""The least-work step captured whole as a CUDA graph, eager or compiled, and compiled with PyTorch's own graphs.

Captured, nothing may depend on the host: the pair is a tensor that selects a teacher's stacked weights and a branch's
factors. Compiled are the networks' forwards, from which PyTorch derives the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from bench.peers.eager import EagerStep, EagerTeach
from bench.setting import Batch, Problem
from fastensdistill.engine.graph import uncollected

Compile = dict[str, Any] | None
# The whole step is captured here, so without Inductor's own graphs. Its search among kernels (minutes for a network)
# is a contender of its own.
CAPTURED: dict[str, Any] = {}
AUTOTUNED: Compile = {"mode": "max-autotune-no-cudagraphs"}
OWN_GRAPHS: Compile = {"mode": "reduce-overhead"}


def compiled(function: Any, options: Compile) -> Any:
    return function if options is None else torch.compile(function, dynamic=False, **options)


class Replay:
    """Runs ``body`` as it is where there is no CUDA device; there, captures it at the first call and replays.

    The warm-up that compiles kernels changes parameters and running statistics; they are put back before the capture.
    """

    def __init__(self, body: Any, changed: list[Tensor], optimizer: torch.optim.Optimizer, device: torch.device):
        self.body, self.changed, self.optimizer = body, changed, optimizer
        self.cuda = device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self.cuda:
            self.body()
            return
        if self.graph is None:
            self.capture()
        assert self.graph is not None
        self.graph.replay()

    def capture(self) -> None:
        before = [t.detach().clone() for t in self.changed]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.body()
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            for tensor, value in zip(self.changed, before, strict=True):
                tensor.copy_(value)
            for state in self.optimizer.state.values():
                state["momentum_buffer"].zero_()
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        # the stream of the warm-up: what autograd remembers of a stream is then the captured one
        with uncollected(), torch.cuda.graph(self.graph, stream=side):
            self.body()


class CapturedStep(EagerStep):
    """``options``: how the networks are compiled, None for eager."""

    def __init__(self, problem: Problem, options: Compile = None):
        super().__init__(problem)
        networks = list(self.teachers.networks)
        parameters, buffers = stack_module_state(networks)
        self.stacked = {name: value.detach() for name, value in (parameters | buffers).items()}
        self.one_teacher = compiled(self.select_teacher, options)
        self.networks_of_teachers, self.compiled = networks, options is not None
        self.some_branches, self.every_branch = compiled(self.select_branch, options), compiled(self.run_all, options)
        self.pair = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.images: Tensor | None = None
        changed = [*self.shared, *self.factors, *self.state()["statistics"]]
        changed += [b for n, b in self.network.named_buffers() if n.endswith("num_batches_tracked")]
        self.run = Replay(self.body, changed, self.optimizer, self.device)

    def select_teacher(self, x: Tensor, member: Tensor) -> Tensor:
        chosen = {name: value.index_select(0, member)[0] for name, value in self.stacked.items()}
        return functional_call(self.teachers.networks[0], chosen, x)

    def select_branch(self, x: Tensor, chosen: Tensor) -> Tensor:
        return super().branches(x, chosen)

    def run_all(self, x: Tensor) -> Tensor:
        return super().branches(x)

    def teacher(self, x: Tensor, member: Any) -> Tensor:
        return self.one_teacher(x, member)

    def all_teachers(self, x: Tensor) -> Tensor:
        if self.compiled:  # one compilation serves all
            return torch.stack([self.teacher(x, self.members[m]) for m in range(len(self.teachers))])
        return torch.stack([network(x) for network in self.networks_of_teachers])

    def branches(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        return self.every_branch(x) if chosen is None else self.some_branches(x, chosen)

    def pair_logits(self, x: Tensor, watched: Tensor, a: Any, b: Any) -> Any:
        with torch.no_grad():
            t_b, s_b = self.teacher(x, b), self.branches(x, b)[0]
        return self.teacher(watched, a), t_b, self.branches(watched, a)[0], s_b

    def body(self) -> None:
        assert self.images is not None
        x = self.images
        if self.config.perturbation == "tdiv-sdiv":
            x = self.perturb(x, self.pair[:1], self.pair[1:])
        self.distil(x)

    def __call__(self, batch: Batch) -> None:
        if self.images is None:
            self.images = torch.empty_like(batch.images)
        self.images.copy_(batch.images)
        self.pair[0].fill_(batch.pair[0])
        self.pair[1].fill_(batch.pair[1])
        self.run()


class CompiledStep(EagerStep):
    """Compiled networks in an otherwise eager step: with ``OWN_GRAPHS`` PyTorch captures each of them by itself."""

    def __init__(self, problem: Problem, options: Compile = OWN_GRAPHS):
        super().__init__(problem)
        self.compiled_teachers = [compiled(self.forward_of(n), options) for n in self.teachers.networks]
        self.some_branches, self.every_branch = compiled(self.select_branch, options), compiled(self.run_all, options)

    @staticmethod
    def forward_of(network: nn.Module) -> Any:
        return lambda x: network(x)

    def select_branch(self, x: Tensor, chosen: Tensor) -> Tensor:
        return super().branches(x, chosen)

    def run_all(self, x: Tensor) -> Tensor:
        return super().branches(x)

    # A result lies in a graph's memory until that graph runs again: what is kept beyond that is copied.
    def teacher(self, x: Tensor, member: int) -> Tensor:
        return self.compiled_teachers[member](x).clone()

    def all_teachers(self, x: Tensor) -> Tensor:
        return torch.stack([self.teacher(x, m) for m in range(len(self.compiled_teachers))])

    def branches(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        return (self.every_branch(x) if chosen is None else self.some_branches(x, chosen)).clone()

    def __call__(self, batch: Batch) -> Tensor | None:
        torch.compiler.cudagraph_mark_step_begin()
        return super().__call__(batch)


class CapturedTeach(EagerTeach):
    def __init__(self, problem: Problem, options: Compile = None):
        super().__init__(problem)
        self.states = [dict(n.named_parameters()) | dict(n.named_buffers()) for n in self.networks]
        self.one = compiled(lambda state, x: functional_call(self.networks[0], state, x), options)
        self.compiled = options is not None
        self.batch: Batch | None = None
        changed = [b for network in self.networks for b in network.buffers()]
        self.run = Replay(self.body, [*self.parameters, *changed], self.optimizer, self.device)

    def logits(self, images: Any) -> Any:
        if not self.compiled:
            return super().logits(images)
        self.networks[0].train()  # one compilation serves all
        return [self.one(state, x) for state, x in zip(self.states, images, strict=True)]

    def body(self) -> None:
        assert self.batch is not None
        super().__call__(self.batch)

    def __call__(self, batch: Batch) -> None:
        if self.batch is None:
            self.batch = Batch([x.clone() for x in batch.images], [y.clone() for y in batch.labels], batch.pair)
        for mine, theirs in zip([*self.batch.images, *self.batch.labels], [*batch.images, *batch.labels], strict=True):
            mine.copy_(theirs)
        self.run()

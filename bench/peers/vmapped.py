"""Teachers by ``torch.func.vmap`` over stacked weights; the rest as in ``eager``."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from bench.peers.eager import EagerStep, replace_layers
from bench.setting import Problem


class GlobalMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1), keepdim=True)


class VmapStep(EagerStep):
    def __init__(self, problem: Problem):
        super().__init__(problem)
        parameters, buffers = stack_module_state(list(self.teachers.networks))
        self.stacked = {name: value.detach() for name, value in (parameters | buffers).items()}
        skeleton = copy.deepcopy(self.teachers.networks[0]).to("meta")
        # the module's own pooling has no batching rule in channels_last and falls back to a loop
        replace_layers(skeleton, nn.AdaptiveAvgPool2d, lambda module: GlobalMean())

        def run(state: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(skeleton, state, (x,))

        self.together = vmap(run, in_dims=(0, None))

    def all_teachers(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.together(self.stacked, x)

"""How much of a step runs on kernels of ours, and how much on PyTorch's own operations inside of the plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fastensdistill.engine.planned_layer_norms import layer_norm_of
from fastensdistill.network.launch import Launch
from fastensdistill.network.nodes import Function, Network, Pool
from fastensdistill.network.plan import Plan

PYTORCH = (
    "function", "function gradient", "dropout", "dropout gradient", "general conv", "general conv gradient",
    "general weight gradient", "logits", "logits gradient", "pad", "pad gradient", "module", "module gradient",
)  # fmt: skip
"""The ops that no kernel of ours computes; of pooling, means; functions but for a LayerNorm over channels."""


class Covered(NamedTuple):
    """Shares from 0 to 1 that run on kernels of ours: of the products' FLOPs, of the launches, of the bytes moved."""

    flops: float
    launches: float
    nbytes: float


def ours(network: Network, launch: Launch) -> bool:
    """Whether a kernel of ours computes this launch of ``network``."""
    node = network.by_name[launch.node]
    if launch.op in ("pool", "pool gradient"):
        return isinstance(node, Pool) and node.kind == "max"
    if isinstance(node, Function) and launch.op in PYTORCH:
        return layer_norm_of(node) is not None
    return launch.op not in PYTORCH


def covered(plans: Iterable[Plan]) -> Covered:
    """Of all launches of the ``plans``, such as those of ``plan_step``; everything of plans without launches."""
    every = [(launch, ours(part.network, launch)) for one in plans for part in one.parts for launch in part.launches]

    def share(count: float, total: float) -> float:
        return count / total if total else 1.0

    return Covered(
        share(sum(one.flops for one, own in every if own), sum(one.flops for one, _ in every)),
        share(sum(own for _, own in every), len(every)),
        share(sum(one.nbytes for one, own in every if own), sum(one.nbytes for one, _ in every)),
    )

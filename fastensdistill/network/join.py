"""One order for two parts of one network, an evaluation and a training part: a layer of both is one launch.

Buffers stay each part's own. A joint launch runs once what both parts have planned for a layer, over the groups of
both, each side with its own input, weights, prologue and epilogue. What has no counterpart (BatchNorm's statistics)
runs when its own part needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fastensdistill.network.launch import Launch, Part

JOINT = ("conv", "head")  # ops of which one launch can serve both


class Turn(NamedTuple):
    """What is launched next: a launch of one of the parts, or of both at once."""

    evaluation: Launch | None
    training: Launch | None

    @property
    def joint(self) -> bool:
        """Whether it is one launch for both parts."""
        return None not in self

    @property
    def launch(self) -> Launch:
        """What runs; of a joint launch the training side's, with the FLOPs and bytes of both."""
        evaluation, training = self
        if training is None:
            assert evaluation
            return evaluation
        if evaluation is None:
            return training
        both = evaluation, training
        return replace(training, flops=sum(one.flops for one in both), nbytes=sum(one.nbytes for one in both))


def join(evaluation: Part, training: Part) -> tuple[Turn, ...]:
    """The launches of both parts, each part's in its own order.

    Those of the same op and node are one turn, where the parts are of one network (but for dropout), the op is among
    ``JOINT`` and they are :func:`alike`. Before it run what either part has before it, the evaluation part's first.
    """
    one, other = list(evaluation.launches), list(training.launches)
    turns: list[Turn] = []

    def both_until(i: int, j: int) -> None:
        turns.extend(Turn(launch, None) for launch in one[:i])
        turns.extend(Turn(None, launch) for launch in other[:j])

    while evaluation.network == training.network.evaluated:
        places = {(launch.op, launch.node): j for j, launch in enumerate(other)}
        pairs = ((i, places.get((launch.op, launch.node))) for i, launch in enumerate(one) if launch.op in JOINT)
        found = ((i, j) for i, j in pairs if j is not None and alike((evaluation, one[i]), (training, other[j])))
        i, j = next(found, (None, None))
        if i is None or j is None:
            break
        both_until(i, j)
        turns.append(Turn(one[i], other[j]))
        del one[: i + 1], other[: j + 1]
    both_until(len(one), len(other))
    return tuple(turns)


def alike(evaluation: tuple[Part, Launch], training: tuple[Part, Launch]) -> bool:
    """Whether one launch can serve both: of heads, whether both take in the pooling, BatchNorm and ReLU before them.

    A convolution's sides may differ in all that is fused. A head has no BatchNorm in evaluation mode where that is in a
    convolution's weights, and no pooling in training mode where a dropout stands between.
    """
    taken = [
        ([step.kind == "relu" for step in launch.prologue], part.buffers[launch.reads[0]].shape)
        for part, launch in (evaluation, training)
    ]
    return evaluation[1].op == "conv" or taken[0] == taken[1]


def running(parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """The parts of a plan as they run: alone, or an evaluation part and the training part of its network together.

    Backward passes share no launch: a part of one runs alone.
    """
    forward = [part for part in parts if any(launch.op in JOINT for launch in part.launches)]
    pairs = [
        (e, t) for t in forward if t.training for e in forward if not e.training and e.network == t.network.evaluated
    ]
    joined = [id(part) for pair in pairs for part in pair]
    alone: list[tuple[Part, ...]] = [(part,) for part in parts if id(part) not in joined]
    return [*alone, *pairs]


def turns(parts: Sequence[Part]) -> tuple[Turn, ...]:
    """Of parts that run alone or together, in order."""
    if len(parts) > 1:
        return join(*parts)
    return tuple(Turn(None, launch) if parts[0].training else Turn(launch, None) for launch in parts[0].launches)

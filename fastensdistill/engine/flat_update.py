"""The fused engine's update: flat parameters, their moments and their averages over time, in a few launches.

    clip_factors    where gradients are clipped: a factor for each network, by the norm of its weights and its factors
    sgd or adamw    over all values, with their average; and, of a student of branches, over all deviations
    move_average    where there is an average: the running means, the running variances

Which values decay, move, and belong to which network is a table of runs, made anew where parameters are frozen or
thawed; one parameter after the other lies in the flat tensors, so that there are few. AdamW counts the steps of every
parameter by itself, as PyTorch does: those that were frozen for a while have fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastensdistill.config import TrainConfig
from fastensdistill.engine.averages import averaged
from fastensdistill.engine.common import State
from fastensdistill.engine.optimizer import factors_of, parameter_groups, positions
from fastensdistill.engine.parameters import FlatParameters, View
from fastensdistill.kernels.adamw import adamw
from fastensdistill.kernels.clip_factors import clip_factors
from fastensdistill.kernels.move_average import move_average
from fastensdistill.kernels.sgd import sgd
from fastensdistill.kernels.update import Average, Run, fields_of, joined
from fastensdistill.method.student import Student


class Flat(NamedTuple):
    """A flat tensor of all values or of all deviations, and what is moved with it; ``squares`` are AdamW's."""

    values: Tensor
    moment: Tensor
    squares: Tensor | None
    average: Tensor | None


class Piece(NamedTuple):
    """A parameter of one of the networks, and where it is in a flat tensor."""

    parameter: nn.Parameter
    view: View
    factors: bool  # among the deviations
    network: int
    counter: int  # where the counts have that of its steps


class FlatUpdate:
    """Moves ``flat``, the parameters of ``networks``, as ``Optimizer`` and ``Averages`` move those of each of them.

    Calling it does one update by the gradients in ``flat``. ``averages`` are modules that are views of flat tensors.
    """

    def __init__(self, networks: Sequence[nn.Module], flat: FlatParameters, config: TrainConfig):
        self.networks, self.flat, self.config = networks, flat, config
        self.adamw, self.averages_over_time = config.optimizer == "adamw", config.ema_decay is not None
        groups = [group for network in networks for group in parameter_groups(network, config)]
        factors = {id(p) for network in networks for p in factors_of(network)}
        of_factors = [group for group in groups if any(id(p) in factors for p in group["params"])]
        self.factor_scale = float(of_factors[0]["lr_scale"]) if of_factors else 1.0
        self.factor_decay = float(of_factors[0]["weight_decay"]) if of_factors else 0.0
        spared = [group for group in groups if not group["weight_decay"] and config.weight_decay]
        self.spared = {id(p) for group in spared for p in group["params"]}
        owners = {id(p): m for m, network in enumerate(networks) for p in network.parameters()}
        views = [(p, view, False) for p, view in flat.views] + [(p, view, True) for p, view in flat.factor_views]
        self.pieces = [Piece(p, view, of_factors, owners[id(p)], i) for i, (p, view, of_factors) in enumerate(views, 1)]
        # Updates so far, and with AdamW the steps of every parameter
        self.counts = flat.values.new_zeros(1 + self.adamw * len(self.pieces))
        self.counted = torch.ones_like(self.counts)
        self.parts = [self._part(flat.values, flat.momentum)]
        if flat.ranked:
            self.parts.append(self._part(flat.deviations, flat.deviation_momentum))
        self.runs: list[list[int]] = []  # of each part
        self.statistics = [t.clone() for t in (flat.running_mean, flat.running_var) if self.averages_over_time]
        self.batches = flat.batches.clone() if self.averages_over_time else flat.batches
        self.averages = [self._averaged(m) for m in range(len(networks))] if self.averages_over_time else []
        self.follow()

    def _part(self, values: Tensor, moment: Tensor) -> Flat:
        squares = torch.zeros_like(values) if self.adamw else None
        return Flat(values, moment, squares, values.clone() if self.averages_over_time else None)

    @torch.no_grad()
    def _averaged(self, m: int) -> nn.Module:
        """Network m's average, as views of what the update moves."""
        network, flat = self.networks[m], self.flat
        average, named = averaged(network), {id(p): name for name, p in network.named_parameters()}
        for piece in self._of_network(m):
            own = self.parts[piece.factors].average
            assert own is not None
            average.get_parameter(named[id(piece.parameter)]).data = piece.view(own)
        inside = average.get_submodule("module") if isinstance(network, Student) else average
        for j, norm in enumerate(flat.network.norms):
            owner = inside.get_submodule(norm.name)
            for kind, tensor in zip(("running_mean", "running_var"), self.statistics, strict=True):
                setattr(owner, kind, flat.norm_view(tensor, norm)[m])
            owner.num_batches_tracked = self.batches[j, m]
        return average

    def _of_network(self, m: int) -> Iterator[Piece]:
        return (piece for piece in self.pieces if piece.network == m)

    def follow(self) -> None:
        """Take in which parameters require gradients: what was captured before is to be captured anew."""
        self.runs = [self._runs(factors, part.values) for factors, part in zip((False, True), self.parts, strict=False)]
        moves = [1.0, *(float(piece.parameter.requires_grad) for piece in self.pieces)]
        self.counted.copy_(torch.tensor(moves[: len(self.counts)], dtype=self.counts.dtype))

    def _runs(self, factors: bool, values: Tensor) -> list[int]:
        """Runs of the parts of ``values`` that are treated alike; none where all are."""
        found = []
        for piece in self.pieces:
            if piece.factors is factors:
                run = Run(
                    0, 0, piece.network if self.config.clip_norm is not None else 0,
                    piece.counter if self.adamw else 0, int(id(piece.parameter) not in self.spared),
                    int(piece.parameter.requires_grad),
                )  # fmt: skip
                found += [run._replace(start=start, size=size) for start, size in spans(piece.view(values), values)]
        runs = joined(found)
        return [] if runs == [Run(0, values.numel())] else fields_of(runs)

    @torch.no_grad()
    def __call__(self, rate: Tensor, factor_gradients: Tensor) -> None:
        """One update; ``factor_gradients`` (rows of factors, factors) are those of the deviations, where there are."""
        c, flat = self.config, self.flat
        clip = None
        if c.clip_norm is not None:
            clip = clip_factors(
                flat.gradient, factor_gradients if flat.ranked else None, most=c.clip_norm, networks=len(self.networks),
                runs=self.runs[0], factor_runs=self.runs[-1] if flat.ranked else (),
            )  # fmt: skip
        gradients, scales = (flat.gradient, factor_gradients), (1.0, self.factor_scale)
        decays = c.weight_decay, self.factor_decay
        for part, g, scale, decay, runs in zip(self.parts, gradients, scales, decays, self.runs, strict=False):
            average = None if part.average is None else Average(part.average, self.counts[0], c.ema_decay or 0.0)
            if part.squares is not None:
                adamw(
                    part.values, part.moment, part.squares, g, rate, self.counts, beta1=c.beta1, beta2=c.beta2,
                    weight_decay=decay, scale=scale, average=average, clip=clip, runs=runs,
                )  # fmt: skip
            else:
                sgd(
                    part.values, part.moment, g, rate, momentum=c.momentum, weight_decay=decay, scale=scale,
                    average=average, clip=clip, runs=runs,
                )  # fmt: skip
        for own, now in zip(self.statistics, (flat.running_mean, flat.running_var), strict=False):
            move_average(own, now, self.counts[0], c.ema_decay or 0.0)
        if self.averages_over_time:
            self.batches.copy_(flat.batches)
        if self.averages_over_time or self.adamw:
            self.counts.add_(self.counted)

    def state(self) -> list[Tensor]:
        """Everything it changes beside ``flat``."""
        kept = [t for part in self.parts for t in (part.squares, part.average) if t is not None]
        return [*kept, *self.statistics, self.batches, self.counts] if self.averages_over_time or self.adamw else kept

    def state_of(self, m: int) -> State:
        """Views of the moments of network m by position, named as in the reference engine."""
        pieces, found = {id(piece.parameter): piece for piece in self._of_network(m)}, dict[str, Tensor]()
        for i, parameter in enumerate(positions(self.networks[m])):
            piece = pieces[id(parameter)]
            part = self.parts[piece.factors]
            found[f"exp_avg.{i}" if self.adamw else f"momentum.{i}"] = piece.view(part.moment)
            if part.squares is not None:
                found |= {f"exp_avg_sq.{i}": piece.view(part.squares), f"step.{i}": self.counts[piece.counter]}
        return found

    def shared_state(self) -> State:
        """Of all networks together: how often averages were moved, a view."""
        return {"updates": self.counts[0]} if self.averages_over_time else {}


def spans(view: Tensor, of: Tensor) -> Iterator[tuple[int, int]]:
    """Start and count of the neighbours in the flat tensor ``of`` that ``view`` consists of: of one, or of its rows."""
    start = int(view.storage_offset() - of.storage_offset())
    if view.is_contiguous():
        yield start, view.numel()
    else:
        yield from ((start + row * view.stride(0), view[row].numel()) for row in range(len(view)))

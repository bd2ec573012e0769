"""Probabilities of many networks on a whole split: networks of one architecture are groups of the same launches.

    networks → traced architectures → a part each, evaluation mode, BatchNorm in the weights → softmax of the logits

A validation of a rank-one student runs its average and its K branches, K + 1 plain networks of one architecture, in as
many launches as one of them takes. One plan and, on a CUDA device, one captured graph serve all batches: weights are
rewritten in their slots, images copied into a tensor that never moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.config import TrainConfig
from fastensdistill.data.loader import EvaluationSet, check_batch_size
from fastensdistill.engine.common import ImageShape, arithmetic
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.fused import plain
from fastensdistill.engine.graph import Captured, Capturing
from fastensdistill.engine.packed import PackedWeights
from fastensdistill.engine.part_run import Execution
from fastensdistill.engine.passes import Pass
from fastensdistill.engine.probe import compared
from fastensdistill.errors import InputError, unknown
from fastensdistill.evaluate.predict import predict
from fastensdistill.method.student import BatchEnsemble, LatentBE, Single, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.fold import fold_branches
from fastensdistill.network.launch import Group
from fastensdistill.network.nodes import Affine, Network, Norm
from fastensdistill.network.plan import plan

State = Mapping[str, Tensor]
Networks = Callable[[], Sequence[nn.Module]]
MOST_IMAGES = 500  # of a batch, unless told otherwise
MOST_AT_ONCE = 2000  # images times networks: what a batch's activations may take


def architectures(networks: Sequence[nn.Module], shape: ImageShape) -> list[Network]:
    """The traced architecture of each network, as it is in evaluation mode.

    Raises InputError, naming the network, for one that cannot be traced or planned, or that has another device or
    number of classes than the first.
    """
    if not networks:
        raise InputError("no networks given: expected at least one")
    found: dict[int, Network] = {}
    for i, network in enumerate(networks):
        if id(network) in found:
            continue
        try:
            found[id(network)] = compared(network, shape, gradient=False)
            plan([found[id(network)]], [Group("")], "forward", 1)
        except InputError as error:
            raise InputError(f"network {i}: {error}") from error
        pair = network, networks[0]
        classes, expected = (net.by_name[net.output].shape[0] for net in (found[id(module)] for module in pair))
        if classes != expected:
            raise InputError(f"network {i} gives {classes} classes; expected {expected}, as network 0 does")
        (device, dtype), first = ((p.device, p.dtype) for p in (next(module.parameters()) for module in pair))
        if (device, dtype) != first:
            raise InputError(f"network {i} is {dtype} on {device}; expected {first[1]} on {first[0]}, as network 0 is")
    return [found[id(network)] for network in networks]


def read_shapes(network: Network, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors of ``module``'s state dict that an evaluation reads, and their shapes."""
    names = [name for node in network.nodes for name in node.parameters]
    kinds = {Norm: ("running_mean", "running_var"), Affine: ("mean", "std")}
    names += [f"{node.name}.{kind}" for node in network.nodes for kind in kinds.get(type(node), ())]
    state = module.state_dict()
    return {name: tuple(state[name].shape) for name in names}


class GroupedPredictor(Capturing):
    """``predictor(images)`` gives what ``evaluate.predict.predict`` gives for each of E networks, all of them at once.

    ``networks`` are plain modules (B, channels, H, W) in [0, 1] → (B, classes), all on one device; they are left as
    they are, in whatever mode, and their weights at this moment are copied: :meth:`refresh` copies them again.

    Args:
        image_shape: (channels, H, W).
        precision: as in ``TrainConfig``; all but bf16 compute in the dtype of the first network.
        capture: a batch is one CUDA graph on a CUDA device; its memory is held as long as this object lives.
            ``captured`` and ``capture_error`` as of a ``FusedStep``.
        implementations: what computes each convolution (``engine.dispatch``).

    Raises InputError as :func:`architectures`, and for an unknown precision.
    """

    graphs: Captured | None = None

    def __init__(self, networks: Sequence[nn.Module], image_shape: ImageShape, *, precision: str = "auto",
                 capture: bool = True, implementations: Dispatch | None = None):  # fmt: skip
        self.image_shape = tuple(image_shape)
        self.networks = architectures(networks, image_shape)
        self.shapes = [read_shapes(net, network) for net, network in zip(self.networks, networks, strict=True)]
        like = next(networks[0].parameters())
        self.device, self.image_dtype = like.device, like.dtype
        dtype, multiplied = arithmetic(TrainConfig(precision=precision), networks[0])
        self.execution = Execution(multiplied, implementations or Dispatch())
        self.capture = capture and self.device.type == "cuda"
        self._build(1)
        self.members = [[int(group.name) for group in part.groups] for part in self.plan.parts]
        self.weights = [PackedWeights(part, len(part.groups), dtype, self.device) for part in self.plan.parts]
        self.index = [torch.arange(len(m), dtype=torch.int32, device=self.device) for m in self.members]
        # Networks of one architecture run together; put them back into the order they were given in
        order = [i for members in self.members for i in members]
        self.order = torch.tensor(order, device=self.device).argsort() if order != sorted(order) else None
        self.refresh(networks)

    def _build(self, batch: int) -> None:
        """Plan and static input for ``batch`` images at a time."""
        C, H, W = self.image_shape
        self.graphs = None  # frees the memory of the graph before
        self.plan = plan(self.networks, [Group(str(i), i) for i in range(len(self.networks))], "forward", batch)
        self.images = torch.zeros(batch, H, W, C, dtype=self.image_dtype, device=self.device)
        if self.capture:
            self.graphs = Captured(self._body, list, [], self.device)

    def _body(self) -> dict[str, Tensor]:
        """Probabilities (E, B, classes) of ``images``: what is captured."""
        outputs = []
        for part, weights, index in zip(self.plan.parts, self.weights, self.index, strict=True):
            outputs.append(Pass(part, None, weights, self.execution).forward(self.images[None], index))
        logits = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        logits = logits if self.order is None else logits.index_select(0, self.order)
        return {"probabilities": logits.float().softmax(-1)}

    @torch.no_grad()
    def refresh(self, networks: Sequence[nn.Module | State | None]) -> None:
        """Copy the weights of networks that have changed; nothing is planned or captured anew.

        Per network its module, a plain network's state dict, or None for one that has not changed. Raises InputError,
        with nothing copied, for another number of networks and for weights of another shape.
        """
        if len(networks) != len(self.networks):
            raise InputError(f"{len(networks)} networks for a predictor of {len(self.networks)}: expected as many")
        given = {i: network for i, network in enumerate(networks) if network is not None}
        states = {i: net.state_dict() if isinstance(net, nn.Module) else net for i, net in given.items()}
        for i, state in states.items():
            for name, shape in self.shapes[i].items():
                found = tuple(state[name].shape) if name in state else "missing"
                if found != shape:
                    raise InputError(f"network {i}: {name!r} is {found}; expected {shape}, as at first")
        for weights, members in zip(self.weights, self.members, strict=True):
            for slot, i in enumerate(members):
                if i in states:
                    weights.write(slot, states[i])

    @torch.no_grad()
    def __call__(self, images: EvaluationSet, batch_size: int | None = None) -> Tensor:
        """Probabilities (E, N, classes), float32 on the networks' device, in the order the networks were given.

        At most ``batch_size`` images at a time (unset: 500, and fewer where more than four networks run together), in
        batches of one size but for the last. Nothing waits for the device. Raises InputError for a batch size below 1
        and images of another shape.
        """
        E, N, classes = len(self.networks), len(images), self.networks[0].by_name[self.networks[0].output].shape[0]
        most = max(1, min(MOST_IMAGES, MOST_AT_ONCE // E)) if batch_size is None else batch_size
        check_batch_size(most)
        size = -(-N // max(1, -(-N // most))) or 1  # as few batches as there must be, evenly filled
        if len(self.images) != size:
            self._build(size)
        result = torch.empty(E, N, classes, dtype=torch.float32, device=self.device)
        for start, batch in zip(range(0, N, size), images.batches(size), strict=True):
            if tuple(batch.shape[1:]) != self.image_shape:
                raise InputError(f"images have shape {tuple(batch.shape[1:])}; expected {self.image_shape}")
            # After a smaller last batch stand images of the one before: in evaluation mode they do not meet
            self.images[: len(batch)].copy_(batch.permute(0, 2, 3, 1))
            found = self.graphs() if self.graphs else self._body()
            result[:, start : start + len(batch)] = found["probabilities"][:, : len(batch)]
        return result


def student_states(student: Student) -> list[State]:
    """The plain networks that a student is, as state dicts: of a LatentBE its average first, then its K branches.

    Of a BatchEnsemble the branches; with one branch, itself. No module is copied, and what branches share is the
    student's own memory. Raises InputError for a student of another kind.
    """
    state, K = student.module.state_dict(), student.branches
    if isinstance(student, Single):
        return [state]
    if not isinstance(student, BatchEnsemble):
        raise InputError(f"a {student.kind} student is not made of plain networks that share an architecture")
    if isinstance(student, LatentBE) and K > 1:
        K += 1
        for name, value in state.items():
            if name.endswith((".delta_r", ".delta_s")):  # the average is the branch whose factors are the mean ones
                state[name] = torch.cat([value.mean(0, keepdim=True), value])
    return list(fold_branches(state, K))


class Evaluator:
    """What a trainer validates with: grouped launches where the engine is fused, plain PyTorch where it is not.

    ``engine`` is "fused" or "reference"; networks that cannot be planned go through ``evaluate.predict.predict`` too,
    and ``reason`` then says why. Predictors are kept from one call to the next as long as the same modules are given;
    every call reads their current weights. ``options`` are those of :class:`GroupedPredictor`.
    """

    def __init__(self, engine: str, image_shape: ImageShape, **options: Any):
        if engine not in ("fused", "reference"):
            raise unknown("engine", engine, ["fused", "reference"])
        TrainConfig(precision=options.get("precision", "auto"))  # a wrong one is no reason to fall back
        self.fused, self.image_shape, self.options = engine == "fused", image_shape, options
        self.reason = "" if self.fused else "the engine is the reference"
        self.kept: dict[str, tuple[list[nn.Module], GroupedPredictor | None]] = {}

    def _predictor(self, role: str, owners: list[nn.Module], networks: Networks) -> GroupedPredictor | None:
        """The one kept for ``owners``, or a new one for ``networks()``; None where it takes plain PyTorch."""
        before, predictor = self.kept.get(role, ([], None))
        if self.fused and [id(network) for network in before] != [id(network) for network in owners]:
            self.kept.pop(role, None)
            self.reason, predictor = "", None
            try:
                options = self.options | ({"capture": False} if role == "once" else {})
                predictor = GroupedPredictor(networks(), self.image_shape, **options)
            except InputError as error:
                self.reason = str(error)
            self.kept[role] = owners, predictor
        return predictor

    def student(self, student: Student, images: EvaluationSet) -> tuple[Tensor, Tensor | None]:
        """Probabilities of what is deployed, (1, N, C) or an ensemble's (K, N, C), and of the K branches where K > 1.

        The fused engine reads the images once for all of them.
        """
        predictor = self._predictor("student", [student], lambda: len(student_states(student)) * [plain(student)])
        K = student.branches
        if predictor is None:
            deployed = predict(student.deployed(), images)
            branches = deployed if len(deployed) == K else predict(student, images)
        else:
            predictor.refresh(student_states(student))
            found = predictor(images)
            deployed, branches = (found[:1], found[-K:]) if isinstance(student, LatentBE) else (found, found)
        return deployed, branches if K > 1 else None

    def networks(self, networks: Sequence[nn.Module], images: EvaluationSet, *, keep: bool = True) -> Tensor:
        """Probabilities (E, N, C) of plain networks, in their order; ``keep`` for the same ones again later."""
        owners = list(networks)
        predictor = self._predictor("networks" if keep else "once", owners, lambda: owners)
        if not keep:
            self.kept.pop("once", None)
        if predictor is None:
            return torch.cat([predict(network, images) for network in owners])
        predictor.refresh(owners)
        return predictor(images)

    def teachers(self, teachers: Teachers, images: EvaluationSet) -> Tensor:
        """Probabilities (M, N, C). Teachers do not change and are asked once: no weights or graph are kept."""
        return self.networks(list(teachers.networks), images, keep=False)

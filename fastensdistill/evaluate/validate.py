"""Probabilities of many networks on a whole split, all at once where the engine is fused.

A validation of a rank-one student runs its average and its K branches, K + 1 plain networks of one architecture, in as
many launches as one of them takes. One plan and, on a CUDA device, one captured graph serve all batches: weights are
rewritten in their slots, images copied into a tensor that never moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.config import ENGINES, TrainConfig
from fastensdistill.data.loader import EvaluationSet, check_batch_size
from fastensdistill.engine.common import ImageShape, arithmetic, state_of
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.ensemble import Ensemble, State, architectures, tensors_read
from fastensdistill.engine.graph import Captured, Capturing
from fastensdistill.engine.part_run import Execution
from fastensdistill.engine.plain import plain_student
from fastensdistill.errors import InputError, unknown
from fastensdistill.evaluate.predict import predict
from fastensdistill.kernels.tiles import device_arch
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.unplanned import Unplanned

Networks = Callable[[], Sequence[nn.Module]]
MOST_IMAGES = 500  # of a batch, unless told otherwise
MOST_AT_ONCE = 2000  # images times networks: what a batch's activations may take


class GroupedPredictor(Capturing):
    """``predictor(images)`` gives what ``evaluate.predict.predict`` gives for each of E networks, all of them at once.

    ``networks`` are plain modules (B, channels, H, W) in [0, 1] → (B, classes), all on one device; they are left as
    they are, in whatever mode, and their weights at this moment are copied: :meth:`refresh` copies them again.

    Args:
        image_shape: (channels, H, W).
        precision: as in ``TrainConfig``; all but bf16 compute in the dtype of the first network that is planned.
        capture: a batch is one CUDA graph on a CUDA device; its memory is held as long as this object lives.
            ``captured`` and ``capture_error`` as of a ``FusedStep``.
        implementations: what computes each convolution (``engine.dispatch``).

    Raises InputError as :func:`architectures`, and for an unknown precision.
    """

    graphs: Captured | None = None

    def __init__(self, networks: Sequence[nn.Module], image_shape: ImageShape, *, precision: str = "auto",
                 capture: bool = True, implementations: Dispatch | None = None):  # fmt: skip
        self.image_shape = tuple(image_shape)
        traced = architectures(networks, image_shape)
        states = [state_of(module) for module in networks]
        self.shapes = [
            {name: tuple(state[name].shape) for name in tensors_read(network, state)}
            for network, state in zip(traced, states, strict=True)
        ]
        planned = next(i for i, network in enumerate(traced) if not isinstance(network, Unplanned))
        like = next(networks[planned].parameters())
        self.device, self.image_dtype = like.device, like.dtype
        dtype, multiplied = arithmetic(TrainConfig(precision=precision), networks[planned])
        chosen = implementations or Dispatch.on(self.device)
        fusions = chosen.fusions(device_arch(like), dtype)
        execution = Execution(multiplied, chosen, fusions=fusions)
        self.ensemble = Ensemble(traced, dtype, self.device, execution)
        self.classes = traced[0].by_name[traced[0].output].shape[0]
        self.capture = capture and self.device.type == "cuda"
        self.images = torch.empty(0)
        self.refresh(networks)

    def _build(self, batch: int) -> None:
        """Plan and static input for ``batch`` images at a time."""
        C, H, W = self.image_shape
        self.graphs = None  # frees the memory of the graph before
        self.ensemble.plan(batch)
        self.images = torch.zeros(batch, H, W, C, dtype=self.image_dtype, device=self.device)
        if self.capture:
            self.graphs = Captured(self._body, list, [], self.device)

    def _batch(self, images: int, batch_size: int | None) -> int:
        """Images of a batch: as few batches as there must be, evenly filled.

        Unless ``batch_size`` says how many, the plan that stands stays for sets of another size where it takes at most
        one batch more and at most a quarter of what it computes is for nothing: a validation and its sample share it.
        """
        most = max(1, min(MOST_IMAGES, MOST_AT_ONCE // len(self.shapes))) if batch_size is None else batch_size
        check_batch_size(most)
        built, fewest = len(self.images), max(1, -(-images // most))
        if batch_size is None and built:
            batches = -(-images // built)
            if batches <= fewest + 1 and 3 * batches * built <= 4 * images:
                return built
        return -(-images // fewest) or 1

    def _body(self) -> dict[str, Tensor]:
        """Probabilities (E, B, classes) of ``images``: what is captured."""
        return {"probabilities": self.ensemble(self.images).float().softmax(-1)}

    @torch.no_grad()
    def refresh(self, networks: Sequence[nn.Module | State | None]) -> None:
        """Copy the weights of networks that have changed; nothing is planned or captured anew.

        Per network its module, a plain network's state dict, or None for one that has not changed. Raises InputError,
        with nothing copied, for another number of networks and for weights of another shape.
        """
        if len(networks) != len(self.shapes):
            raise InputError(f"{len(networks)} networks for a predictor of {len(self.shapes)}: expected as many")
        changed = {i: network for i, network in enumerate(networks) if network is not None}
        states = {i: state_of(net) if isinstance(net, nn.Module) else net for i, net in changed.items()}
        for i, state in states.items():
            for name, shape in self.shapes[i].items():
                actual = tuple(state[name].shape) if name in state else "missing"
                if actual != shape:
                    raise InputError(f"network {i}: {name!r} is {actual}; expected {shape}, as at first")
        for i, network in changed.items():
            self.ensemble.write(i, network)

    @torch.no_grad()
    def __call__(self, images: EvaluationSet, batch_size: int | None = None) -> Tensor:
        """Probabilities (E, N, classes), float32 on the networks' device, in the order the networks were given.

        At most ``batch_size`` images at a time (unset: 500, and fewer where more than four networks run together), in
        batches of one size but for the last. Nothing waits for the device. Raises InputError for a batch size below 1
        and images of another shape.
        """
        E, N = len(self.shapes), len(images)
        size = self._batch(N, batch_size)
        if len(self.images) != size:
            self._build(size)
        result = torch.empty(E, N, self.classes, dtype=torch.float32, device=self.device)
        for start, batch in zip(range(0, N, size), images.batches(size), strict=True):
            if tuple(batch.shape[1:]) != self.image_shape:
                raise InputError(f"images have shape {tuple(batch.shape[1:])}; expected {self.image_shape}")
            # After a smaller last batch stand images of the one before: in evaluation mode they do not meet
            self.images[: len(batch)].copy_(batch.permute(0, 2, 3, 1))
            results = self.graphs() if self.graphs else self._body()
            result[:, start : start + len(batch)] = results["probabilities"][:, : len(batch)]
        return result


class Evaluator:
    """What a trainer validates with: grouped launches where the engine is fused, plain PyTorch where it is not.

    ``engine`` is "fused", "captured" or "reference"; networks that cannot be planned go through
    ``evaluate.predict.predict`` too, and ``reason`` then says why. Predictors are kept from one call to the next as
    long as the same modules are given; every call reads their current weights. ``options`` are those of
    :class:`GroupedPredictor`.
    """

    def __init__(self, engine: str, image_shape: ImageShape, **options: Any):
        if engine not in ENGINES[1:]:
            raise unknown("engine", engine, ENGINES[1:])
        TrainConfig(precision=options.get("precision", "auto"))  # a wrong one is no reason to fall back
        self.fused, self.image_shape, self.options = engine == "fused", image_shape, options
        self.reason = "" if self.fused else f"the engine is {engine}"
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
        [found] = self.students([student], images)
        return found

    def students(self, students: Sequence[Student], images: EvaluationSet) -> list[tuple[Tensor, Tensor | None]]:
        """:meth:`student` for several of one kind, such as a student and its average over time: all at once."""
        predictor, K = self._of_students(students), students[0].branches
        found: list[tuple[Tensor, Tensor]] = []
        if predictor is None:
            for student in students:
                deployed = predict(student.deployed(), images)
                found.append((deployed, deployed if len(deployed) == K else predict(student, images)))
        else:
            plain = [plain_student(student) for student in students]
            states = [one.states() for one in plain]
            predictor.refresh([state for of_one in states for state in of_one])
            each = predictor(images).split([len(of_one) for of_one in states])
            found = [(p[: one.deployed], p[-K:]) for one, p in zip(plain, each, strict=True)]
        return [(deployed, branches if K > 1 else None) for deployed, branches in found]

    def mixed(self, student: Student, weights: Tensor, images: EvaluationSet) -> Tensor:
        """Probabilities (P, N, C) of the student with its branches' factors mixed by rows of ``weights`` (P, K).

        The fused engine writes them into the slots of the student's own networks, so many at a time: the same launches
        and the same captured graph. Plain PyTorch takes as many at once. Raises InputError as ``Student.mixed``.
        """
        before, _ = self.kept.get("student", ([], None))
        predictor = self._of_students([one for one in before if isinstance(one, Student)] if student in before
                                      else [student])  # fmt: skip
        parts = []
        for points in weights.split(student.branches + 1 if predictor is None else len(predictor.shapes)):
            if predictor is None:
                parts.append(predict(student.mixed(points), images))
            else:
                unchanged = (len(predictor.shapes) - len(points)) * [None]
                predictor.refresh([*plain_student(student).mixed(points), *unchanged])
                parts.append(predictor(images)[: len(points)])
        return torch.cat(parts)

    def _of_students(self, students: Sequence[Student]) -> GroupedPredictor | None:
        def networks() -> list[nn.Module]:
            plain = [plain_student(student) for student in students]
            return sum(len(one.states()) for one in plain) * [plain[0].architecture()]

        return self._predictor("student", list(students), networks)

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

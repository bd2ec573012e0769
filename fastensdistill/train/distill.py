"""The distillation trainer: its step, its validation, and what it saves at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig
from fastensdistill.data.augment import Augment
from fastensdistill.data.sources import Dataset
from fastensdistill.engine import parallel
from fastensdistill.engine.seeds import SeedsStep
from fastensdistill.engine.select import distillation_step
from fastensdistill.errors import InputError
from fastensdistill.evaluate import landscape, metrics
from fastensdistill.evaluate.classes import check_teachers
from fastensdistill.evaluate.validate import Evaluator
from fastensdistill.method.arguments import checked_config
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.train import collapse, keeping
from fastensdistill.train.collapse import Guard
from fastensdistill.train.keeping import Score
from fastensdistill.train.setup import check_statistics, ready_student, ready_teachers
from fastensdistill.train.trainer import State, Trainer
from fastensdistill.weights import save_network

# The file of the network that is deployed, by the name it is kept under
DEPLOYED = {"student": "network.safetensors", "ema": "ema.safetensors"}


class DistillTrainer(Trainer):
    """Distils ``teachers`` into ``student`` (docs/method.md, from Student to Recipe).

    After :meth:`fit`, ``student.average()`` is the network that is kept. The run's folder holds it as
    ``network.safetensors``, beside the student itself, ``student.safetensors``, and ``last.safetensors``, the network
    that the last step left. Where ``config.ema_decay`` asks for an average over time, ``averages["ema"]`` is a student
    of the same kind, validated and kept at its best by itself: ``ema.safetensors`` and ``last-ema.safetensors``.
    ``config.branches`` may be left unset: the student says how many it has, and of which kind it is.

    Args:
        student: a network that is wrapped, ``LatentBE(network, branches=4)``. It is trained and moved to the device;
            ``Single(network)`` trains ``network`` itself, the others a copy.
        teachers: a sequence of networks, or ``Teachers``. The run has copies of its own; these stay as they are.
        data: a :class:`Dataset`, or the name or path of one, as ``load_dataset`` takes it.
        config: the recipe; its defaults are the paper's.
        out: the run's folder, for its settings, checkpoint, metrics and networks; None writes nothing.
        resume: continue the run in ``out`` from its checkpoint, bit for bit.
        augment: what is changed at random of the training images; None is what the config says and suits the data.
        tensorboard: also write TensorBoard events to ``out`` (needs the extra).
        quiet: print nothing on stderr.

    Raises InputError for teachers that do not fit the data, and settings that do not fit each other.
    """

    title = "distill"

    def __init__(self, student: Student, teachers: Teachers | Sequence[nn.Module], data: Dataset | str | Path,
                 config: DistillConfig | None = None, *, out: Path | str | None = None, resume: bool = False,
                 augment: Augment | None = None, tensorboard: bool = False, quiet: bool = False):  # fmt: skip
        config = checked_config(config or DistillConfig(), DistillConfig)
        teachers = list(teachers) if isinstance(teachers, Iterator) else teachers
        given = [student, *(teachers if isinstance(teachers, Sequence) else [teachers])]
        super().__init__(config, data, out, resume, augment, tensorboard, quiet, given)
        config = checked_config(self.config, DistillConfig)
        shape, classes = (self.data.channels, *self.data.image_size), self.data.num_classes
        with parallel.together():
            # The teachers first: copies of what they are before a student that shares with them is trained
            self.teachers, about = ready_teachers(teachers, config, self.device, shape, classes)
            check_teachers(self.teachers.networks, self.data)
            self.student, notes = ready_student(student, config, self.device, shape, classes)
            if config.branches not in (None, self.student.branches):
                raise InputError(
                    f"branches={config.branches} for a student of {self.student.branches}: expected the same"
                )
        self.warn(about + notes)
        self.networks = {"student": self.student}
        self.seeds = [config.seed]
        with parallel.together():
            self.distil, self.engine = distillation_step(self.student, self.teachers, config, shape, classes)
            check_statistics(config, self.engine)
        self.step = self.distil
        self.averages = dict(zip(["ema"], self.distil.averages, strict=False))
        self.evaluator = Evaluator(self.engine.name, shape, precision=config.precision)
        self.sampled = index = landscape.spread(len(self.validation))
        self.sample = self.validation.part(index.to(self.device))
        self.guard = Guard()
        self.saved_config = replace(config, student=self.student.kind, branches=self.student.branches)
        self._about_teachers: dict[str, Any] = {}

    def join(self, step: SeedsStep, number: int, first: DistillTrainer) -> None:
        """Leave the training to ``step``, whose student of this ``number`` is this trainer's: ``fit`` ends here.

        The teachers, and what they do on the validation images, are from here on those of the ``first`` trainer.
        """
        self.step = step.seeds[number]
        self.averages = dict(zip(["ema"], step.averages[number : number + 1], strict=False))
        self.teachers, self._about_teachers = first.teachers, first.about_teachers()
        del self.distil  # the student's parameters have moved

    def train_step(self) -> dict[str, Tensor]:
        return self.distil.train_on(self.loaders[0])

    def validate(self) -> tuple[dict[str, Score], dict[str, Any]]:
        students = {name: one for name, one in self.every.items() if isinstance(one, Student)}
        found = self.evaluator.students(list(students.values()), self.validation)
        scores: dict[str, Score] = {}
        record: dict[str, Any] = {}
        for (name, student), (members, branches) in zip(students.items(), found, strict=True):
            scores[name], about = self.assess(student, members, branches)
            record |= about if name == "student" else {f"ema_{key}": value for key, value in about.items()}
        parting = self.guard.look(scores["student"].averaging, self.step_index / self.steps_per_epoch, self.config)
        for line in parting:  # what the run ends with is warned of at its end
            self.say(f"warning: {line}")
        return scores, record | self.about_teachers() | ({"warnings": parting} if parting else {})

    def assess(self, student: Student, members: Tensor, branches: Tensor | None) -> tuple[Score, dict[str, Any]]:
        """What ``student`` does on the validation images, of which these are the probabilities: its score and record.

        Of an average also what its branches do, and on at most 1,000 images the K networks half-way to them. In the
        fused engine these are one more pass of the same launches over that sample: a validation on 5,000 images costs a
        fifth more, one on 1,000 or fewer twice as much.
        """
        labels = self.validation.labels
        score = Score.of(members.mean(0), labels)
        record: dict[str, Any] = {"accuracy": score.accuracy, "nll": score.nll}
        if branches is None or not bool(torch.isfinite(branches).all()):
            return score, record
        record |= {
            "branch_accuracy": [metrics.accuracy(branch, labels) for branch in branches],
            "branch_nll": [metrics.nll(branch, labels) for branch in branches],
            "branch_kl": metrics.pairwise_kl(branches), "branch_agreement": metrics.agreement(branches),
        }  # fmt: skip
        if len(members) == 1 and score.finite:
            way = self.evaluator.mixed(student, landscape.midpoints(len(branches)), self.sample)
            if bool(torch.isfinite(way).all()):
                found = landscape.averaging(members[0], branches, way, labels, self.sampled)
                score, record = replace(score, averaging=found), record | found.record()
        return score, record

    def about_teachers(self) -> dict[str, Any]:
        """What the teachers do on the validation images, measured and told once: a teacher that was given another
        normalisation than its own, or whose classes are in another order, shows here."""
        if not self._about_teachers:
            p = self.evaluator.teachers(self.teachers, self.validation)
            accuracies = [metrics.accuracy(member, self.validation.labels) for member in p]
            self._about_teachers = {"teacher_accuracy": accuracies}
            if len(self.teachers) > 1:
                self._about_teachers |= {
                    "ensemble_accuracy": metrics.accuracy(p.mean(0), self.validation.labels),
                    "teacher_kl": metrics.pairwise_kl(p), "teacher_agreement": metrics.agreement(p),
                }  # fmt: skip
        return self._about_teachers

    def save_last(self, out: Path) -> None:
        for name, file in (("ema", "last-ema"), ("student", "last")):  # this order: the latter says that all is written
            if name in self.every:
                save_network(out / f"{file}.safetensors", self.deployed(name), self.card(self.keeper.last[name]))

    def kept_file(self, name: str) -> nn.Module:
        return self.deployed(name) if name in self.averages else self.every[name]

    def deployed(self, name: str) -> nn.Module:
        """The network that the student, or its average over time, is for."""
        student = self.every[name]
        assert isinstance(student, Student)
        return student.deployed()

    def finish(self) -> None:
        super().finish()
        with parallel.together():
            if self.first and self.out is not None:
                for name in self.every:
                    parted, deployed = self.parted(name), self.deployed(name)
                    if parted or (name == "student" and deployed is not self.student):
                        card = self.card(self.keeper.kept()[name]) | ({"warnings": parted} if parted else {})
                        save_network(self.out / DEPLOYED[name], deployed, card)

    def doubts(self) -> list[str]:
        teachers = self.about_teachers()["teacher_accuracy"]
        kept = self.keeper.kept()["student"]
        parted = [line for name in self.every for line in self.parted(name)]
        if self.parted("student"):  # which says why it is behind, and longer training would not help
            return parted
        return [*keeping.warn_of_student(kept, teachers, len(self.validation)), *parted]

    def parted(self, name: str) -> list[str]:
        """A line where the network that is kept as ``name`` averages branches that have parted."""
        kept, last = self.keeper.kept()[name], self.keeper.last[name]
        return collapse.at_the_end(kept, last, self.config, DEPLOYED[name])

    def state_dict(self) -> State:
        return super().state_dict() | {"guard": self.guard.state_dict()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.guard.load_state_dict(state.get("guard", {}))

    def frozen(self) -> Sequence[nn.Module]:
        return list(self.teachers.networks)

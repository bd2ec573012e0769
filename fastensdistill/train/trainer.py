"""The training loop, once, and what differs between training teachers and distilling them.

``fit`` reads top to bottom: learning rate, step, record, and at the end of an epoch a look at the validation images
and a checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig, TeachConfig, TrainConfig
from fastensdistill.data.augment import Augment, default_augment
from fastensdistill.data.loader import DeviceLoader, EvaluationSet
from fastensdistill.data.sources import Dataset, load_dataset
from fastensdistill.engine.select import AnyStep, distillation_step, teaching_step
from fastensdistill.errors import InputError
from fastensdistill.evaluate import metrics
from fastensdistill.evaluate.predict import predict
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.train import checkpoint
from fastensdistill.train.record import DivergedError, Recorder
from fastensdistill.train.schedule import is_validation_epoch, make_schedule
from fastensdistill.train.stop import Interrupted, Stopper
from fastensdistill.weights import save_network

RECORD_EVERY = 20  # steps
State = dict[str, Any]


class Trainer:
    """What both trainers share.

    ``data`` is a dataset or the name of one; ``out`` the run's folder, or None for no files; ``augment`` defaults to
    what suits the data (CIFAR: zero-pad 4, crop, flip); ``resume`` continues the run in ``out``.
    """

    title: str
    networks: dict[str, nn.Module]  # what is trained, by the name it is saved under
    step: AnyStep
    engine: str  # which engine trains, and why
    seeds: list[int]  # one stream of batches each

    def __init__(self, config: TrainConfig, data: Dataset | str, out: Path | str | None, resume: bool,
                 augment: Augment | None, tensorboard: bool, quiet: bool):  # fmt: skip
        self.config = config
        self.device = choose_device(config.device)
        self.data = load_dataset(data) if isinstance(data, str) else data
        self.out = None if out is None else Path(out)
        self.resume, self.tensorboard, self.quiet = resume, tensorboard, quiet
        self.augment = augment or default_augment(self.data.name, self.data.image_size)
        self.validation = EvaluationSet(self.data.validation, self.device)
        self.saved_config: Any = config  # what config.yaml shall hold; the command line puts its own settings there
        self.step_index = 0
        self.best: dict[str, tuple[float, int, dict[str, Tensor]]] = {}  # score, step, weights
        if resume and self.out is None:
            raise InputError("resume=True needs the run's folder (out=)")

    def fit(self) -> Trainer:
        """Train to the end. Afterwards the networks hold the weights of their best validation accuracy.

        Raises Interrupted after SIGINT or SIGTERM, with a checkpoint saved, and DivergedError for a loss that is not
        finite, with the last good checkpoint kept.
        """
        images = EvaluationSet(self.data.train, self.device)  # one copy, however many streams of batches
        self.loaders = [self.make_loader(images, seed) for seed in self.seeds]
        self.steps_per_epoch = self.loaders[0].batches_per_epoch
        rate = make_schedule(self.config, self.steps_per_epoch)
        self.begin()
        if not self.quiet:
            print(self.engine, file=sys.stderr)
        recorder = Recorder(
            self.out, title=self.title, total_steps=rate.total_steps, start_step=self.step_index,
            tensorboard=self.tensorboard, quiet=self.quiet,
        )  # fmt: skip
        with Stopper() as stopper, recorder:
            while self.step_index < rate.total_steps:
                self.step.set_learning_rate(rate(self.step_index))
                scalars = self.train_step()
                recorder.step(self.step_index, scalars)
                self.step_index += 1
                epoch = self.step_index / self.steps_per_epoch
                end_of_epoch = self.step_index % self.steps_per_epoch == 0
                if end_of_epoch or stopper.signum or self.step_index % RECORD_EVERY == 0:
                    recorder.train(self.step_index, epoch, rate(self.step_index - 1), self.config.batch_size)
                if end_of_epoch or stopper.signum:
                    paused = recorder.pause()
                    recorder.drain()  # raises where the loss is not finite, so no such weights are kept
                    if end_of_epoch and is_validation_epoch(round(epoch), self.config.epochs):
                        recorder.validation({"step": self.step_index, "epoch": epoch, **self.look()})
                    self.save()
                    recorder.resume(paused)
                if stopper.signum:
                    where = f"at step {self.step_index} of {rate.total_steps}"
                    raise Interrupted(stopper.signum, f"stopped {where}" + (f"; resume {self.out}" if self.out else ""))
        for name, (_, _, weights) in self.best.items():
            self.networks[name].load_state_dict(weights)
        return self

    def begin(self) -> None:
        """Seed everything, or continue from the checkpoint."""
        torch.manual_seed(self.config.seed)
        if self.out is None:
            return
        self.fingerprint = checkpoint.fingerprint(self.config, self.device, self.data, self.frozen())
        if checkpoint.claim_folder(self.out, self.saved_config, self.resume):
            self.load_state_dict(checkpoint.load_checkpoint(self.out, self.fingerprint))

    def look(self) -> dict[str, Any]:
        """Validate; keep the weights of every network that is better than before. Returns the record."""
        scores, record = self.validate()
        for name, score in scores.items():
            if name not in self.best or score > self.best[name][0]:
                network = self.networks[name]
                weights = {k: v.detach().clone() for k, v in network.state_dict().items()}
                self.best[name] = (score, self.step_index, weights)
                if self.out is not None:
                    card = {**self.card(), "validation_accuracy": score, "step": self.step_index}
                    save_network(self.out / f"{name}.safetensors", network, card)
        return record

    def save(self) -> None:
        """Write a checkpoint. Raises DivergedError, with the last one kept, for weights that are not finite."""
        for name, network in self.networks.items():
            if not all(bool(torch.isfinite(p).all()) for p in network.parameters()):
                raise DivergedError(f"the weights of {name} are not finite after step {self.step_index - 1}; stopped")
        if self.out is not None:
            checkpoint.save_checkpoint(self.out, self.state_dict(), self.fingerprint)

    def state_dict(self) -> State:
        """Everything a run needs to go on bit for bit, as nested dictionaries of tensors and plain values."""
        return {
            "step_index": self.step_index,
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "step": self.step.state_dict(),
            "loaders": {str(i): loader.state_dict() for i, loader in enumerate(self.loaders)},
            "random": checkpoint.random_state(self.device),
            "best": {n: {"score": s, "step": t, "weights": w} for n, (s, t, w) in self.best.items()},
        }

    def load_state_dict(self, state: State) -> None:
        self.step_index = state["step_index"]
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        self.step.load_state_dict(state["step"])
        for i, loader in enumerate(self.loaders):
            loader.load_state_dict(state["loaders"][str(i)])
        checkpoint.set_random_state(state["random"], self.device)
        self.best = {n: (b["score"], b["step"], b["weights"]) for n, b in state.get("best", {}).items()}

    def make_loader(self, images: EvaluationSet, seed: int) -> DeviceLoader:
        generator = torch.Generator(self.device).manual_seed(seed)
        return DeviceLoader(
            images, self.config.batch_size, device=self.device, generator=generator, augment=self.augment
        )

    def card(self) -> dict[str, Any]:
        return {"data": self.data.name, "classes": list(self.data.classes)}

    def frozen(self) -> Sequence[nn.Module]:
        """Networks the run learns from and does not change."""
        return ()

    def train_step(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def validate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Validation accuracy of each network that is to be kept at its best, and the record of this look."""
        raise NotImplementedError


class DistillTrainer(Trainer):
    """Distils ``teachers`` into ``student`` (method §2–5).

    After :meth:`fit`, ``student.average()`` is the network with the best validation accuracy. The run's folder holds it
    as ``network.safetensors``, beside the student itself, ``student.safetensors``.
    Raises InputError for teachers that do not fit the data, and settings that do not fit each other.
    """

    title = "distill"

    def __init__(self, student: Student, teachers: Teachers | Sequence[nn.Module], data: Dataset | str,
                 config: DistillConfig | None = None, *, out: Path | str | None = None, resume: bool = False,
                 augment: Augment | None = None, tensorboard: bool = False, quiet: bool = False):  # fmt: skip
        config = config or DistillConfig()
        super().__init__(config, data, out, resume, augment, tensorboard, quiet)
        if not isinstance(student, Student):
            raise InputError(f"student is a {type(student).__name__}; wrap it: LatentBE(network, branches=4)")
        teachers = teachers if isinstance(teachers, Teachers) else Teachers(teachers)
        self.student, self.teachers = place(student, self.device), place(teachers, self.device)
        self.teachers.check((self.data.channels, *self.data.image_size), self.data.num_classes)
        Teachers.check_output(self.student, "student", (self.data.channels, *self.data.image_size),
                              (student.branches, 1, self.data.num_classes))  # fmt: skip
        self.networks = {"student": self.student}
        self.seeds = [config.seed]
        shape = (self.data.channels, *self.data.image_size)
        self.distil, self.engine = distillation_step(self.student, self.teachers, config, shape, self.data.num_classes)
        self.step = self.distil
        self._teacher_diversity: dict[str, float] | None = None

    def train_step(self) -> dict[str, Tensor]:
        images, labels = self.loaders[0].next()
        return self.distil(images, labels)

    def validate(self) -> tuple[dict[str, float], dict[str, Any]]:
        labels = self.validation.labels
        members = predict(self.student.deployed(), self.validation)
        mean = members.mean(0)
        record = {"accuracy": metrics.accuracy(mean, labels), "nll": metrics.nll(mean, labels)}
        if self.student.branches > 1:
            branches = members if len(members) > 1 else predict(self.student, self.validation)
            record |= {"branch_kl": metrics.pairwise_kl(branches), "branch_agreement": metrics.agreement(branches)}
        if len(self.teachers) > 1:
            if self._teacher_diversity is None:
                p = predict(self.teachers, self.validation)
                self._teacher_diversity = {
                    "teacher_kl": metrics.pairwise_kl(p), "teacher_agreement": metrics.agreement(p)
                }  # fmt: skip
            record |= self._teacher_diversity
        return {"student": record["accuracy"]}, record

    def fit(self) -> DistillTrainer:
        super().fit()
        deployed = self.student.deployed()
        if self.out is not None and deployed is not self.student:
            best = self.best["student"]
            card = {**self.card(), "validation_accuracy": best[0], "step": best[1]}
            save_network(self.out / "network.safetensors", deployed, card)
        return self

    def frozen(self) -> Sequence[nn.Module]:
        return list(self.teachers.networks)


class TeachTrainer(Trainer):
    """Trains M networks at once, each from its own seed, on its own order of images (method §2, "Teachers").

    Member i is bit for bit the network that training it alone with its seed gives (dropout aside, which draws from
    PyTorch's global generator). Its best weights end as ``teacher-{i}.safetensors``.
    """

    title = "teach"

    def __init__(self, networks: Sequence[nn.Module], data: Dataset | str, config: TeachConfig | None = None, *,
                 out: Path | str | None = None, resume: bool = False, augment: Augment | None = None,
                 tensorboard: bool = False, quiet: bool = False):  # fmt: skip
        config = config or TeachConfig(members=len(networks))
        super().__init__(config, data, out, resume, augment, tensorboard, quiet)
        if len(networks) != config.members:
            raise InputError(f"{len(networks)} networks for members={config.members}: expected as many")
        shape = (self.data.channels, *self.data.image_size)
        self.networks = {}
        for i, network in enumerate(networks):
            network = place(network, self.device)
            Teachers.check_output(network, f"teacher {i}", shape, (1, self.data.num_classes))
            self.networks[f"teacher-{i}"] = network
        self.seeds = [config.seed + i for i in range(config.members)]
        self.teach, self.engine = teaching_step(list(self.networks.values()), config, shape)
        self.step = self.teach

    def train_step(self) -> dict[str, Tensor]:
        return self.teach([loader.next() for loader in self.loaders])

    def validate(self) -> tuple[dict[str, float], dict[str, Any]]:
        labels = self.validation.labels
        members = torch.cat([predict(network, self.validation) for network in self.networks.values()])
        accuracies = [metrics.accuracy(p, labels) for p in members]
        record: dict[str, Any] = {"accuracy": accuracies, "nll": [metrics.nll(p, labels) for p in members]}
        if len(members) > 1:
            record |= {"teacher_kl": metrics.pairwise_kl(members), "teacher_agreement": metrics.agreement(members)}
        return dict(zip(self.networks, accuracies, strict=True)), record


Placed = TypeVar("Placed", bound=nn.Module)


def place(network: Placed, device: torch.device) -> Placed:
    """On the device, weights stored channels last, which is how the batches come."""
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"device {name!r}: expected auto, cpu, or cuda, which may have a number (cuda:1)")
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # events, streams and graphs are the current device's
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def seeded(seed: int, create: Callable[[], Placed]) -> Placed:
    """What ``create`` returns with PyTorch's generator seeded, which is put back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create()

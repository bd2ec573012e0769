"""The training loop; ``train.distill`` and ``train.teach`` define a step and a validation.

``fit`` reads top to bottom: learning rate, step, record, and at the end of an epoch a validation
and a checkpoint. Under ``torchrun`` every process runs it on its share of each batch; the first one alone validates,
writes and prints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastensdistill.config import TrainConfig
from fastensdistill.data.augment import Augment
from fastensdistill.data.channels import for_networks
from fastensdistill.data.loader import DeviceLoader, EvaluationSet
from fastensdistill.data.presets import SWITCHES, choose_augment, switches
from fastensdistill.data.sources import Dataset, load_dataset
from fastensdistill.engine import parallel
from fastensdistill.engine.common import precision_on
from fastensdistill.engine.seeds import OneSeed
from fastensdistill.engine.select import AnyStep, EngineChoice
from fastensdistill.errors import InputError
from fastensdistill.evaluate.validate import Evaluator
from fastensdistill.files import expanded
from fastensdistill.method.modes import set_mode
from fastensdistill.network.overlap import load_state
from fastensdistill.train import checkpoint, keeping, summary
from fastensdistill.train.finite import NotFinite
from fastensdistill.train.folder import RunFolder
from fastensdistill.train.keeping import Keeper, Score
from fastensdistill.train.record import DivergedError, Recorder, tensorboard_writer
from fastensdistill.train.schedule import Schedule, is_validation_epoch, make_schedule
from fastensdistill.train.setup import (
    check_arguments,
    check_shares,
    check_tf32,
    choose_device,
    enough_values,
)
from fastensdistill.train.stop import Interrupted, Stopper
from fastensdistill.train.threads import thread_hint
from fastensdistill.weights import save_network

RECORD_EVERY = 20  # steps
State = dict[str, Any]


class Trainer:
    """What both trainers share.

    ``data`` is a dataset or the name of one; ``out`` the run's folder, or None for no files; ``augment`` is what the
    config's settings say, or given whole; ``resume`` continues the run in ``out``. ``self.data`` is the
    data as the networks take it (grey images repeated to three channels for colour networks), ``self.config`` the
    config with the augmentation that is used.
    After :meth:`fit`, ``networks`` and their ``averages`` over time hold the weights that were best; ``kept`` says in
    one line which epoch's they are, and ``warnings`` what should make one doubt them.
    """

    title: str
    networks: dict[str, nn.Module]  # what is trained, by the name it is saved under
    averages: dict[str, nn.Module]  # theirs over time, likewise; {} where ``ema_decay`` asks for none
    step: AnyStep | OneSeed
    engine: EngineChoice  # which engine trains, and why; prints as a line
    evaluator: Evaluator  # what the validation images go through
    seeds: list[int]  # one stream of batches each
    fitted_with: TrainConfig  # the settings that fit began with
    random: State  # PyTorch's generators when the run was stopped

    def __init__(self, config: TrainConfig, data: Dataset | str | Path, out: Path | str | None, resume: bool,
                 augment: Augment | None, tensorboard: bool, quiet: bool, networks: Sequence[object]):  # fmt: skip
        parallel.join()
        with parallel.together():
            self.device = choose_device(config.device)
            parallel.check_device(self.device)
            check_tf32(config, self.device)
            check_shares(config)
            self.data = load_dataset(data) if isinstance(data, str | Path) else data
            check_arguments(self.data, out, augment)
            self.data = for_networks(self.data, networks)
            self.augment = choose_augment(self.data, given=augment, **switches(config))
        self.config = config = replace(config, **{name: getattr(self.augment, name) for name in SWITCHES})
        self.first = parallel.rank() == 0
        self.out = None if out is None else expanded(out)
        self.resume, self.tensorboard, self.quiet = resume, tensorboard, quiet
        self.validation = EvaluationSet(self.data.validation, self.device)
        self.saved_config: Any = config  # what config.yaml shall hold; the command line puts its own settings there
        self.data_given = data if isinstance(data, str | Path) else None
        self.notes: list[str] = []  # to tell before the first step
        self.step_index, self.averages = 0, {}
        self.speaker = ""  # what its lines on stderr begin with
        self.phase = "new"  # then running, stopped (by a signal; it can go on) or finished
        self.loaders: list[DeviceLoader] = []
        self.kept = ""
        self.warnings: list[str] = []
        self.doubted: list[str] = []  # warnings that the end of the run gave
        with parallel.together():
            for name, given in (("resume", resume), ("tensorboard", tensorboard)):
                if given and self.out is None:
                    raise InputError(f"{name}=True needs the run's folder (out=)")
            if tensorboard:
                tensorboard_writer()

    def fit(self) -> Self:
        """Train to the end. Afterwards the networks hold the weights that ``train.keeping`` chose, on all processes,
        and are in evaluation mode. Called again after it was interrupted it goes on where it stopped, bit for bit;
        after the end it does nothing.

        Raises Interrupted after SIGINT or SIGTERM, with a checkpoint saved, and DivergedError for a loss, weights or
        statistics that are not finite, with the last good checkpoint kept; all processes stop after the same step.
        """
        if self.phase == "finished":
            return self
        folder = RunFolder(self.out if self.first else None)
        try:
            self.begin(folder)
            self.train()
            self.finish()
        finally:
            folder.release(unused=self.step_index == 0)
        return self

    def begin(self, folder: RunFolder, images: EvaluationSet | None = None) -> None:
        """Seed everything, continue from the checkpoint, or go on where this trainer was stopped.

        ``images`` are those to train on where they are on the device already.
        """
        with parallel.together():
            if self.phase == "running":
                raise InputError(f"this run ended with an error in step {self.step_index}: make a new trainer"
                                 + (", with resume=True" if self.out else ""))  # fmt: skip
            if self.phase == "stopped":
                if self.config != self.fitted_with:
                    raise InputError("the settings were changed after the run began: make a new trainer")
                folder.go_on(self.step_index)
        if self.phase == "stopped":
            checkpoint.set_random_state(self.random, self.device)
            return
        with parallel.together():
            self.fitted_with = replace(self.config)
            images = images or EvaluationSet(self.data.train, self.device)  # one copy for all streams of batches
            self.loaders = [self.make_loader(images, seed) for seed in self.seeds]
            self.steps_per_epoch = self.loaders[0].batches_per_epoch
            self.rate: Schedule = make_schedule(self.config, self.steps_per_epoch)
            self.keeper = Keeper(len(self.validation), self.rate.warmup_steps)
        torch.manual_seed(self.config.seed + 2 * parallel.rank())
        if self.out is not None or parallel.processes() > 1:
            saved: State | None = None
            with parallel.together():
                self.fingerprint = checkpoint.fingerprint(self.config, self.device, self.data, self.frozen())
                checkpoint.check_same(parallel.exchange(self.fingerprint))
                if self.out is not None and folder.claim(summary.used(self), self.resume):
                    saved = checkpoint.load_checkpoint(self.out, self.fingerprint)
            saved = parallel.from_first(saved)
            if saved is not None:
                self.load_state_dict(checkpoint.with_own_part(saved, parallel.rank()))
        self.not_finite = NotFinite(self.every)
        with parallel.together():
            if self.first and not self.quiet:
                with parallel.alone():
                    self.say(summary.describe(self))
        hint = thread_hint(self.device)
        if hint:
            self.say(f"hint: {hint}")
        self.warn(keeping.warn_of_images(len(self.validation)))

    def train(self) -> None:
        """The loop: from ``step_index`` to the end."""
        recorder = self.recording()
        with Stopper(self.step_index) as stopper, recorder:
            while self.step_index < self.rate.total_steps:
                self.step.set_learning_rate(self.rate(self.step_index))
                with enough_values(self.config):
                    scalars = self.train_step()
                self.note(scalars, recorder)
                stop = stopper.agreed(self.step_index, self.record_due)
                self.after_step(recorder, stop)
                if stop:
                    raise Interrupted(stop, self.where, self.out)
            self.after_last_step(recorder)

    def recording(self, title: str = "", quiet: bool = False) -> Recorder:
        """What records the run from here on, which begins with this; ``quiet`` shows nothing of its progress."""
        self.phase = "running"
        with parallel.together():
            return Recorder(
                self.out if self.first else None, title=title or self.title, epochs=self.config.epochs,
                steps_per_epoch=self.steps_per_epoch, images=self.config.batch_size, start_step=self.step_index,
                tensorboard=self.tensorboard and self.first, quiet=quiet or self.quiet or not self.first,
                describe=self.describe,
            )  # fmt: skip

    def note(self, scalars: dict[str, Tensor], recorder: Recorder) -> None:
        """A step was made, with these scalars."""
        recorder.step(self.step_index, scalars)
        self.step_index += 1

    @property
    def record_due(self) -> bool:
        """Whether a record ends with the last step."""
        return self.step_index % self.steps_per_epoch == 0 or self.step_index % RECORD_EVERY == 0

    @property
    def where(self) -> str:
        """In words, how far the run has come."""
        return f"at step {self.step_index} of {self.rate.total_steps}"

    def after_step(self, recorder: Recorder, stop: int) -> None:
        """The record; at the end of an epoch, or where the signal ``stop`` has come, a validation and a checkpoint."""
        epoch = self.step_index / self.steps_per_epoch
        end_of_epoch = self.step_index % self.steps_per_epoch == 0
        if self.record_due or stop:
            with parallel.together():
                recorder.drain()
            recorder.train(self.step_index, epoch, self.rate(self.step_index - 1))
        if end_of_epoch or stop:
            paused = recorder.pause()
            validates = end_of_epoch and is_validation_epoch(round(epoch), self.config.epochs)
            with parallel.together():
                recorder.drain()  # raises where the loss is not finite, so no such weights are kept
                self.check_finite()
                if validates and self.first:
                    with parallel.alone():
                        recorder.validation({"step": self.step_index, "epoch": epoch, **self.validate_and_keep_best()})
                self.save()
            recorder.resume(paused, validates)
        if stop:
            self.phase, self.random = "stopped", checkpoint.random_state(self.device)

    def after_last_step(self, recorder: Recorder) -> None:
        """What the run ends with, for the record."""
        with parallel.together():
            if self.first:
                self.check_kept()
                with parallel.alone():
                    self.doubted = self.doubts()
                recorder.kept(self.kept_record(), self.rate.total_steps)

    def finish(self) -> None:
        """Save the last weights, and leave the networks and their averages with those that are kept."""
        with parallel.together():
            if self.first and self.out is not None:
                self.save_last(self.out)
        for name, (_, weights) in self.keeper.best.items():
            load_state(self.every[name], weights)
        for network in self.every.values():
            parallel.same_start(network.state_dict().values())
            set_mode(network, False)
        if self.first:
            self.warn(self.doubted)
            self.say(self.kept)
        self.phase = "finished"

    def validate_and_keep_best(self) -> dict[str, Any]:
        """Validate; keep the weights of every network that is better than before. Returns the record."""
        scores, record = self.validate()
        for name, score in scores.items():
            score = replace(score, step=self.step_index)
            if self.keeper.note(name, score, self.every[name]) and self.out is not None:
                save_network(self.out / f"{name}.safetensors", self.kept_file(name), self.card(score))
        return record

    def kept_record(self) -> dict[str, Any]:
        """Which weights the networks and their averages end with, for the record; ``self.kept`` says it in one line."""
        record: dict[str, Any] = {}
        said = []
        for prefix, networks in (("", self.networks), ("ema_", self.averages)):
            if networks:
                kept, last = ({n: scores[n] for n in networks} for scores in (self.keeper.kept(), self.keeper.last))
                said.append(
                    keeping.in_words(kept, last, self.steps_per_epoch, self.config.epochs, len(self.validation))
                )
                about = keeping.as_record(kept, last, self.steps_per_epoch)
                record |= {f"{prefix}{key}": value for key, value in about.items()}
        self.kept = "; EMA: ".join(said)
        return {**record, "said": said[0], "warnings": [*self.warnings, *self.doubted]}

    def check_finite(self) -> None:
        """Raise DivergedError, with the last checkpoint kept, for weights or statistics that are no longer finite."""
        found = self.not_finite()
        if found:
            raise DivergedError(f"{found} after {self.describe(self.step_index - 1)}")

    def check_kept(self) -> None:
        """Raise DivergedError where a network has no weights to keep."""
        for name in self.every:
            if name not in self.keeper.best:
                raise DivergedError(
                    f"no look at {name} after the warm-up gave finite predictions of the validation images; the last "
                    f"one came after {self.describe(self.step_index - 1)}"
                )

    def describe(self, step: int) -> str:
        """How ``step`` was made, for the error of a run that diverged in it."""
        rate, peak = self.rate(step), self.config.learning_rate
        precision = precision_on(self.config, self.device)
        advice = "" if precision == "fp32" else ", or use precision fp32"
        return (f"step {step}, at learning rate {rate:.3g} (learning_rate={peak:g}, precision {precision}); stopped. "
                f"Lower learning_rate{advice}")  # fmt: skip

    def save(self) -> None:
        """Write a checkpoint."""
        if self.out is None:
            return
        state = self.state_dict()
        if parallel.processes() > 1:
            parts = parallel.exchange(checkpoint.own_part(state, self.every))
            state["processes"] = {str(i): part for i, part in enumerate(parts) if i > 0}
        if self.first:
            checkpoint.save_checkpoint(self.out, state, self.fingerprint)

    def state_dict(self) -> State:
        """Everything this process needs to go on bit for bit, as nested dictionaries of tensors and plain values."""
        return {
            "step_index": self.step_index,
            "total_steps": self.rate.total_steps,
            "networks": {name: network.state_dict() for name, network in self.every.items()},
            "step": self.step.state_dict(),
            "loaders": {str(i): loader.state_dict() for i, loader in enumerate(self.loaders)},
            "random": checkpoint.random_state(self.device),
            **self.keeper.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """The way back from :meth:`state_dict`."""
        self.step_index = state["step_index"]
        for name, network in self.every.items():
            load_state(network, state["networks"][name])
        self.step.load_state_dict(state["step"])
        for i, loader in enumerate(self.loaders):
            loader.load_state_dict(state["loaders"][str(i)])
        checkpoint.set_random_state(state["random"], self.device)
        self.keeper.load_state_dict(state)

    def say(self, line: str) -> None:
        """``line`` on stderr, once of all processes, and unless the run is quiet."""
        if self.first and not self.quiet:
            print(f"{self.speaker}{line}", file=sys.stderr, flush=True)

    def warn(self, lines: Sequence[str]) -> None:
        """Say ``lines`` as warnings, and keep them for the report."""
        self.warnings += lines
        for line in lines:
            self.say(f"warning: {line}")

    def make_loader(self, images: EvaluationSet, seed: int) -> DeviceLoader:
        """This process's share of the training images, shuffled and cropped by ``seed``."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return DeviceLoader(
            images, self.config.batch_size, device=self.device, generator=generator, augment=self.augment,
            share=(parallel.rank(), parallel.processes()), classes=self.data.num_classes,
        )  # fmt: skip

    def card(self, score: Score) -> dict[str, Any]:
        """What a network's file says besides its architecture: the data, and how its weights validated."""
        return {
            **summary.source(self), "validation_accuracy": score.accuracy, "validation_nll": score.nll,
            "validation_images": len(self.validation), "step": score.step,
            "epoch": score.step / self.steps_per_epoch, "epochs": self.config.epochs,
        }  # fmt: skip

    @property
    def every(self) -> dict[str, nn.Module]:
        """The networks and their averages over time."""
        return self.networks | self.averages

    def kept_file(self, name: str) -> nn.Module:
        """What the file of the best weights of ``name`` holds."""
        return self.every[name]

    def frozen(self) -> Sequence[nn.Module]:
        """Networks the run learns from and does not change."""
        return ()

    def train_step(self) -> dict[str, Tensor]:
        """One step; its scalars, on the device."""
        raise NotImplementedError

    def validate(self) -> tuple[dict[str, Score], dict[str, Any]]:
        """The score of each network that is to be kept at its best, and the record of this validation."""
        raise NotImplementedError

    def save_last(self, out: Path) -> None:
        """Save the networks as the last step left them, beside those that are kept."""
        raise NotImplementedError

    def doubts(self) -> list[str]:
        """What should make one doubt the networks that were kept, a line each."""
        return []

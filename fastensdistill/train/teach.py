"""The trainer of M teachers at once: its step, its validation, and what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastensdistill.config import TeachConfig
from fastensdistill.data.augment import Augment
from fastensdistill.data.sources import Dataset
from fastensdistill.engine import parallel
from fastensdistill.engine.select import teaching_step
from fastensdistill.errors import InputError
from fastensdistill.evaluate import metrics
from fastensdistill.evaluate.validate import Evaluator
from fastensdistill.method.arguments import checked_config, listed_networks
from fastensdistill.train.keeping import Score
from fastensdistill.train.setup import check_statistics, ready_networks
from fastensdistill.train.trainer import Trainer
from fastensdistill.weights import save_network


class TeachTrainer(Trainer):
    """Trains M networks at once, each from its own seed, on its own order of images (docs/method.md, Loss).

    Member i is bit for bit the network that training it alone with its seed gives (dropout aside, which draws from
    PyTorch's global generator). The weights that are kept end as ``teacher-{i}.safetensors``, the last ones as
    ``last-{i}.safetensors``; those of their averages over time, where ``config.ema_decay`` asks for them, as
    ``ema-{i}.safetensors`` and ``last-ema-{i}.safetensors``.

    Args:
        networks: the modules, which are trained themselves: images (B, channels, H, W) in [0, 1] → logits (B, classes).
        data: a :class:`Dataset`, or the name or path of one, as ``load_dataset`` takes it.
        config: the recipe; its defaults are the paper's, for as many members as there are networks.
        out: the run's folder, for its settings, checkpoint, metrics and networks; None writes nothing.
        resume: continue the run in ``out`` from its checkpoint, bit for bit.
        augment: what is changed at random of the training images; None is what the config says and suits the data.
        tensorboard: also write TensorBoard events to ``out`` (needs the extra).
        quiet: print nothing on stderr.

    Raises InputError for networks that do not fit the data, and settings that do not fit each other.
    """

    title = "teach"

    def __init__(self, networks: Sequence[nn.Module], data: Dataset | str | Path, config: TeachConfig | None = None, *,
                 out: Path | str | None = None, resume: bool = False, augment: Augment | None = None,
                 tensorboard: bool = False, quiet: bool = False):  # fmt: skip
        networks = listed_networks(networks)
        config = checked_config(config or TeachConfig(members=len(networks)), TeachConfig)
        super().__init__(config, data, out, resume, augment, tensorboard, quiet, networks)
        config = checked_config(self.config, TeachConfig)
        shape = (self.data.channels, *self.data.image_size)
        with parallel.together():
            if len(networks) != config.members:
                raise InputError(f"{len(networks)} networks for members={config.members}: expected as many")
            placed, notes = ready_networks(networks, self.device, shape, self.data.num_classes)
        self.networks = {f"teacher-{i}": network for i, network in enumerate(placed)}
        self.warn(notes)
        self.seeds = [config.seed + i for i in range(config.members)]
        with parallel.together():
            self.teach, self.engine = teaching_step(list(self.networks.values()), config, shape)
            check_statistics(config, self.engine)
        self.step = self.teach
        self.averages = {f"ema-{i}": network for i, network in enumerate(self.teach.averages)}
        self.evaluator = Evaluator(self.engine.name, shape, precision=config.precision)

    def train_step(self) -> dict[str, Tensor]:
        return self.teach.train_on(self.loaders)

    def validate(self) -> tuple[dict[str, Score], dict[str, Any]]:
        found = self.evaluator.networks(list(self.every.values()), self.validation)
        scores: dict[str, Score] = {}
        record: dict[str, Any] = {}
        count = len(self.networks)
        for prefix, names, members in (("", self.networks, found[:count]), ("ema_", self.averages, found[count:])):
            own = {name: Score.of(p, self.validation.labels) for name, p in zip(names, members, strict=True)}
            about: dict[str, Any] = {
                "accuracy": [s.accuracy for s in own.values()], "nll": [s.nll for s in own.values()],
            }  # fmt: skip
            if len(members) > 1 and all(s.finite for s in own.values()):
                about |= {"teacher_kl": metrics.pairwise_kl(members), "teacher_agreement": metrics.agreement(members)}
            scores |= own
            record |= {f"{prefix}{key}": value for key, value in about.items()} if own else {}
        return scores, record

    def save_last(self, out: Path) -> None:
        for name in (*self.averages, *self.networks):  # the teachers' last: they say that all was written
            file = out / f"last-{name.removeprefix('teacher-')}.safetensors"
            save_network(file, self.every[name], self.card(self.keeper.last[name]))

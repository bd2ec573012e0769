"""Every setting, once: these dataclasses are what Python takes, what YAML holds and what the command line offers.

The defaults are the paper's recipe (method §5). A run folder's ``config.yaml`` is one of the ``...Run`` classes, flat.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fastensdistill.data.sources import Dataset, load_dataset
from fastensdistill.errors import InputError, unknown
from fastensdistill.method.perturbation import PERTURBATIONS
from fastensdistill.method.student import STUDENTS

ENGINES = ("auto", "reference", "fused")
PRECISIONS = ("auto", "fp32", "tf32", "bf16")


@dataclass
class TrainConfig:
    """How a network is trained."""

    epochs: int = 200
    """Passes over the training images."""
    batch_size: int = 128
    """Images in a batch, of all processes together; the last incomplete batch of an epoch is dropped."""
    learning_rate: float = 0.1
    """Peak learning rate of SGD with Nesterov momentum."""
    warmup_epochs: float | None = None
    """Epochs over which the rate rises linearly from 0, before it falls to 0 along a cosine. Unset: 5, or a tenth of a
    shorter run."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """λ of the decay in the loss, over all parameters; rank-one factors are pulled towards one."""
    seed: int = 0
    """Seed of the initialisation, the order of the images, their augmentation and every random choice."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one."""
    precision: str = "auto"
    """fp32, tf32 (float32 multiplied on tensor cores; the fused engine's, as PyTorch sets its own), or bf16: bfloat16
    activations and products with float32 weights and statistics. auto is bf16 on GPUs that multiply it, else fp32."""
    micro_batches: int = 1
    """Parts that a batch is taken in, one after another, for less memory. The update is by the mean gradient; BatchNorm
    normalises each part by its own statistics (the perturbation and the teachers do not depend on the parts)."""
    engine: str = "auto"
    """reference (plain PyTorch on any device), fused (one CUDA graph of grouped kernels), or auto: fused where there is
    a CUDA device and every layer has a kernel."""
    sync_batch_norm: bool = False
    """Of several processes (torchrun): BatchNorm's statistics over the whole batch, not over each process's images. The
    fused engine's."""

    def __post_init__(self) -> None:
        _at_least("epochs", self.epochs, 1)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("micro_batches", self.micro_batches, 1)
        if self.batch_size % self.micro_batches:
            size, parts = self.batch_size, self.micro_batches
            raise InputError(f"batch_size={size} in micro_batches={parts}: expected equal parts")
        if self.warmup_epochs is None:
            self.warmup_epochs = min(5.0, self.epochs / 10)
        _at_least("warmup_epochs", self.warmup_epochs, 0)
        _at_least("weight_decay", self.weight_decay, 0)
        _at_least("seed", self.seed, 0)
        for name in ("warmup_epochs", "weight_decay", "learning_rate"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name}={getattr(self, name)}: expected a finite number")
        if self.seed >= 2**62:
            raise InputError(f"seed={self.seed}: expected less than 2^62")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate={self.learning_rate}: expected more than 0")
        if not 0 < self.momentum < 1:
            raise InputError(f"momentum={self.momentum}: expected a value between 0 and 1 (Nesterov)")
        _one_of("engine", self.engine, ENGINES)
        _one_of("precision", self.precision, PRECISIONS)


@dataclass
class TeachConfig(TrainConfig):
    """How the teachers are trained: the plain network, cross-entropy, one seed each."""

    members: int = 4
    """M, the number of teachers; member i has the seed ``seed + i``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("members", self.members, 1)


@dataclass
class DistillConfig(TrainConfig):
    """How the student is trained."""

    student: str = "latent-be"
    """single (plain distillation), batch-ensemble, latent-be or hydra."""
    branches: int | None = None
    """K, the student's branches; branch k learns from teacher k mod M. Unset: as many as there are teachers."""
    perturbation: str = "tdiv-sdiv"
    """none, gaussian, ods, confods, tdiv or tdiv-sdiv."""
    step_size: float = 1 / 255
    """ε: root-mean-square size of the perturbation, of pixels in [0, 1]."""
    temperature: float = 4.0
    """τ of the distillation loss, on both sides."""
    alpha: float = 1.0
    """Share of the distillation loss; 1 − alpha goes to the labels' cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("student", self.student, STUDENTS)
        _one_of("perturbation", self.perturbation, PERTURBATIONS)
        if self.branches is not None:
            _at_least("branches", self.branches, 1)
            if self.student == "single" and self.branches > 1:
                raise InputError(f"branches={self.branches} for a single student: expected 1, or none given")
        if not 0 <= self.step_size <= 1:
            raise InputError(f"step_size={self.step_size}: expected a value from 0 to 1, the range of pixels")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature}: expected a finite number above 0")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha={self.alpha}: expected a value from 0 to 1")


@dataclass
class DataConfig:
    """Which images."""

    data: str | None = None
    """digits, cifar10, cifar100, an .npz file, or a folder of class folders. Unset: the data of the runs and files that
    are given, as they say it; digits for teach."""
    root: str | None = None
    """Folder that holds cifar-10-batches-py or cifar-100-python."""
    limit: int | None = None
    """Use only the first so many training images."""
    validation: int | None = None
    """Training images set aside (the last ones). Unset: 5,000 for CIFAR, 300 for digits, a tenth otherwise."""
    image_size: int | None = None
    """Height and width that the images of a folder are resized to."""

    def load(self) -> Dataset:
        name = self.data or "digits"
        return load_dataset(
            name, root=self.root, limit=self.limit, validation=self.validation, image_size=self.image_size
        )


@dataclass
class ModelConfig:
    """Which network. The shape settings are for preresnet and resnet."""

    model: str | None = None
    """wrn28_1, wrn28_4, wrn28_10, resnet32, ..., preresnet, resnet, a torchvision name, or timm/NAME."""
    blocks: tuple[int, ...] | None = None
    """Blocks in each group."""
    widen: int | None = None
    """Widening factor k."""
    in_planes: int | None = None
    """Channels of the first convolution."""

    def __post_init__(self) -> None:
        for name, values in (("blocks", self.blocks), ("widen", self.widen), ("in_planes", self.in_planes)):
            if values is not None and (values == () or min(values if isinstance(values, tuple) else (values,)) < 1):
                raise InputError(f"{name}={values}: expected whole numbers of at least 1")
        parent = getattr(super(), "__post_init__", None)  # of the run that this is mixed into
        if parent is not None:
            parent()

    def arguments(self) -> dict[str, Any]:
        given = {"blocks": self.blocks, "widen": self.widen, "in_planes": self.in_planes}
        return {k: v for k, v in given.items() if v is not None}


@dataclass
class RunConfig:
    """Where the run lives."""

    out: Path = Path("runs/run")
    """Folder of the run: config, checkpoint, metrics, networks, report."""
    resume: bool = False
    """Continue the run in ``out`` from its last checkpoint."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra)."""


@dataclass
class TeachRun(RunConfig, DataConfig, ModelConfig, TeachConfig):
    """Train M teachers at once, one seed each."""


@dataclass
class DistillRun(RunConfig, DataConfig, ModelConfig, DistillConfig):
    """Distil teachers into one network."""

    teachers: tuple[Path, ...] = field(default_factory=tuple)
    """Files of the teachers, or folders that ``teach`` wrote."""
    teacher_model: tuple[str, ...] = ()
    """Architecture of teachers whose files do not say it: one for all, or one for each."""
    teacher_mean: tuple[float, ...] = ()
    """Their normalisation: a mean for each channel of pixels in [0, 1], for all teachers, or for one after another.
    Unset: the data's."""
    teacher_std: tuple[float, ...] = ()
    """Standard deviations, as the means."""
    unfinished: bool = False
    """Also learn from teachers whose run did not end, as they are."""


def to_yaml(config: Any) -> str:
    """A config dataclass as flat YAML."""
    return yaml.safe_dump({k: _plain(v) for k, v in asdict(config).items()}, sort_keys=False)


def read_yaml(path: str | Path, cls: type) -> dict[str, Any]:
    """The settings in a YAML file, checked against the fields of ``cls``."""
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected a mapping of settings, got {type(loaded).__name__}")
    known = [f.name for f in fields(cls)]
    for key in loaded:
        if key not in known:
            raise unknown(f"setting of {path}", str(key), known)
    return loaded


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _one_of(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise unknown(name, value, known)


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise InputError(f"{name}={value}: expected at least {least}")

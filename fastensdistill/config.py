"""All settings: the dataclasses that Python takes, YAML files hold and the command line offers.

The defaults are the paper's recipe (docs/method.md, Recipe). A run folder's ``config.yaml`` holds the fields of one of
the ``...Run`` classes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastensdistill.errors import InputError
from fastensdistill.files import expanded
from fastensdistill.kernels.distillation_loss import TARGETS
from fastensdistill.method.perturbation import PERTURBATIONS
from fastensdistill.method.student import STUDENTS
from fastensdistill.models import SHAPED, check_name
from fastensdistill.settings import Settings, setting, settings_of

ENGINES = ("auto", "reference", "captured", "fused")
OPTIMIZERS = ("sgd", "adamw")
AUGMENTS = ("none", "standard", "strong")
OF_PRESETS = ("pad", "flip", "trivial_augment", "cutout")  # the switches that they set
PRECISIONS = ("auto", "fp32", "tf32", "bf16")
SCHEDULES = ("cosine", "step", "constant")
MILESTONES = (0.3, 0.6, 0.8)  # of step: Zagoruyko and Komodakis, "Wide Residual Networks", 2016, 60, 120, 160 of 200
FLOAT16 = ("fp16", "float16", "half", "f16", "16", "fp16-mixed", "16-mixed", "amp")  # what others call it


def check_device_name(name: str) -> None:
    """Raise InputError for what is no name of a device that a run can be on."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise InputError(f"device {name!r}: expected auto, cpu, or cuda, which may have a number (cuda:1)")


def check_precision(name: str) -> None:
    """Raise InputError, with the reason, for a name of float16."""
    if name.lower() in FLOAT16:
        raise InputError(f"precision {name!r}: float16 gradients of the loss underflow unless they are scaled, which "
                         "bf16 (on GPUs of compute capability 8.0 and up) does without; expected auto, fp32, tf32 or "
                         "bf16")  # fmt: skip


def _numbers(values: tuple[float, ...] | tuple[int, ...]) -> str:
    return " ".join(format(value, "" if isinstance(value, int) else "g") for value in values)


@dataclass
class AugmentConfig(Settings):
    """How training images are changed at random."""

    augment: str = setting("standard", choices=AUGMENTS)
    """none, standard (images are moved, and mirrored where that is known to keep the class), or strong (TrivialAugment
    and a cutout of half the image's side, too). The settings below override it."""
    flip: bool | None = None
    """Mirror training images at random. Unset: only where that is known to keep the class (CIFAR, ImageNet's classes),
    never for digits, .npz files and folders of your own."""
    pad: int | None = setting(None, least=0)
    """Pixels by which training images are moved at random, zeros behind them. Unset: an eighth of their size."""
    resized_crop: tuple[float, ...] | None = setting(None, above=0, most=1)
    """Least and largest share of a training image's area, such as 0.25 1: a random box of that size is enlarged to the
    image's, instead of moving the image."""
    trivial_augment: bool | None = None
    """Apply one random operation to a training image: TrivialAugment, the wide ranges. It shears and rotates, too."""
    cutout: int | None = setting(None, least=0)
    """Side, in pixels, of a black square at a random place of a training image; 0 for none."""
    erasing: float | None = setting(None, least=0, most=1)
    """Probability of a black box of 2 to 33% of a training image; 0 for none."""
    mixup: float = setting(0.0, least=0, most=1000)
    """α of the Beta(α, α) by which a training image, and its label, are blended with another's; 0 for none."""
    cutmix: float = setting(0.0, least=0, most=1000)
    """α of the Beta(α, α) that says what share of a training image, and of its label, is another's; 0 for none. If
    mixup is set too, each image gets one of the two at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        crop = self.resized_crop
        if crop is not None and (len(crop) != 2 or crop[0] > crop[1]):
            raise InputError(f"resized_crop={_numbers(crop)}: expected two shares, the smaller one first")
        if crop is not None and self.pad:
            raise InputError(f"pad={self.pad} with resized_crop={_numbers(crop)}, which takes the place of moving "
                             "images: expected one of them")  # fmt: skip


@dataclass
class TrainConfig(AugmentConfig):
    """How a network is trained."""

    epochs: int = setting(200, least=1, most=10**6)
    """Passes over the training images."""
    batch_size: int = setting(128, least=1)
    """Images in a batch, of all processes together; the last incomplete batch of an epoch is dropped."""
    learning_rate: float = setting(0.1, above=0, most=1e38)
    """Peak learning rate; of AdamW a hundredth of SGD's is usual."""
    warmup_epochs: float | None = setting(None, least=0)
    """Epochs over which the rate rises linearly from 0, before the schedule begins. Unset: 5, or a tenth of a shorter
    run."""
    schedule: str = setting("cosine", choices=SCHEDULES)
    """The rate after the warm-up: along a cosine to 0, in steps, or constant."""
    milestones: tuple[float, ...] = setting((), above=0, below=1)
    """Of schedule step: the shares of the run after which the rate is multiplied by gamma. Unset: 0.3 0.6 0.8."""
    gamma: float = setting(0.2, above=0, below=1)
    """Of schedule step: the factor at each milestone."""
    optimizer: str = setting("sgd", choices=OPTIMIZERS)
    """sgd (with Nesterov momentum) or adamw (Adam with decoupled decay)."""
    momentum: float = setting(0.9, above=0, below=1)
    """Nesterov momentum of SGD."""
    beta1: float = setting(0.9, least=0, below=1)
    """AdamW's decay of the mean gradient."""
    beta2: float = setting(0.999, least=0, below=1)
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = setting(5e-4, least=0, most=100)
    """λ of the decay in the loss (AdamW: beside it) of all parameters; rank-one factors are pulled towards one."""
    label_smoothing: float = setting(0.0, least=0, below=1)
    """ε of the cross-entropy: the share of a label that is spread evenly over all classes."""
    decay_norm_and_bias: bool = True
    """Whether scales and shifts of normalisation layers, and biases, decay too: false spares all parameters of one
    dimension, and those called bias."""
    clip_norm: float | None = setting(None, above=0, most=1e38)
    """Norm to which a network's gradients are scaled down where theirs, over all of its parameters, is larger. Unset:
    they are left as they are."""
    ema_decay: float | None = setting(None, above=0, below=1)
    """Decay of an average of the weights over time (EMA), which is kept as a further network: the share of itself that
    the average keeps at each update, less in the first ones. Unset: there is no average."""
    seed: int = setting(0, least=0, most=2**62)
    """Seed of the initialisation, the order of the images, their augmentation and every random choice."""
    device: str = setting("auto", check=check_device_name)
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one."""
    precision: str = setting("auto", choices=PRECISIONS, check=check_precision)
    """fp32, tf32 (float32 multiplied on tensor cores; the fused engine's, as PyTorch sets its own), or bf16: bfloat16
    activations and products with float32 weights and statistics. auto is bf16 on GPUs that multiply it, else fp32."""
    micro_batches: int = setting(1, least=1)
    """Parts that a batch is taken in, one after another, for less memory. The update is by the mean gradient; BatchNorm
    normalises each part by its own statistics (the perturbation and the teachers do not depend on the parts)."""
    engine: str = setting("auto", choices=ENGINES)
    """reference (plain PyTorch on any device), captured (the same step as CUDA graphs), fused (one CUDA graph of
    grouped kernels), or auto: on a CUDA device fused where every operation of the student can be planned, else
    captured, and reference for networks that wait for the device."""
    sync_batch_norm: bool = False
    """Of several processes (torchrun): BatchNorm's statistics over the whole batch, not over each process's images. The
    fused engine's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.micro_batches:
            size, parts = self.batch_size, self.micro_batches
            raise InputError(f"batch_size={size} in micro_batches={parts}: expected equal parts")
        if self.warmup_epochs is None:
            self.warmup_epochs = min(5.0, self.epochs / 10)
        if self.warmup_epochs >= self.epochs:
            raise InputError(f"warmup_epochs={self.warmup_epochs:g} of epochs={self.epochs}: expected fewer")
        self._check_schedule(self.warmup_epochs / self.epochs)
        for name, used in (("momentum", "sgd"), ("beta1", "adamw"), ("beta2", "adamw")):
            if self.optimizer != used:
                self._check_unset(name, f"optimizer={self.optimizer!r}", f"optimizer {used!r}")

    def _check_unset(self, name: str, other: str, expected: str) -> None:
        """Raise InputError where the setting ``name``, of which ``other`` makes no use, is not its default."""
        cls: Any = type(self)
        value = getattr(self, name)
        if value != settings_of(cls)[name].default:
            shown = f"{value:g}" if isinstance(value, float) else _numbers(value) if isinstance(value, tuple) else value
            raise InputError(f"{name}={shown} with {other}: expected {expected}, or {name} unset")

    def _check_schedule(self, warmup: float) -> None:
        """Raise InputError for settings of another schedule, and milestones that are none after the ``warmup``."""
        if self.schedule != "step":
            for name in ("milestones", "gamma"):
                self._check_unset(name, f"schedule={self.schedule!r}", "schedule 'step'")
            return
        self.milestones = given = self.milestones or MILESTONES
        if any(a >= b for a, b in pairwise(given)):
            raise InputError(f"milestones={_numbers(given)}: expected each later than the one before")
        if given[0] <= warmup:
            raise InputError(
                f"milestones={_numbers(given)}: expected the first after the warm-up, which takes {warmup:.3g} of the "
                "run"
            )


@dataclass
class TeachConfig(TrainConfig):
    """How the teachers are trained: the plain network, cross-entropy, one seed each."""

    members: int = setting(4, least=1, most=1000)
    """M, the number of teachers; member i has the seed ``seed + i``."""


@dataclass
class DistillConfig(TrainConfig):
    """How the student is trained."""

    student: str = setting("latent-be", choices=STUDENTS)
    """single (plain distillation), batch-ensemble, latent-be or hydra."""
    branches: int | None = setting(None, least=1, most=1000)
    """K, the student's branches; branch k learns from teacher k mod M. Unset: as many as there are teachers."""
    perturbation: str = setting("tdiv-sdiv", choices=tuple(PERTURBATIONS))
    """How images are nudged before the networks see them (docs/method.md, Perturbation)."""
    step_size: float = setting(1 / 255, least=0, most=1)
    """ε: root-mean-square size of the perturbation, of pixels in [0, 1]."""
    temperature: float = setting(4.0, above=0, most=1e6)
    """τ of the distillation loss, on both sides."""
    alpha: float = setting(1.0, least=0, most=1)
    """Share of the distillation loss; 1 − alpha goes to the labels' cross-entropy."""
    target: str | None = setting(None, choices=TARGETS)
    """one-to-one (branch k learns from teacher k mod M) or mean (every branch from the mean of all teachers). Unset:
    mean for a single student, else one-to-one."""
    teacher_weights: tuple[float, ...] = setting((), least=0, most=1e6)
    """A weight for each teacher: its share of the mean, or how much its branches count. Unset: all count alike."""
    standardize_logits: bool = False
    """Whether the distillation loss takes logits of mean 0 and standard deviation 1, of teachers and student alike: it
    then compares their order and proportions, not their size. Its authors take temperature 2 or 3."""
    factor_rate: float = setting(1.0, least=0, most=1e6)
    """Learning rate of the rank-one factors, as a multiple of learning_rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student == "single" and self.branches is not None and self.branches > 1:
            raise InputError(f"branches={self.branches} for a single student: expected 1, or none given")
        if self.teacher_weights and not any(self.teacher_weights):
            raise InputError(f"teacher_weights={_numbers(self.teacher_weights)}: expected one above 0")
        if self.label_smoothing and self.alpha == 1:
            raise InputError(f"label_smoothing={self.label_smoothing:g} with alpha=1, where labels have no weight: "
                             "expected alpha below 1")  # fmt: skip
        for name in ("target", "teacher_weights", "standardize_logits"):
            if self.alpha == 0:
                self._check_unset(name, "alpha=0, where teachers have no weight", "alpha above 0")
        if self.student in ("single", "hydra"):
            self._check_unset("factor_rate", f"a {self.student} student, which has no factors", "another student")


@dataclass
class DataConfig(Settings):
    """Which images."""

    data: str | None = None
    """digits, cifar10, cifar100, an .npz file, or a folder of class folders. Unset: the data of the runs and files that
    are given, as they say it; digits for teach."""
    root: Path | None = None
    """Folder that holds cifar-10-batches-py or cifar-100-python."""
    limit: int | None = setting(None, least=1)
    """Use only so many training images: of CIFAR and digits the first, else drawn class by class."""
    validation: int | None = setting(None, least=1)
    """Training images set aside: of CIFAR and digits the last, else drawn class by class, the same in every run. Unset:
    5,000 for CIFAR, 300 for digits, a tenth otherwise."""
    image_size: int | None = setting(None, least=4, most=4096)
    """Height and width that the images of a folder are resized to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is not None and self.data.startswith("~"):
            self.data = str(expanded(self.data))


@dataclass
class ModelConfig(Settings):
    """Which network. The shape settings are for preresnet and resnet."""

    model: str | None = setting(None, check=check_name)
    """wrn28_1, wrn28_4, wrn28_10, resnet32, ..., preresnet, resnet, a torchvision name, or timm/NAME."""
    blocks: tuple[int, ...] | None = setting(None, least=1, most=1000)
    """Blocks in each group."""
    widen: int | None = setting(None, least=1, most=100)
    """Widening factor k."""
    in_planes: int | None = setting(None, least=1, most=4096)
    """Channels of the first convolution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model not in (None, *SHAPED):
            for name, value in self.arguments().items():
                raise InputError(f"{name}={value} for model {self.model!r}, whose shape is in its name: expected model "
                                 f"{' or '.join(SHAPED)}, or {name} unset")  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """The settings of the shape that are set, as ``create_model`` takes them."""
        given = {"blocks": self.blocks, "widen": self.widen, "in_planes": self.in_planes}
        return {k: v for k, v in given.items() if v is not None}


@dataclass
class RunConfig(Settings):
    """Where the run lives."""

    out: Path = Path("runs/run")
    """Folder of the run: config, checkpoint, metrics, networks, report."""
    seeds: tuple[int, ...] = setting((), least=0, most=2**62)
    """Several seeds instead of one: a run of each in out/seed-0, out/seed-1, ..., and one report of all in out."""
    resume: bool = False
    """Continue the run in ``out`` from its last checkpoint."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra)."""
    report: bool = True
    """At the end, measure the networks on the test images: a table, results.json and report.html. ``evaluate`` does it
    later."""

    def __post_init__(self) -> None:
        super().__post_init__()
        seed = getattr(self, "seed", 0)
        if self.seeds and seed:
            raise InputError(f"seed={seed} and seeds={_numbers(self.seeds)}: expected one of the two")
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds={_numbers(self.seeds)}: expected each once")


@dataclass
class TeachRun(RunConfig, DataConfig, ModelConfig, TeachConfig):
    """Train M teachers at once, one seed each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        M, ordered = self.members, sorted(self.seeds)
        if any(b - a < M for a, b in pairwise(ordered)):
            spaced = _numbers(tuple(ordered[0] + i * M for i in range(len(ordered))))
            raise InputError(
                f"seeds={_numbers(self.seeds)} for {M} members, of which member i has the seed s + i: runs would share "
                f"networks; expected seeds at least {M} apart, such as {spaced}"
            )


@dataclass
class DistillRun(RunConfig, DataConfig, ModelConfig, DistillConfig):
    """Distil teachers into one network."""

    teachers: tuple[Path, ...] = ()
    """Files of the teachers, or folders that ``teach`` wrote."""
    teacher_model: tuple[str, ...] = setting((), check=check_name)
    """Architecture of teachers whose files do not say it: one for all, or one for each."""
    teacher_mean: tuple[float, ...] = ()
    """Their normalisation: a mean for each channel of pixels in [0, 1], for all teachers, or for one after another.
    Unset: that of published weights for torchvision's and timm's models, the data's for ours."""
    teacher_std: tuple[float, ...] = setting((), above=0)
    """Standard deviations, as the means."""
    teacher_ema: bool = False
    """Learn from the averages over time in the teachers' folders (ema-0.safetensors, ...), not from the teachers."""
    unfinished: bool = False
    """Also learn from teachers whose run did not end, as they are."""

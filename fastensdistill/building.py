"""What the settings of a run build: its data, and its networks."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastensdistill.config import DataConfig, DistillRun, ModelConfig
from fastensdistill.data.sources import DATASETS, Dataset, load_dataset
from fastensdistill.files import expanded
from fastensdistill.method.student import STUDENTS, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import ModelSpec, create_model, takes_colour
from fastensdistill.train.setup import check_tf32, choose_device, seeded


def load_data(settings: DataConfig) -> Dataset:
    """The data set that ``settings`` name; digits where they name none."""
    return load_dataset(
        settings.data or "digits", root=settings.root, limit=settings.limit, validation=settings.validation,
        image_size=settings.image_size,
    )  # fmt: skip


def prepare(run: Any) -> Dataset:
    """The data of a run, its paths made absolute so that the run can be resumed from anywhere."""
    check_tf32(run, choose_device(run.device))
    if run.data not in DATASETS and expanded(run.data).exists():
        run.data = str(expanded(run.data).resolve())
    if run.root is not None:
        run.root = str(expanded(run.root).resolve())
    return load_data(run)


def record_model(run: Any, network: Any) -> None:
    """Set the model that was built among the settings of a new run, for its config.yaml; a resumed one has it there."""
    spec = getattr(network, "spec", None)
    if spec is None or (run.resume and (run.out / "config.yaml").is_file()):
        return
    run.model = spec.name
    for name in ("blocks", "widen", "in_planes"):
        value = spec.arguments.get(name)
        setattr(run, name, tuple(value) if isinstance(value, list) else value)  # a card has lists


def build_model(run: ModelConfig, data: Any) -> Any:
    """The network the settings name; unset, a small one for small images and the paper's otherwise."""
    arguments = run.arguments()
    name = run.model or ("preresnet" if arguments or max(data.image_size) <= 16 else "wrn28_4")
    if run.model is None and not arguments and max(data.image_size) <= 16:
        arguments = {"blocks": (1, 1, 1)}
    colours = 3 if takes_colour(name) and data.channels == 1 else 1  # the trainer repeats the images as often
    return create_model(name, data.num_classes, mean=data.mean * colours, std=data.std * colours, **arguments)


def build_student(run: DistillRun, data: Dataset, teachers: Teachers) -> Student:
    """The student of the seed, kind and branches that the settings name: of its own network, else of its teachers'."""
    if run.branches is None:
        run.branches = 1 if run.student == "single" else len(teachers)
    spec = getattr(teachers.networks[0], "spec", ModelSpec("wrn28_4"))

    def create() -> nn.Module:
        if run.model or run.arguments():
            return build_model(run, data)
        shape = {k: v for k, v in spec.arguments.items() if k not in ("num_classes", "mean", "std")}
        return create_model(spec.name, data.num_classes, mean=data.mean, std=data.std, **shape)

    branches = run.branches
    return seeded(run.seed, lambda: STUDENTS[run.student](create(), branches))

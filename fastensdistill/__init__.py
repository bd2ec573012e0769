"""fastensdistill: distil an ensemble of image classifiers into one ordinary network.

    import fastensdistill as fed

    teachers = fed.load_teachers("wrn28_4", ["t0.safetensors", "t1.safetensors"])
    student = fed.LatentBE(fed.models.wrn28_4(num_classes=100), branches=2)
    fed.DistillTrainer(student, teachers, data="cifar100.npz", config=fed.DistillConfig()).fit()
    network = student.average()

Names are imported on first use, so importing the package is cheap and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastensdistill import evaluate as evaluate
    from fastensdistill import models as models
    from fastensdistill.config import DistillConfig as DistillConfig
    from fastensdistill.config import TeachConfig as TeachConfig
    from fastensdistill.data.augment import Augment as Augment
    from fastensdistill.data.sources import Dataset as Dataset
    from fastensdistill.data.sources import Split as Split
    from fastensdistill.data.sources import load_dataset as load_dataset
    from fastensdistill.engine.fused import FusedStep as FusedStep
    from fastensdistill.engine.reference import ReferenceStep as ReferenceStep
    from fastensdistill.engine.seeds import SeedsStep as SeedsStep
    from fastensdistill.errors import InputError as InputError
    from fastensdistill.evaluate.predict import predict as predict
    from fastensdistill.export import export_network as export_network
    from fastensdistill.kernels.distillation_loss import distillation_loss as distillation_loss
    from fastensdistill.kernels.diversity_seed import diversity_seed as diversity_seed
    from fastensdistill.method.student import BatchEnsemble as BatchEnsemble
    from fastensdistill.method.student import Hydra as Hydra
    from fastensdistill.method.student import LatentBE as LatentBE
    from fastensdistill.method.student import Single as Single
    from fastensdistill.method.student import reestimate_batch_norm as reestimate_batch_norm
    from fastensdistill.method.teachers import Teachers as Teachers
    from fastensdistill.models import create_model as create_model
    from fastensdistill.train.distill import DistillTrainer as DistillTrainer
    from fastensdistill.train.teach import TeachTrainer as TeachTrainer
    from fastensdistill.weights import load_network as load_network
    from fastensdistill.weights import load_teachers as load_teachers
    from fastensdistill.weights import save_network as save_network

_HOMES = {
    "config": ("DistillConfig", "TeachConfig"),
    "data.augment": ("Augment",),
    "data.sources": ("Dataset", "Split", "load_dataset"),
    "engine.fused": ("FusedStep",),
    "engine.reference": ("ReferenceStep",),
    "engine.seeds": ("SeedsStep",),
    "errors": ("InputError",),
    "evaluate.predict": ("predict",),
    "export": ("export_network",),
    "kernels.distillation_loss": ("distillation_loss",),
    "kernels.diversity_seed": ("diversity_seed",),
    "method.student": ("BatchEnsemble", "Hydra", "LatentBE", "Single", "reestimate_batch_norm"),
    "method.teachers": ("Teachers",),
    "models": ("create_model",),
    "train.distill": ("DistillTrainer",),
    "train.teach": ("TeachTrainer",),
    "weights": ("load_network", "load_teachers", "save_network"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

_MODULES = ("evaluate", "models")

__all__ = sorted([*_HOME_OF, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastensdistill.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fastensdistill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastensdistill.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__

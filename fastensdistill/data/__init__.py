"""Data: sources (digits, torchvision, .npz files, folders) and the device-resident loader with its augmentation."""

from fastensdistill.data.augment import Augment, augment
from fastensdistill.data.loader import DeviceLoader, EvaluationSet
from fastensdistill.data.presets import choose_augment
from fastensdistill.data.sources import DATASETS, Dataset, Split, load_dataset

__all__ = [
    "DATASETS",
    "Augment",
    "Dataset",
    "DeviceLoader",
    "EvaluationSet",
    "Split",
    "augment",
    "choose_augment",
    "load_dataset",
]

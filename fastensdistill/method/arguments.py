"""Check students, teachers and networks that callers pass in: unwrap them, or refuse them in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from fastensdistill.errors import InputError
from fastensdistill.method.base import Student
from fastensdistill.method.teachers import Teachers, check_distinct
from fastensdistill.models.wrappers import unwrap

Config = TypeVar("Config")


def checked_student(student: Any) -> Student:
    """``student``. Raises InputError for what is none, and for one that something is wrapped around."""
    if isinstance(student, Student):
        return student
    about = f"student is {kind_of(student)}"
    if isinstance(student, Teachers | list | tuple):
        raise InputError(f"{about}; expected student, teachers, in this order")
    inner = unwrap(student) if isinstance(student, nn.Module) else student
    if isinstance(inner, Student):
        raise InputError(f"{about} around a {type(inner).__name__}; expected the {type(inner).__name__} itself")
    raise InputError(f"{about}; wrap it: LatentBE(network, branches=4)")


def checked_teachers(teachers: Any) -> Teachers:
    """``teachers``, or Teachers made of a sequence of networks. Raises InputError for what are none."""
    if isinstance(teachers, Student):
        raise InputError(f"teachers are {kind_of(teachers)}; expected student, teachers, in this order")
    return teachers if isinstance(teachers, Teachers) else Teachers(teachers)


def listed_networks(networks: Any) -> list[nn.Module]:
    """The networks that are to become teachers. Raises InputError for what are none, and for one of them twice."""
    if isinstance(networks, nn.Module) and not isinstance(networks, nn.ModuleList | nn.ModuleDict):
        raise InputError(f"networks are {kind_of(networks)}; expected a sequence of networks, such as [network]")
    if isinstance(networks, str) or not isinstance(networks, Iterable):
        raise InputError(f"networks are {kind_of(networks)}; expected a sequence of nn.Module")
    given = list(networks.values() if isinstance(networks, Mapping | nn.ModuleDict) else networks)
    for i, network in enumerate(given):
        if not isinstance(network, nn.Module) or isinstance(network, Student | Teachers):
            raise InputError(f"network {i} is {kind_of(network)}; expected an nn.Module that returns logits")
    if not given:
        raise InputError("no networks given; expected at least one")
    check_distinct([unwrap(network) for network in given], "teachers", equal=False)
    return given


def checked_config(config: Any, kind: type[Config]) -> Config:
    """``config``. Raises InputError unless it is of this ``kind``."""
    if not isinstance(config, kind):
        raise InputError(f"config is {kind_of(config)}; expected a {kind.__name__}")
    return config


def kind_of(value: Any) -> str:
    """What an argument is, for an error: the name 'resnet18', the class Net, a list."""
    if isinstance(value, str | Path):
        return f"the name {str(value)!r}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"

"""Where a network came from: the run, whether it finished, and the data it was made for.

a file of ours: its card, and the config.yaml beside it        a run's folder: its config.yaml and its files' cards
a foreign file: nothing
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastensdistill.config import DataConfig
from fastensdistill.data.sources import DATASETS
from fastensdistill.errors import InputError
from fastensdistill.evaluate.report import read_metrics
from fastensdistill.files import expanded
from fastensdistill.train.checkpoint import finished
from fastensdistill.weights import read_card, teacher_files

KEPT = ("network.safetensors", "student.safetensors")  # of a distill run, the first of them that is there
Asked = TypeVar("Asked", bound=DataConfig)
OTHERS = r"(last|ema|last-ema)(-\d+)?\.safetensors"  # of any run
SETTINGS = ("root", "limit", "validation", "image_size")  # of the data, beside its name


@dataclass(frozen=True)
class Origin:
    """``path`` as it was given, ``files`` the networks it stands for, ``folder`` the run they come from, if any, and
    ``whole`` the folder of several seeds that the run is one of."""

    path: Path
    files: tuple[Path, ...]
    folder: Path | None
    whole: Path | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings of the run; {} where they are not known."""
        return read_config(self.folder) if self.folder else {}

    @cached_property
    def card(self) -> dict[str, Any]:
        """What the first file says of itself; {} for a foreign one."""
        return read_card(self.files[0])

    @property
    def is_teachers(self) -> bool:
        """Whether this is the folder of ``teach``."""
        return self.path.is_dir() and self.files[0].name not in KEPT

    @property
    def is_average(self) -> bool:
        """Whether this is the file of an average over time."""
        return re.fullmatch(r"(last-)?ema(-\d+)?\.safetensors", self.path.name) is not None

    @property
    def averages(self) -> list[Path]:
        """The averages over time that the run in a folder kept of its networks; [] where it kept none."""
        names = [f"ema-{i}" for i in range(len(self.files))] if self.is_teachers else ["ema"]
        files = [self.path / f"{name}.safetensors" for name in names]
        return files if self.path.is_dir() and all(file.is_file() for file in files) else []

    def averaged(self) -> Origin:
        """The averages over time of the run in a folder. Raises InputError where there are none."""
        if not self.averages:
            raise InputError(f"{self.path} holds no average over time: expected the folder of a run with --ema-decay")
        return replace(self, files=tuple(self.averages))

    def data(self) -> dict[str, Any] | None:
        """Name or path of the data and its settings, or None where nothing is said."""
        said = next((s for s in (self.config, self.card.get("source") or {}) if s.get("data")), None)
        if said is None:
            name = self.card.get("data")
            return {"data": name, **dict.fromkeys(SETTINGS)} if name in DATASETS else None
        return {key: said.get(key) for key in ("data", *SETTINGS)}

    def unfinished(self) -> str | None:
        """How far the run came that did not end; None for one that did, and where nothing is known."""
        epochs = self.config.get("epochs")
        if self.folder is None or not isinstance(epochs, int):
            return None
        step, steps = 0, 0
        with contextlib.suppress(InputError):  # a damaged checkpoint says nothing of the networks beside it
            _, step, steps = finished(self.folder)
        if step < steps:
            return f"epoch {epochs * step / steps:.4g} of {epochs}"
        if not steps and (self.folder / "metrics.jsonl").is_file():  # a run of an older version, or without checkpoint
            reached = max((r.get("epoch", 0) for r in read_metrics(self.folder / "metrics.jsonl")), default=0)
            if reached < epochs:
                return f"epoch {reached:.4g} of {epochs}"
        distilled = "student" in self.config and (self.folder / KEPT[1]).is_file()
        if distilled and self.config["student"] in ("single", "latent-be") and not (self.folder / KEPT[0]).is_file():
            return "its network was not written"
        return None


def origin(path: Path) -> Origin:
    """What ``path``, a file or a run's folder, stands for. Raises InputError for a path that holds no network."""
    path = expanded(path)
    if not path.exists():
        raise InputError(f"no such file: {path}" if path.suffix else f"there is no {path}: expected a file or a folder")
    if path.is_file():
        ours = path.name in KEPT or path in teacher_files(path.parent) or re.match(OTHERS, path.name)
        beside = ours and (path.parent / "config.yaml").is_file()
        return Origin(path, (path,), path.parent if beside else None)
    files = network_files(path)
    if not files:
        raise InputError(f"{path}: expected a safetensors file, or the folder of a finished run")
    return Origin(path, tuple(files), path)


def network_files(folder: Path) -> list[Path]:
    """The networks that the run in ``folder`` is for; [] for another folder."""
    return teacher_files(folder) or [folder / name for name in KEPT if (folder / name).is_file()][:1]


def seed_folders(path: Path) -> list[Path]:
    """Of a folder of several seeds, that of each one's run, which need not be there yet; [] for another path."""
    seeds = read_config(path).get("seeds") or () if path.is_dir() else ()
    return [seed_folder(path, seed) for seed in seeds]


def seed_folder(out: Path, seed: int) -> Path:
    """Where the run of ``seed`` is among several in ``out``."""
    return out / f"seed-{seed}"


def expand(path: Path, unfinished: bool) -> list[Origin]:
    """What ``path`` stands for: of several seeds one origin each, of those that have networks if ``unfinished``."""
    path = expanded(path)
    folders = seed_folders(path)
    if not folders:
        return [origin(path)]
    begun = [folder for folder in folders if network_files(folder)]
    if len(begun) < len(folders) and not (unfinished and begun):
        missing = " ".join(folder.name.removeprefix("seed-") for folder in folders if folder not in begun)
        hint = ", or take the others with --unfinished" if begun else ""
        raise InputError(
            f"the runs in {path} are not finished (no networks of the seeds {missing}): --resume them{hint}"
        )
    return [seed_origin(folder) for folder in begun]


def seed_origin(folder: Path) -> Origin:
    """What the run in ``folder``, one of several seeds, stands for."""
    return replace(origin(folder), whole=folder.parent)


def origins(paths: Sequence[Path], unfinished: bool = False) -> list[Origin]:
    """The origins of all ``paths``. Raises InputError for one given twice, and for runs that did not end, unless
    ``unfinished`` asks for them."""
    found: dict[Path, Origin] = {}
    for one in (one for path in paths for one in expand(path, unfinished)):
        path = one.path
        place = one.path.resolve()
        if place in found:
            raise InputError(f"{path} is given twice{_as(found[place].path, path)}: expected each once")
        if not unfinished and (stopped := one.unfinished()):
            raise InputError(
                f"the run in {one.folder} is not finished ({stopped}): --resume it, or take it as it is with "
                "--unfinished"
            )
        found[place] = one
    return list(found.values())


def choose_data(asked: Asked, given: Sequence[Origin]) -> tuple[Asked, str]:
    """The data that ``asked`` names, else that of the runs and files ``given``; and a line that says so, or "".

    Settings that were not asked for (root, validation, ...) are the runs' where the data is theirs. Raises InputError
    where nothing says which data, where two say otherwise, and where it is not there any more.
    """
    known = [(one, said) for one in given if (said := one.data()) is not None]
    if asked.data is None and not known:
        names = ", ".join(str(one.path) for one in given[:3]) or "nothing"
        named = next((f" (a set called {one.card['data']!r})" for one in given if one.card.get("data")), "")
        raise InputError(f"{names} does not say where the data is{named}: pass --data")
    if asked.data is not None:
        known = [(one, said) for one, said in known if _place(said["data"]) == _place(asked.data)]
    for one, said in known[1:]:
        first, expected = known[0]
        for key in ("data", "root", "validation", "image_size"):
            if getattr(asked, key) is None and _place(said[key]) != _place(expected[key]):
                mine, theirs = _short(said[key]), _short(expected[key])
                raise InputError(
                    f"{one.path} was made with {key} {mine} and {first.path} with {theirs}: expected the same, or "
                    f"--{key.replace('_', '-')} to say which"
                )
    if not known:
        return asked, ""
    first, said = known[0]
    settings = {key: value for key, value in said.items() if getattr(asked, key) is None}
    if any(other["limit"] != said["limit"] for _, other in known):
        settings.pop("limit", None)
    chosen = replace(asked, **settings)
    for key in ("data", "root"):
        value = settings.get(key)
        if value and (key == "root" or value not in DATASETS) and not expanded(value).exists():
            raise InputError(f"{value}, the {key} of {first.path}, is not there any more: pass --{key}")
    taken = {k: v for k, v in settings.items() if v is not None}
    details = [f"{k.replace('_', ' ')} {v}" for k, v in taken.items() if k not in ("data", "root")]
    if not taken:
        return chosen, ""
    return chosen, f"data: {', '.join([str(chosen.data), *details])} (from {first.path})"


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of the run in ``folder``, {} where it has none."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a mapping of settings, got {type(config).__name__}")
    return config


def _place(value: Any) -> Any:
    """Of a path to a file or folder that is there, where it is; anything else as it stands."""
    if not isinstance(value, str) or value in DATASETS or not expanded(value).exists():
        return value
    return str(expanded(value).resolve())


def _as(first: Path, second: Path) -> str:
    return "" if first == second else f", also as {first}"


def _short(value: Any) -> str:
    return "unset" if value is None else repr(value)

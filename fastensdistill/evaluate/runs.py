"""Load the networks for the rows of a table from run folders and files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fastensdistill.data.channels import for_networks
from fastensdistill.data.sources import Dataset
from fastensdistill.errors import InputError
from fastensdistill.evaluate.classes import check_card, reordered
from fastensdistill.evaluate.names import Label, distinct
from fastensdistill.evaluate.origin import Origin, origins, read_config
from fastensdistill.method.student import Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import takes_colour
from fastensdistill.weights import load, load_network, members, read_card

# What runs of one row may differ in: their seed, and where and how they ran
APART = ("seed", "out", "resume", "tensorboard", "device", "engine", "unfinished")


@dataclass
class Candidate:
    """One row: a network, or an ensemble (Teachers, or a student that is one), once for each seed."""

    name: str
    group: str  # teachers, ensemble or student
    networks: list[nn.Module]
    folders: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)  # what the networks were read from
    label: Label | None = None  # what to call it where another row has its name
    over_time: bool = False  # the averages over time of the networks that the runs are for


def find_candidates(
    paths: Sequence[Path], data: Dataset, foreign: Foreign | None = None, *, unfinished: bool = False,
    notes: list[str] | None = None,
) -> list[Candidate]:  # fmt: skip
    """The rows of the files and run folders ``paths``, as :func:`candidates_of`; unfinished runs are refused unless
    ``unfinished``."""
    return candidates_of(origins(paths, unfinished), data, foreign, notes)


def candidates_of(
    given: Sequence[Origin], data: Dataset, foreign: Foreign | None = None, notes: list[str] | None = None
) -> list[Candidate]:
    """The rows that files and run folders make; runs that differ only in their seed share one, and no two one name.

    ``foreign`` says what the files hold that do not say it. A folder of ``teach`` gives its members and their ensemble;
    one of ``distill`` its averaged network, or the branch ensemble where that is what the student is for; one of
    several seeds the same, once for each of them. What the user should know besides is added to ``notes``.
    Raises InputError for networks made for other images or classes than the data's, and copies of one network where
    seeds are counted.
    """
    notes = [] if notes is None else notes
    foreign = foreign or Foreign()
    candidates: list[Candidate] = []
    known: dict[tuple[Any, ...], list[Candidate]] = {}  # the rows of a run and of those that share them
    files = [one.path for one in given if one.path.is_file()]
    for one in given:
        stopped = one.unfinished()
        mark = f" (unfinished, {stopped})" if stopped else ""
        if one.path in files:
            network = foreign.load(one.path, files.index(one.path), len(files), data)
            label = Label(one.path.stem + mark, one.path.resolve(), "{}" + mark)
            [network] = fit([network], [one.path], data, notes)
            candidates.append(Candidate(label.short, "student", [network], [], [one.path], label))
            continue
        rows = rows_of_run(one, data, mark, notes)
        key: tuple[Any, ...] = (one.whole or one.path, stopped)
        if not one.whole and not one.is_teachers and {"teachers", "data"} <= set(one.config):
            # A run made from Python saves no teachers and no data: what else differs cannot be seen
            config = {k: v for k, v in one.config.items() if k not in APART}
            key = (json.dumps([config, *(row.files[0].name for row in rows)], default=str), stopped)
        before = known[key][0].folders if key in known and not one.whole else []
        if before and one.config.get("seed") in map(read_seed, before):
            notes.append(f"{one.path} has the seed of another run of its row, so it counts as a row of its own")
            key = (one.path, *key)
        if key not in known:
            known[key] = rows
            candidates += rows
            continue
        join(known[key], rows)
        if not one.whole and len(known[key][0].folders) == 2:
            first = known[key][0].folders[0].resolve()
            name = re.sub(r"[-_]?(seed)?[-_]?\d+$", "", first.name) or one.path.name
            for row in known[key]:
                row.label = label_of(first.with_name(name), row.over_time, mark)
    if not candidates:
        raise InputError("nothing to evaluate: expected at least one file or run folder")
    for candidate in candidates:
        check_copies(candidate.networks, candidate.files)
    return uniquely_named(candidates)


def rows_of_run(one: Origin, data: Dataset, mark: str, notes: list[str]) -> list[Candidate]:
    """The rows of the run that ``one`` is: of its networks, and of their averages over time where it kept any."""
    place = (one.whole or one.path).resolve()
    rows: list[Candidate] = []
    for files in filter(None, (list(one.files), one.averages)):
        networks = fit([load_network(file) for file in files], files, data, notes)
        check_copies(networks, files)
        over_time = files != list(one.files)
        if one.is_teachers:
            own = teacher_candidates(networks, files, place, (", EMA" if over_time else "") + mark)
        else:
            label = label_of(place, over_time, mark)
            own = [Candidate(label.short, "student", networks, [], files, label)]
        own[0].folders.append(one.path)
        for row in own:
            row.over_time = over_time
        rows += own
    return rows


def label_of(place: Path, over_time: bool, mark: str) -> Label:
    """What the row of the students in ``place`` may be called."""
    end = (", EMA" if over_time else "") + mark
    return Label(place.name + end, place, "{}" + end)


def join(rows: Sequence[Candidate], more: Sequence[Candidate]) -> None:
    """Add to each of the ``rows`` its own of ``more``, which are of another seed.

    Raises InputError where one of both has rows that the other lacks.
    """
    if len(rows) != len(more):
        names = [", ".join(one.name for one in each) for each in (rows, more)]
        raise InputError(f"seeds have other networks: {names[0]} and {names[1]}; expected the same of every seed")
    for row, other in zip(rows, more, strict=True):
        row.networks += other.networks
        row.folders += other.folders
        row.files += other.files


def teacher_candidates(
    networks: Sequence[nn.Module], files: Sequence[Path], folder: Path | None = None, mark: str = ""
) -> list[Candidate]:
    """The rows of teachers: each alone, as seeds of one row, and their ensemble. ``folder`` gives them their names."""
    path = folder.resolve() if folder else None
    prefix = "" if path is None or path.name == "teachers" else f"{path.name}: "
    form = "{}" if path and path.name == "teachers" else "{}: teachers"
    label = Label(f"{prefix}teachers{mark}", path, form + mark)
    out = [Candidate(label.short, "teachers", list(networks), [], list(files), label)]
    if len(networks) > 1:
        kind = f"ensemble of {len(networks)}{mark}"
        label = Label(f"{prefix}{kind}", path, f"{{}}: {kind}")
        out.append(Candidate(label.short, "ensemble", [Teachers(networks)], [], list(files), label))
    return out


def rows_of_teachers(sets: Sequence[tuple[Teachers, Sequence[Path]]]) -> list[Candidate]:
    """The rows of teachers beside their students': of the sets that several seeds learned from, each row of all."""
    rows, *others = (teacher_candidates(list(teachers.networks), files) for teachers, files in sets)
    for more in others:
        join(rows, more)
    return rows


def ensemble_of(candidates: Sequence[Candidate]) -> Candidate:
    """All single networks of ``candidates`` as one ensemble. Raises InputError for fewer than two, and for copies.

    The averages over time that a run's folder also has are near copies of its networks, and no further members.
    """
    alone = [c for c in candidates if not c.over_time]
    plain = [c for c in alone if not any(isinstance(n, Student | Teachers) for n in c.networks)]
    networks = [n for c in plain for n in c.networks]
    files = [f for c in plain for f in c.files]
    if len(networks) < 2:
        raise InputError(f"--ensemble of {len(networks)} networks: expected at least 2 files")
    check_copies(networks, files)
    return Candidate(f"ensemble of {len(networks)}", "ensemble", [Teachers(networks)], [], files)


def uniquely_named(candidates: list[Candidate]) -> list[Candidate]:
    """The same, no two of one name."""
    labels = [c.label or Label(c.name) for c in candidates]
    for candidate, name in zip(candidates, distinct(labels), strict=True):
        candidate.name = name
    return candidates


def fit(networks: Sequence[nn.Module], files: Sequence[Path], data: Dataset, notes: list[str]) -> list[nn.Module]:
    """The networks, their logits in the data's order of classes. Raises InputError for other classes or images."""
    out, said = [], set()
    for network, file in zip(networks, files, strict=True):
        order, told = check_card(read_card(file), data, file)
        if order is not None:
            taken = for_networks(data, [network])
            network = reordered(network, order, (taken.channels, *taken.image_size))
        for note in told:
            kind = note.replace(str(file), "")
            notes += [] if kind in said else [note]  # one file of a folder speaks for all
            said.add(kind)
        out.append(network)
    return out


def check_copies(networks: Sequence[nn.Module], files: Sequence[Path]) -> None:
    """Raise InputError where two networks have the same parameters, or two files are one."""
    seen: dict[Any, Path] = {}
    for network, file in zip(networks, files, strict=False):
        marks: list[Any] = [file.resolve()]
        digest = digest_parameters(network.parameters())
        marks += [digest] if digest else []
        for mark in marks:
            if mark in seen:
                raise InputError(
                    f"{file} is the same network as {seen[mark]}: expected networks that differ, as copies "
                    "have nothing to disagree about"
                )
        seen |= dict.fromkeys(marks, file)


def digest_parameters(parameters: Iterable[Any]) -> str:
    """A digest of the values, whatever their names; "" where there are none."""
    digest, any_ = hashlib.sha256(), False
    for tensor in parameters:
        any_ = True
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest() if any_ else ""


def teacher_sets(
    paths: Sequence[Path], seeds: Sequence[int], *, unfinished: bool = False, ema: bool = False
) -> list[list[Origin]]:
    """The teachers that ``paths`` stand for: one set for all ``seeds``, or one for each of them.

    Where a path is a folder of several seeds, seed i of the students learns from its i-th. ``ema`` takes the averages
    over time of the networks in folders. Raises InputError, besides what :func:`origins` does, where there are others
    than as many.
    """
    given = origins(paths, unfinished)
    for one in given:
        members(one.path)  # which refuses a folder without teachers
    if ema and not any(one.path.is_dir() or one.is_average for one in given):
        files = ", ".join(str(one.path) for one in given[:3])
        raise InputError(
            f"teacher_ema with {files}: expected the folder of a run with --ema-decay, or its ema-0.safetensors"
        )
    given = [one.averaged() if one.path.is_dir() else one for one in given] if ema else given
    wholes: dict[Path, list[Origin]] = {}
    for one in given:
        if one.whole:
            wholes.setdefault(one.whole, []).append(one)
    for whole, sets in wholes.items():
        if len(sets) not in (1, len(seeds)):
            expected = f"--seeds with {len(sets)} of them" if not seeds else "as many"
            raise InputError(f"{whole} holds teachers of {len(sets)} seeds for {len(seeds) or 1} of students: expected "
                             f"{expected}, or one of its folders, such as {sets[0].path}")  # fmt: skip
    count = max((len(sets) for sets in wholes.values()), default=1)
    several = [sets for sets in wholes.values() if len(sets) > 1]
    return [
        [one for one in given if not any(one in sets and one is not sets[i] for sets in several)] for i in range(count)
    ]


def read_seed(folder: Path) -> Any:
    """The seed of the run in ``folder``, None where it is not known."""
    return read_config(folder).get("seed")


def load_teachers_of(
    given: Sequence[Origin], foreign: Foreign, data: Dataset, notes: list[str]
) -> tuple[list[nn.Module], list[Path]]:
    """The teachers that files and folders stand for, their logits in the data's order of classes, and their files.

    Raises InputError for files that cannot be read, copies, and networks of other images or classes.
    """
    files = [file.resolve() for one in given for file in one.files]
    networks = fit([foreign.load(f, i, len(files), data) for i, f in enumerate(files)], files, data, notes)
    check_copies(networks, [file for one in given for file in one.files])
    return networks, files


@dataclass(frozen=True)
class Foreign:
    """What files hold that do not say it: each field for all of them, or for one after another.

    ``models`` are architectures, ``mean`` and ``std`` the normalisation of pixels in [0, 1], a value per channel. Unset
    it is the data's for our own models, and that of the published weights for torchvision's and timm's. What is given
    for one file, or for each, must agree with a file that says what it holds. ``prefix`` begins the settings' names in
    errors.
    """

    models: str | Sequence[str] | None = ()
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    prefix: str = ""

    def load(self, path: Path, index: int, count: int, data: Dataset) -> nn.Module:
        """The network in ``path``, the file ``index`` of ``count``. Raises InputError for settings that do not fit."""
        models = [self.models] if isinstance(self.models, str) else list(self.models or ())
        own = bool(read_card(path).get("model"))
        model = self._own("model", models, 1, index, count, own)
        colours = 3 if data.channels == 1 and any(map(takes_colour, models)) else 1  # they take grey images repeated
        channels = data.channels * colours
        given = {
            "mean": self._own("mean", self.mean, channels, index, count, own),
            "std": self._own("std", self.std, channels, index, count, own),
        }
        arguments: dict[str, Any] = {k: v for k, v in given.items() if v}
        name = model[0] if model else None
        if name is not None and not own:
            arguments["num_classes"] = data.num_classes
        return load(path, name, arguments, fallback=(data.mean * colours, data.std * colours))

    def _own(self, name: str, values: Sequence[Any], each: int, index: int, count: int, says: bool) -> Sequence[Any]:
        """The file's own of ``values``; none of those for all files where it says itself what it holds."""
        if len(values) not in (0, each, each * count):
            raise InputError(
                f"{self.prefix}{name} has {len(values)} values: expected {each} for all files, or {each * count} for "
                f"the {count} files one after another"
            )
        if len(values) > each:
            return values[index * each : (index + 1) * each]
        return () if says and count > 1 else values


def teachers_of(config: dict[str, Any]) -> Foreign:
    """What a distill run's settings say of its teachers' files."""
    model, mean, std = (config.get(f"teacher_{name}") or () for name in ("model", "mean", "std"))
    return Foreign(model, mean, std, prefix="teacher_")

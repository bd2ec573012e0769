"""``fastensdistill demo``: the whole job on scikit-learn's handwritten digits, in a few minutes on two cores.

Four small teachers from 150 images; then plain distillation, LatentBE, and LatentBE on TDiv − SDiv perturbed images,
some seeds of each; one table with the differences between the kinds, one report, and the method's network, that of the
seed with the best validation NLL, exported. Every run is an ordinary run of the command line, so its folder can be
read, resumed and evaluated like any other. Running the demo again continues where it stopped.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch

from fastensdistill.errors import InputError
from fastensdistill.evaluate.tables import Row
from fastensdistill.train.progress import Progress

STUDENTS = {
    "KD": ("--student", "single", "--perturbation", "none"),
    "LatentBE": ("--student", "latent-be", "--perturbation", "none"),
    "LatentBE + TDiv-SDiv": ("--student", "latent-be", "--perturbation", "tdiv-sdiv"),
}
METHOD = "LatentBE + TDiv-SDiv"
SEEDS = 5
# 150 of the 600 images that are not for testing train, and they are not moved: so the teachers fit them and agree on
# them, and differ elsewhere (docs/studies/perturbation.md). How it was chosen: docs/benchmarks.md, Accuracy.
VALIDATION = 450
RECIPE = ("--data", "digits", "--validation", str(VALIDATION), "--pad", "0", "--batch-size", "32",
          "--learning-rate", "0.1", "--no-report")  # fmt: skip
TEACHER_EPOCHS, EPOCHS = 100, 90
WARMUP = 0.3  # of a student's run, so that its branches do not part before the shared weights have settled
STEP = 1 / 16  # of the perturbation: one of the scans' levels of grey


def command_lines(out: Path, seeds: int, epochs: int) -> dict[Path, list[str]]:
    """The run of the teachers, and then those of the students, by their folders."""
    teachers = out / "teachers"
    longer = str(round(epochs * TEACHER_EPOCHS / EPOCHS))
    lines = {teachers: ["teach", *RECIPE, "--epochs", longer, "--out", str(teachers)]}
    common = [*RECIPE, "--epochs", str(epochs), "--warmup-epochs", f"{WARMUP * epochs:g}", "--step-size", str(STEP)]
    for seed in range(seeds):
        for name, flags in STUDENTS.items():
            folder = folder_of(out, name, seed)
            lines[folder] = ["distill", *common, *flags, "--teachers", str(teachers), "--seed", str(seed),
                             "--out", str(folder)]  # fmt: skip
    return lines


def folder_of(out: Path, student: str, seed: int) -> Path:
    """The folder of a student's run."""
    return out / f"{student.lower().replace(' + ', '-')}-{seed}"


def run_demo(out: Path, seeds: int = SEEDS, epochs: int = EPOCHS) -> None:
    """Run the demo in ``out``: so many seeds of each kind of student, for so many epochs; teachers in proportion.

    Raises InputError where a run fails.
    """
    from fastensdistill.commands import ExportRun, export, show
    from fastensdistill.data.sources import load_dataset
    from fastensdistill.evaluate import comparison, runs
    from fastensdistill.weights import read_card

    began = time.perf_counter()
    (_, teaching), *jobs = command_lines(out, seeds, epochs).items()
    print("1. four teachers, trained at once on 150 images of handwritten digits", flush=True)
    _run(teaching, quiet=False)
    print(f"2. {len(STUDENTS)} kinds of student, seeds 0 to {seeds - 1}", flush=True)
    workers = 1 if torch.cuda.is_available() else max(1, min(os.cpu_count() or 1, len(jobs)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_run, line, threads=1): folder for folder, line in jobs}
        with Progress("students", len(jobs), "student", transient=True) as shown:
            for done in as_completed(waiting):
                print(f"   {waiting[done].name}: {done.result():.0f} s", flush=True)
                shown.advance(1)
    data = load_dataset("digits", validation=VALIDATION)
    print(f"3. all of them on the {len(data.test):,} test images", flush=True)
    candidates = runs.find_candidates([out / "teachers", *(folder for folder, _ in jobs)], data)
    for candidate, name in zip(candidates[2:], STUDENTS, strict=True):
        candidate.name = name
    found = comparison.compare(candidates, data, torch.device("cpu"))
    each, ensemble, *students = [e.row for e in found]
    show([each, ensemble, *students], data)
    said = [difference(*pair) for pair in combinations(students, 2)]
    print("seed by seed, mean ± standard error:", *said, sep="\n   ")
    title = "Four teachers into one network: digits"
    comparison.write(found, candidates, data, out, torch.device("cpu"), title, said)
    folders = [folder_of(out, METHOD, seed) for seed in range(seeds)]
    nll = [read_card(folder / "network.safetensors")["validation_nll"] for folder in folders]
    best = nll.index(min(nll))
    print(f"4. the network of {METHOD}, seed {best}, which has the best validation NLL of its kind", flush=True)
    exported = students[list(STUDENTS).index(METHOD)].metrics[best]
    for name, metrics in (("it", [exported]), ("its teachers", each.metrics), ("their ensemble", ensemble.metrics)):
        accuracy, likelihood = mean(m.accuracy for m in metrics), mean(m.nll for m in metrics)
        print(f"   {name + ':':16} accuracy {100 * accuracy:.2f}%, NLL {likelihood:.3f}")
    export(ExportRun(path=folders[best], out=out / "network"))
    print(f"report: {out / 'report.html'}\ntook {time.perf_counter() - began:.0f} s")


def difference(before: Row, after: Row) -> str:
    """How the second row differs from the first, seed by seed: the mean, and its standard error where there is one."""
    seeds = list(zip(before.metrics, after.metrics, strict=True))
    accuracy = _mean_and_error([100 * (b.accuracy - a.accuracy) for a, b in seeds], "+.2f")
    nll = _mean_and_error([b.nll - a.nll for a, b in seeds], "+.4f")
    return f"{after.name} against {before.name}: accuracy {accuracy} points, NLL {nll}"


def _mean_and_error(values: Sequence[float], shown: str) -> str:
    error = f" ± {stdev(values) / len(values) ** 0.5:{shown[1:]}}" if len(values) > 1 else ""
    return f"{mean(values):{shown}}{error}"


def _run(arguments: list[str], threads: int | None = None, quiet: bool = True) -> float:
    """One run of the command line, resumed if its folder is there already; its seconds.

    Of what it says nothing is shown unless it fails, or all but its table where it is not ``quiet``.
    """
    from fastensdistill.cli import main

    if threads:
        torch.set_num_threads(threads)
    folder = Path(arguments[arguments.index("--out") + 1])
    began = time.perf_counter()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said if quiet else sys.stderr):
        code = main([*arguments, "--resume"] if (folder / "config.yaml").is_file() else arguments)
    if code:
        print(said.getvalue(), file=sys.stderr)
        raise InputError(f"the run in {folder} ended with code {code}")
    return time.perf_counter() - began

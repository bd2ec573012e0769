"""``fastensdistill demo``: the whole job on scikit-learn's handwritten digits, in a few minutes on two cores.

Four small teachers from 300 images; then plain distillation, LatentBE, and LatentBE on TDiv − SDiv perturbed images,
some seeds of each; one table, one report, and the network with the best validation NLL exported. Every run is an
ordinary run of the command line, so its folder can be read, resumed and evaluated like any other. Running the demo
again continues where it stopped.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from fastensdistill.errors import InputError
from fastensdistill.train.progress import Progress

STUDENTS = {
    "KD": ("--student", "single", "--perturbation", "none"),
    "LatentBE": ("--student", "latent-be", "--perturbation", "none"),
    "LatentBE + TDiv-SDiv": ("--student", "latent-be", "--perturbation", "tdiv-sdiv"),
}
# A run of 240 steps needs a smaller rate and a longer warm-up than the paper's: at 0.1 the branches part before the
# shared weights have settled and their average is useless, and at 0.05 that still happens to one seed in some.
RECIPE = ("--data", "digits", "--batch-size", "64", "--learning-rate", "0.03")
EPOCHS = 60


def run_demo(out: Path, seeds: int = 3, epochs: int | None = None) -> None:
    """Run the demo in ``out``. Raises InputError for fewer than one seed, or where a run fails."""
    if seeds < 1:
        raise InputError(f"seeds={seeds}: expected at least 1")
    from fastensdistill.commands import ExportRun, compare_and_write, export
    from fastensdistill.data.sources import load_dataset
    from fastensdistill.evaluate import runs
    from fastensdistill.weights import read_tensors

    began = time.perf_counter()
    teachers = out / "teachers"
    epochs = EPOCHS if epochs is None else epochs
    if epochs < 1:
        raise InputError(f"epochs={epochs}: expected at least 1")
    length = ("--epochs", str(epochs), "--warmup-epochs", str(0.3 * epochs))
    print("1. four teachers, trained at once on 300 images of handwritten digits", flush=True)
    _run(["teach", *RECIPE, *length, "--out", str(teachers)], quiet=False)
    print(f"2. {len(STUDENTS)} kinds of student, {seeds} seeds each", flush=True)
    jobs = {}
    for seed in range(seeds):
        for name, flags in STUDENTS.items():
            folder = out / f"{name.lower().replace(' + ', '-')}-{seed}"
            jobs[folder] = ["distill", *RECIPE, *length, *flags, "--teachers", str(teachers), "--seed", str(seed),
                            "--out", str(folder)]  # fmt: skip
    workers = 1 if torch.cuda.is_available() else max(1, min(os.cpu_count() or 1, len(jobs)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_run, arguments, threads=1): folder for folder, arguments in jobs.items()}
        with Progress("students", len(jobs), "student", transient=True) as shown:
            for done in as_completed(waiting):
                print(f"   {waiting[done].name}: {done.result():.0f} s", flush=True)
                shown.advance(1)
    print("3. all of them on the 1,197 test images", flush=True)
    data = load_dataset("digits")
    candidates = runs.find_candidates([teachers, *jobs], data)
    for candidate, name in zip(candidates[2:], STUDENTS, strict=True):
        candidate.name = name
    compare_and_write(candidates, data, out, torch.device("cpu"), "Four teachers into one network: digits")
    best = min(jobs, key=lambda f: read_tensors(f / "network.safetensors")[1]["validation_nll"])
    print(f"4. the network with the best validation NLL, {best.name}", flush=True)
    export(ExportRun(path=best, out=out / "network"))
    print(f"report: {out / 'report.html'}\ntook {time.perf_counter() - began:.0f} s")


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

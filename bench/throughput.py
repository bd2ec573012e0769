"""Images per second of whole training steps: the engines and their peers, interleaved in one process.

    python -m bench.throughput [--width 1] [--batch 64] [--rounds 12] [--json FILE] [--smoke]

LatentBE + TDiv−SDiv on a PreResNet of blocks [4, 4, 4], in_planes 16, for 32x32 images, 100 classes, M = K. Before
anything is timed, one step of every contender is compared with the reference engine's in float64. Base images are
counted: B a step. Medians of the rounds, with the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers.eager import EagerStep
from fastensdistill.config import DistillConfig
from fastensdistill.engine.reference import ReferenceStep
from fastensdistill.method.modes import evaluating
from fastensdistill.method.perturbation import tdiv_sdiv
from fastensdistill.method.student import LatentBE
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import create_model

Step = Callable[[Tensor, Tensor, tuple[int, int]], Any]


def reference(student: LatentBE, teachers: Teachers, config: DistillConfig, classes: int) -> Step:
    step = ReferenceStep(student, teachers, config, num_classes=classes)

    def run(images: Tensor, labels: Tensor, pair: tuple[int, int]) -> Any:
        with evaluating(student):
            perturbed = tdiv_sdiv(images, teachers, student, pair, pair, config.step_size)
        return step.distil(perturbed, labels)

    return run


CONTENDERS: dict[str, Callable[[LatentBE, Teachers, DistillConfig, int], Step]] = {
    "reference engine": reference,
    "least work, eager": lambda s, t, c, n: EagerStep(s, t, c, as_written=False),
    "as the authors run it, eager": lambda s, t, c, n: EagerStep(s, t, c, as_written=True),
}


def parameters(step: Step, student: LatentBE) -> list[Tensor]:
    """Shared parameters after the step, in the student's order."""
    if isinstance(step, EagerStep):
        return step.shared
    return student.parameter_groups(0)[0]["params"]


def check(width: int, members: int) -> dict[str, float]:
    """Largest relative difference from the reference engine, in float64, after one step of a small case."""
    setting = make(width, members, classes=5, blocks=(1, 1), dtype=torch.float64)
    images, labels = torch.rand(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2])
    results = {}
    for name, build in CONTENDERS.items():
        student, teachers, config = copy.deepcopy(setting)
        step = build(student, teachers, config, 5)
        step(images, labels, (1, 0))
        results[name] = torch.cat([p.detach().flatten() for p in parameters(step, student)])
    expected = results["reference engine"]
    return {name: float((r - expected).abs().max() / expected.square().mean().sqrt()) for name, r in results.items()}


def make(width: int, members: int, classes: int, blocks: tuple[int, ...], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    build = lambda: create_model("preresnet", classes, blocks=blocks, in_planes=16, widen=width)  # noqa: E731
    teachers = Teachers([build() for _ in range(members)]).to(dtype).to(memory_format=torch.channels_last)
    student = LatentBE(build(), members).to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for layer in student.layers():  # off one, so that the branches differ
            layer.delta_r.normal_(std=0.1)
            layer.delta_s.normal_(std=0.1)
    return student, teachers, DistillConfig(learning_rate=0.01, branches=members)


def measure(width: int, members: int, batch: int, rounds: int, blocks: tuple[int, ...]) -> dict[str, list[float]]:
    setting = make(width, members, 100, blocks, torch.float32)
    images = torch.rand(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(100, (batch,))
    steps = {name: build(*copy.deepcopy(setting), 100) for name, build in CONTENDERS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step(images, labels, (i % members, (i + 1) % members))
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - began)
    return times


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, round(q * (len(values) - 1)))]


def describe_host() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(), "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--members", type=int, default=4, help="M = K")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads)
    differences = check(1, 2)
    for name, difference in differences.items():
        if not difference < 1e-9:
            print(f"not timed: {name} differs from the reference engine by {difference:.1e} after one step")
            return 1
    blocks, batch, rounds = ((1,), 4, 2) if a.smoke else ((4, 4, 4), a.batch, a.rounds)
    times = measure(a.width, a.members, batch, rounds, blocks)
    base = statistics.median(times["reference engine"])
    print(f"PreResNet {list(blocks)} width {a.width}, batch {batch}, M = K = {a.members}, float32, {a.threads} threads")
    print(f"{'step':32} {'images/s':>9} {'p20':>8} {'p80':>8} {'reference is':>13}")
    rows = []
    for name, t in times.items():
        median = statistics.median(t)
        row = {
            "name": name, "images_per_second": batch / median, "p20": batch / quantile(t, 0.8),
            "p80": batch / quantile(t, 0.2), "ratio": median / base, "difference_after_one_step": differences[name],
        }  # fmt: skip
        rows.append(row)
        print(f"{name:32} {row['images_per_second']:9.1f} {row['p20']:8.1f} {row['p80']:8.1f} {row['ratio']:12.2f}x")
    if a.json:
        setting = {"width": a.width, "batch": batch, "members": a.members, "blocks": blocks, "rounds": rounds}
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps({**describe_host(), "setting": setting, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Run an engine through recorded steps of the authors' code, and print the largest relative errors.

    python tests/parity.py FILE.npz... [--engine reference|fused] [--kernels] [--verbose]

Each FILE holds a small PreResNet student and its teachers before step 0, the images, labels and pair of every step, and
what came out (images NHWC, convolution weights HWIO, linear weights (in, out)). Errors are the largest absolute
difference over the root mean square of the recorded quantity. Exit code 1 if one is above 1e-9 (reference, float64) or
1e-3 (fused, float32). Where float32 itself is further off, because an activation near zero changed sides and with it a
gradient, twice the reference engine's own error in float32 is allowed, and said. --kernels runs the fused engine's
Triton kernels on a CPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

if "--kernels" in sys.argv:  # Triton decides on its interpreter when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastensdistill.config import DistillConfig
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep
from fastensdistill.kernels.launch import use_kernels
from fastensdistill.method.perturbation import Perturbed
from fastensdistill.method.student import LatentBE, RankOneLayer
from fastensdistill.method.teachers import Teachers
from fastensdistill.models.layers import BatchNorm2d
from fastensdistill.models.preresnet import PreResNet
from tests.compare import relative_error
from tests.untyped import present

RECORDING = Path(__file__).parent / "data" / "official_k2.npz"
TOLERANCE = {"reference": 1e-9, "fused": 1e-3}
DTYPE = {"reference": torch.float64, "fused": torch.float32}
# Perturbation for a given pair, distillation on its result, and the branches' logits of that.
Perturb = Callable[[Tensor, tuple[int, int]], Perturbed]
Distil = Callable[[Perturbed, Tensor], dict[str, Tensor]]
Halves = tuple[Perturb, Distil, Callable[[], Tensor]]


def slots(network: Any) -> dict[str, Any]:
    """The layers of a PreResNet, plain or wrapped, under the recorded names without the layer kind."""
    named = {"backbone/FirstBlock_0/conv": network.stem}
    blocks = [block for group in network.groups for block in group]
    for i, block in enumerate(blocks):
        base = f"backbone/BasicBlock_{i}"
        named |= {f"{base}/BatchNorm2d_0": block.bn1, f"{base}/BatchNorm2d_1": block.bn2}
        named |= {f"{base}/conv_0": block.conv1, f"{base}/conv_1": block.conv2}
        if not isinstance(block.shortcut, nn.Identity):
            named[f"{base}/ProjectionShortcut_0/conv"] = block.shortcut
    return named | {"backbone/LastBlock_0/BatchNorm2d_0": network.bn, "classifier/linear": network.classifier}


def recorded_name(slot: str, wrapped: bool) -> str:
    suffix = "_BatchEnsemble" if wrapped else ""
    for short, kind in (("/conv_0", "Conv2d"), ("/conv_1", "Conv2d"), ("/conv", "Conv2d"), ("/linear", "Linear")):
        if slot.endswith(short):
            return f"{slot.removesuffix(short)}/{kind}{suffix}_{'1' if short == '/conv_1' else '0'}"
    return slot


def to_torch(array: np.ndarray) -> Tensor:
    """HWIO → OIHW and (in, out) → (out, in); vectors stay."""
    t = torch.from_numpy(np.asarray(array))
    return t.permute(3, 2, 0, 1) if t.ndim == 4 else t.T if t.ndim == 2 else t


def tensors(network: Any, wrapped: bool) -> dict[str, tuple[str, Tensor]]:
    """Recorded key → (what has to be done on reading, the tensor in the network)."""
    found: dict[str, tuple[str, Tensor]] = {}
    for slot, layer in slots(network).items():
        name = recorded_name(slot, wrapped)
        if isinstance(layer, BatchNorm2d):
            found[f"params/{name}/w"], found[f"params/{name}/b"] = ("", layer.weight), ("", layer.bias)
            found[f"batch_stats/{name}/m"] = ("", present(layer.running_mean))
            found[f"batch_stats/{name}/v"] = ("", present(layer.running_var))
            continue
        inner = layer.layer if isinstance(layer, RankOneLayer) else layer
        found[f"params/{name}/w"] = ("weight", inner.weight)
        if inner.bias is not None:
            found[f"params/{name}/b"] = ("", inner.bias)
        if isinstance(layer, RankOneLayer):
            found[f"params/{name}/r"] = ("deviation", layer.delta_r)
            found[f"params/{name}/s"] = ("deviation", layer.delta_s)
    return found


def convert(kind: str, array: np.ndarray) -> Tensor:
    if kind == "deviation":
        return torch.from_numpy(np.asarray(array)) - 1
    return to_torch(array) if kind == "weight" else torch.from_numpy(np.asarray(array))


def build(record: dict[str, np.ndarray], prefix: str, branches: int) -> Any:
    network = PreResNet(
        int(record["meta/classes"]), blocks=record["meta/num_blocks"].tolist(), widen=int(record["meta/widen_factor"]),
        in_planes=int(record["meta/in_planes"]), mean=record["meta/pixel_mean"].tolist(),
        std=record["meta/pixel_std"].tolist(),
    ).double()  # fmt: skip
    network.normalize.mean.copy_(torch.from_numpy(record["meta/pixel_mean"]).view(1, -1, 1, 1))
    network.normalize.std.copy_(torch.from_numpy(record["meta/pixel_std"]).view(1, -1, 1, 1))
    for m in network.modules():
        if isinstance(m, BatchNorm2d):
            m.eps, m.momentum = float(record["meta/bn_eps"]), 1 - float(record["meta/bn_momentum"])
    student = LatentBE(network, branches) if branches else None
    inner: Any = student.module if student else network
    found = tensors(inner, wrapped=student is not None)
    known = {k.removeprefix(f"{prefix}/") for k in record if k.startswith(f"{prefix}/")}
    assert known == set(found), f"{prefix}: the file and the network differ in {sorted(known ^ set(found))[:5]}"
    with torch.no_grad():
        for key, (kind, t) in found.items():
            t.copy_(convert(kind, record[f"{prefix}/{key}"]))
    return student or network


def images_of(record: dict[str, np.ndarray], key: str) -> Tensor:
    return torch.from_numpy(record[key]).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def reference(student: LatentBE, teachers: Teachers, config: DistillConfig, classes: int) -> Halves:
    step = ReferenceStep(student, teachers, config, num_classes=classes)
    step.set_learning_rate(config.learning_rate)
    logits: list[Tensor] = []

    def perturb(images: Tensor, pair: tuple[int, int]) -> Perturbed:
        return step.perturbation.perturb(images, teachers, student, pair)

    def distil(perturbed: Perturbed, labels: Tensor) -> dict[str, Tensor]:
        logits.clear()
        hook = student.register_forward_hook(lambda _m, _i, output: logits.append(output.detach()))
        scalars = step.distil(perturbed, labels)
        hook.remove()
        return scalars

    return perturb, distil, lambda: logits[0]


def fused(student: LatentBE, teachers: Teachers, config: DistillConfig, classes: int) -> Halves:
    step = FusedStep(student, teachers, config)
    step.set_learning_rate(config.learning_rate)
    return step.perturb, step.distil, lambda: step.branch_logits


def run(file: str | Path, engine: str = "reference", dtype: torch.dtype | None = None) -> dict[str, float]:
    """Relative error of every quantity in ``file``; for parameters and statistics, every one of every step."""
    record = dict(np.load(file))
    dtype = dtype or DTYPE[engine]
    k, steps = int(record["meta/K"]), int(record["meta/steps"])
    student = build(record, "student", k).to(dtype)
    teachers = Teachers([build(record, f"teacher{i}", 0) for i in range(k)]).to(dtype)
    config = DistillConfig(
        learning_rate=float(record["meta/lr"]), momentum=float(record["meta/momentum"]),
        weight_decay=float(record["meta/weight_decay"]), temperature=float(record["meta/T"]),
        alpha=float(record["meta/alpha"]), branches=k,
    )  # fmt: skip
    perturb, distil, logits = {"reference": reference, "fused": fused}[engine](
        student, teachers, config, int(record["meta/classes"])
    )
    errors: dict[str, float] = {}

    def note(name: str, actual: Tensor, expected: np.ndarray | Tensor) -> None:
        errors[name] = relative_error(actual, torch.as_tensor(expected))

    for t in range(steps):
        images, labels = images_of(record, f"step{t}/images").to(dtype), torch.from_numpy(record[f"step{t}/labels"])
        pair = tuple(record[f"step{t}/pair"].tolist())
        with torch.no_grad():
            note(f"step{t}/teacher_log_probs_clean", teachers(images).log_softmax(-1),
                 record[f"step{t}/teacher_log_probs_clean"])  # fmt: skip
        perturbed = perturb(images, pair)
        note(f"step{t}/perturbed", perturbed.images, images_of(record, f"step{t}/perturbed"))
        # The change alone as well: beside the image, an error of its sign would look small.
        note(f"step{t}/perturbation", perturbed.images - images, images_of(record, f"step{t}/perturbed") - images)
        with torch.no_grad():
            note(f"step{t}/teacher_log_probs_perturbed", teachers(perturbed.images).log_softmax(-1),
                 record[f"step{t}/teacher_log_probs_perturbed"])  # fmt: skip
        penalty = student.penalty()
        scalars = distil(perturbed, labels)
        note(f"step{t}/loss_kd", scalars["loss_kd"], record[f"step{t}/loss_kd"])
        note(f"step{t}/loss_ce", scalars["loss_ce"], record[f"step{t}/loss_ce"])
        note(f"step{t}/loss_wd", penalty, record[f"step{t}/loss_wd"])
        note(f"step{t}/loss", scalars["loss"] + config.weight_decay * penalty, record[f"step{t}/loss"])
        note(f"step{t}/acc1", (logits().argmax(-1) == labels).double().mean(), record[f"step{t}/acc1"])
        for key, (kind, tensor) in tensors(student.module, wrapped=True).items():
            note(f"step{t}/{key}", tensor, convert(kind, record[f"step{t}/{key}"]))
    student.eval()
    with torch.no_grad():
        images = images_of(record, "eval/images").to(dtype)
        note("eval/branch_log_probs", student(images).log_softmax(-1), record["eval/branch_log_probs"])
        average = student.average().eval()(images).log_softmax(-1)
        note("eval/averaged_log_probs", average, record["eval/averaged_log_probs"])
    return errors


def limits(file: str | Path, engine: str, errors: dict[str, float]) -> dict[str, float]:
    """What each quantity may be off: the engine's tolerance, or twice what the reference is off in the same dtype."""
    allowed = dict.fromkeys(errors, TOLERANCE[engine])
    if engine == "reference" or max(errors.values()) <= TOLERANCE[engine]:
        return allowed
    own = run(file, "reference", DTYPE[engine])
    return {name: max(limit, 2 * own[name]) for name, limit in allowed.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--engine", choices=TOLERANCE, default="reference")
    parser.add_argument("--kernels", action="store_true", help="the fused engine's Triton kernels on a CPU")
    parser.add_argument("--verbose", action="store_true", help="also print every parameter and statistic")
    arguments = parser.parse_args(argv)
    good, worst, tolerance = True, 0.0, TOLERANCE[arguments.engine]
    for file in arguments.files:
        with use_kernels() if arguments.kernels else contextlib.nullcontext():
            errors = run(file, arguments.engine)
        allowed = limits(file, arguments.engine, errors)
        groups: dict[str, tuple[float, str]] = {}
        for name, error in errors.items():
            step, *rest = name.split("/")
            kind = f"{step}/{rest[0]}" if len(rest) > 1 else name
            kind += f" ({name[-1]})" if rest[0] == "params" else ""
            shown = name if arguments.verbose else kind
            remark = f"   ABOVE {allowed[name]:.1e}" if not error <= allowed[name] else ""
            if error > tolerance and not remark:
                remark = f"   above {tolerance}, but the reference engine is off {allowed[name] / 2:.1e} in this dtype"
            good &= error <= allowed[name]
            groups[shown] = max(groups.get(shown, (0.0, "")), (error, remark))
        print(f"{file}: {len(errors)} quantities")
        for shown, (error, remark) in groups.items():
            print(f"  {shown:<40} {error:.2e}{remark}")
        worst = max(worst, *errors.values())
    limit = tolerance if worst <= tolerance or not good else f"{tolerance}, and twice the reference engine's own error"
    print(f"largest relative error {worst:.2e} ({'within' if good else 'ABOVE'} {limit})")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

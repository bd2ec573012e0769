"""The plan of a training step as a table: what is launched, over whom, with what fused, how long it takes at best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastensdistill.errors import unknown
from fastensdistill.models import create_model, image_size
from fastensdistill.network.gpu import GPUS, Gpu
from fastensdistill.network.join import running, turns
from fastensdistill.network.launch import RULES, Launch, Part, Step, is_sums
from fastensdistill.network.on_load import Fusions, nothing
from fastensdistill.network.plan import Plan, plan_step
from fastensdistill.network.trace import trace


def line(op: str, node: str, shape: str, before: str, after: str, numbers: str) -> str:
    """One row of the table."""
    return f"{op:18} {node:26} {shape:>12}  {before:13} {after:50} {numbers}"


NUMBERS = f"{'GFLOP':>8} {'MB':>8} {'us':>7}"
HEADER = line("launch", "layer", "output", "fused before", "fused after", NUMBERS)
SIDE = "training side"  # of a joint launch, whose first line is its evaluation side


def describe(steps: tuple[Step, ...]) -> str:
    """Steps in short; of a residual or a shortcut that is read with a stride, the stride."""
    words = {
        "scale_shift": "norm", "batch_norm": "norm", "affine": "normalise", "add": "residual", "second": "shortcut",
        "open": "mask-from-input", "norm_gradient": "norm-gradient",
    }  # fmt: skip
    text = [words.get(step.kind, step.kind) + (f"/{step.stride}" if step.stride > 1 else "") for step in steps]
    return " ".join(text)


def row(op: str, launch: Launch, part: Part, cost: str) -> str:
    """The line of one launch of ``part``."""
    shapes = [part.buffers[name].shape for name in launch.writes if not is_sums(name)]
    shape = "x".join(str(size) for size in max(shapes, key=len)[1:]) if shapes else ""
    after = " ".join(filter(None, ["norm-in-weights" if launch.folded else "", describe(launch.epilogue)]))
    return line(op, launch.node, shape, describe(launch.prologue), after, cost)


def rows(parts: Sequence[Part], gpu: Gpu) -> Iterator[str]:
    """A line per launch of ``parts``, which run alone or together; of a joint launch two, its numbers in the first."""
    evaluation, training = parts[0], parts[-1]
    for turn in turns(parts):
        cost = numbers([turn.launch], gpu)
        if turn.evaluation:
            op = f"joint {turn.evaluation.op}" if turn.joint else turn.evaluation.op
            yield row(op, turn.evaluation, evaluation, cost)
        if turn.training:
            op, cost = (f"  {SIDE}", "") if turn.joint else (turn.training.op, cost)
            yield row(op, turn.training, training, cost)


def numbers(launches: list[Launch], gpu: Gpu) -> str:
    """GFLOP, MB, and the least microseconds on ``gpu``, of all ``launches`` together."""
    flops, nbytes = sum(launch.flops for launch in launches), sum(launch.nbytes for launch in launches)
    least = sum(gpu.least_time(launch) for launch in launches)
    return f"{flops / 1e9:8.2f} {nbytes / 1e6:8.2f} {least * 1e6:7.1f}"


def step_table(
    plans: dict[str, Plan], others: dict[str, Plan], label: str, forward_flops: int, batch: int, gpu: Gpu
) -> Iterator[str]:
    """The passes of one step, their totals, and the total per image in forward passes of one network.

    ``others`` are the same passes otherwise planned, of which the totals are told as ``label`` says; nothing of that
    where they are the same. ``forward_flops`` is F, the FLOPs of one network's forward pass of one image.
    """
    different = plans != others
    for name, plan in plans.items():
        yield f"== {name}"
        for parts in running(plan.parts):
            names = ("{}: {}".format(part.name, " ".join(group.name for group in part.groups)) for part in parts)
            yield f"-- {'; '.join(names)}, {batch} images each"
            yield HEADER
            yield from rows(parts, gpu)
        count, apart = len(plan.launches), sum(len(part.launches) for part in plan.parts)
        yield total("total of", plan.launches, "", gpu)
        if apart > count:
            yield f"without joint launches {apart}"
        if different:
            yield total("total of", others[name].launches, label, gpu)
        yield ""
    launches, other = ([launch for plan in of.values() for launch in plan.launches] for of in (plans, others))
    yield total("step of", launches, "", gpu)
    if different:
        yield total("step of", other, label, gpu)
    flops = sum(launch.flops for launch in launches)
    yield (
        f"per image: {flops / batch / 1e9:.2f} GFLOP = {flops / batch / forward_flops:.2f} F, F = "
        f"{forward_flops / 1e9:.4f} GFLOP, one forward pass of one network"
    )
    least, better = (sum(gpu.least_time(launch) for launch in of) for of in (launches, other))
    yield (
        f"least time on {gpu.name} ({gpu.flops / 1e12:.0f} TFLOP/s bf16, {gpu.bandwidth / 1e12:.2f} TB/s, "
        f"{gpu.source}): {least * 1e3:.2f} ms, at most {batch / least:,.0f} images/s; by arithmetic alone "
        f"{batch * gpu.flops / flops:,.0f} images/s"
    )
    if different:
        yield f"{label}: {better * 1e3:.2f} ms, at most {batch / better:,.0f} images/s"


def total(what: str, launches: list[Launch], label: str, gpu: Gpu) -> str:
    """One line about all ``launches``."""
    words = f"{what} {len(launches)} launches" + (f", {label}" if label else "")
    return f"{words:{len(HEADER) - len(NUMBERS)}}{numbers(launches, gpu)}"


def print_plan(
    model: str,
    teachers: int = 4,
    branches: int = 4,
    batch: int = 128,
    gpu: str = "h200",
    size: int | None = None,
    fusions: Fusions = nothing,
    on_load: bool = False,
) -> list[Part]:
    """Print the plan of a TDiv − SDiv training step of ``model``, teachers and student alike, on 100 classes.

    Args:
        size: of the square images, 32 by default, for torchvision's networks 224.
        fusions: what convolutions can take in as they load (``network.on_load``): totals of that plan stand below
            those of the plan in which they take in nothing; with ``on_load`` it is the one whose table is printed.

    Returns the parts of the plan in the table. Raises ``InputError`` for an unknown model or GPU, and for a network
    that cannot be planned.
    """
    if gpu not in GPUS:
        raise unknown("gpu", gpu, GPUS)
    size = size or image_size(model)
    network = trace(create_model(model, 100), (3, size, size))
    print(f"{model}, {teachers} teachers, {branches} branches, batch {batch}, images 3x{size}x{size}\n")
    for number, rule in enumerate(RULES, 1):
        print(f"{number}. {rule}")
    print()
    plans, others = (plan_step(network, network, teachers, branches, batch, fusions=of) for of in (nothing, fusions))
    label = "BatchNorm and shortcuts on load"
    if on_load:
        plans, others, label = others, plans, "nothing on load"
    for text in step_table(plans, others, label, 2 * network.macs, batch, GPUS[gpu]):
        print(text.rstrip())
    return [part for one in plans.values() for part in one.parts]

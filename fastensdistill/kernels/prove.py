"""Every kind of wgmma kernel on small shapes against its reference in float64, in a process that may die of it.

    python -m fastensdistill.kernels.prove [--device cuda] [--copies]

One line for each launch, which where it is wrong names the element that is furthest off. New memory starts as NaN,
every launch runs twice, and both runs have to agree bit for bit. The exit status is 0 where all is
right, 1 where something is not, 2 where the extension has no such kernels for the device. ``engine.proof`` starts it
before these kernels are used in a run. ``--copies`` tries the layout that is right on every device
(``wgmma.in_copies``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels import wgmma
from fastensdistill.kernels.conv_data_gradient import conv_data_gradient
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.operands import Window, out_size
from fastensdistill.kernels.wgmma_joint_conv import wgmma_joint_conv

ALLOWED = 0.01  # of the largest element: five times what rounding to bf16 leaves of it
GROUPS, SLOTS = 2, 3
INDEX = (2, 0)  # a slot is left out, and no group has that of its own number
# Channels in and out, images, rows, columns: every width that has a kernel of its own, and sizes that no tile divides
SHAPES = (
    (64, 64, 2, 32, 32),
    (64, 64, 3, 12, 20),
    (128, 128, 3, 16, 16),
    (256, 256, 5, 8, 8),
    (64, 128, 2, 16, 16),
    (16, 16, 2, 32, 32),
    (32, 32, 3, 9, 13),
    (16, 64, 2, 16, 16),
    (48, 160, 2, 8, 8),
    (64, 64, 2, 1, 1),
)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Case(NamedTuple):
    """A launch: the op whose place is taken, its window, its shape as in ``SHAPES``, and what it fuses.

    ``training`` is what the other side of a joint launch fuses, None where the launch has one side.
    """

    op: Callable[..., Any]
    window: Window
    shape: tuple[int, int, int, int, int]
    fused: tuple[str, ...] = ()
    training: tuple[str, ...] | None = None

    @property
    def title(self) -> str:
        Ci, Co, N, H, W = self.shape
        k, stride, _ = self.window
        name = wgmma.KERNELS[self.op][1] if self.training is None else wgmma_joint_conv.__name__
        fused = self.fused if self.training is None else (*self.fused, "|", *self.training)
        return " ".join([name, f"{k}x{k} s{stride} {Ci}→{Co} @{H}x{W}x{N}", *fused])

    @property
    def sides(self) -> tuple[tuple[str, ...], ...]:
        """What each side fuses."""
        return (self.fused,) if self.training is None else (self.fused, self.training)


ON_LOAD = ("in_scale", "in_shift", "in_relu")
NORM = ("norm_z", "norm_a", "norm_b", "norm_c")
SECOND = ("second", "second_weight", "second_stride")
# What a launch can do beside its product, a few at a time; the last is what is tried on every shape
FUSIONS: dict[Callable[..., Any], list[tuple[str, ...]]] = {
    grouped_conv: [
        (), ("bias", "relu", "mask"), ("bias", "residual", "next_scale", "next_shift", "mask"),
        ("in_scale", "in_shift"), ON_LOAD, (*SECOND, "second_bias", "bias"), (*ON_LOAD, *SECOND, "center"),
        ("residual", "center"),
    ],
    conv_data_gradient: [
        (), ("mask", "scale"), ("residual", "residual_first", "mask"), ("z", "mean", "inv_std", *NORM),
        ("z", "mean", "inv_std", "mask_scale", "mask_shift"), (*SECOND, "mask"), ("mask", "z", "mean", "inv_std"),
    ],
    conv_weight_gradient: [(), ON_LOAD, NORM, (*ON_LOAD, *NORM), ("in_scale", "in_shift")],
}  # fmt: skip
# The same for the evaluation side and the training side of a joint launch
JOINT: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("bias", "residual", "next_scale", "next_shift", "mask"), (*ON_LOAD, "residual", "center")),
    (("bias", "relu"), ("center",)), ((*SECOND, "second_bias", "bias"), (*ON_LOAD, "center")),
    ((*SECOND, "second_bias", "bias"), (*ON_LOAD, *SECOND, "center")),
]  # fmt: skip


def cases() -> Iterator[Case]:
    """All windows on the first shapes, everything fused on the first, and every other shape with its statistics.

    Joint launches of every window on the first shape, and of the kernel for few channels on another.
    """
    for shape in (SHAPES[0], SHAPES[5]):
        for window in wgmma.WINDOWS if shape is SHAPES[0] else wgmma.WINDOWS[:2]:
            for evaluation, training in JOINT:
                yield Case(grouped_conv, window, shape, evaluation, training)
    for op in wgmma.KERNELS:
        every = FUSIONS[op]
        for i, shape in enumerate(SHAPES):
            for window in wgmma.WINDOWS if i % 3 == 1 or i == 0 else wgmma.WINDOWS[:2]:
                yield Case(op, window, shape, every[-1] if i else ())
        for fused in every[1:]:
            for shape in (SHAPES[0], SHAPES[5]):
                yield Case(op, wgmma.WINDOWS[0], shape, fused)


def operands(case: Case, side: int = 0) -> Arguments:
    """Random operands of one side of the op, on the CPU: activations and weights in bf16, rows in float32."""
    Ci, Co, N, H, W = case.shape
    k, stride, padding = case.window
    Ho, Wo = (out_size(size, *case.window) for size in (H, W))
    generator, fused = torch.Generator().manual_seed(side), case.sides[side]

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    def half(*shape: int, scale: float = 1.0) -> Tensor:
        return draw(*shape, scale=scale).to(torch.bfloat16)

    options: dict[str, Any] = {"kernel": k, "stride": stride, "padding": padding}
    x, d = half(GROUPS, N, H, W, Ci), half(GROUPS, N, Ho, Wo, Co)
    made: dict[str, Any] = {"norm_z": half(*d.shape), **{name: draw(GROUPS, Co) for name in NORM[1:]}}
    if case.op is conv_weight_gradient:
        made |= {"in_scale": draw(GROUPS, Ci), "in_shift": draw(GROUPS, Ci), "in_relu": True}
        return (x, d), options | {name: made[name] for name in fused}
    index = torch.tensor(INDEX, dtype=torch.int32)
    forward = case.op is grouped_conv
    size, channels = ((Ho, Wo), Co) if forward else ((H, W), Ci)
    out = (GROUPS, N, *size, channels)
    made |= {name: draw(SLOTS, channels) for name in ("bias", "scale", "next_scale", "next_shift", "mean")}
    # the second source is a shortcut: forward at twice the size, back at half of it
    other = [2 * side - 1 for side in size] if forward else [-(-side // 2) for side in size]
    made |= {
        "in_scale": draw(SLOTS, Ci), "in_shift": draw(SLOTS, Ci), "residual": half(*out), "z": half(*out),
        # away from the mean, so that one value too few in a sum is seen
        "center": draw(SLOTS, channels) - 3, "inv_std": draw(SLOTS, channels).abs() + 0.5,
        # powers of two, so that no rounding decides about a sign
        "mask_scale": torch.where(draw(SLOTS, channels) > 0, 2.0, -0.5), "mask_shift": draw(SLOTS, channels),
        "mask": True if forward else torch.randint(256, (*out[:4], -(-channels // 8)), generator=generator).byte(),
        "relu": True, "in_relu": True, "residual_first": True, "second": half(GROUPS, N, *other, 32),
        "second_weight": half(SLOTS, 1, 32, channels, scale=0.2), "second_bias": draw(SLOTS, channels),
        "second_stride": 2,
    }  # fmt: skip
    options |= {name: made[name] for name in fused}
    # as the packings have it: (taps, Ci, Co), and for the gradient (taps reversed, Co, Ci)
    weight = half(SLOTS, k * k, *((Ci, Co) if forward else (Co, Ci)), scale=(k * k * Ci) ** -0.5)
    if forward:
        return (x, weight, index), options
    return (d, weight, index), options | {"in_size": (H, W)}


def moved(value: Any, *to: Any) -> Any:
    """Floating tensors inside of ``value`` as ``Tensor.to(*to)``; others only to a device."""
    if isinstance(value, Tensor):
        return value.to(*to) if value.is_floating_point() or not isinstance(to[0], torch.dtype) else value
    if isinstance(value, dict):
        return {name: moved(one, *to) for name, one in value.items()}
    return tuple(moved(one, *to) for one in value) if isinstance(value, tuple) else value


def results(found: Any) -> dict[str, Tensor]:
    """The tensors that an op returned, by name; rows of partial sums added up, in float64."""
    if isinstance(found, Tensor):
        return {"gradient": found}
    named = {name: value for name, value in found._asdict().items() if value is not None}
    return {name: value.double().sum(1) if name == "statistics" else value for name, value in named.items()}


def bits(packed: Tensor, channels: int) -> Tensor:
    """(…, C/8) uint8 → (…, C) bool."""
    each = torch.arange(8, device=packed.device)
    return (packed[..., None] >> each & 1).flatten(-2)[..., :channels].bool()


class Worst(NamedTuple):
    """The element that is furthest off: how far as a part of the largest, its result's name, where, and both values."""

    error: float
    name: str = ""
    place: tuple[int, ...] = ()
    actual: float = 0.0
    expected: float = 0.0


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> Worst:
    """The worst element of all results; the bits have to be those of the values that came with them."""
    found = Worst(0.0)
    for name, right in expected.items():
        mine = actual[name].cpu()
        if name == "mask":
            value = actual.get("activated", actual["z"]).cpu()
            mine, right = bits(mine, value.shape[-1]), value > 0
        right, mine = right.double(), mine.double()
        # each of the two sums by its own size
        size = right.abs().amax((0, 2), keepdim=True) if name == "statistics" else right.abs().max()
        off = ((mine - right).abs() / size.clamp_min(1e-30)).nan_to_num(float("inf"), float("inf"))
        flat = int(off.argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), off.shape))
        if float(off[place]) > found.error:
            found = Worst(float(off[place]), name, place, float(mine[place]), float(right[place]))
    return found


def launched(case: Case, sides: Sequence[Arguments]) -> list[dict[str, Tensor]]:
    """The results of every side by the kernel."""
    if case.training is not None:
        names = "x", "weight", "weight_index"
        both = (dict(zip(names, arguments, strict=True)) | options for arguments, options in sides)
        return [results(found) for found in wgmma_joint_conv(*both)]
    kernel = wgmma.kernel(case.op)
    assert kernel is not None
    return [results(kernel(*arguments, **options)) for arguments, options in sides]


def check(case: Case, device: torch.device) -> str:
    """What is wrong with the kernel's results, "" where nothing is. Raises InputError where it does not cover them."""
    sides = [operands(case, side) for side in range(len(case.sides))]
    there = [(moved(arguments, device), moved(options, device)) for arguments, options in sides]
    first, second = (launched(case, there) for _ in range(2))
    for side, (arguments, options) in enumerate(sides):
        whose = f"side {side}: " if side else ""
        expected = results(case.op(*moved(arguments, torch.float64), **moved(options, torch.float64)))
        off = worst(first[side], expected)
        if off.error > ALLOWED:
            return f"{whose}{off.name}{list(off.place)} is {off.actual:.6g}, expected {off.expected:.6g}"
        moving = [name for name, value in first[side].items() if not torch.equal(value, second[side][name])]
        if moving:
            return f"{whose}{moving[0]} is not the same twice"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status as above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--copies", action="store_true")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    with wgmma.in_copies(options.copies):
        return prove(device)


def prove(device: torch.device) -> int:
    """Try all that there is for ``device``, a line each; the exit status."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        present = [op for op in wgmma.KERNELS if wgmma.built(op, 10 * major + minor)]
        torch.cuda.set_device(device)
    else:  # the references: what is compared and how can be tried anywhere
        present = [op for op in wgmma.KERNELS if wgmma.kernel(op)]
    if not present:
        print("there are no wgmma kernels for this device")
        return 2
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory starts as NaN
    wrong = 0
    for case in cases():
        if case.op not in present:
            continue
        try:
            found = check(case, device)
        except InputError as error:
            print(f"left out  {case.title}: {error}")
            continue
        wrong += bool(found)
        print(f"{'WRONG' if found else 'right'}  {case.title}{': ' if found else ''}{found}", flush=True)
    print(f"{wrong} wrong" if wrong else "all right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

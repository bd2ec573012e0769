"""The narrow wgmma convolution on the CPU, instruction by instruction, against the references.

``emulation.py`` runs what a GPU would, each role in a thread of its own, with NaN where nothing was written. Every case
runs twice: with everything asynchronous as early and as late as it may happen. Cases are such that every two options
meet (narrows.py); epilogues, windows and sizes that are odd among them.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from fastensdistill.kernels import wgmma_conv as kernels
from tests.kernels import narrows
from tests.kernels.emulation import call, hopper


@pytest.mark.parametrize("choice", narrows.FORWARD_CASES, ids=narrows.name_of)
def test_forward(choice, uninitialised_is_nan):
    narrows.check_forward(choice)


@pytest.mark.parametrize("choice", narrows.GRADIENT_CASES, ids=narrows.name_of)
def test_data_gradient(choice, uninitialised_is_nan):
    narrows.check_gradient(choice)


@pytest.mark.parametrize(
    ("factors", "cases"),
    [(narrows.FORWARD, narrows.FORWARD_CASES), (narrows.GRADIENT, narrows.GRADIENT_CASES)],
    ids=["forward", "gradient"],
)
def test_every_two_options_meet(factors, cases):
    apart = [
        (a, x, b, y)
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if not any(case[a] == x and case[b] == y for case in cases)
    ]
    never: set[tuple] = {("residual", kind, "mask", "z") for kind in ("last", "narrow")}
    never.add(("mask", "z", "sums", False))
    never.update(("window", (kernel, 1), "residual", "spread") for kernel in (1, 3))
    assert set(apart) == (never if factors is narrows.GRADIENT else set())


LAYERS = {
    "16": {"size": (1, 1, 32, 12), "channels": 16, "out_channels": 16, "window": (3, 1)},
    "32": {"size": (1, 2, 16, 9), "channels": 32, "out_channels": 32, "window": (3, 1)},
    "64-strided": {"size": (1, 1, 16, 16), "channels": 64, "out_channels": 32, "window": (3, 2)},
}


def layer(name: str, factors: dict, **options) -> dict:
    return {factor: choices[0] for factor, choices in factors.items()} | LAYERS[name] | options


@pytest.mark.parametrize("name", LAYERS)
def test_copies_serve_units_that_swizzle_offsets(name, uninitialised_is_nan):
    """Their operands start and go on at multiples of eight positions; without, such a unit reads other channels."""
    with hopper(swizzle_offsets=True):
        narrows.check_forward(layer(name, narrows.FORWARD, copies=True, prologue="relu", second=(16, 1)))
        narrows.check_gradient(layer(name, narrows.GRADIENT, copies=True, norm=True, second=16))
        with pytest.raises(AssertionError, match=r"^z: "):
            narrows.check_forward(layer(name, narrows.FORWARD))
        with pytest.raises(AssertionError, match=r"^d: "):
            narrows.check_gradient(layer(name, narrows.GRADIENT))


def test_nan_is_passed_on(uninitialised_is_nan):
    """A ReLU that turns NaN into 0 would hide a diverged network; on load, and in both outputs."""
    x = torch.ones(1, 1, 6, 7, 16, dtype=torch.bfloat16)
    x[0, 0, 2, 3, 5] = float("nan")
    weight, index = torch.ones(1, 9, 16, 16, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)
    rows = torch.ones(1, 16)
    operands, window, _ = kernels.conv_operands(
        x, weight, index, kernel=3, padding=1, in_scale=rows, in_shift=rows, in_relu=True, relu=True, next_scale=rows,
        next_shift=rows,
    )  # fmt: skip
    z, activated, _, _ = call("wgmma_conv", *operands, *window, 132, False)
    for value in (z, activated):
        assert value[0, 0, 1:4, 2:5].isnan().all()
        assert value.isnan().sum() == 9 * 16

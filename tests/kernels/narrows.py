"""What the narrow wgmma convolution is tested on: every pair of sizes and options, and how results are compared."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fastensdistill.kernels import wgmma_conv as kernels
from fastensdistill.kernels.conv_data_gradient import data_gradient_operands
from fastensdistill.kernels.grouped_conv import conv_operands, conv_output
from fastensdistill.kernels.operands import out_size
from fastensdistill.kernels.ops import present
from fastensdistill.kernels.reference import pack_mask, pick
from tests.compare import check_close
from tests.kernels.both import values
from tests.kernels.emulation import both_ways
from tests.kernels.halos import check_value

BF16 = torch.bfloat16
SLOTS = 3
# (groups, images, height, width) of the result forward and backward; tiles of one to 32 lines
SIZES = [(2, 1, 6, 8), (1, 3, 7, 5), (3, 2, 1, 1), (1, 5, 8, 9), (2, 1, 33, 3), (1, 9, 4, 17)]
COMMON: dict[str, list[Any]] = {
    "size": SIZES,
    "channels": [16, 32, 48, 64, 128],  # boxes of 16, 32 and 64 channels, whole and in part, one and two of them
    "out_channels": [16, 32],
    "window": [(3, 1), (3, 2), (1, 1), (1, 2)],  # kernel, stride
    "copies": [False, True],
    "multiprocessors": [1, 5, 132],  # so that blocks take many tiles, and none
}
FORWARD = COMMON | {
    "shared": [False, True],
    "bias": [False, True],
    "relu": [False, True],
    "residual": ["", "same", "strided"],
    "next": [False, True],
    "mask": [False, True],
    "center": [False, True],
    "prologue": ["", "norm", "relu"],
    "second": [(), (16, 1), (48, 2)],  # channels, stride
}
GRADIENT = COMMON | {
    "residual": ["", "first", "last", "spread", "narrow"],
    "mask": ["", "bits", "z"],
    "scale": [False, True],
    "sums": [False, True],
    "norm": [False, True],
    "second": [0, 16, 48],  # channels
}


def pairwise(factors: dict[str, list[Any]], covered: Any) -> list[dict[str, Any]]:
    """Choices such that every two options of different factors meet in one that is ``covered``."""
    names = list(factors)
    pairs = list(itertools.combinations(names, 2))
    options = [(a, x, b, y) for a, b in pairs for x in factors[a] for y in factors[b]]
    left, found = dict.fromkeys(map(repr, options)), []

    def new(choice: dict[str, Any]) -> list[str]:
        return [key for a, b in pairs if (key := repr((a, choice[a], b, choice[b]))) in left]

    for a, x, b, y in options:
        if repr((a, x, b, y)) not in left:
            continue
        others = [name for name in names if name not in (a, b)]
        choice = {name: factors[name][0] for name in names} | {a: x, b: y}
        changed = [choice, *(choice | {name: option} for name in others for option in factors[name])]
        if not (possible := list(filter(covered, changed))):
            continue
        choice = possible[0]
        for name in others:
            tries = [choice | {name: option} for option in factors[name]]
            choice = max((t for t in tries if covered(t)), key=lambda t: len(new(t)))
        for key in new(choice):
            del left[key]
        found.append(choice)
    return found


def _gradient_is_covered(choice: dict[str, Any]) -> bool:
    mask_from_z, stride = choice["mask"] == "z", choice["window"][1]
    return not (
        (mask_from_z and choice["residual"] in ("last", "narrow"))
        or (mask_from_z and not choice["sums"])
        or (stride == 1 and choice["residual"] == "spread")
    )


FORWARD_CASES = pairwise(FORWARD, lambda choice: True)
GRADIENT_CASES = pairwise(GRADIENT, _gradient_is_covered)


def name_of(choice: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "") or "no" for value in choice.values())


def _weights(choice: dict[str, Any]) -> tuple[Tensor, Tensor]:
    taps, channels, groups = choice["window"][0] ** 2, choice["channels"], choice["size"][0]
    weight = values(SLOTS, taps, channels, choice["out_channels"], dtype=BF16, scale=(taps * channels) ** -0.5)
    return weight, torch.tensor([(2 * g + 2) % SLOTS for g in range(groups)], dtype=torch.int32)


def _window(choice: dict[str, Any]) -> dict[str, Any]:
    kernel, stride = choice["window"]
    return {"kernel": kernel, "stride": stride, "padding": kernel // 2}


def check_forward(choice: dict[str, Any]) -> None:
    """z against the reference; what follows from z as stored, exactly that (sums up to their order)."""
    groups, images, height, width = choice["size"]
    n, stride = choice["out_channels"], choice["window"][1]
    out = (groups, images, height, width)
    x = values(1 if choice["shared"] else groups, images, stride * height, stride * width - stride + 1,
               choice["channels"], dtype=BF16)  # fmt: skip
    weight, weight_index = _weights(choice)
    o: dict[str, Any] = {"relu": choice["relu"], "mask": choice["mask"]}
    if choice["bias"]:
        o["bias"] = values(SLOTS, n)
    if choice["residual"] == "same":
        o["residual"] = values(*out, n, dtype=BF16, seed=1)
    if choice["residual"] == "strided":
        o |= {"residual": values(*out[:2], 2 * height - 1, 2 * width, n // 2, dtype=BF16, seed=2), "residual_stride": 2}
    if choice["next"]:
        o |= {"next_scale": values(SLOTS, n, seed=3), "next_shift": values(SLOTS, n, seed=4)}
    if choice["center"]:
        o["center"] = values(1, n, seed=5)
    if choice["prologue"]:
        o |= {"in_scale": values(SLOTS, choice["channels"], seed=6), "in_relu": choice["prologue"] == "relu",
              "in_shift": 2 + values(SLOTS, choice["channels"], seed=7)}  # fmt: skip
    if choice["second"]:
        c, s = choice["second"]
        o |= {"second": values(*out[:2], s * height - s + 1, s * width, c, dtype=BF16, seed=8), "second_stride": s,
              "second_weight": values(SLOTS, 1, c, n, dtype=BF16, seed=9, scale=c**-0.5),
              "second_bias": values(SLOTS, n, seed=10)}  # fmt: skip
    operands, window, _ = conv_operands(x, weight, weight_index, **_window(choice), **o)
    rest = (choice["multiprocessors"], choice["copies"])
    z, *others = both_ways("wgmma_conv", *operands, *window, *rest)
    actual = conv_output(z, *others)
    expected = conv_output(*kernels.wgmma_conv_reference(operands, window, *rest))
    assert [a is None for a in actual] == [e is None for e in expected]
    check_value("z", z, expected.z)
    seen = z.float()
    if actual.activated is not None:
        seen = (seen * pick(o["next_scale"], weight_index) + pick(o["next_shift"], weight_index)).relu().to(BF16)
        check_value("activated", actual.activated, seen)
        seen = actual.activated
    if actual.mask is not None:
        assert torch.equal(actual.mask, pack_mask(seen > 0))
    if actual.statistics is not None:
        rows = kernels.conv_rows(operands, window, choice["multiprocessors"])
        centred = z.double() - pick(o["center"], weight_index)
        check_close("statistics", actual.statistics, torch.stack([rows.sums(centred), rows.sums(centred**2)], 2), 1e-5)


def check_gradient(choice: dict[str, Any]) -> None:
    """For a convolution from ``out_channels`` to ``channels``: the kernel makes ``out_channels``."""
    groups, images, height, width = choice["size"]
    n, stride = choice["out_channels"], choice["window"][1]
    shape, padding = (groups, images, height, width, n), choice["window"][0] // 2
    small = (groups, images, *(out_size(s, choice["window"][0], stride, padding) for s in (height, width)))
    d = values(*small, choice["channels"], dtype=BF16)
    weight, weight_index = _weights(choice)
    o: dict[str, Any] = {"residual_first": choice["residual"] in ("first", "spread")}
    if choice["residual"] in ("first", "last"):
        o["residual"] = values(*shape, dtype=BF16, seed=1)
    if choice["residual"] in ("spread", "narrow"):
        more = n + 16 if choice["residual"] == "spread" else 8
        o |= {"residual": values(*small, more, dtype=BF16, seed=2), "residual_stride": stride}
    if choice["mask"] == "bits":
        o["mask"] = pack_mask(values(*shape, seed=3) > 0)
    if choice["scale"]:
        o["scale"] = values(SLOTS, n, seed=4)
    if choice["sums"]:
        o |= {"z": values(*shape, dtype=BF16, seed=5), "mean": values(SLOTS, n, seed=6),
              "inv_std": values(SLOTS, n, seed=7).abs()}  # fmt: skip
    if choice["mask"] == "z":
        o |= {"mask_scale": values(SLOTS, n, seed=8), "mask_shift": values(SLOTS, n, seed=9)}
    if choice["norm"]:
        o |= {f"norm_{letter}": values(groups, choice["channels"], seed=10 + i) for i, letter in enumerate("abc")}
        o["norm_z"] = values(*small, choice["channels"], dtype=BF16, seed=13)
    if choice["second"]:
        o |= {"second": values(*small, choice["second"], dtype=BF16, seed=14), "second_stride": stride,
              "second_weight": values(SLOTS, 1, choice["second"], n, dtype=BF16, seed=15, scale=0.2)}  # fmt: skip
    operands, epilogue, window, _ = data_gradient_operands(
        d, weight, weight_index, in_size=(height, width), **_window(choice), **o
    )
    mine = kernels.WgmmaGradientOperands(
        **{field: getattr(operands, field) for field in kernels.WgmmaGradientOperands._fields}
    )
    rest = (choice["multiprocessors"], choice["copies"])
    out, statistics = both_ways("wgmma_data_gradient", *mine, *epilogue, *window, *rest)
    expected, _ = kernels.wgmma_data_gradient_reference(mine, epilogue, window, *rest)
    check_value("d", out, expected)
    assert (present(statistics) is None) == (not choice["sums"])
    if choice["sums"]:
        rows = kernels.gradient_rows(mine, window, choice["multiprocessors"])
        standard = (o["z"].double() - pick(o["mean"], weight_index)) * pick(o["inv_std"], weight_index)
        wide = out.double()
        check_close("statistics", statistics, torch.stack([rows.sums(wide), rows.sums(wide * standard)], 2), 1e-5)

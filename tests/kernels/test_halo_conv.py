"""The halo convolution's ops: references, tiles, refusals, and on a device the kernels against PyTorch.

What the kernels do instruction by instruction is tested without a device in ``test_halo_blocks.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels import halo_conv as halo
from fastensdistill.kernels.conv_data_gradient import DataGradient, conv_data_gradient, flip_weight
from fastensdistill.kernels.elementwise_gradient import GradientEpilogue
from fastensdistill.kernels.grouped_conv import ConvOperands, ConvOutput, grouped_conv
from fastensdistill.kernels.reference import pack_mask, pick
from fastensdistill.kernels.vendor_conv import vendor_conv
from tests.compare import check_close
from tests.kernels.both import values
from tests.kernels.rounding import rounding

BF16 = torch.bfloat16
SLOTS = 3


class Case(NamedTuple):
    name: str
    groups: int
    images: int
    height: int
    width: int
    channels: int
    out_channels: int


CASES = [
    Case("16", 2, 1, 6, 8, 16, 16),
    Case("16-odd-four-groups", 4, 3, 7, 5, 16, 16),
    Case("two-chunks-of-16", 1, 2, 5, 7, 32, 16),  # odd size; the ring is two stages deep: one step per chunk
    Case("16-to-64", 2, 1, 4, 5, 16, 64),  # a quarter of a block's input channels
    Case("32", 3, 2, 3, 3, 32, 32),
    Case("32-two-chunks", 1, 1, 4, 4, 64, 32),
    Case("48-channels", 1, 1, 5, 5, 48, 48),  # a partial chunk after a whole one; three blocks of 16 channels
    Case("64", 2, 1, 9, 32, 64, 64),  # two tiles of 8 rows down, the second with one row
    Case("64-eight-by-eight", 2, 5, 8, 8, 64, 64),  # whole images: four in a tile, one in the next
    Case("80-to-64", 1, 1, 6, 5, 80, 64),  # a whole and a quarter chunk
    Case("128", 1, 2, 8, 8, 128, 128),
    Case("160-to-160", 1, 1, 4, 4, 160, 160),
    Case("wide", 1, 1, 3, 40, 16, 16),  # two tiles of 20 columns across
    Case("one-pixel", 2, 50, 1, 1, 16, 16),  # 45 images a tile: the border bounds it
    Case("one-row", 1, 2, 1, 9, 16, 32),
    Case("three-blocks-of-64", 1, 1, 3, 4, 16, 192),
]


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x, weights of SLOTS slots, and a map from groups to slots that permutes, repeats and skips some."""
    x = values(case.groups, case.images, case.height, case.width, case.channels, dtype=BF16)
    weight = values(SLOTS, 9, case.channels, case.out_channels, dtype=BF16, scale=(9 * case.channels) ** -0.5)
    return x, weight, torch.tensor([(2 * g + 2) % SLOTS for g in range(case.groups)], dtype=torch.int32)


SHAPE = {"kernel": 3, "stride": 1, "padding": 1}


def epilogues(case: Case) -> dict[str, dict]:
    n, out = case.out_channels, (case.groups, case.images, case.height, case.width)
    residual = values(*out, n, dtype=BF16, seed=1)
    following = {"next_scale": values(SLOTS, n, seed=2), "next_shift": values(SLOTS, n, seed=3)}
    prologue = {"in_scale": values(SLOTS, case.channels, seed=5), "in_shift": 2 + values(SLOTS, case.channels, seed=6)}
    strided = values(*out[:2], 2 * case.height - 1, 2 * case.width, n // 2, dtype=BF16, seed=4)
    return {
        "bias-relu-mask": {"bias": values(SLOTS, n), "relu": True, "mask": True},
        "residual-next-mask": {"residual": residual, **following, "mask": True},
        "bias-next-shared-rows": {"bias": values(1, n), **{k: v[:1].clone() for k, v in following.items()}},
        "statistics": {"center": values(1, n)},
        "everything": {
            "bias": values(SLOTS, n), "residual": residual, "relu": True, **following, "center": values(SLOTS, n),
            "mask": True,
        },
        "strided-shortcut": {"residual": strided, "residual_stride": 2, "relu": True, "mask": True},
        "prologue": {**prologue, "center": values(SLOTS, n)},
        "one-input-for-all": {"shared": True, **{name: rows[:1] for name, rows in prologue.items()}},
    }  # fmt: skip


def gradient_epilogues(case: Case) -> dict[str, dict]:
    """For a convolution from the case's out_channels to its channels: the kernel computes what the case says."""
    n, shape = case.out_channels, (case.groups, case.images, case.height, case.width)
    mask = {"mask": pack_mask(values(*shape, n, seed=1) > 0)}
    residual = {"residual": values(*shape, n, dtype=BF16, seed=2)}
    small = values(*shape[:2], -(-case.height // 2), -(-case.width // 2), n + 16, dtype=BF16)
    sums = {"z": values(*shape, n, dtype=BF16, seed=3), "mean": values(1, n, seed=4), "inv_std": values(1, n).abs()}
    per_slot = {name: rows.expand(SLOTS, -1).contiguous() for name, rows in sums.items() if name != "z"}
    return {
        "plain": {},
        "mask": mask,
        "mask-scale-residual": {**mask, "scale": values(SLOTS, n), **residual},
        "residual-first-mask": {**residual, "residual_first": True, **mask},
        "padded-shortcut": {"residual": small, "residual_stride": 2, "residual_first": True, **mask},
        "narrow-shortcut-last": {"residual": small[..., :8].contiguous(), "residual_stride": 2},
        "mask-sums": {**mask, **sums},
        "residual-first-mask-sums": {**residual, "residual_first": True, **mask, **sums, **per_slot},
    }  # fmt: skip


def check_value(name: str, actual: Tensor, expected: Tensor) -> None:
    """What differs is the other neighbour in bf16, and little does: the order of sums, on a device truncation."""
    check_close(name, actual, expected, rounding(expected, BF16))
    share = (actual.double().cpu() != expected.double().cpu()).double().mean().item()
    assert share <= max(0.05, 1 / expected.numel()), f"{name}: {share:.1%} of the values are rounded differently"


def check_forward(actual: ConvOutput, x: Tensor, weight: Tensor, slots: Tensor, options: dict) -> None:
    """z against the reference; what follows from z as stored, exactly that (sums up to their order)."""
    expected = halo.halo_conv(x, weight, slots, **SHAPE, **options)
    assert [a is None for a in actual] == [e is None for e in expected]
    check_value("z", actual.z, expected.z)
    z = actual.z.float()
    if actual.activated is not None:
        z = (z * pick(options["next_scale"], slots) + pick(options["next_shift"], slots)).relu().to(BF16)
        check_value("activated", actual.activated, z)
        z = actual.activated
    if actual.mask is not None:
        assert torch.equal(actual.mask, pack_mask(z > 0))
    if actual.statistics is not None:
        rest = actual.z.double() - pick(options["center"], slots)
        tile = list(halo.halo_tile(*x.shape[1:4], weight.shape[3]))
        sums = torch.stack([halo._tile_sums(rest, tile), halo._tile_sums(rest.square(), tile)], 2)
        check_close("statistics", actual.statistics, sums, 1e-5)


def check_gradient(actual: DataGradient, d: Tensor, weight: Tensor, slots: Tensor, options: dict) -> None:
    expected = halo.halo_data_gradient(d, weight, slots, in_size=tuple(d.shape[2:4]), **SHAPE, **options)
    check_value("d", actual.d, expected.d)
    assert (actual.statistics is None) == (expected.statistics is None)
    if actual.statistics is not None:
        wide, standard = actual.d.double(), options["z"].double() - pick(options["mean"], slots)
        tile = list(halo.halo_tile(*d.shape[1:4], weight.shape[3]))
        product = wide * standard * pick(options["inv_std"], slots)
        sums = torch.stack([halo._tile_sums(wide, tile), halo._tile_sums(product, tile)], 2)
        check_close("statistics", actual.statistics, sums, 1e-5)


by_name = {case.name: case for case in CASES}
FEW = [by_name[name] for name in ("16-odd-four-groups", "32", "64-eight-by-eight", "160-to-160", "128")]


def test_references_are_those_of_the_other_convolution():
    """Same values as grouped_conv and conv_data_gradient; the partial sums have other rows and the same total."""
    case = by_name["16-odd-four-groups"]
    x, weight, slots = operands(case)
    options = epilogues(case)["everything"]
    for one, other in zip(
        halo.halo_conv(x, weight, slots, **SHAPE, **options), grouped_conv(x, weight, slots, **SHAPE, **options),
        strict=True,
    ):  # fmt: skip
        a, b = (t.sum(1) if t.dtype == torch.float32 else t.double() for t in (one, other))
        check_close("forward", a, b, 1e-5)
    options, size = gradient_epilogues(case)["mask-sums"], {"in_size": tuple(x.shape[2:4]), **SHAPE}
    one = halo.halo_data_gradient(x, flip_weight(weight).transpose(2, 3).contiguous(), slots, **size, **options)
    other = conv_data_gradient(x, flip_weight(weight).transpose(2, 3).contiguous(), slots, **size, **options)
    check_close("d", one.d, other.d, 0)
    check_close("sums", one.statistics.sum(1), other.statistics.sum(1), 1e-5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((128, 32, 32, 64), (1, 8, 32, 64)),
        ((128, 16, 16, 128), (1, 16, 16, 128)),
        ((128, 8, 8, 256), (4, 8, 8, 128)),
        ((128, 32, 32, 16), (1, 8, 32, 16)),
        ((128, 32, 32, 160), (1, 8, 32, 32)),
        ((16, 56, 56, 64), (1, 8, 28, 64)),
        ((3, 8, 8, 320), (3, 8, 8, 64)),
        ((9, 7, 7, 640), (5, 7, 7, 128)),
        ((1, 5, 300, 16), (1, 5, 30, 16)),
    ],
)
def test_tiles(shape, expected):
    assert halo.halo_tile(*shape) == expected


def test_every_tile_fits():
    for height in (*range(1, 40), 56, 112, 224):
        for width in (*range(1, 40), 56, 112, 224):
            for images in (1, 3, 500):
                n, h, w, _ = halo.halo_tile(images, height, width, 16)
                assert min(n, h, w) >= 1
                assert n * h * w <= halo.POSITIONS
                assert n * (h + 2) * (w + 2) <= halo.BORDERED
                assert n == 1 or (h, w) == (height, width), "only whole images share a tile"


X, W, S = operands(CASES[0])
REFUSED = {
    "another kernel size": (lambda: halo.halo_conv(X, W[:, :1].contiguous(), S, kernel=1), "kernel 1, stride 1"),
    "a stride": (lambda: halo.halo_conv(X, W, S, kernel=3, stride=2, padding=1), "kernel 3, stride 2, padding 1"),
    "a stem": (
        lambda: halo.halo_conv(X[..., :3].contiguous(), W[:, :, :3].contiguous(), S, **SHAPE), "3 to 16 channels",
    ),
    "float32": (lambda: halo.halo_conv(X.float(), W.float(), S, **SHAPE), "torch.float32, expected torch.bfloat16"),
    "float32 pixels": (lambda: halo.halo_conv(X.float(), W, S, **SHAPE), "torch.float32, expected torch.bfloat16"),
    "what grouped_conv refuses": (lambda: halo.halo_conv(X, W, S.long(), **SHAPE), "expected int32"),
    "an odd residual": (
        lambda: halo.halo_conv(X, W, S, **SHAPE, residual=X[..., :5].contiguous()), "a residual of 5 channels",
    ),
    "a gradient in float32": (
        lambda: halo.halo_data_gradient(X, W, S, in_size=(6, 8), **SHAPE, out_dtype=torch.float32), "a result in",
    ),
    "a gradient at a stride": (
        lambda: halo.halo_data_gradient(X, W, S, in_size=(12, 16), kernel=3, stride=2, padding=1), "stride 2",
    ),
    "what conv_data_gradient refuses": (
        lambda: halo.halo_data_gradient(X, W, S, in_size=(9, 9), **SHAPE), r"d has size \(6, 8\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals(name):
    function, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        function()


def test_support():
    assert all(halo.supports(a, b, halo.WINDOW, BF16) for a in (16, 48, 160) for b in (32, 640))
    assert not halo.supports(16, 24, halo.WINDOW, BF16)
    assert not halo.supports(16, 16, halo.WINDOW._replace(kernel=1), BF16)
    assert [halo.block_channels(n) for n in (16, 48, 64, 160, 320, 640)] == [16, 16, 64, 32, 64, 128]
    with halo.at_most(64):
        assert halo.halo_tile(1, 8, 8, 640).channels == halo.block_channels(640, 128) // 2 == 64


def test_one_graph_under_torch_compile():
    def both(x, weight, slots, center):
        out = halo.halo_conv(x, weight, slots, **SHAPE, center=center)
        back = halo.halo_data_gradient(out.z, weight, slots, in_size=(6, 8), **SHAPE)
        return out.z, out.statistics, back.d

    arguments = (X, W, S, torch.ones(1, 16))
    compiled = torch.compile(both, fullgraph=True, backend="eager")(*arguments)
    for a, e in zip(compiled, both(*arguments), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("epilogue", ["statistics", "everything", "prologue"])
def test_opcheck_forward(epilogue):
    call = (*ConvOperands(X, W, S, **epilogues(CASES[0])[epilogue]), [1, 6, 8, 16])
    torch.library.opcheck(torch.ops.fastensdistill.halo_conv.default, call)


@pytest.mark.parametrize("epilogue", ["plain", "mask-scale-residual", "mask-sums"])
def test_opcheck_gradient(epilogue):
    call = (X, W, S, *GradientEpilogue(**gradient_epilogues(CASES[0])[epilogue]), [1, 6, 8, 16])
    torch.library.opcheck(torch.ops.fastensdistill.halo_data_gradient.default, call)


# ---- on a device

WRN28_4 = [
    Case("wrn28_4-1", 4, 16, 32, 32, 16, 64),
    Case("wrn28_4-1b", 4, 16, 32, 32, 64, 64),
    Case("wrn28_4-2", 4, 16, 16, 16, 128, 128),
    Case("wrn28_4-3", 4, 18, 8, 8, 256, 256),
    Case("wrn28_4-3b", 2, 128, 8, 8, 256, 256),
]
on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def moved(value):
    return value.cuda() if isinstance(value, Tensor) else value


def twice(op, *arguments, **options):
    """On the device, from memory that starts as NaN; both runs give the same bits."""
    assert halo.built(), "the extension has no CUDA kernels"
    arguments, options = [moved(a) for a in arguments], {name: moved(value) for name, value in options.items()}
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        one, other = op(*arguments, **options), op(*arguments, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, a, b in zip(one._fields, one, other, strict=True):
        assert a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{name}: two runs differ"
    return type(one)(*(None if value is None else value.cpu() for value in one))


class TestDevice:
    pytestmark = on_device

    @pytest.mark.parametrize("case", [*CASES, *WRN28_4], ids=lambda c: c.name)
    def test_forward(self, case):
        for options in ({}, *epilogues(case).values()):
            x, weight, slots = operands(case)
            if options.pop("shared", False):
                x = x[:1].contiguous()
            check_forward(twice(halo.halo_conv, x, weight, slots, **SHAPE, **options), x, weight, slots, options)

    @pytest.mark.parametrize("case", [*CASES, *WRN28_4], ids=lambda c: c.name)
    def test_data_gradient(self, case):
        d, weight, slots = operands(case)
        size = {"in_size": (case.height, case.width), **SHAPE}
        for options in gradient_epilogues(case).values():
            actual = twice(halo.halo_data_gradient, d, weight, slots, **size, **options)
            check_gradient(actual, d, weight, slots, options)

    @pytest.mark.parametrize("case", WRN28_4, ids=lambda c: c.name)
    def test_errs_as_pytorchs_own_bf16(self, case):
        x, weight, slots = (t.cuda() for t in operands(case))
        exact = grouped_conv(x.double(), weight.double(), slots, **SHAPE).z
        own = vendor_conv(x, weight, slots, **SHAPE).z
        mine = halo.halo_conv(x, weight, slots, **SHAPE).z
        errors = [(z.double() - exact).square().mean().sqrt().item() for z in (mine, own)]
        assert errors[0] <= 2 * errors[1]

    def test_views_at_odd_offsets(self):
        case = by_name["64"]
        x, weight, slots = (t.cuda() for t in operands(case))
        shifted = torch.empty(weight.numel() + 1, dtype=BF16, device="cuda")[1:].view_as(weight).copy_(weight)
        expected = halo.halo_conv(x, weight, slots, **SHAPE).z
        assert torch.equal(halo.halo_conv(x, shifted, slots, **SHAPE).z, expected)

    def test_an_operand_on_the_cpu_is_refused(self):
        """In a kernel it would end the process' use of the device."""
        x, weight, slots = (t.cuda() for t in operands(CASES[0]))
        for given in ({"weight_index": slots.cpu()}, {"bias": torch.ones(1, 16)}):
            (name,) = given
            call = {"weight_index": slots, **given}
            with pytest.raises(RuntimeError, match=f"{name} is .* on the CPU; expected .* on CUDA device"):
                halo.halo_conv(x, weight, **SHAPE, **call)
        mask = pack_mask(torch.ones(x.shape, dtype=torch.bool))
        with pytest.raises(RuntimeError, match=r"mask is .* on the CPU; expected .* on CUDA device"):
            halo.halo_data_gradient(x, weight, slots, in_size=(6, 8), **SHAPE, mask=mask)
        torch.cuda.synchronize()

    def test_a_graph_of_a_large_tile_outlives_a_launch_of_a_small_one(self):
        """The limit of shared memory belongs to the kernel: the small launch must not lower it."""
        large = [t.cuda() for t in operands(Case("large", 1, 4, 8, 8, 256, 128))]
        small = [t.cuda() for t in operands(Case("small", 1, 1, 2, 2, 64, 128))]
        expected = halo.halo_conv(*large, **SHAPE).z
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = halo.halo_conv(*large, **SHAPE).z
        halo.halo_conv(*small, **SHAPE)
        graph.replay()
        assert torch.equal(z, expected)

    def test_inside_a_captured_graph(self):
        """New slots and a new input take effect at replay."""
        case = by_name["128"]
        x, weight, slots = (t.cuda() for t in operands(case))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            halo.halo_conv(x, weight, slots, **SHAPE)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = halo.halo_conv(x, weight, slots, **SHAPE).z
        x.mul_(-0.5)
        slots.fill_(1)
        graph.replay()
        assert torch.equal(z, halo.halo_conv(x, weight, slots, **SHAPE).z)

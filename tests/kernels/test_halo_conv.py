"""The halo convolution's ops: references, tiles, refusals, and on a device the kernels against PyTorch.

What the kernels do instruction by instruction is tested without a device in ``test_halo_blocks.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels import halo_conv as halo
from fastensdistill.kernels.conv_data_gradient import conv_data_gradient, flip_weight
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.reference import pack_mask
from fastensdistill.kernels.vendor_conv import vendor_conv
from tests.compare import check_close
from tests.kernels.halos import (
    BF16,
    CASES,
    SHAPE,
    Case,
    by_name,
    check_forward,
    check_gradient,
    epilogues,
    gradient_epilogues,
    operands,
)
from tests.untyped import present, untyped


def test_references_are_those_of_the_other_convolution():
    """Same values as grouped_conv and conv_data_gradient; the partial sums have other rows and the same total."""
    case = by_name["16-odd-four-groups"]
    x, weight, weight_index = operands(case)
    options = epilogues(case)["everything"]
    for one, other in zip(
        halo.halo_conv(x, weight, weight_index, **SHAPE, **options),
        grouped_conv(x, weight, weight_index, **SHAPE, **options),
        strict=True,
    ):
        a, b = (t.sum(1) if t.dtype == torch.float32 else t.double() for t in (untyped(one), untyped(other)))
        check_close("forward", a, b, 1e-5)
    options, size = gradient_epilogues(case)["mask-sums"], {"in_size": tuple(x.shape[2:4]), **SHAPE}
    gradient = halo.halo_data_gradient(
        x, flip_weight(weight).transpose(2, 3).contiguous(), weight_index, **size, **options
    )
    turned = flip_weight(weight).transpose(2, 3).contiguous()
    expected = conv_data_gradient(x, turned, weight_index, **untyped(size), **options)
    check_close("d", gradient.d, expected.d, 0)
    check_close("sums", present(gradient.statistics).sum(1), present(expected.statistics).sum(1), 1e-5)


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
    def both(x, weight, weight_index, center):
        out = halo.halo_conv(x, weight, weight_index, **SHAPE, center=center)
        back = halo.halo_data_gradient(out.z, weight, weight_index, in_size=(6, 8), **SHAPE)
        return out.z, out.statistics, back.d

    arguments = (X, W, S, torch.ones(1, 16))
    compiled = torch.compile(both, fullgraph=True, backend="eager")(*arguments)
    for a, e in zip(compiled, both(*arguments), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("epilogue", ["statistics", "everything", "prologue"])
def test_opcheck_forward(epilogue):
    call = (*halo.HaloOperands(X, W, S, **epilogues(CASES[0])[epilogue]), [1, 6, 8, 16])
    torch.library.opcheck(torch.ops.fastensdistill.halo_conv.default, call)


@pytest.mark.parametrize("epilogue", ["plain", "mask-scale-residual", "mask-sums"])
def test_opcheck_gradient(epilogue):
    call = (X, W, S, *halo.HaloEpilogue(**gradient_epilogues(CASES[0])[epilogue]), [1, 6, 8, 16])
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
    arguments, options = untyped([moved(a) for a in arguments]), {name: moved(value) for name, value in options.items()}
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
            x, weight, weight_index = operands(case)
            if options.pop("shared", False):
                x = x[:1].contiguous()
            check_forward(
                twice(halo.halo_conv, x, weight, weight_index, **SHAPE, **options), x, weight, weight_index, options
            )

    @pytest.mark.parametrize("case", [*CASES, *WRN28_4], ids=lambda c: c.name)
    def test_data_gradient(self, case):
        d, weight, weight_index = operands(case)
        size = {"in_size": (case.height, case.width), **SHAPE}
        for options in gradient_epilogues(case).values():
            actual = twice(halo.halo_data_gradient, d, weight, weight_index, **size, **options)
            check_gradient(actual, d, weight, weight_index, options)

    @pytest.mark.parametrize("case", WRN28_4, ids=lambda c: c.name)
    def test_errs_as_pytorchs_own_bf16(self, case):
        x, weight, weight_index = (t.cuda() for t in operands(case))
        exact = grouped_conv(x.double(), weight.double(), weight_index, **SHAPE).z
        own = vendor_conv(x, weight, weight_index, **SHAPE).z
        mine = halo.halo_conv(x, weight, weight_index, **SHAPE).z
        errors = [(z.double() - exact).square().mean().sqrt().item() for z in (mine, own)]
        assert errors[0] <= 2 * errors[1]

    def test_views_at_odd_offsets(self):
        case = by_name["64"]
        x, weight, weight_index = (t.cuda() for t in operands(case))
        shifted = torch.empty(weight.numel() + 1, dtype=BF16, device="cuda")[1:].view_as(weight).copy_(weight)
        expected = halo.halo_conv(x, weight, weight_index, **SHAPE).z
        assert torch.equal(halo.halo_conv(x, shifted, weight_index, **SHAPE).z, expected)

    def test_an_operand_on_the_cpu_is_refused(self):
        """In a kernel it would end the process' use of the device."""
        x, weight, weight_index = (t.cuda() for t in operands(CASES[0]))
        for given in ({"weight_index": weight_index.cpu()}, {"bias": torch.ones(1, 16)}):
            (name,) = given
            call = {"weight_index": weight_index, **given}
            with pytest.raises(RuntimeError, match=f"{name} is .* on the CPU; expected .* on CUDA device"):
                halo.halo_conv(x, weight, **SHAPE, **call)
        mask = pack_mask(torch.ones(x.shape, dtype=torch.bool))
        with pytest.raises(RuntimeError, match=r"mask is .* on the CPU; expected .* on CUDA device"):
            halo.halo_data_gradient(x, weight, weight_index, in_size=(6, 8), **SHAPE, mask=mask)
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
        x, weight, weight_index = (t.cuda() for t in operands(case))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            halo.halo_conv(x, weight, weight_index, **SHAPE)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = halo.halo_conv(x, weight, weight_index, **SHAPE).z
        x.mul_(-0.5)
        weight_index.fill_(1)
        graph.replay()
        assert torch.equal(z, halo.halo_conv(x, weight, weight_index, **SHAPE).z)

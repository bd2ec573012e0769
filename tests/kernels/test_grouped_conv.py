import pytest
import torch
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.reference import pack_mask, unpack_mask
from tests.compare import check_close
from tests.kernels.both import DEVICE, TOLERANCE, check_op, run_kernel, values
from tests.kernels.convs import CASES, SLOTS, Case, each_conv, each_stem, operands
from tests.untyped import present, untyped


@each_conv
def test_plain(case):
    check_op(grouped_conv, *operands(case), **case.shape, tolerance=TOLERANCE[case.dtype])


def _epilogues(case: Case) -> dict[str, dict]:
    n, out = case.out_channels, (case.groups, case.images, *case.out)
    residual = values(*out, n, dtype=case.dtype, seed=1)
    following = {"next_scale": values(SLOTS, n, seed=2), "next_shift": values(SLOTS, n, seed=3)}
    strided = values(*out[:2], 2 * out[2] - 1, 2 * out[3], n // 2, dtype=case.dtype, seed=4)
    return {
        "bias-relu-mask": {"bias": values(SLOTS, n), "relu": True, "mask": True},
        "residual-next-mask": {"residual": residual, **following, "mask": True},
        "bias-residual-relu-mask": {"bias": values(1, n), "residual": residual, "relu": True, "mask": True},
        "bias-next": {"bias": values(SLOTS, n), **following},
        "statistics": {"center": values(1, n)},
        "residual-statistics": {"residual": residual, "center": values(SLOTS, n)},
        "strided-shortcut": {"residual": strided, "residual_stride": 2, "relu": True, "mask": True},
    }


@pytest.mark.parametrize("epilogue", list(_epilogues(CASES[0])))
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[6]], ids=lambda c: c.name)
def test_epilogues(case, epilogue):
    check_op(grouped_conv, *operands(case), **case.shape, **_epilogues(case)[epilogue], tolerance=TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=lambda c: c.name)
def test_prologue_comes_before_the_zero_padding(case):
    x, weight, weight_index = operands(case)
    affine = {"in_scale": values(SLOTS, case.channels, seed=1), "in_shift": 3 + values(SLOTS, case.channels, seed=2)}
    check_op(grouped_conv, x, weight, weight_index, **case.shape, **affine, tolerance=2 * TOLERANCE[case.dtype])


@each_stem
def test_stem_shares_its_input(case):
    x, weight, weight_index = operands(case)
    affine = {"in_scale": 1 + values(1, case.channels).abs(), "in_shift": values(1, case.channels, seed=1)}
    pixels = values(1, case.images, case.height, case.width, case.channels).abs()
    following = {"next_scale": values(SLOTS, case.out_channels), "next_shift": values(SLOTS, case.out_channels, seed=1)}
    options = {**case.shape, **affine, **following, "mask": True}
    expected = check_op(grouped_conv, pixels, weight, weight_index, **options, tolerance=2 * TOLERANCE[case.dtype])
    copies = grouped_conv(pixels.expand_as(x).contiguous(), weight, weight_index, **options)
    check_close("z from one input and from copies of it", expected.z, copies.z, 0)


def test_reference_is_pytorchs_convolution():
    case = CASES[5]
    x, weight, weight_index = (t.double() if t.is_floating_point() else t for t in operands(case))
    n = case.out_channels
    bias, scale, shift, center = (values(SLOTS, n, seed=s).double() for s in range(4))
    out = grouped_conv(
        x, weight, weight_index, **case.shape, bias=bias, next_scale=scale, next_shift=shift, mask=True, center=center
    )
    for g, slot in enumerate(weight_index.tolist()):
        kernel = weight[slot].view(3, 3, case.channels, n).permute(3, 2, 0, 1)
        image = x[g].permute(0, 3, 1, 2)
        z = F.conv2d(image, kernel, bias[slot], stride=case.stride, padding=case.padding).permute(0, 2, 3, 1)
        check_close("z", out.z[g], z, 1e-12)
        activated = F.relu(scale[slot] * z + shift[slot])
        check_close("activated", present(out.activated)[g], activated, 1e-12)
        assert torch.equal(unpack_mask(present(out.mask)[g], n), activated > 0)
        rest = (z - center[slot]).flatten(0, 2)
        sums = torch.stack([rest.sum(0), rest.square().sum(0)])
        check_close("statistics", present(out.statistics)[g].sum(0), sums, 1e-12)


@pytest.mark.parametrize("channels", [1, 8, 13, 64])
def test_mask_packing(channels):
    positive = values(3, 5, channels) > 0
    packed = pack_mask(positive)
    assert packed.shape == (3, 5, -(-channels // 8))
    assert torch.equal(unpack_mask(packed, channels), positive)
    assert bool((packed[..., 0] & 1).bool().eq(positive[..., 0]).all()), "channel 0 is the lowest bit of byte 0"


REFUSED = {
    "weight of another kernel size": (lambda x, w, s: grouped_conv(x, w, s, kernel=1), "weight has shape"),
    "slots in int64": (lambda x, w, s: grouped_conv(x, w, s.long(), kernel=3), "expected int32"),
    "groups that disagree": (lambda x, w, s: grouped_conv(x, w, s.repeat(2), kernel=3), "expected 4 or 1"),
    "another dtype": (lambda x, w, s: grouped_conv(x.half(), w, s, kernel=3), "x is torch.float16"),
    "a scale without a shift": (
        lambda x, w, s: grouped_conv(x, w, s, kernel=3, in_scale=torch.ones(1, 16)), "given together",
    ),
    "a bias of another width": (
        lambda x, w, s: grouped_conv(x, w, s, kernel=3, bias=torch.ones(1, 3)), r"bias has shape \(1, 3\)",
    ),
    "a residual of another size": (lambda x, w, s: grouped_conv(x, w, s, kernel=3, residual=x), "residual has shape"),
    "not contiguous": (lambda x, w, s: grouped_conv(x.transpose(2, 3), w, s, kernel=3), "not contiguous"),
    "another precision": (lambda x, w, s: grouped_conv(x, w, s, kernel=3, precision="fast"), "unknown precision"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        call(*operands(CASES[0]))


def test_a_group_past_32_bit_offsets_is_refused():
    weight = torch.empty(1, 9, 64, 64, device="meta")
    weight_index = torch.empty(1, dtype=torch.int32, device="meta")
    with pytest.raises(InputError, match="2147483648 elements in one group"):
        grouped_conv(torch.empty(1, 2**15, 32, 32, 64, device="meta"), weight, weight_index, kernel=3, padding=1)
    wide = torch.empty(1, 9, 64, 256, device="meta")
    with pytest.raises(InputError, match="the result of shape"):
        grouped_conv(torch.empty(1, 2**13, 32, 32, 64, device="meta"), wide, weight_index, kernel=3, padding=1)
    # several groups may together hold more: a group's base is a 64-bit offset
    x = torch.empty(4, 2**14, 32, 32, 64, device="meta")
    assert x.numel() == 2**32
    z = grouped_conv(x, weight, torch.empty(4, dtype=torch.int32, device="meta"), kernel=3, padding=1).z
    assert z.shape == x.shape


def test_nan_is_passed_on():
    """A ReLU that turns NaN into 0 would hide a diverged network."""
    case = CASES[0]
    x, weight, weight_index = operands(case)
    x[0, 1, 4, 4, 3] = float("nan")
    rows = torch.ones(1, 16)
    options = {**case.shape, "relu": True, "next_scale": rows, "next_shift": rows.clone()}
    expected = grouped_conv(x, weight, weight_index, **untyped(options))
    actual = run_kernel(grouped_conv, x.to(DEVICE), weight.to(DEVICE), weight_index.to(DEVICE), **{
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()
    })  # fmt: skip
    for name in ("z", "activated"):
        nan = torch.isnan(getattr(actual, name)).cpu()
        assert torch.equal(nan, torch.isnan(getattr(expected, name)))
        assert nan[0, 1, 3:6, 3:6].all()
        assert nan.sum() == 9 * 16


def test_a_groups_base_is_a_64_bit_offset():
    """Group 2 starts at element 2^31. Memory that is never touched costs nothing: one position per group is read."""
    x = torch.empty(3, 1, 2**13, 2**13, 16, dtype=torch.float16, device=DEVICE)
    weight, weight_index = (
        values(1, 1, 16, 16).to(DEVICE, torch.float16),
        torch.zeros(3, dtype=torch.int32, device=DEVICE),
    )
    x[:, 0, 0, 0] = values(3, 16).to(x)
    z = run_kernel(grouped_conv, x, weight, weight_index, kernel=1, stride=2**13).z
    check_close("z", z[:, 0, 0, 0], x[:, 0, 0, 0].float() @ weight[0, 0].float(), TOLERANCE[torch.float16])

import pytest
import torch

from fastensdistill.errors import InputError
from fastensdistill.kernels import conv_data_gradient as data_gradient
from fastensdistill.kernels.conv_data_gradient import conv_data_gradient, flip_weight
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient
from fastensdistill.kernels.grouped_conv import ConvOperands, grouped_conv_reference
from fastensdistill.kernels.operands import Window
from fastensdistill.kernels.reference import pack_mask
from fastensdistill.kernels.tiles import Tile
from tests.compare import check_close
from tests.kernels.both import TOLERANCE, check_op, values
from tests.kernels.convs import CASES, SLOTS, STEMS, Case, each_conv, each_stem, operands
from tests.untyped import untyped


def _output_gradient(case: Case) -> torch.Tensor:
    return values(case.groups, case.images, *case.out, case.out_channels, dtype=case.dtype, seed=7)


def _data(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, weight, weight_index = operands(case)
    return _output_gradient(case), flip_weight(weight), weight_index


@each_conv
def test_data_gradient(case):
    size = {"in_size": (case.height, case.width), **case.shape}
    check_op(conv_data_gradient, *_data(case), **size, tolerance=TOLERANCE[case.dtype])


def _epilogues(case: Case) -> dict[str, dict]:
    shape, n = (case.groups, case.images, case.height, case.width), case.channels
    mask = {"mask": pack_mask(values(*shape, n, seed=1) > 0)}
    residual = {"residual": values(*shape, n, dtype=case.dtype, seed=2)}
    small = (*shape[:2], -(-case.height // 2), -(-case.width // 2), n + 5)
    sums = {
        "z": values(*shape, n, dtype=case.dtype, seed=3),
        "mean": values(1, n, seed=4),
        "inv_std": values(1, n, seed=5).abs(),
    }
    per_slot = {name: rows.expand(SLOTS, -1).contiguous() for name, rows in sums.items() if name != "z"}
    return {
        "mask": mask,
        "mask-scale-residual": {**mask, "scale": values(SLOTS, n), **residual},
        "residual-first-mask": {**residual, "residual_first": True, **mask},
        "padded-shortcut": {"residual": values(*small, dtype=case.dtype), "residual_stride": 2, "residual_first": True,
                            **mask},
        "mask-sums": {**mask, **sums},
        "residual-first-mask-sums": {**residual, "residual_first": True, **mask, **sums, **per_slot},
        "float32-scale": {"scale": values(1, n), "out_dtype": torch.float32},
    }  # fmt: skip


@pytest.mark.parametrize("epilogue", list(_epilogues(CASES[0])))
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[4]], ids=lambda c: c.name)
def test_data_gradient_epilogues(case, epilogue):
    size = {"in_size": (case.height, case.width), **case.shape}
    check_op(conv_data_gradient, *_data(case), **size, **_epilogues(case)[epilogue], tolerance=TOLERANCE[case.dtype])


@each_conv
def test_weight_gradient(case):
    x, _, _ = operands(case)
    check_op(conv_weight_gradient, x, _output_gradient(case), **case.shape, tolerance=1e-5)


@each_stem
def test_stem_gradients(case):
    pixels = values(1, case.images, case.height, case.width, case.channels).abs()
    affine = {"in_scale": 1 + values(1, case.channels).abs(), "in_shift": values(1, case.channels, seed=1)}
    check_op(conv_weight_gradient, pixels, _output_gradient(case), **case.shape, **affine, tolerance=1e-4)
    size = {"in_size": (case.height, case.width), **case.shape}
    options = {"scale": affine["in_scale"], "out_dtype": torch.float32}
    check_op(conv_data_gradient, *_data(case), **size, **options, tolerance=1e-5)


def test_weight_gradient_with_a_scale_per_group_in_front():
    case = CASES[4]
    x, _, _ = operands(case)
    affine = {"in_scale": values(2, case.channels, seed=1), "in_shift": 1 + values(2, case.channels, seed=2)}
    check_op(conv_weight_gradient, x, _output_gradient(case), **case.shape, **untyped(affine))


@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[7], CASES[10], STEMS[3]], ids=lambda c: c.name)
def test_references_are_the_adjoints_of_the_forward_reference(case):
    x, weight, weight_index = (t.double() if t.is_floating_point() else t for t in operands(case))
    x.requires_grad_()
    weight.requires_grad_()
    z = grouped_conv_reference(ConvOperands(x, weight, weight_index), Window(*case.shape.values()), "ieee")[0]
    d = _output_gradient(case).double()
    dx, dw = torch.autograd.grad(z, (x, weight), d)
    size = {"in_size": (case.height, case.width), **case.shape}
    check_close("dx", conv_data_gradient(d, flip_weight(weight.detach()), weight_index, **size).d, dx, 1e-12)
    per_group = conv_weight_gradient(x.detach(), d, **case.shape)
    summed = torch.zeros_like(weight).index_add(0, weight_index.long(), per_group)
    check_close("dW", summed, dw, 1e-12)


def test_refusals():
    case = CASES[0]
    d, weight, weight_index = _data(case)
    size = {"in_size": (8, 8), **case.shape}
    with pytest.raises(InputError, match=r"d has size \(8, 8\), expected \(9, 9\)"):
        conv_data_gradient(d, weight, weight_index, in_size=(9, 9), **case.shape)
    with pytest.raises(InputError, match="z, mean and inv_std"):
        conv_data_gradient(d, weight, weight_index, **untyped(size), z=d)
    with pytest.raises(InputError, match="mask is torch"):
        conv_data_gradient(d, weight, weight_index, **untyped(size), mask=d)
    with pytest.raises(InputError, match="expected float32 or"):
        conv_weight_gradient(d.half(), d, **case.shape)
    huge = torch.empty(1, 2**15, 32, 32, 64, device="meta")
    with pytest.raises(InputError, match="elements in one group"):
        conv_weight_gradient(huge, huge, **case.shape)


@pytest.mark.parametrize("epilogue", list(_epilogues(CASES[0])))
def test_data_gradient_in_two_halves(epilogue, monkeypatch):
    """A tile of 128 columns, as GPUs have, whose epilogue takes one half of them after the other."""
    case = CASES[2]._replace(channels=72, images=2)
    monkeypatch.setattr(data_gradient, "conv_tile_of", lambda d, weight: Tile(32, 128, 16, 4, 1, "two halves"))
    size = {"in_size": (case.height, case.width), **case.shape}
    check_op(conv_data_gradient, *_data(case), **size, **_epilogues(case)[epilogue], tolerance=TOLERANCE[case.dtype])

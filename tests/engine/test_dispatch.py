"""Implementations named per launch: PyTorch's own convolutions in the place of the kernels'."""

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastensdistill.engine import dispatch
from fastensdistill.engine.dispatch import OPS, TABLE, Choice, ConvShape, Dispatch, halo_rows
from fastensdistill.engine.fused import FusedStep
from fastensdistill.errors import InputError
from fastensdistill.kernels import halo_conv
from fastensdistill.kernels.conv_data_gradient import conv_data_gradient, flip_weight
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.reference import partial_rows
from fastensdistill.kernels.vendor_conv import vendor_conv, vendor_data_gradient, vendor_weight_gradient
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.models.resnet import ResNet
from fastensdistill.network.trace import trace
from tests.compare import check_close, relative_error
from tests.engine.cases import CLASSES, check_equal, network, setting, steps, trained_parts
from tests.kernels.both import values
from tests.network import models
from tests.untyped import untyped

VENDOR_ONLY = [Choice(op, "cudnn", "for the test") for op in OPS]


@pytest.mark.parametrize("build", [network, models.resnet, models.odd], ids=["preresnet", "resnet", "unusual"])
def test_vendor_convolutions_give_the_same_step(monkeypatch, build):
    calls: list[str] = []
    counted = {op: counting(calls, vendor) for op, vendor in dispatch.VENDOR.items()}
    monkeypatch.setattr(dispatch, "VENDOR", counted)
    student, teachers, config = setting(teacher=build, student=build)
    other = copy.deepcopy(student)
    one = FusedStep(student, teachers, config)
    two = FusedStep(other, teachers, config, implementations=Dispatch(VENDOR_ONLY))
    for expected, actual in zip(steps(one, 2), steps(two, 2), strict=True):
        check_close("loss", actual["loss"], expected["loss"], 1e-9)
    check_equal(student, other, one, two, 1e-8)
    assert set(calls) == {"vendor_conv", "vendor_data_gradient", "vendor_weight_gradient"}


def counting(calls, function):
    def call(*arguments, **options):
        calls.append(function.__name__)
        return function(*arguments, **options)

    return call


def test_vendor_convolutions_in_bf16_err_as_the_kernels_do():
    exact, teachers, config = setting(perturbation="none")
    students = [copy.deepcopy(exact).float() for _ in range(2)]
    steps(FusedStep(exact, teachers, config), 2, B=6)
    half, narrow = dataclasses.replace(config, precision="bf16"), copy.deepcopy(teachers).float()
    for student, table in zip(students, ([], VENDOR_ONLY), strict=True):
        steps(FusedStep(student, narrow, half, implementations=Dispatch(table)), 2, B=6, dtype=torch.float32)
    states = [torch.cat([v.double().flatten() for v in s.state_dict().values()]) for s in (exact, *students)]
    kernels, vendor = (relative_error(state, states[0]) for state in states[1:])
    assert 0 < vendor <= 2 * kernels


def test_vendor_convolutions_read_slots_as_the_kernels_do():
    """No group reads the row of its own number: what is by slot and taken by group shows."""
    weight_index = torch.tensor([2, 0, 1, 2], dtype=torch.int32)
    x, d, weight = values(4, 3, 5, 4, 6), values(4, 3, 5, 4, 10), values(3, 9, 6, 10)
    rows = [values(3, 6, seed=seed) for seed in range(3)]
    center = values(3, 10)
    size = {"kernel": 3, "padding": 1}
    options: dict[str, Any] = size | {"in_scale": rows[0], "in_shift": rows[1], "center": center}
    actual, expected = (untyped(conv)(x, weight, weight_index, **options) for conv in (vendor_conv, grouped_conv))
    check_close("z", actual.z, expected.z, 1e-5)
    check_close("statistics", actual.statistics.sum(1), expected.statistics.sum(1), 1e-5)
    options = size | {"scale": rows[0], "z": values(4, 3, 5, 4, 6, seed=1), "mean": rows[1], "inv_std": rows[2]}
    gradients = (vendor_data_gradient, conv_data_gradient)
    actual, expected = (
        untyped(op)(d, flip_weight(weight), weight_index, in_size=(5, 4), **options) for op in gradients
    )
    check_close("d", actual.d, expected.d, 1e-5)
    check_close("statistics", actual.statistics.sum(1), expected.statistics.sum(1), 1e-5)


class Convolutions(TorchDispatchMode):
    """The operands of PyTorch's convolutions."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            self.operands.append([arg for arg in args if isinstance(arg, torch.Tensor)])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [((5, 4), 3, 1), ((5, 4), 3, 2), ((5, 4), 1, 2), ((1, 1), 1, 1)], ids=str
)
def test_vendor_convolutions_are_given_channels_last_and_copy_no_activation(size, kernel, stride):
    """In another format cuDNN copies what it is given and computes in that: a peer that is timed unfairly. What has no
    memory of its own (the shape of the tensor that a gradient is of) has no say."""
    weight_index, padding = torch.tensor([1, 0], dtype=torch.int32), kernel // 2
    x, weight = values(2, 3, *size, 6), values(2, kernel**2, 6, 10)
    options = {"kernel": kernel, "stride": stride, "padding": padding}
    d = values(*vendor_conv(x, weight, weight_index, **options).z.shape, seed=1)
    flipped = flip_weight(weight)
    for activations, run in {
        (x,): lambda: vendor_conv(x, weight, weight_index, **options),
        (d,): lambda: vendor_data_gradient(d, flipped, weight_index, in_size=size, **options),
        (x, d): lambda: vendor_weight_gradient(x, d, **options),
    }.items():
        with Convolutions() as seen:
            run()
        assert len(seen.operands) == 2
        read = set()
        for operand in (operand for operands in seen.operands for operand in operands):
            if operand.untyped_storage().nbytes() > operand.element_size():
                _, C, H, W = operand.shape
                assert operand.stride() == (H * W * C, 1, W * C, C)
                read.add(operand.untyped_storage().data_ptr())
        assert read >= {activation.untyped_storage().data_ptr() for activation in activations}


def test_one_layer_can_be_named():
    student, teachers, config = setting()
    step = FusedStep(student, teachers, config)
    steps(step, 1)
    part = trained_parts(step)[0]
    launches = [launch for launch in part.launches if launch.op == "conv"]
    table = Dispatch([Choice("conv", "cudnn", "for the test", layer="stem"), Choice("conv", "triton", "the others")])
    assert {table.implementation(part, launch) for launch in launches if launch.node == "stem"} == {"cudnn"}
    assert {table.implementation(part, launch) for launch in launches if launch.node != "stem"} == {"triton"}
    assert all(Dispatch(TABLE).implementation(part, launch) == "triton" for launch in launches)


def test_a_shape_can_be_named_on_a_device(monkeypatch, tmp_path):
    student, teachers, config = setting()
    step = FusedStep(student, teachers, config)
    steps(step, 1)
    shape = ConvShape(3, 1, 4, 4, 6, 6)
    given = [
        Choice("conv", "cuda", "fastest", shape=shape, arch=90),
        Choice("conv", "cudnn", "next", shape=shape, arch=90),
    ]
    (tmp_path / "rows").write_text(json.dumps([dataclasses.asdict(row) for row in given]))
    table = Dispatch.load(tmp_path / "rows")
    assert table.table == tuple(given)
    for part in trained_parts(step):
        for launch in part.launches:
            if launch.op not in OPS:
                continue
            node = part.network.by_name[launch.node]
            geometry = (untyped(node).in_shape, node.shape, untyped(node).stride) if launch.op == "conv" else None
            own = geometry == ((4, 6, 6), (4, 6, 6), 1)
            monkeypatch.setattr(halo_conv, "built", lambda arch=0: arch != 89)
            assert table.implementation(part, launch, 90) == ("cuda" if own else "triton")
            assert table.implementation(part, launch, 80) == "triton"
            assert not table.missing(90)
            monkeypatch.setattr(halo_conv, "built", lambda arch=0: False)
            assert table.implementation(part, launch, 90) == ("cudnn" if own else "triton")
            assert table.missing(90)
            assert not table.missing(80)
    for text in ("{}]", '[{"op": "conv"}]', '["conv"]', '{"op": 1}'):
        (tmp_path / "rows").write_text(text)
        with pytest.raises(InputError, match="rows is no table of implementations"):
            Dispatch.load(tmp_path / "rows")


def wide(seed: int):
    """16, 32 and 64 channels: every convolution but the stem, the shortcuts and those at stride 2 is covered."""
    torch.manual_seed(seed)
    return models.moved(PreResNet(CLASSES, blocks=(1, 2), in_planes=16, widen=2), seed)


def cifar(seed: int):
    """Shortcuts that are strided reads of fewer channels."""
    torch.manual_seed(seed)
    return models.moved(ResNet(CLASSES, blocks=(1, 2)), seed)


@pytest.mark.parametrize("perturbation", ["none", "tdiv-sdiv"])
@pytest.mark.parametrize("build", [wide, cifar], ids=["preresnet", "cifar-resnet"])
def test_halo_convolutions_give_the_same_step(monkeypatch, build, perturbation):
    """Off a GPU both compute the references: what the engine passes and takes is the same, and so is every bit, once
    the sums for BatchNorm are added in the same order."""
    calls: list[str] = []
    monkeypatch.setattr(halo_conv, "_tile_sums", lambda values, tile: partial_rows(values.flatten(1, 3), 32))
    monkeypatch.setattr(dispatch, "HALO", {op: counting(calls, halo) for op, halo in dispatch.HALO.items()})
    student, teachers, config = setting(teacher=build, student=build, dtype=torch.float32, precision="bf16",
                                        perturbation=perturbation)  # fmt: skip
    other = copy.deepcopy(student)
    rows = halo_rows(trace(build(0), (3, 6, 6)), "for the test")
    one = FusedStep(student, teachers, config)
    two = FusedStep(other, teachers, config, implementations=Dispatch(rows))
    for expected, actual in zip(steps(one, 2, dtype=torch.float32), steps(two, 2, dtype=torch.float32), strict=True):
        check_close("loss", actual["loss"], expected["loss"], 0)
    check_equal(student, other, one, two, 0)
    covered = {row.layer for row in rows}
    assert len(rows) == 2 * len(covered) >= 8
    assert set(calls) == {"halo_conv", "halo_data_gradient"}
    launches = [(part, launch) for part in trained_parts(two) for launch in part.launches if launch.node in covered]
    chosen = {Dispatch(rows).implementation(*both) for both in launches if both[1].op in ("conv", "conv gradient")}
    assert chosen == {"cuda"}


def test_a_launch_that_no_cuda_kernel_covers_is_refused_by_name():
    student, teachers, config = setting(dtype=torch.float32, precision="bf16")
    step = FusedStep(student, teachers, config, implementations=Dispatch([Choice("conv", "cuda", "for the test")]))
    with pytest.raises(InputError, match='"cuda" for conv stem: halo_conv does not cover 3 to 4 channels'):
        steps(step, 1, dtype=torch.float32)


def test_refusals():
    with pytest.raises(InputError, match="weight gradient has no cuda implementation"):
        Choice("weight gradient", "cuda", "")
    with pytest.raises(InputError, match="implementation 'cudn'"):
        Choice("conv", "cudn", "")
    with pytest.raises(InputError, match="op 'convolution'"):
        Choice("convolution", "cudnn", "")

"""Partial results of weight gradients: which are left to the un-fold, and that a step with them is the same step."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from fastensdistill.engine import partials, planned_ops
from fastensdistill.engine.dispatch import Choice, Dispatch
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.part_run import kernels_themselves
from fastensdistill.engine.partials import MOST, gradient_shape, left_to_unfold
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient, weight_gradient_partials
from fastensdistill.kernels.tiles import assume_arch
from fastensdistill.kernels.wgmma_weight_gradient import partial_count
from fastensdistill.models import create_model
from fastensdistill.network.launch import Part
from fastensdistill.network.plan import plan, teach_groups
from fastensdistill.network.trace import trace
from tests.engine.cases import batch, check_equal, gradients, setting, steps, teach_setting

META, CPU = torch.device("meta"), torch.device("cpu")


@cache
def backward(model: str, images: int) -> Part:
    with META:
        network = trace(create_model(model, 100), (3, 32, 32), trains=True)
    groups, way = teach_groups(4)["backward"]
    (part,) = plan([network], groups, way, images).parts
    return part


@pytest.mark.parametrize(
    ("model", "images", "count"), [("wrn28_4", 512, 21), ("wrn28_4", 128, 28), ("resnet32", 512, 31)]
)
def test_what_is_left_to_the_unfold(model, images, count):
    part = backward(model, images)
    launches = [launch for launch in part.launches if launch.op == "weight gradient"]
    with assume_arch(90):
        left = left_to_unfold(part, Dispatch(), torch.bfloat16, META)
        assert left == left_to_unfold(part, kernels_themselves, torch.bfloat16, META)
        assert len(left) == count
        for launch in launches:
            shape = gradient_shape(part, launch, torch.bfloat16, META)
            splits = weight_gradient_partials(shape)
            size = 4 * 4 * splits * shape.window.kernel**2 * shape.x[4] * shape.out_channels
            if launch.node in left:
                assert left[launch.node].splits == splits > 1
            assert (launch.node in left) == (size <= MOST)


def test_one_result_of_what_has_no_kernel_that_splits():
    part = backward("wrn28_4", 128)
    assert left_to_unfold(part, Dispatch(), torch.bfloat16, CPU) == {}
    with assume_arch(90):
        assert left_to_unfold(part, Dispatch(), torch.float64, META) == {}
        every = left_to_unfold(part, Dispatch(), torch.bfloat16, META)
        name = next(iter(every))
        vendor = Dispatch([Choice("weight gradient", "cudnn", "for the test", name)])
        assert set(left_to_unfold(part, vendor, torch.bfloat16, META)) == set(every) - {name}
        assert left_to_unfold(part, lambda part, launch, op: op, torch.bfloat16, META) == {}


def test_those_of_the_wgmma_kernel():
    """As its cut says: 33 of 64 → 64 at 32 x 32, four blocks of which 132 multiprocessors hold at once."""
    part = backward("wrn28_4", 512)
    by_wgmma = Dispatch([Choice("weight gradient", "wgmma", "for the test")])
    left = left_to_unfold(part, by_wgmma, torch.bfloat16, CPU)
    shapes = {
        launch.node: gradient_shape(part, launch, torch.bfloat16, CPU)
        for launch in part.launches
        if launch.op == "weight gradient"
    }
    for name, one in left.items():
        assert one.splits == partial_count(shapes[name])
    wide = [left[name].splits for name, shape in shapes.items() if shape.x[4] == shape.out_channels == 64]
    assert set(wide) == {33}
    assert len(wide) == 7


def by_images(x, d, *, out, **options):
    """The weight gradient, a partial result from every so many images on."""
    if out.dim() == 4:
        return conv_weight_gradient(x, d, out=out, **options)
    for i, one in enumerate(out):
        conv_weight_gradient(x[:, i :: len(out)].contiguous(), d[:, i :: len(out)].contiguous(), out=one, **options)
    return out


def distilling(**changes):
    student, teachers, config = setting(K=3, **changes)
    return student, FusedStep(student, teachers, config), lambda step: steps(step, 2, B=6)


def teaching(**changes):
    networks, config = teach_setting()
    config.micro_batches = changes.get("micro_batches", 1)
    step = FusedTeachStep(networks, config, image_shape=(3, 6, 6))
    return torch.nn.ModuleList(networks), step, lambda step: [step([batch(m, B=6) for m in range(3)]) for _ in range(2)]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", [distilling, teaching])
def test_a_step_with_partial_results_is_the_same_step(kind, micro_batches, monkeypatch):
    plain, one, run = kind(micro_batches=micro_batches)
    run(one)
    student, two, run = kind(micro_batches=micro_batches)
    monkeypatch.setitem(partials.COUNTED, "triton", lambda shape: 3 if shape.window.kernel == 3 else 1)
    monkeypatch.setattr(planned_ops, "conv_weight_gradient", by_images)
    two.build((6, 3, 6, 6))
    left, memory = gradients(one)[0].numel(), gradients(two)[0]
    assert left < memory.numel() < 3 * left
    for gradient in two.trained.gradients.values():
        gradient.fill_(torch.nan)
    run(two)
    check_equal(plain, student, one, two, 1e-10)
    # the reference's three results are the first one and zeros: the same to the bit
    monkeypatch.setattr(planned_ops, "conv_weight_gradient", conv_weight_gradient)
    student, three, run = kind(micro_batches=micro_batches)
    run(three)
    check_equal(plain, student, one, three, 0.0)

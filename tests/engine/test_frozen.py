"""Parameters that do not require gradients: both engines leave them as they are, and train the rest alike."""

import copy

import pytest
import torch

from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, check_equal, left_as_they_are, network, setting, steps, teach_setting
from tests.engine.frozen import FROZEN, frozen
from tests.network import models
from tests.untyped import untyped


def kept(module, before):
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name


@pytest.mark.parametrize("case", FROZEN)
def test_a_student_with_frozen_parameters(case):
    kind, chosen = FROZEN[case]
    changes = {"K": 1, "perturbation": "tdiv"} if kind == "single" else {}
    student, teachers, config = setting(kind, **changes)
    frozen(student, chosen)
    before, other = copy.deepcopy(student.state_dict()), copy.deepcopy(student)
    one = ReferenceStep(student, teachers, config, num_classes=CLASSES)
    two = FusedStep(other, teachers, config)
    for expected, actual in zip(steps(one, 2), steps(two, 2), strict=True):
        check_close("loss", actual["loss"], expected["loss"], 1e-9)
    check_equal(student, other, one, two, 1e-8)
    kept(student, before)
    kept(other, before)


def test_networks_that_are_tuned_differently():
    """Fine-tuning: each network has its own frozen part; statistics of BatchNorm move all the same."""
    networks, config = teach_setting(2)
    frozen(networks[0], lambda name: "classifier" not in name)
    others, before = copy.deepcopy(networks), [copy.deepcopy(network.state_dict()) for network in networks]
    one, two = TeachStep(networks, config), FusedTeachStep(others, config, image_shape=(3, 6, 6))
    for i in range(2):
        batches = [batch(10 * i + m) for m in range(2)]
        check_close("loss", two(batches)["loss"], one(batches)["loss"], 1e-9)
    for first, second, state in zip(networks, others, before, strict=True):
        check_equal(first, second, one, two, 1e-8)
        kept(first, state)
        kept(second, state)


@pytest.mark.parametrize("first", [True, False], ids=["trained first", "frozen first"])
def test_frozen_and_thawed_between_steps(first):
    student, teachers, config = setting(perturbation="none")
    other = copy.deepcopy(student)
    one, two = ReferenceStep(student, teachers, config, num_classes=CLASSES), FusedStep(other, teachers, config)
    for i, flag in enumerate((first, not first, first)):
        for run, step in ((student, one), (other, two)):
            run.module.stem.layer.weight.requires_grad_(flag)
            step(*batch(i))
        check_equal(student, other, one, two, 1e-8)


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_resumed_is_bit_equal(engine):
    def make():
        student, teachers, config = setting(student=models.resnet, teacher=models.resnet, perturbation="ods")
        frozen(student, lambda name: "stem" in name or "bn" in name)
        kinds = {"reference": lambda: ReferenceStep(student, teachers, config, num_classes=7)}
        untyped(kinds)["fused"] = lambda: FusedStep(student, teachers, config, image_shape=(3, 6, 6))
        return student, kinds[engine]()

    (whole, one), (half, two), (rest, three) = make(), make(), make()
    steps(one, 2)
    steps(two, 1)
    rest.load_state_dict(half.state_dict())
    three.load_state_dict(two.state_dict())
    three.set_learning_rate(0.05 / 2)
    three(*batch(1))
    for name, value in (whole.state_dict() | one.state_dict()).items():
        assert torch.equal(value, (rest.state_dict() | three.state_dict())[name]), name


def test_a_network_is_left_as_it_is_where_another_is_trained():
    """Frozen only in one process's view of the flat buffer: the mask covers copies side by side, not each other."""
    networks = [network(m) for m in range(3)]
    frozen(networks[1], lambda name: "stem" in name)
    step = FusedTeachStep(networks, teach_setting(3)[1], image_shape=(3, 6, 6))
    stem, count = left_as_they_are(step, "stem.weight")
    assert [bool(own.all()) for own in stem] == [bool(own.any()) for own in stem] == [False, True, False]
    assert count == stem[1].numel()


def test_a_weight_that_is_no_parameter_is_refused():
    networks, config = teach_setting(1)
    weight = networks[0].stem._parameters.pop("weight")
    networks[0].stem.register_buffer("weight", weight.detach())
    with pytest.raises(InputError, match=r"'stem.weight' is no parameter"):
        FusedTeachStep(networks, config, image_shape=(3, 6, 6))

"""Networks that do what few do are the same in a plan as they are, or are refused in one line that says where."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fastensdistill.config import TeachConfig
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.probe import compared
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from fastensdistill.network.nodes import Function
from fastensdistill.network.trace import trace
from fastensdistill.train.setup import place
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, check_equal, setting, steps
from tests.engine.odd_networks import SIZE, WithOthers, odd

SHAPE = (3, SIZE, SIZE)
NUMBER = "number of images"
REFUSED = {
    "by_an_eighth_of_the_images": rf"operation 'mul': takes 'add', which is no multiple of the {NUMBER}",
    "by_whether_there_are_many": rf"operation 'mul': takes 'pow_1', which is no multiple of the {NUMBER}",
    "by_the_larger_of_two": f"after module 'stem': depends on the {NUMBER}",
    "by_a_tensor_of_it": f"after module 'stem': depends on the {NUMBER}",
    "rolled_over_all": "'roll' does not compute each image by itself|logits of one image by itself",
    "the_first_image": "logits of one image by itself",
    "summed_over_images": "logits of one image by itself",
    "by_the_largest": "does not compute each image by itself|logits of one image by itself",
    "a_value_on_the_host": "after module 'stem': reads a value of a tensor on the host",
    "doubled_again_and_again": "operation 'add': ends 1000 operations and more between two values",
}
SAME = [
    "by_what_one_image_has",
    "reshaped_and_back",
    "a_weight_for_each_image",
    "layers_called_as_operations",
    "normalised_flat",
    "convolved_in_three_dimensions",
    "positions_twice",
    "masks_twice",
    "complex_twice",
]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name):
    """Whatever two images show: most of these compute the same of two as of one."""
    for trains in (False, True):
        with pytest.raises(InputError, match=REFUSED[name]) as error:
            compared(odd(name)(3), SHAPE, trains=trains)
        assert re.fullmatch(rf"{name}: .+", str(error.value))


@pytest.mark.parametrize("name", SAME)
def test_a_step_is_the_reference_engines(name):
    """As student and as teachers, several micro-batches, one parameter frozen."""
    pair = [setting(student=odd(name), teacher=odd(name), micro_batches=2) for _ in range(2)]
    for student, _, _ in pair:
        next(student.parameters()).requires_grad_(False)
    reference, fused = ReferenceStep(*pair[0], num_classes=CLASSES), FusedStep(*pair[1], image_shape=SHAPE)
    assert not fused.modules
    for expected, actual in zip(steps(reference, 2, B=4), steps(fused, 2, B=4), strict=True):
        for key, value in expected.items():
            check_close(key, actual[key], value, 1e-9)
    check_equal(pair[0][0], pair[1][0], reference, fused, 1e-9)


def test_networks_side_by_side():
    """Teachers, a parameter of PyTorch's for each of them."""
    both = [[odd("a_weight_for_each_image")(seed).double() for seed in range(2)] for _ in range(2)]
    config = TeachConfig(members=2, learning_rate=0.05, seed=7)
    reference, fused = TeachStep(both[0], config), FusedTeachStep(both[1], config, image_shape=SHAPE)
    for i in range(2):
        batches = [batch(2 * i + m, 3) for m in range(2)]
        check_close("loss", fused(batches)["loss"], reference(batches)["loss"], 1e-9)
    for one, other in zip(*both, strict=True):
        for key, value in one.state_dict().items():
            check_close(key, other.state_dict()[key].double(), value.double(), 1e-9)


@pytest.mark.parametrize("name", ["positions_twice", "masks_twice", "complex_twice"])
def test_only_activations_are_stored(name):
    """A plan's values are rounded to its dtype: 257 is no position in bfloat16."""
    functions = [node.name for node in trace(odd(name)(0), SHAPE).nodes if isinstance(node, Function)]
    assert functions
    assert not {"argmax", "lt", "fft_fft2"} & set(functions)


def test_a_parameter_seen_as_complex_numbers():
    """It would lie at an odd place of the flat parameters, where PyTorch cannot see it so."""
    network = odd("filtered")(0)
    with pytest.raises(InputError, match="'view_as_complex': sees a parameter as complex numbers"):
        compared(network, SHAPE, trains=True)


def test_a_tuple_of_its_own_in_training():
    with pytest.raises(InputError, match="operation 'Both': puts what it computes into a tuple of its own"):
        compared(WithOthers(), SHAPE, trains=True)


def test_weights_of_five_dimensions_stay_as_they_are():
    network = odd("convolved_in_three_dimensions")(0)
    cube = network.get_submodule("cube")
    before = cube.get_parameter("weight").stride()
    assert place(network, torch.device("cpu")) is network
    assert isinstance(network.get_submodule("stem"), nn.Conv2d)
    assert network.get_parameter("stem.weight").is_contiguous(memory_format=torch.channels_last)
    assert cube.get_parameter("weight").stride() == before

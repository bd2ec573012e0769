"""Parameters as other people leave them in memory: the reference engine's update reaches every element, no other."""

import copy

import pytest
import torch
from torch import nn

from fastensdistill.config import TeachConfig
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.errors import InputError
from fastensdistill.network.overlap import common_memory, dense
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, network, setting

LAYOUTS = {
    "as it is": lambda w: w.clone(),
    "channels last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "with gaps": lambda w: torch.stack([w, w + 1], -1)[..., 0],
    "a part of more": lambda w: torch.cat([w, w + 1])[: len(w)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_takes_the_same_steps(layout):
    plain, other = network(1), network(1)
    weight = LAYOUTS[layout](other.stem.weight.detach())
    other.stem.weight = nn.Parameter(weight)
    assert dense(weight) == (layout != "with gaps")
    around = torch.as_strided(weight, (weight.untyped_storage().nbytes() // 8,), (1,), 0)
    before, own = around.clone(), weight.clone()
    for net in (plain, other):
        step = TeachStep([net], TeachConfig(members=1, learning_rate=0.05))
        for i in range(2):
            step([batch(i)])
    check_close("stem", other.stem.weight, plain.stem.weight, 1e-9)
    assert not torch.equal(other.stem.weight, own)
    other.stem.weight.data.copy_(own)
    assert torch.equal(around, before)  # nothing beside it has moved


def test_factors_of_a_student_that_the_fused_engine_had_before():
    """They lie in its buffers with gaps between them."""
    student, teachers, config = setting(perturbation="none")
    other = copy.deepcopy(student)
    FusedStep(other, teachers, config, image_shape=(3, 6, 6))
    assert not dense(other.module.stem.delta_r)
    for one in (student, other):
        step = ReferenceStep(one, teachers, config, num_classes=CLASSES)
        step(*batch(0))
    for name, value in student.state_dict().items():
        check_close(name, other.state_dict()[name].double(), value.double(), 1e-9)


def test_refusals():
    net = network(1)
    net.stem.weight = nn.Parameter(net.stem.weight.detach()[:1].expand(net.stem.weight.shape))
    with pytest.raises(InputError, match=r"parameter 'stem.weight' is expanded"):
        TeachStep([net], TeachConfig(members=1))
    with pytest.raises(InputError, match="no parameter of PreResNet requires gradients"):
        TeachStep([network(1).requires_grad_(False)], TeachConfig(members=1))


def test_memory_held_in_common():
    memory = torch.zeros(24)
    rows, columns = memory[:12], memory.view(4, 6)
    assert common_memory([("a", rows), ("b", memory[12:])]) is None
    assert common_memory([("a", rows), ("b", memory[11:])]) == ("a", "b")
    assert common_memory([("even", columns[:, ::2]), ("odd", columns[:, 1::2])]) is None
    assert common_memory([("two", columns[:, :2]), ("rest", columns[:, 2:]), ("row", columns[3])]) == ("rest", "row")
    assert common_memory([("one", torch.zeros(1).expand(3))]) == ("one", "one")
    assert common_memory([("none", memory[:0]), ("all", memory), ("other", torch.zeros(24))]) is None

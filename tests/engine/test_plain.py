"""What a student is to the engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastensdistill
from fastensdistill.engine.plain import KINDS, plain_student
from fastensdistill.errors import InputError
from fastensdistill.evaluate.predict import predict
from fastensdistill.method.base import Student
from fastensdistill.method.student import STUDENTS
from fastensdistill.network.trace import trace
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, setting
from tests.network import models


def test_states_of_a_student_are_its_networks():
    """Also with biases, whose factor is that of the output."""
    student, _, _ = setting(K=3, student=models.odd)
    plain = student.average()
    expected = [plain.state_dict()]
    states = plain_student(student).states()
    assert len(states) == 4
    for name, value in expected[0].items():
        check_close(f"average {name}", states[0][name], value, 1e-12)
    images, _ = batch(0)
    for k in range(3):
        plain.load_state_dict(states[1 + k])
        branch = predict(student, images)[k]
        check_close(f"branch {k}", predict(plain, images)[0], branch, 1e-7)


@pytest.mark.parametrize(
    ("kind", "states", "deployed"), [("single", 1, 1), ("batch-ensemble", 3, 3), ("latent-be", 4, 1)]
)
def test_what_is_deployed_comes_first_and_the_branches_last(kind, states, deployed):
    student, _, _ = setting(kind, K=3)
    plain, (images, _) = plain_student(student), batch(0)
    assert (len(plain.states()), plain.deployed) == (states, deployed)
    network = plain.architecture()
    for state, expected in zip(plain.states(), predict(student.deployed(), images), strict=False):
        network.load_state_dict(state)
        check_close("deployed", predict(network, images)[0], expected, 1e-7)


def test_heads_are_one_layer():
    """Its logits are those of all branches, and gradients go back the same way."""
    student, _, _ = setting("hydra", K=3)
    plain, (images, _) = plain_student(student), batch(0)
    student.eval()
    logits = plain.architecture()(images)[None]
    check_close("logits", plain.branch_logits(logits), student(images), 1e-12)
    assert torch.equal(plain.group_logits(plain.branch_logits(logits)), logits)
    assert plain.classes(trace(plain.architecture(), (3, 6, 6))) == CLASSES
    with pytest.raises(InputError, match="a hydra student"):
        plain.states()


def test_every_kind_of_student_is_known_and_others_are_refused():
    assert {setting(kind)[0].kind for kind in STUDENTS} == {kind.kind for kind, _ in KINDS}

    class Other(Student):
        def __init__(self):
            super().__init__()
            self.module, self.branches = torch.nn.Linear(2, 2), 1

    with pytest.raises(InputError, match="no plan covers a student of the kind Other"):
        plain_student(Other())


def test_nobody_else_asks_what_kind_a_student_is():
    kinds = "|".join(kind.__name__ for kind, _ in KINDS)
    root = Path(fastensdistill.__file__).parent
    asking = {
        str(path.relative_to(root))
        for folder in ("engine", "train", "evaluate")
        for path in (root / folder).glob("*.py")
        if re.search(rf"isinstance\([^()]*\b({kinds})\b", path.read_text())
    }
    assert not asking

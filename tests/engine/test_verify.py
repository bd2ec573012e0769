"""The check before a run: right kernels pass, a fault is found, and the engine is chosen accordingly."""

import pytest
import torch

from fastensdistill.config import DistillConfig, TeachConfig
from fastensdistill.engine import evaluation, select, trained
from fastensdistill.engine.reference import ReferenceStep
from fastensdistill.engine.verify import verify_distillation, verify_teaching
from fastensdistill.errors import InputError
from fastensdistill.method.student import LatentBE, Single
from fastensdistill.method.teachers import Teachers
from tests.test_student import tiny

SHAPE = (3, 8, 8)


def setting(kind="latent-be", **settings):
    torch.manual_seed(0)
    teachers = Teachers([tiny() for _ in range(3)])
    student = LatentBE(tiny(), 3) if kind == "latent-be" else Single(tiny())
    return student, teachers, DistillConfig(**{"student": kind, "engine": "fused", **settings})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "perturbation"), [("latent-be", "tdiv-sdiv"), ("latent-be", "none"), ("single", "tdiv")]
)
def test_right_kernels_pass_and_nothing_is_changed(precision, kind, perturbation):
    student, teachers, config = setting(kind, precision=precision, perturbation=perturbation)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    found = verify_distillation(student, teachers, config, SHAPE, 5)
    assert set(found) == ({"update"} if perturbation == "none" else {"perturbation", "update"})
    assert max(found.values()) < (1e-9 if precision == "fp32" else 2e-2)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())


def test_teachers_pass():
    assert verify_teaching([tiny(), tiny()], TeachConfig(members=2), SHAPE)["update"] < 1e-9


def wrong_update(monkeypatch):
    update = trained.Trained.backward
    monkeypatch.setattr(trained.Trained, "backward", lambda self, seed, add: update(self, seed.flip(1), add))


def wrong_perturbation(monkeypatch):
    step = evaluation.perturb_step
    monkeypatch.setattr(evaluation, "perturb_step", lambda x, g, *a, **k: step(x, -g, *a, **k))


@pytest.mark.parametrize(("fault", "words"), [(wrong_update, "update"), (wrong_perturbation, "perturbation")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fault_is_found_and_the_engine_chosen_accordingly(monkeypatch, fault, words, precision):
    fault(monkeypatch)
    student, teachers, config = setting(precision=precision)
    with pytest.raises(InputError, match=f"fused engine's {words}"):
        select.distillation_step(student, teachers, config, SHAPE, 5)
    monkeypatch.setattr(select, "choose_engine", lambda *a: ("fused", "every layer has a kernel"))
    config.engine = "auto"
    step, line = select.distillation_step(student, teachers, config, SHAPE, 5)
    assert isinstance(step, ReferenceStep)
    assert line.startswith(f"reference engine: the fused engine's {words} is not")


def test_where_another_process_finds_a_fault_all_take_the_reference_engine(monkeypatch):
    monkeypatch.setattr(select, "choose_engine", lambda *a: ("fused", "every layer has a kernel"))
    asked = []
    monkeypatch.setattr(select, "anyone", lambda trouble: asked.append(trouble) or "process 1 differs")
    student, teachers, config = setting()
    config.engine = "auto"
    step, line = select.distillation_step(student, teachers, config, SHAPE, 5)
    assert isinstance(step, ReferenceStep)
    assert (asked, line) == ([None], "reference engine: process 1 differs")

"""The check before a run: right kernels pass, a fault is found, and the engine is chosen accordingly."""

from typing import Any

import pytest
import torch

from fastensdistill.config import DistillConfig, TeachConfig
from fastensdistill.engine import select, trained, verify
from fastensdistill.engine.perturb import FusedPerturbation
from fastensdistill.engine.reference import ReferenceStep
from fastensdistill.engine.select import EngineChoice
from fastensdistill.engine.verify import verify_distillation, verify_teaching
from fastensdistill.errors import InputError
from fastensdistill.method.student import LatentBE, Single
from fastensdistill.method.teachers import Teachers
from tests.networks import tiny
from tests.untyped import untyped

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
    update = trained.TrainedPass.backward
    monkeypatch.setattr(trained.TrainedPass, "backward", lambda self, seed, add: update(self, seed.flip(1), add))


def wrong_perturbation(monkeypatch):
    right = FusedPerturbation._direction

    def away(self, *arguments):
        direction = right(self, *arguments)
        return direction._replace(grad_logits={name: -value for name, value in direction.grad_logits.items()})

    monkeypatch.setattr(FusedPerturbation, "_direction", away)


@pytest.mark.parametrize(("fault", "words"), [(wrong_update, "update"), (wrong_perturbation, "perturbation")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fault_is_found_and_the_engine_chosen_accordingly(monkeypatch, fault, words, precision):
    fault(monkeypatch)
    student, teachers, config = setting(precision=precision)
    with pytest.raises(InputError, match=f"fused engine's {words}"):
        select.distillation_step(student, teachers, config, SHAPE, 5)
    monkeypatch.setattr(select, "choose_engine", lambda *a: EngineChoice("fused", "every layer has a kernel"))
    config.engine = "auto"
    step, choice = select.distillation_step(student, teachers, config, SHAPE, 5)
    assert isinstance(step, ReferenceStep)
    assert str(choice).startswith(f"reference engine: the fused engine's {words} is not")


def test_where_another_process_finds_a_fault_all_take_the_reference_engine(monkeypatch):
    monkeypatch.setattr(select, "choose_engine", lambda *a: EngineChoice("fused", "every layer has a kernel"))
    asked: list[Any] = []
    monkeypatch.setattr(select, "anyone", lambda trouble: untyped(asked).append(trouble) or "process 1 differs")
    student, teachers, config = setting()
    config.engine = "auto"
    step, choice = select.distillation_step(student, teachers, config, SHAPE, 5)
    assert isinstance(step, ReferenceStep)
    assert (asked, choice) == ([None], EngineChoice("reference", "process 1 differs"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("stem.weight"), "KeyError: 'stem.weight'"),
        (IndexError(), "IndexError"),
        (AssertionError("\nsize 3 != 4\nmore"), "AssertionError: size 3 != 4"),
        (torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory."),
        (NotImplementedError("no kernel"), "NotImplementedError: no kernel"),
        (InputError("a line of ours"), "a line of ours"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("where", ["check_networks", "verify_distillation", "FusedStep"])
def test_any_error_on_the_way_means_the_reference_engine_or_one_line(monkeypatch, where, error, line):
    """Other people's code raises what it likes."""

    def fails(*unused, **options):
        raise error if where != "FusedStep" or isinstance(error, InputError) else InputError(line)

    student, teachers, config = setting()
    if where == "check_networks":
        monkeypatch.setattr(select, "HAS_TRITON", True)
        monkeypatch.setattr(select, "_on_cuda", lambda device: True)
        monkeypatch.setattr(select, "try_distillation", fails)
    else:
        monkeypatch.setattr(select, "choose_engine", lambda *a: EngineChoice("fused", "every layer has a kernel"))
        monkeypatch.setattr(select, "verify_distillation", lambda *a: {"update": 0.0})
    monkeypatch.setattr(select, where, fails)
    with pytest.raises(InputError) as raised:
        select.distillation_step(student, teachers, config, SHAPE, 5)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)
    config.engine = "auto"
    step, choice = select.distillation_step(student, teachers, config, SHAPE, 5)
    assert isinstance(step, ReferenceStep)
    reason = f"{line}; nor can its step be captured: {line}" if where == "check_networks" else line
    assert choice == EngineChoice("reference", reason)
    assert str(choice) == f"reference engine: {reason}"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_stop_is_no_error_of_the_check(monkeypatch, error):
    def stopped(*unused):
        raise error

    monkeypatch.setattr(select, "verify_distillation", stopped)
    with pytest.raises(error):
        untyped(select.distillation_step)(*setting(), SHAPE, 5)


@pytest.mark.parametrize("right", [True, False])
def test_sums_that_few_images_do_without_are_compared_too(monkeypatch, right):
    monkeypatch.setattr(verify, "runs_kernel", lambda device, dtype: True)
    monkeypatch.setattr(
        verify, "add_rows", lambda rows, kept: rows[:, int(not right) :: 1 + (not right)].sum(1)[:, None]
    )
    if right:
        return verify.verify_sums(torch.device("cpu"))
    with pytest.raises(InputError, match="fused engine's sum of rows"):
        verify_teaching([tiny(), tiny()], TeachConfig(members=2), SHAPE)

"""What only a capture on a device can show: batches read in the graph, noise, resumption, a capture that fails."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from fastensdistill.data import Augment, DeviceLoader, Split
from fastensdistill.data.loader import EvaluationSet
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.graph import Captured
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.evaluate.predict import predict
from fastensdistill.evaluate.validate import GroupedPredictor
from tests.compare import check_close
from tests.engine.cases import CLASSES, network, setting, teach_setting
from tests.engine.unplanned import odd, some_unplanned
from tests.untyped import untyped

CUDA = torch.device("cuda")
CASES = {
    "paper": {},
    "noise of a drawn teacher": {"perturbation": "confods", "M": 3},
    "gaussian noise": {"perturbation": "gaussian"},
    "heads": {"kind": "hydra", "K": 3},
    "in parts": {"micro_batches": 2, "batch_size": 4},
    "heads in parts": {"kind": "hydra", "micro_batches": 2, "batch_size": 4},
    "unlike teachers": {"M": 4, "K": 4, "teacher": lambda seed: network(seed, widen=1 + (seed == 12))},
    "a teacher as a module": {"M": 3, "K": 3, "teacher": some_unplanned},
    "teachers as modules, one drawn, in parts": {"perturbation": "ods", "teacher": odd, "micro_batches": 2,
                                                 "batch_size": 4},
}  # fmt: skip
STEPS = 7  # more than two epochs of three batches: permutations are drawn between replays


@pytest.fixture(autouse=True)
def loud():
    """A capture that fails says so in a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the step could not be captured")
        yield


def split() -> Split:
    generator = np.random.default_rng(3)
    return Split(generator.integers(0, 256, (13, 6, 6, 3), dtype=np.uint8), generator.integers(0, CLASSES, 13))


def loader(seed: int) -> DeviceLoader:
    own = torch.Generator(CUDA).manual_seed(seed)
    return DeviceLoader(split(), 4, device=CUDA, generator=own, augment=Augment(1))


def distil(case: str, capture: bool):
    student, teachers, config = setting(dtype=torch.float32, precision="bf16", **untyped(CASES[case]))
    step = FusedStep(student.to(CUDA), teachers.to(CUDA), config, image_shape=(3, 6, 6), capture=capture)
    step.set_learning_rate(0.05)
    return student, step


def state(*owners) -> dict[str, torch.Tensor]:
    return {f"{i} {k}": v.clone() for i, owner in enumerate(owners) for k, v in owner.state_dict().items()
            if isinstance(v, torch.Tensor)}  # fmt: skip


def check_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("case", CASES)
def test_replayed_on_a_loader_is_launched_on_a_loader(case, monkeypatch):
    if "module" in case:  # of which cuDNN computes the image's gradient, in one order only if it is told so
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    ended = []
    for capture in (True, False):
        student, step = distil(case, capture)
        batches = loader(5)
        for _ in range(STEPS):
            scalars = step.train_on(batches)
        ended.append({**state(student, step, batches), **{k: v.float() for k, v in scalars.items()}})
        assert step.captured is capture, step.capture_error
        if capture:
            assert len(step.graphs.made) == len(step.perturbers)
    check_same(*ended)


@pytest.mark.parametrize("case", ["noise of a drawn teacher", "heads", "unlike teachers"])
def test_a_captured_run_is_resumed_bit_for_bit(case):
    """Into new objects, and into those whose graphs were captured and have gone further."""
    student, step = distil(case, True)
    batches = loader(5)
    for _ in range(2):
        step.train_on(batches)
    saved = [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in owner.state_dict().items()}
             for owner in (student, step, batches)]  # fmt: skip
    for _ in range(STEPS - 2):
        step.train_on(batches)
    whole = state(student, step, batches)
    for owners in ((*distil(case, True), loader(9)), (student, step, batches)):
        for owner, values in zip(owners, saved, strict=True):
            owner.load_state_dict(values)
        for _ in range(STEPS - 2):
            owners[1].train_on(owners[2])
        check_same(state(*owners), whole)


def test_teachers_replayed_on_loaders_are_launched_on_loaders():
    ended = []
    for capture in (True, False):
        networks, config = teach_setting(2, torch.float32)
        config.precision, config.micro_batches = "bf16", 2
        networks = [one.to(CUDA) for one in networks]
        step = FusedTeachStep(networks, config, image_shape=(3, 6, 6), capture=capture)
        step.set_learning_rate(0.05)
        batches = [loader(m) for m in range(2)]
        for _ in range(STEPS):
            loss = step.train_on(batches)["loss"]
        assert step.captured is capture, step.capture_error
        ended.append({**state(*networks, step, *batches), "loss": loss})
    check_same(*ended)


def test_a_captured_predictor_follows_its_networks():
    """Between the steps of a captured run, as validation is."""
    _, step = distil("paper", True)
    batches, images = loader(5), EvaluationSet(split(), CUDA)
    networks = [network(m).float().to(CUDA) for m in range(3)]
    predictor = GroupedPredictor(networks, (3, 6, 6), precision="fp32")
    for i in range(3):
        step.train_on(batches)
        with torch.no_grad():
            for one in networks:
                one.classifier.weight.mul_(1 + i)
        predictor.refresh(networks)
        exact = torch.cat(
            [predict(one.double(), EvaluationSet(split(), CUDA, dtype=torch.float64)) for one in networks]
        )
        for one in networks:
            one.float()
        check_close("probabilities", predictor(images, batch_size=5).double(), exact, 1e-4)
    assert predictor.captured, predictor.capture_error


def test_after_a_capture_that_fails_all_goes_on():
    """Draws from its generators, memory handed back to the driver, and captures of something else."""
    generator, total = torch.Generator(CUDA).manual_seed(0), torch.zeros((), device=CUDA)

    def drawn():
        return torch.rand(3, device=CUDA, generator=generator)

    def body():
        total.add_(drawn().sum())
        return {"total": total.clone() + total.item() * 0}

    expected = torch.Generator(CUDA).manual_seed(0)
    sums = [torch.rand(3, device=CUDA, generator=expected).sum() for _ in range(2)]
    torch.cuda.manual_seed(7)
    unseen = torch.rand(2, 3, device=CUDA)
    torch.cuda.manual_seed(7)
    earlier = Captured(lambda: {"total": total + 1}, list, [], CUDA)
    earlier.prepare()
    captured = Captured(body, lambda: [total], [generator], CUDA)
    before = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="could not be captured and is launched from Python"):
        assert torch.equal(captured()["total"], sums[0])
    assert torch.equal(captured()["total"], sums[0] + sums[1])
    assert (captured.captured, "captur" in captured.error) == (False, True)
    assert torch.cuda.current_stream() == before
    assert torch.equal(torch.rand(2, 3, device=CUDA), unseen)  # by the device's own generator
    assert torch.equal(earlier()["total"], total + 1)
    torch.ones(3, pin_memory=True)
    torch.cuda.empty_cache()
    other = Captured(lambda: {"drawn": drawn()}, list, [generator], CUDA)
    assert torch.equal(other()["drawn"], torch.rand(3, device=CUDA, generator=expected))
    assert other.captured, other.error

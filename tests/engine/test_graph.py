"""What can be known of the captured step without a GPU: a pure function of tensors that stay, nothing waited for."""

import contextlib
import copy

import pytest
import torch

from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.graph import Captured, warm_up
from fastensdistill.engine.reference import ReferenceStep
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, check_equal, setting
from tests.engine.meta import build, watched


@pytest.mark.parametrize("perturbation", ["tdiv-sdiv", "none", "tdiv"])
def test_the_body_waits_for_nothing_and_copies_nothing_from_the_host(monkeypatch, perturbation):
    """On the meta device a value that is read back raises, and a tensor of the host beside the others is seen."""
    step = build("wrn28_1", 4, M=2, K=2, monkeypatch=monkeypatch, perturbation=perturbation)
    with watched() as watch:
        step._body()
    assert watch.syncs == []


def test_the_watch_sees_a_sync():
    with watched() as watch:
        torch.zeros(2).sum().item()
        torch.tensor([1.0, 2.0])
    assert any("_local_scalar_dense" in s for s in watch.syncs)
    assert any("lift_fresh" in s for s in watch.syncs)


@pytest.mark.parametrize("perturbation", ["tdiv-sdiv", "ods", "gaussian"])
def test_the_body_follows_its_static_inputs_alone(perturbation):
    """Body run again and again, as a replay would, with images, labels, draw and rate changed in place."""
    student, teachers, config = setting(M=3, K=3, perturbation=perturbation)
    other = copy.deepcopy(student)
    one, two = ReferenceStep(student, teachers, config, num_classes=CLASSES), FusedStep(other, teachers, config)
    two._load(*batch(0))
    addresses = [t.data_ptr() for t in (two.images, two.labels, two.draw, two.rate, *two.master.state())]
    drawn = set()
    for i in range(4):
        images, labels = batch(i)
        rate = 0.05 / (1 + i)
        one.set_learning_rate(rate)
        expected = one(images, labels)
        two.images.copy_(images.permute(0, 2, 3, 1))
        two.labels.copy_(labels)
        two.rate.fill_(rate)
        two._draw()
        drawn.add(int(two.draw))
        with torch.no_grad():
            actual = two._body()
        for name, value in expected.items():
            check_close(name, actual[name], value, 1e-9)
    check_equal(student, other, one, two, 1e-8)
    assert addresses == [t.data_ptr() for t in (two.images, two.labels, two.draw, two.rate, *two.master.state())]
    assert len(drawn) > 1 or perturbation == "gaussian"


def test_warm_up_leaves_no_trace():
    student, teachers, config = setting(perturbation="ods")
    step = FusedStep(student, teachers, config)
    step._load(*batch(0))
    before = {k: v.clone() for k, v in (student.state_dict() | step.state_dict()).items()}
    ran = []

    def body():
        ran.append(1)
        return step._body()

    with torch.no_grad():
        warm_up(body, step.master.state, [step.noise])
    assert len(ran) == 2
    for name, value in (student.state_dict() | step.state_dict()).items():
        assert torch.equal(value, before[name]), name


class FakeGraph:
    """Stands in for a CUDA graph: replay runs the body again into the tensors of the capture."""

    body = None

    def __init__(self):
        self.generators = []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        FakeGraph.results.copy_(torch.stack([value.float() for value in FakeGraph.body().values()]))


@pytest.fixture
def fake_cuda(monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def nothing(*_, **__):
        yield

    for name, value in {
        "Stream": Stream, "stream": nothing, "device": nothing, "graph": nothing, "CUDAGraph": FakeGraph,
        "current_stream": Stream,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return monkeypatch


def test_replays_hand_out_copies_and_the_capture_is_no_step(fake_cuda):
    count = torch.zeros(())

    def body():
        count.add_(1)
        return {"loss": count.clone()}

    captured = Captured(body, lambda: [count], [torch.Generator()], torch.device("cpu"))
    FakeGraph.body = body
    first_state = count.clone()
    original = Captured._capture

    def capture(self):
        original(self)
        FakeGraph.results = self.results
        count.copy_(first_state)  # a real capture runs nothing

    fake_cuda.setattr(Captured, "_capture", capture)
    first, second = captured(), captured()
    assert (float(first["loss"]), float(second["loss"])) == (1.0, 2.0)
    assert len(captured.graph.generators) == 1


def test_a_capture_that_fails_is_loud_and_every_step_still_runs(fake_cuda):
    @contextlib.contextmanager
    def refuse(_graph, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    fake_cuda.setattr(torch.cuda, "graph", refuse)
    count = torch.zeros(())

    def body():
        count.add_(1)
        return {"loss": count.clone()}

    captured = Captured(body, lambda: [count], [], torch.device("cpu"))
    with pytest.warns(UserWarning, match="could not be captured and is launched from Python: operation not permitted"):
        assert float(captured()["loss"]) == 1.0
    assert float(captured()["loss"]) == 2.0

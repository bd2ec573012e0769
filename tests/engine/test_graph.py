"""What can be known of the captured step without a GPU: a pure function of tensors that stay, nothing waited for."""

import contextlib
import copy
import gc
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from fastensdistill.config import TeachConfig
from fastensdistill.data import Split
from fastensdistill.data.loader import EvaluationSet
from fastensdistill.engine import graph, parallel, trained
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.graph import Captured, Graphs, warm_up
from fastensdistill.engine.reference import ReferenceStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.evaluate.validate import GroupedPredictor
from fastensdistill.models import create_model
from tests.compare import check_close
from tests.engine.cases import CLASSES, batch, check_equal, network, setting, state, static_inputs, teach_setting
from tests.engine.meta import build, watched
from tests.untyped import untyped

BODIES = {
    "paper": {},
    "unperturbed": {"perturbation": "none"},
    "teachers alone": {"perturbation": "tdiv"},
    "noise": {"perturbation": "gaussian"},
    "noise of a teacher, in parts": {"perturbation": "confods", "micro_batches": 2},
    "heads": {"student": "hydra"},
    "heads, in parts": {"student": "hydra", "micro_batches": 2},
    "other teachers": {"teacher": "resnet32"},
}


@pytest.mark.parametrize("case", BODIES)
def test_the_body_waits_for_nothing_and_copies_nothing_from_the_host(monkeypatch, case):
    """On the meta device a value that is read back raises, and a tensor of the host beside the others is seen."""
    for draw in ("uniform_", "normal_"):  # the meta device has no generators
        monkeypatch.setattr(torch.Tensor, draw, lambda self, *range, generator: self)
    step = build("wrn28_1", 4, M=2, K=2, **untyped(BODIES[case]))
    with watched() as watch:
        step.body()
    assert watch.syncs == []


def test_the_teachers_body_waits_for_nothing():
    with torch.device("meta"):
        networks = [create_model("wrn28_1", 100) for _ in range(2)]
    config = TeachConfig(members=2, precision="bf16", micro_batches=2)
    step = FusedTeachStep(networks, config, image_shape=(3, 32, 32))
    step.build((4, 3, 32, 32))
    with watched() as watch:
        step.body()
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
    two.load(batch(0))
    addresses = [t.data_ptr() for t in (*static_inputs(two), *state(two))]
    drawn = set()
    for i in range(4):
        images, labels = batch(i)
        rate = 0.05 / (1 + i)
        one.set_learning_rate(rate)
        expected = one(images, labels)
        two.images.copy_(images.permute(0, 2, 3, 1))
        two.labels.copy_(labels)
        two.rate.fill_(rate)
        two.choose()
        drawn.add(int(two.draw))
        with torch.no_grad():
            actual = two.body()
        for name, value in expected.items():
            check_close(name, actual[name], value, 1e-9)
    check_equal(student, other, one, two, 1e-8)
    assert addresses == [t.data_ptr() for t in (*static_inputs(two), *state(two))]
    assert len(drawn) > 1 or perturbation == "gaussian"


def test_warm_up_leaves_no_trace():
    student, teachers, config = setting(perturbation="ods")
    step = FusedStep(student, teachers, config)
    step.load(batch(0))
    before = {k: v.clone() for k, v in (student.state_dict() | step.state_dict()).items()}
    ran = []

    def body():
        ran.append(1)
        return step.body()

    with torch.no_grad():
        warm_up(body, step.state, step.generators)
    assert len(ran) == 2
    for name, value in (student.state_dict() | step.state_dict()).items():
        assert torch.equal(value, before[name]), name


def test_warm_up_leaves_no_trace_where_it_fails():
    """Out of memory in its second run, say: who catches that goes on from the same weights."""
    weight, noise = torch.zeros(3), torch.Generator().manual_seed(1)
    expected = torch.rand(2, generator=torch.Generator().manual_seed(1))

    def body():
        weight.add_(1)
        torch.rand(1, generator=noise)
        if weight[0] == 2:
            raise RuntimeError("out of memory")
        return {}

    with pytest.raises(RuntimeError, match="out of memory"):
        warm_up(body, lambda: [weight], [noise])
    assert torch.equal(weight, torch.zeros(3))
    assert torch.equal(torch.rand(2, generator=noise), expected)


class FakeGraph:
    """Stands in for a CUDA graph: replay runs the body again into the tensors of the capture."""

    body: Any = None
    results: Any = None

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
        "current_stream": Stream, "graph_pool_handle": lambda: (0, 1), "current_device": lambda: 0,
        "default_generators": (CapturedGenerator(),),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graph, "_abandoned", [])
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
    assert len(untyped(captured.graph).generators) == 1


def test_a_capture_that_fails_is_loud_and_every_step_still_runs(fake_cuda):
    """And what PyTorch leaves behind is put right: generators that count for the capture, the allocator that serves it.

    The end of a spoiled capture raises an error of its own; the one that spoiled it is told.
    """
    refuse_captures(fake_cuda)
    count, generator, ended = torch.zeros(()), CapturedGenerator(), []
    fake_cuda.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: ended.append(pool))
    fake_cuda.setattr(torch._C, "_cuda_releasePool", lambda *pool: ended.append(pool))

    def body():
        count.add_(1)
        return {"loss": count.clone()}

    captured = Captured(body, lambda: [count], [untyped(generator)], torch.device("cpu"))
    assert (captured.captured, captured.error) == (None, "")
    with pytest.warns(UserWarning, match="could not be captured and is launched from Python: operation not permitted"):
        assert float(captured()["loss"]) == 1.0
    assert float(captured()["loss"]) == 2.0
    assert (captured.captured, captured.error) == (False, "operation not permitted when stream is capturing")
    assert generator.state == "clone"
    assert untyped(torch.cuda.default_generators[0]).state == "clone", "PyTorch registers it with every graph"
    assert ended == [(0, (0, 1)), (0, (0, 1))]
    del captured
    assert len(graph._abandoned) == 1, "the allocators may ask it for as long as the process lives"


def test_a_capture_that_had_ended_gives_its_memory_back(fake_cuda):
    """An error in Python: PyTorch ends the capture in good order, and the graph holds what was recorded up to it."""
    reset = []
    fake_cuda.setattr(FakeGraph, "reset", lambda self: reset.append(self), raising=False)

    def ended(*pool):
        raise RuntimeError("not currently recording to mempool_id")

    fake_cuda.setattr(torch._C, "_cuda_endAllocateToPool", ended)
    ran = []

    def body():
        ran.append(1)
        if len(ran) == 3:
            raise RuntimeError("in Python")
        return {"loss": torch.zeros(())}

    captured = Captured(body, list, [], torch.device("cpu"))
    with pytest.warns(UserWarning, match="launched from Python: in Python"):
        captured()
    assert reset == graph._abandoned


def test_the_warm_up_runs_all_that_is_captured(fake_cuda):
    """A kernel that the capture alone would run would have to be loaded inside of it."""
    gathered: list[Any] = []
    fake_cuda.setattr(graph, "gathered", lambda results: untyped(gathered).append(results) or torch.zeros(1))
    Captured(lambda: {"loss": torch.zeros(())}, list, [], torch.device("cpu")).prepare()
    assert len(gathered) == graph.WARM_UP + 1


def test_warm_up_restores_the_devices_own_generator(fake_cuda):
    (own,) = torch.cuda.default_generators

    def body():
        untyped(own).state += 1
        return {"loss": torch.zeros(())}

    Captured(body, list, [], torch.device("cpu")).prepare()
    assert untyped(own).state == 1  # the capture alone: with a device it counts for the graph


class CapturedGenerator:
    """What a CUDA generator has beyond a CPU one."""

    state = 0

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state

    def clone_state(self):
        return "clone"

    def graphsafe_set_state(self, state):
        self.state = state


def refuse_captures(fake_cuda, times: int = 100):
    """The next so many captures are spoiled."""
    left = [times]

    @contextlib.contextmanager
    def refuse(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        left[0] -= 1
        if left[0] < 0:
            yield
            return
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        yield

    fake_cuda.setattr(torch.cuda, "graph", refuse)


def test_where_one_capture_fails_none_of_those_that_share_generators_is_replayed(fake_cuda):
    fake_cuda.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: None)
    fake_cuda.setattr(torch._C, "_cuda_releasePool", lambda *pool: None)
    graphs = Graphs(list, torch.device("cpu"))
    body = lambda: {"loss": torch.zeros(())}  # noqa: E731
    first = graphs.prepare("first", body, [])
    assert first.graph is not None
    refuse_captures(fake_cuda, 1)
    assert (graphs.captured, graphs.error) == (True, "")
    with pytest.warns(UserWarning, match="could not be captured"):
        graphs.prepare("second", body, [])()
    assert first.graph is None
    assert float(first()["loss"]) == 0
    assert (graphs.captured, graphs.error) == (False, "operation not permitted when stream is capturing")


class Cycle:
    """Garbage that only a collection finds."""

    collected = 0

    def __init__(self):
        self.me = self

    def __del__(self):
        Cycle.collected += 1


def test_no_garbage_is_collected_between_the_warm_up_and_the_end_of_a_capture(fake_cuda):
    """A collection there may free another graph, or memory and its events: calls that spoil a capture."""
    fake_cuda.setattr(Cycle, "collected", 0)
    found = []

    def body():
        found.append(Cycle.collected)
        for _ in range(100):
            Cycle()
        found.append(Cycle.collected)
        return {"loss": torch.zeros(())}

    thresholds = gc.get_threshold()
    gc.set_threshold(1000000)
    for _ in range(10):
        Cycle()
    gc.set_threshold(10)  # one every few objects
    try:
        Captured(body, list, [], torch.device("cpu")).prepare()
        assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)
    # at once; nothing in two runs of warm-up; what these left; nothing in the capture
    assert found == [10, 10, 10, 10, 210, 210]


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_it_was_after_an_error(fake_cuda, enabled):
    def body():
        assert not gc.isenabled()
        raise ValueError("in the warm-up")

    if not enabled:
        gc.disable()
    try:
        with pytest.raises(ValueError, match="in the warm-up"):
            Captured(body, list, [], torch.device("cpu")).prepare()
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["distil", "teach", "predict"])
def test_a_step_says_whether_it_is_captured_and_why_not(fake_cuda, kind):
    fake_cuda.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: None)
    fake_cuda.setattr(torch._C, "_cuda_releasePool", lambda *pool: None)
    fake_cuda.setattr(Captured, "__call__", lambda self: self.prepare() or self.body())
    found = []
    for capture, spoiled in ((False, 0), (True, 0), (True, 100)):
        refuse_captures(fake_cuda, spoiled)
        step, run = capturing(kind)
        assert (step.captured, step.capture_error) == (False, ""), "on a CPU"
        step.capture = capture
        before = step.captured
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the step could not be captured")
            run()
        found.append((before, step.captured, step.capture_error))
    told = "operation not permitted when stream is capturing"
    assert found == [(False, False, ""), (None, True, ""), (None, False, told)]


def capturing(kind):
    """A step that has not run, and what runs it."""
    if kind == "predict":
        predictor = GroupedPredictor([network(0)], (3, 6, 6))
        images = Split(np.zeros((2, 6, 6, 3), dtype=np.uint8), np.zeros(2, dtype=np.int64))
        return predictor, lambda: predictor(EvaluationSet(images, "cpu"), 2)
    if kind == "teach":
        networks, config = teach_setting(2)
        teach = FusedTeachStep(networks, config, image_shape=(3, 6, 6))
        return teach, lambda: teach([batch(0), batch(1)])
    student, teachers, config = setting()
    step = FusedStep(student, teachers, config)
    step.generators = [untyped(CapturedGenerator)()]
    return step, lambda: step(*batch(0))


def test_all_graphs_of_unlike_teachers_are_made_at_the_first_step(fake_cuda):
    """A warm-up averages over processes too. Those that draw differently must not warm up at different steps."""
    counts: list[Any] = []
    right = trained.average
    fake_cuda.setattr(trained, "average", lambda values: untyped(counts).append(1) or right(values))
    fake_cuda.setattr(graph, "Captured", WarmedUp)
    ended: list[Any] = []
    averaged: list[Any] = []
    for capture in (False, True, True):
        # four teachers, one of another architecture: the first pair's place is one that not all lists have
        student, teachers, config = setting(M=4, K=4, teacher=lambda seed: network(seed, widen=1 + (seed == 12)))
        config.seed += 2 * len(averaged)  # as a process of its own
        step = FusedStep(student, teachers, config)
        step.load(batch(0))
        step.graphs = Graphs(step.state, torch.device("cpu")) if capture else None
        assert len(step.perturbers) == 3
        averaged.append([])
        for i in range(6):
            counts.clear()
            step(*batch(i), pair=None if i else (3, 1))
            averaged[-1].append(len(counts))
        ended.append(student.state_dict())
        if len(ended) == 2:  # the seed of the second, launched
            again, _, _ = setting(M=4, K=4)
            one = FusedStep(again, teachers, config)
            for i in range(6):
                one(*batch(i), pair=None if i else (3, 1))
            for name, value in again.state_dict().items():
                assert torch.equal(value, ended[1][name]), name
    once = averaged[0][0]
    assert averaged[0] == [once] * 6
    assert averaged[1] == averaged[2] == [7 * once, *[once] * 5]


class WarmedUp(Captured):
    """Warmed up as a capture is, then launched."""

    def _capture(self):
        warm_up(self.body, self.state, self.generators)
        self.graph = untyped(self)

    def __call__(self):
        self.prepare()
        return self.body()


def test_a_process_that_leaves_its_group_destroys_its_graphs_first(fake_cuda):
    """NCCL waits for them."""
    happened = []
    fake_cuda.setattr(graph, "processes", lambda: 2)
    fake_cuda.setattr(parallel.dist, "is_initialized", lambda: True)
    fake_cuda.setattr(parallel.dist, "destroy_process_group", lambda: happened.append("left"))
    fake_cuda.setattr(FakeGraph, "reset", lambda self: happened.append("destroyed"), raising=False)
    captured = Captured(lambda: {"loss": torch.zeros(())}, list, [], torch.device("cpu"))
    captured.prepare()
    parallel._leave()
    assert happened == ["destroyed", "left"]
    assert captured.graph is None

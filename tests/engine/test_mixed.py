"""Teachers that cannot be planned, as modules in the fused step, against the reference engine; and those refused."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations

from fastensdistill.data.loader import EvaluationSet
from fastensdistill.data.sources import Split
from fastensdistill.engine import module_pass, planned_ops
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.graph_nodes import GraphNodes
from fastensdistill.engine.host_reads import HostReads
from fastensdistill.engine.memory import estimate, on_meta, report
from fastensdistill.engine.reference import ReferenceStep
from fastensdistill.engine.select import distillation_step
from fastensdistill.engine.verify import DisagreementError, verify_distillation
from fastensdistill.errors import InputError
from fastensdistill.evaluate.predict import predict
from fastensdistill.evaluate.validate import Evaluator, GroupedPredictor
from fastensdistill.kernels.tiles import assume_arch
from tests.compare import check_close
from tests.engine import unplanned
from tests.engine.cases import CLASSES, batch, check_equal, network, setting, steps
from tests.engine.recorded_graph import RecordedGraphs
from tests.engine.unplanned import odd
from tests.untyped import present, untyped

SHAPE = (3, 6, 6)


def mixed(*modules, then=None, others=network):
    """Teachers: those of these numbers are modules, the ``others`` are planned, as the student is."""
    return lambda seed: odd(seed, then) if seed - 10 in modules else others(seed)


def normed(seed):
    net = network(seed)
    parametrizations.weight_norm(net.stem)
    return net


def widening(seed):
    return network(seed, widen=1 + seed % 2)


TWO = {"micro_batches": 2}
CASES = {
    "none": {"kind": "single", "K": 1, "teacher": mixed(0, then=unplanned.without_gradient), "perturbation": "none"},
    "gaussian, last": {"teacher": mixed(2), "perturbation": "gaussian", **TWO},
    "ods, all": {"teacher": mixed(0, 1, 2), "perturbation": "ods"},
    "confods, a hydra": {"kind": "hydra", "teacher": mixed(1), "perturbation": "confods", **TWO},
    "tdiv, more branches": {"M": 4, "K": 5, "teacher": mixed(0, 3), "perturbation": "tdiv"},
    "tdiv-sdiv": {"teacher": mixed(1), **TWO},
    "first, contiguous images": {"teacher": mixed(0, then=unplanned.in_order)},
    "last, writes into its images": {"teacher": mixed(2, then=unplanned.overwriting), **TWO},
    "all, that draw": {"teacher": mixed(0, 1, 2, then=unplanned.dropping)},
    "among two architectures": {"M": 4, "K": 4, "teacher": mixed(2, others=widening), **TWO},
    "weight norm": {"M": 2, "K": 2, "teacher": normed},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_as_the_reference(case):
    """Steps in float64, by several drawn pairs: scalars, weights, statistics, momentum and generators."""
    options = {"M": 3, "K": 3, "batch_size": 4, **CASES[case]}
    student, teachers, config = setting(**untyped(options))
    if case == "weight norm":
        assert "parametrised" in FusedStep(copy.deepcopy(student), teachers, config, image_shape=SHAPE).modules[0]
    other, found = copy.deepcopy(student), []
    one = ReferenceStep(student, teachers, config, num_classes=CLASSES)
    two = FusedStep(other, teachers, config, image_shape=SHAPE)
    for step in (one, two):
        torch.manual_seed(5)
        found.append(steps(step, 3, B=4))
    for expected, actual in zip(*found, strict=True):
        assert set(expected) == set(actual)
        for name, value in expected.items():
            check_close(name, actual[name], value, 1e-9)
    check_equal(student, other, one, two, 1e-9)
    numbers = {i for i, net in enumerate(teachers.networks) if isinstance(net, unplanned.Odd)}
    assert case == "weight norm" or set(two.modules) == numbers


def test_every_pair_has_its_launches_and_its_gradient():
    """All that can be drawn, one by one, against the reference engine's perturbation."""
    student, teachers, config = setting(M=3, K=3, teacher=mixed(0, 2))
    step = FusedStep(student, teachers, config, image_shape=SHAPE)
    x = batch(3)[0]
    for pair in step.perturbation.pairs:
        expected = step.perturbation.perturb(x, teachers, student, pair)
        actual = step.perturb(x, pair)
        check_close(f"{pair}", actual.images - x, expected.images - x, 1e-9)
    assert len(step.perturbers) == 6
    assert (step.joint is not None) == step.implementations.joint


def test_teachers_are_copied_once_and_left_as_they_are():
    student, teachers, config = setting(M=3, K=3, teacher=mixed(1))
    step = FusedStep(student, teachers, config, image_shape=SHAPE)
    before = {name: value.clone() for name, value in teachers.state_dict().items()}
    flags = [p.requires_grad for p in teachers.parameters()]
    step(*batch(0))
    assert all(torch.equal(value, before[name]) for name, value in teachers.state_dict().items())
    assert flags == [p.requires_grad for p in teachers.parameters()]
    assert all(p.grad is None for p in teachers.parameters())
    images = batch(1)[0].permute(0, 2, 3, 1).contiguous()
    logits = step.targets(images)
    with torch.no_grad():
        for p in teachers.parameters():
            p.mul_(1.5)
    assert torch.equal(step.targets(images), logits)


def test_a_teacher_of_another_dtype_is_a_module():
    """In its own precision, as in the reference engine."""
    student, teachers, config = setting(M=3, K=3)
    teachers.networks[2].float()
    other = copy.deepcopy(student)
    one = ReferenceStep(student, teachers, config, num_classes=CLASSES)
    two = FusedStep(other, teachers, config, image_shape=SHAPE)
    assert list(two.modules) == [2]
    for expected, actual in zip(steps(one, 2), steps(two, 2), strict=True):
        check_close("loss", actual["loss"], expected["loss"], 1e-7)
    check_equal(student, other, one, two, 1e-6)


def test_bfloat16_is_autocasts():
    student, teachers, config = setting(M=2, dtype=torch.float32, teacher=mixed(0, 1), precision="bf16")
    step = FusedStep(student, teachers, config, image_shape=SHAPE)
    images = batch(0, dtype=torch.float32)[0]
    step.build(images.shape)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = teachers(images)
    found = step.targets(images.permute(0, 2, 3, 1))
    assert expected.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_check_before_a_run_covers_modules(precision):
    student, teachers, config = setting(M=3, K=3, dtype=torch.float32, teacher=mixed(0, 2), precision=precision)
    assert max(verify_distillation(student, teachers, config, SHAPE, CLASSES).values()) < 2e-2


@pytest.mark.parametrize("wrong", [None, 0, 2])
def test_the_check_sees_every_architectures_gradient(monkeypatch, wrong):
    """Whichever pair the run draws first: one teacher's gradient turned is found."""
    student, teachers, config = setting(M=3, K=3, dtype=torch.float32, teacher=mixed(0, 2))
    right = module_pass.module_gradient

    def turned(run, launch):
        right(run, launch)
        if run.part.network.name == f"teacher {wrong}":
            run.buffers["input.grad"] *= -1

    monkeypatch.setitem(planned_ops.OPS, "module gradient", turned)
    if wrong is None:
        assert verify_distillation(student, teachers, config, SHAPE, CLASSES)["perturbation"] < 1e-6
    else:
        with pytest.raises(DisagreementError, match="perturbation"):
            verify_distillation(student, teachers, config, SHAPE, CLASSES)


def test_the_check_has_both_engines_draw_alike():
    """A teacher that drops values in evaluation mode."""
    drawing = mixed(0, 2, then=unplanned.dropping)
    student, teachers, config = setting(M=3, K=3, dtype=torch.float32, teacher=drawing)
    assert max(verify_distillation(student, teachers, config, SHAPE, CLASSES).values()) < 1e-6


def test_resumed_is_bit_equal():
    def make():
        student, teachers, config = setting(M=3, K=3, teacher=mixed(0), perturbation="ods")
        return student, FusedStep(student, teachers, config, image_shape=SHAPE)

    (whole, one), (half, two), (rest, three) = make(), make(), make()
    steps(one, 2)
    steps(two, 1)
    rest.load_state_dict(half.state_dict())
    three.load_state_dict(two.state_dict())
    three.set_learning_rate(0.05 / 2)
    three(*batch(1))
    for name, value in (whole.state_dict() | one.state_dict()).items():
        assert torch.equal(value, (rest.state_dict() | three.state_dict())[name]), name


@pytest.mark.parametrize("perturbation", ["tdiv-sdiv", "ods"])
def test_what_is_captured_is_what_is_launched(perturbation):
    """Recorded and replayed without Python, where nothing may be read on the host, for every pair that was drawn."""

    def make():
        student, teachers, config = setting(M=3, K=3, teacher=mixed(0, 1), perturbation=perturbation)
        step = FusedStep(student, teachers, config, image_shape=SHAPE)
        step.build((3, *SHAPE))
        return student, step

    (student, launched), (other, captured) = make(), make()
    named = {f"teacher {m}": own for m, own in enumerate(captured.teachers.networks)}
    graphs = RecordedGraphs(captured.state, lambda: HostReads(named, torch.device("cpu"), refuse=True))
    untyped(captured).graphs = graphs
    for expected, actual in zip(steps(launched, 4), steps(captured, 4), strict=True):
        for name, value in expected.items():
            check_close(name, actual[name], value.float(), 1e-6)  # a graph's scalars are float32
    check_equal(student, other, launched, captured, 1e-12)
    assert len(graphs.made) == (6 if perturbation == "tdiv-sdiv" else 3)
    assert len(set(graphs.replayed)) > 1


REFUSED = {
    "counter": (unplanned.counting, "'act.seen' changes"),
    "buffer": (unplanned.counting_in_a_buffer, "'act.count' changes"),
    "list": (unplanned.listing, r"'act.history\[1\]' changes"),
    "running mean": (unplanned.rebinding, "'act.mean' changes"),
    "set by the first images": (unplanned.set_by_the_first, "depend on what it was called with before"),
    "Python's generator": (unplanned.drawing_on_the_host, "generator"),
    "its own generator": (unplanned.own_generator, "'act.noise' is a generator"),
    "values on the host": (unplanned.branching, r"act \(Then\) reads values on the host by item"),
    "values on the host, in the backward pass": (unplanned.branching_back, "reads values on the host by item"),
    "no gradient": (unplanned.without_gradient, "gives no gradient of the images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_would_freeze_is_refused(case):
    then, words = REFUSED[case]
    student, teachers, config = setting(M=3, K=3, teacher=mixed(1, then=then))
    before = copy.deepcopy(teachers.state_dict())
    with pytest.raises(InputError, match=rf"^teacher 1: Odd: .*captured as a module: .*{words}"):
        FusedStep(student, teachers, config, image_shape=SHAPE)
    assert all(torch.equal(value, before[name]) for name, value in teachers.state_dict().items())


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_refused(register):
    student, teachers, config = setting(M=2, teacher=mixed(0))
    getattr(untyped(teachers.networks[1]).stem, register)(lambda *a: None)
    with pytest.raises(InputError, match=r"^teacher 1: .*module: module 'stem' has a forward (pre-)?hook, which would"):
        FusedStep(student, teachers, config, image_shape=SHAPE)


def test_a_container_that_does_something_is_refused():
    for change in (lambda t: t.register_forward_hook(print), lambda t: setattr(t, "forward", lambda x: x)):
        student, teachers, config = setting(M=2, teacher=mixed(0))
        change(teachers)
        with pytest.raises(InputError, match="Teachers: the outermost module"):
            FusedStep(student, teachers, config, image_shape=SHAPE)


def test_a_student_without_a_plan_and_one_that_shares_weights_are_refused():
    student, teachers, config = setting(teacher=mixed(0), student=odd)
    with pytest.raises(InputError, match="Odd"):
        FusedStep(student, teachers, config, image_shape=SHAPE)
    student, teachers, config = setting("single", K=1, teacher=mixed(0), perturbation="none")
    untyped(teachers.networks[0]).more = untyped(student).module.stem.weight
    with pytest.raises(InputError, match=r"the student's parameter 'module.stem.weight' is teacher 0's too"):
        FusedStep(student, teachers, config, image_shape=SHAPE)


def fails_on_meta(self, x):
    if x.is_meta:
        raise RuntimeError("no values")
    return x


def test_memory_counts_modules_or_says_that_it_does_not():
    found = {}
    for then in (None, fails_on_meta):
        student, teachers, config = setting(M=3, K=3, dtype=torch.float32, teacher=mixed(1, 2, then=then))
        found[then] = estimate(FusedStep(student, teachers, config, image_shape=SHAPE), 64)
    counted, not_counted = found.values()
    assert counted.uncounted == []
    perturbing = {p.name: p for p in counted.passes}["perturbation, forward"]
    assert ("module", "logits") in [(op, layer) for op, layer, _ in perturbing.rows]
    of_module = max(size for op, _, size in perturbing.rows if op == "module")
    assert of_module > 3 * 64 * 6 * 36 * 4  # at least so many activations that autograd keeps
    assert not_counted.uncounted == [f"teacher {m}: no values" for m in (1, 2)]
    of_no_module = next(p for p in not_counted.passes if p.name == perturbing.name)
    assert max(size for op, _, size in of_no_module.rows if op == "module") < of_module
    assert any("not counted but for its logits: teacher 2: no values" in line for line in report("", not_counted))


def test_products_of_modules_count():
    student, teachers, config = setting(M=2, K=2, teacher=mixed(0))
    step = FusedStep(student, teachers, config, image_shape=SHAPE)
    assert step.networks[0].macs == 6 * 36 * 27 + 6 * 5
    step.build((4, *SHAPE))
    launches = [launch for one, _ in step.passes() for part in one.parts for launch in part.launches]
    flops = [launch.flops for launch in launches if launch.op.startswith("module")]
    assert flops == 4 * [4 * 2 * step.networks[0].macs]  # forward and back as the first, forward as the second, target


def test_the_line_says_which_why_and_whose_memory_is_not_counted():
    student, teachers, config = setting(M=3, K=3, dtype=torch.float32, teacher=mixed(0, 2, then=fails_on_meta))
    config.engine = "fused"
    step, choice = distillation_step(student, teachers, config, SHAPE, CLASSES)
    assert list(untyped(step).modules) == [0, 2]
    line = str(choice)
    assert line.startswith("fused engine, mixed, float32, ")
    assert "of its FLOPs by own kernels, memory without the activations of teacher 0, teacher 2" in line
    assert "1 of 3 teachers planned, teachers 0, 2 run as their own modules (0: Odd: " in line


def test_nodes_of_modules_count():
    """In every graph the target's forward pass; and in those of pairs that it is drawn in, one more, or both ways."""
    student, teachers, config = setting(M=3, K=3, dtype=torch.float32, teacher=mixed(0))
    twin, found = on_meta(FusedStep(student, teachers, config, image_shape=SHAPE)), []
    with torch.no_grad(), assume_arch(90):
        twin.build((4, *SHAPE))
        for _ in twin.variants():
            with GraphNodes() as nodes:
                twin.body()
            found.append((nodes.pytorch["sin"], nodes.pytorch["cos"]))
    assert sorted(found) == [(1, 0), (2, 0), (2, 1)]


def evaluated(count: int = 7) -> EvaluationSet:
    pixels = np.random.default_rng(4).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return EvaluationSet(Split(pixels, np.zeros(count, dtype=np.int64)), "cpu", dtype=torch.float64)


def test_an_ensemble_with_modules_is_evaluated_at_once():
    nets, split = [odd(0), network(1), odd(2), network(3), odd(0)], evaluated()
    nets[4] = nets[0]
    expected = torch.cat([predict(net, split) for net in nets])
    predictor = GroupedPredictor(nets, SHAPE)
    check_close("at first", predictor(split, 3), expected, 1e-9)
    with torch.no_grad():
        for net in nets[1:3]:
            for value in net.state_dict().values():
                value.mul_(1.1) if value.is_floating_point() else None
    after = torch.cat([predict(net, split) for net in nets])
    predictor.refresh([None, nets[1].state_dict(), nets[2], None, nets[2].state_dict()])
    after[4] = after[2]
    check_close("refreshed", predictor(split, 3), after, 1e-9)
    with pytest.raises(InputError, match=r"network 2: '.*' is missing; expected .*, as at first"):
        predictor.refresh([None, None, {}, None, None])


def across(self, x):
    return x - x.mean(0, keepdim=True)


def test_where_none_is_planned_or_one_mixes_images_all_are_evaluated_one_by_one():
    split = evaluated()
    for nets, why in (
        ([odd(0), odd(1)], "network 0: Odd"),
        ([network(0), odd(1, across)], "images that it comes with"),
    ):
        evaluator = Evaluator("fused", SHAPE)
        expected = torch.cat([predict(net, split) for net in nets])
        assert torch.equal(evaluator.networks(nets, split), expected)
        assert why in evaluator.reason
        assert evaluator.kept["networks"][1] is None
    evaluator = Evaluator("fused", SHAPE)
    nets = [network(0), odd(1)]
    check_close("mixed", evaluator.networks(nets, split), torch.cat([predict(net, split) for net in nets]), 1e-9)
    assert present(evaluator.kept["networks"][1]).ensemble.passes

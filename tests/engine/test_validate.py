"""Grouped evaluation against ``evaluate.predict.predict``, network by network."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fastensdistill.data.loader import EvaluationSet
from fastensdistill.data.sources import Split
from fastensdistill.engine import planned_ops
from fastensdistill.engine.dispatch import Choice, Dispatch
from fastensdistill.engine.ensemble import Ensemble
from fastensdistill.engine.fused import FusedStep
from fastensdistill.errors import InputError
from fastensdistill.evaluate import validate
from fastensdistill.evaluate.predict import predict
from fastensdistill.evaluate.validate import Evaluator, GroupedPredictor
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.launch import use_kernels
from fastensdistill.kernels.vendor_conv import VENDOR
from fastensdistill.method.modes import evaluating
from fastensdistill.models import create_model
from fastensdistill.models.preresnet import PreResNet
from tests.compare import check_close, relative_error
from tests.engine.cases import batch, evaluated_parts, network, setting, steps
from tests.engine.meta import watched
from tests.network import models
from tests.students import merged
from tests.untyped import present, untyped

SHAPE = (3, 6, 6)


def images(count: int = 7, size: int = 6, dtype=torch.float64) -> EvaluationSet:
    generator = np.random.default_rng(4)
    pixels = generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return EvaluationSet(Split(pixels, np.zeros(count, dtype=np.int64)), "cpu", dtype=dtype)


def one_by_one(networks, split) -> torch.Tensor:
    return torch.cat([predict(net, split) for net in networks])


def normalised(seed: int, mean: float, std: float) -> nn.Module:
    torch.manual_seed(seed)
    return models.moved(PreResNet(5, (1, 1), in_planes=4, mean=(mean, 0.5, 0.4), std=(std, 0.2, 0.3)), seed)


CASES = {
    "one network": lambda: [network(1)],
    "three of one architecture": lambda: [network(m) for m in range(3)],
    "post-activation": lambda: [models.resnet(m) for m in range(2)],
    "sums and BatchNorms in unusual places": lambda: [models.odd(m) for m in range(2)],
    "three architectures, not in order": lambda: [
        network(0), network(1, widen=2), models.odd(2), network(3), network(4, widen=2),
    ],
    "normalisations that differ": lambda: [normalised(0, 0.1, 0.2), normalised(1, 0.6, 0.5), normalised(2, 0.3, 1.0)],
    "one network twice": lambda: [network(1), network(2)] * 2,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_as_network_by_network(case):
    networks, split = CASES[case](), images()
    check_close(case, GroupedPredictor(networks, SHAPE)(split, batch_size=3), one_by_one(networks, split), 1e-9)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7, 100, None], ids=str)
def test_one_plan_serves_every_batch(monkeypatch, batch_size):
    """Batches that fit, a smaller last one, one beyond the set; the same again, and after new weights."""
    networks, split = [network(0), network(1)], images()
    predictor = GroupedPredictor(networks, SHAPE)
    sizes: list[int] = []
    right = Ensemble.plan
    monkeypatch.setattr(Ensemble, "plan", lambda self, batch: untyped(sizes).append(batch) or right(self, batch))
    for round in range(3):
        expected = one_by_one(networks, split)
        check_close(f"round {round}", predictor(split, batch_size), expected, 1e-9)
        with torch.no_grad():
            networks[1].stem.weight.mul_(-1.5)
        predictor.refresh([None, networks[1]])
    # evenly filled: at most 5 are 4 and 3
    assert sizes == {1: [1], 3: [3], 5: [4]}.get(batch_size, [7])


def test_weights_are_copied_and_refreshed():
    networks, split = [network(0), network(1, widen=2)], images()
    before = one_by_one(networks, split)
    predictor = GroupedPredictor(networks, SHAPE)
    check_close("at first", predictor(split), before, 1e-9)
    with torch.no_grad():
        for net in networks:
            for value in net.state_dict().values():  # scales, shifts and running statistics too
                if value.is_floating_point():
                    value.mul_(1.1)
    after = one_by_one(networks, split)
    assert relative_error(after, before) > 1e-2
    check_close("stale", predictor(split), before, 1e-9)
    predictor.refresh([networks[0], None])
    check_close("first refreshed", predictor(split), torch.stack([after[0], before[1]]), 1e-9)
    predictor.refresh([None, networks[1].state_dict()])
    check_close("both refreshed", predictor(split), after, 1e-9)


def test_average_and_branches_take_the_launches_of_one_network():
    student, _, _ = setting(K=3)
    average = GroupedPredictor([student.average()], SHAPE)
    average(images())
    (one,) = evaluated_parts(average)
    evaluator = Evaluator("fused", SHAPE)
    evaluator.student(student, images())
    _, predictor = evaluator.kept["student"]
    (part,) = evaluated_parts(present(predictor))
    assert len(part.groups) == 4
    assert len(part.launches) == len(one.launches) > 5
    assert [launch.op for launch in part.launches] == [launch.op for launch in one.launches]


@pytest.mark.parametrize("engine", ["fused", "reference"])
@pytest.mark.parametrize("kind", ["latent-be", "batch-ensemble", "single", "hydra"])
def test_students(kind, engine):
    """What the trainer asks for; a hydra goes through PyTorch on either engine."""
    student, _, _ = setting(kind, K=1 if kind == "single" else 3)
    evaluator, split = Evaluator(engine, SHAPE), images()
    deployed, branches = evaluator.student(student, split)
    check_close("deployed", deployed, predict(student.deployed(), split), 1e-9)
    if kind == "single":
        assert branches is None
    else:
        check_close("branches", present(branches), predict(student, split), 1e-9)
    assert ("hydra" in evaluator.reason) == (kind == "hydra" and engine == "fused")
    assert (evaluator.kept.get("student", ([], None))[1] is not None) == (kind != "hydra" and engine == "fused")


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_networks_between_the_branches(engine, monkeypatch):
    """More of them than slots, on a sample of the images; the student itself afterwards, with the same plan."""
    student, _, _ = setting(K=3)
    evaluator, split, sample = Evaluator(engine, SHAPE), images(15), images(13)
    sizes: list[int] = []
    right = Ensemble.plan
    monkeypatch.setattr(Ensemble, "plan", lambda self, batch: untyped(sizes).append(batch) or right(self, batch))
    weights = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.1
    weights /= weights.sum(1, keepdim=True)
    for _ in range(2):
        deployed, branches = evaluator.student(student, split)
        check_close("deployed", deployed, predict(student.average(), split), 1e-9)
        check_close("branches", present(branches), predict(student, split), 1e-9)
        between = evaluator.mixed(student, weights, sample)
        for k, row in enumerate(weights):
            check_close(f"point {k}", between[k], predict(merged(student, row), sample)[0], 1e-6)
        with torch.no_grad():
            student.layers()[0].layer.weight.mul_(1.3)
    assert sizes == ([15] if engine == "fused" else [])


@pytest.mark.parametrize("engine", ["fused", "reference"])
@pytest.mark.parametrize("kind", ["single", "hydra"])
def test_students_without_factors_have_nothing_between_them(kind, engine):
    student, _, _ = setting(kind, K=1 if kind == "single" else 2)
    with pytest.raises(InputError, match=f"a {kind} student has no factors to mix"):
        Evaluator(engine, SHAPE).mixed(student, torch.ones(1, student.branches), images())


def test_one_branch_is_its_own_average():
    student, _, _ = setting(K=1)
    deployed, branches = Evaluator("fused", SHAPE).student(student, images())
    check_close("deployed", deployed, predict(student.deployed(), images()), 1e-9)
    assert branches is None


def test_a_trainer_validates_again_and_again():
    """Between the steps of the fused engine, which holds the student's weights, with one predictor."""
    student, teachers, config = setting(K=2)
    step = FusedStep(student, teachers, config, image_shape=SHAPE)
    evaluator, split = Evaluator("fused", SHAPE), images()
    seen, predictors = [], set()
    for i in range(3):
        deployed, branches = evaluator.student(student, split)
        check_close(f"deployed {i}", deployed, predict(student.average(), split), 1e-9)
        check_close(f"branches {i}", present(branches), predict(student, split), 1e-9)
        seen.append(deployed)
        predictors.add(id(evaluator.kept["student"][1]))
        steps(step, 1)
    assert relative_error(seen[2], seen[1]) > 1e-3
    assert len(predictors) == 1
    members = [network(20), network(21), network(22)]
    for i in range(2):
        check_close(f"networks {i}", evaluator.networks(members, split), one_by_one(members, split), 1e-9)
        with torch.no_grad():
            members[1].stem.weight.mul_(-1.5)
    members = list(teachers.networks)
    check_close("teachers", evaluator.teachers(teachers, split), one_by_one(members, split), 1e-9)
    check_close("networks", evaluator.networks(members, split), one_by_one(members, split), 1e-9)
    check_close("fewer", evaluator.networks(members[1:], split), one_by_one(members[1:], split), 1e-9)
    assert {role: len(owners) for role, (owners, _) in evaluator.kept.items()} == {"student": 1, "networks": 1}


class Auxiliary(nn.Module):
    """Another computation in training mode than in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.second = nn.Conv2d(3, 4, 3), nn.Linear(64, 5), nn.Linear(64, 5)

    def forward(self, x):
        x = self.conv(x).relu().flatten(1)
        return self.second(x) if self.training else self.linear(x)


def test_a_network_in_training_mode_is_the_one_it_is_in_evaluation():
    networks, split = [Auxiliary().double().train(), Auxiliary().double().eval()], images()
    predictor = GroupedPredictor(networks, SHAPE)
    check_close("both", predictor(split), one_by_one(networks, split), 1e-9)
    assert len(evaluated_parts(present(predictor))) == 1


class Repeated(nn.Module):
    """A layer that is used twice, which no plan has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(64, 5)

    def forward(self, x):
        return self.linear((self.conv(x) + self.conv(x.flip(3))).flatten(1))


def test_what_cannot_be_planned_goes_through_pytorch():
    networks, split = [Repeated().double(), Repeated().double()], images()
    with pytest.raises(InputError, match=r"network 0: .*used twice"):
        GroupedPredictor(networks, SHAPE)
    evaluator = Evaluator("fused", SHAPE)
    assert torch.equal(evaluator.networks(networks, split), one_by_one(networks, split))
    assert "used twice" in evaluator.reason


def test_networks_are_left_as_they_are():
    """Modes, gradients' flags and every tensor, whatever mode they are in; a training network is evaluated."""
    networks, split = [network(0).train(), network(1).eval(), models.odd(2).train()], images()
    networks[0].bn.eval()
    networks[1].stem.weight.requires_grad_(False)

    def record():
        return [
            (
                [m.training for m in net.modules()],
                [p.requires_grad for p in net.parameters()],
                {name: (value.data_ptr(), value.clone()) for name, value in net.state_dict().items()},
            )
            for net in networks
        ]

    before = record()
    predictor = GroupedPredictor(networks, SHAPE)
    check_close("in training mode", predictor(split), one_by_one(networks, split), 1e-9)
    predictor.refresh(networks)
    for (modes, flags, tensors), (modes_after, flags_after, tensors_after) in zip(before, record(), strict=True):
        assert modes == modes_after
        assert flags == flags_after
        for name, (address, value) in tensors.items():
            assert address == tensors_after[name][0]
            assert torch.equal(value, tensors_after[name][1]), name


def test_kernels_in_the_interpreter():
    """The Triton kernels themselves, float32: a student's average and branches, and a network of another kind."""
    student, _, _ = setting(dtype=torch.float32)
    other, split = models.resnet(0).float(), images(3, 5, torch.float32)
    expected, alone = predict(student, split), predict(other, split)
    with use_kernels():
        deployed, branches = Evaluator("fused", (3, 5, 5)).student(student, split)
        (found,) = GroupedPredictor([other], (3, 5, 5))(split, batch_size=2)
    check_close("branches", present(branches), expected, 1e-4)
    check_close("deployed", deployed, predict(student.average(), split), 1e-4)
    check_close("resnet", found, alone[0], 1e-4)


def test_bf16_errs_at_most_twice_as_much_as_pytorch():
    networks, split = [network(m).float() for m in range(4)], images(64, 8, torch.float32)
    exact = one_by_one([copy.deepcopy(net).double() for net in networks], images(64, 8))
    with torch.autocast("cpu", torch.bfloat16):
        pytorch = relative_error(one_by_one(networks, split), exact)
    predictor = GroupedPredictor(networks, (3, 8, 8), precision="bf16")
    ours = relative_error(predictor(split), exact)
    (weights,) = predictor.ensemble.weights.values()
    assert weights.layers["stem"].forward.dtype == torch.bfloat16
    assert 1e-5 < ours <= 2 * pytorch


def test_precision_and_implementations_reach_the_launches(monkeypatch):
    seen = []

    def spy(right):
        def op(*arguments, **options):
            seen.append((right.__name__, options["precision"]))
            return right(*arguments, **options)

        return op

    monkeypatch.setitem(VENDOR, grouped_conv, spy(VENDOR[grouped_conv]))
    monkeypatch.setattr(planned_ops, "head", spy(planned_ops.head))
    networks, split = [network(m).float() for m in range(2)], images(dtype=torch.float32)
    for precision, expected in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        seen.clear()
        table = Dispatch([Choice("conv", "cudnn", "a test")])
        found = GroupedPredictor(networks, SHAPE, precision=precision, implementations=table)(split)
        assert set(seen) == {("vendor_conv", expected), ("head", expected)}
        check_close(precision, found, one_by_one(networks, split), 5e-2 if precision == "bf16" else 1e-5)


def test_the_captured_body_follows_its_static_tensors_alone():
    """Run again and again, as a replay would, with images and weights changed in place."""
    networks = [network(0), network(1, widen=2), network(2)]
    predictor = GroupedPredictor(networks, SHAPE)
    predictor._build(3)
    kept = [predictor.images]
    for weights in predictor.ensemble.weights.values():
        stem = weights.layers["stem"]
        kept += [stem.forward, *([] if stem.bias is None else [stem.bias])]
    addresses = [t.data_ptr() for t in kept]
    for i in range(3):
        x, _ = batch(i)
        predictor.images.copy_(x.permute(0, 2, 3, 1))
        with torch.no_grad():
            networks[i].classifier.weight.add_(0.5)
            predictor.refresh(networks)
            found = predictor._body()["probabilities"]
            for m, net in enumerate(networks):
                with evaluating(net):
                    check_close(f"batch {i}, network {m}", found[m], net(x).float().softmax(-1), 1e-9)
    assert addresses == [t.data_ptr() for t in kept]


class Replayed:
    """``Captured`` without a GPU: results at one address, which the next call overwrites."""

    made = 0

    def __init__(self, body, state, generators, device):
        Replayed.made += 1
        assert (list(state()), generators) == ([], [])
        self.body, self.results = body, None

    def __call__(self):
        results = self.body()
        if self.results is None:
            self.results = results
        for name, value in results.items():
            self.results[name].copy_(value)
        return self.results


def test_one_capture_serves_every_batch_and_refresh(monkeypatch):
    monkeypatch.setattr(validate, "Captured", Replayed)
    monkeypatch.setattr(Replayed, "made", 0)
    networks, split = [network(0), network(1, widen=2), network(2)], images()
    predictor = GroupedPredictor(networks, SHAPE)
    predictor.capture = True
    for i in range(3):
        check_close(f"round {i}", predictor(split, batch_size=3), one_by_one(networks, split), 1e-9)
        with torch.no_grad():
            networks[i].stem.weight.mul_(-1.5)
        predictor.refresh(networks)
    assert Replayed.made == 1
    check_close("another size", predictor(split, batch_size=4), one_by_one(networks, split), 1e-9)
    assert Replayed.made == 2


def test_the_body_and_a_refresh_wait_for_nothing():
    with torch.device("meta"):
        networks = [create_model("wrn28_1", 5), create_model("resnet32", 5), create_model("wrn28_1", 5)]
    predictor = GroupedPredictor(networks, (3, 32, 32), precision="bf16")
    predictor._build(4)
    with watched() as watch:
        predictor._body()
        predictor.refresh(networks)
    assert watch.syncs == []


def test_refusals():
    split = images()
    with pytest.raises(InputError, match="at least one"):
        GroupedPredictor([], SHAPE)
    with pytest.raises(InputError, match="network 1 gives 7 classes; expected 5"):
        GroupedPredictor([network(0), models.resnet(0)], SHAPE)
    with torch.device("meta"):
        elsewhere = PreResNet(5, (1, 1), in_planes=4)
    with pytest.raises(InputError, match=r"network 1 is torch.float32 on meta; expected torch.float64 on cpu"):
        GroupedPredictor([network(0), elsewhere], SHAPE)
    with pytest.raises(InputError, match="unknown precision 'fp8'"):
        GroupedPredictor([network(0)], SHAPE, precision="fp8")
    with pytest.raises(InputError, match="unknown precision 'fp8'"):
        Evaluator("fused", SHAPE, precision="fp8")
    with pytest.raises(InputError, match="unknown engine 'auto'"):
        Evaluator("auto", SHAPE)
    predictor = GroupedPredictor([network(0), network(1)], SHAPE)
    with pytest.raises(InputError, match="1 networks for a predictor of 2"):
        predictor.refresh([network(0)])
    with pytest.raises(InputError, match=r"network 1: 'stem\.weight' is missing"):
        predictor.refresh([None, {}])
    with pytest.raises(InputError, match=r"network 1: '.*' is \(.*\); expected \("):
        predictor.refresh([None, network(1, widen=2)])
    with pytest.raises(InputError, match=r"\(3, 5, 5\); expected \(3, 6, 6\)"):
        predictor(images(3, 5))
    with pytest.raises(InputError, match="batch size is 0"):
        predictor(split, 0)
    with pytest.raises(InputError, match="network 0"):
        GroupedPredictor([setting()[0]], SHAPE)

"""The fused step against the reference engine and the recorded steps; faults that must be seen."""

import copy
import dataclasses

import pytest
import torch

from fastensdistill.engine import flat_update, planned_ops
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.packed import TrainedWeights
from fastensdistill.engine.perturb import FusedPerturbation
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import use_kernels
from fastensdistill.method import perturbation
from fastensdistill.method.perturbation import PERTURBATIONS
from fastensdistill.method.teachers import Teachers
from fastensdistill.models.preresnet import PreResNet
from tests import parity
from tests.compare import check_close, relative_error
from tests.engine.cases import CLASSES, batch, check_equal, network, packed, setting, steps, teach_setting
from tests.network import models
from tests.parity import RECORDING
from tests.untyped import untyped


def test_recorded_steps(capsys):
    assert parity.main([str(RECORDING), "--engine", "fused"]) == 0
    assert "138 quantities" in capsys.readouterr().out
    assert max(parity.run(RECORDING, "fused", torch.float64).values()) < 1e-9


def wrong_sign(monkeypatch):
    seeds = perturbation.diversity_seed
    monkeypatch.setattr(perturbation, "diversity_seed", lambda t, s: (*seeds(t, s)[:3], -seeds(t, s)[3]))


def swapped_pair(monkeypatch):
    slot = FusedPerturbation._slot
    monkeypatch.setattr(FusedPerturbation, "_slot", lambda self, name, choice: slot(self, name, choice[::-1]))


def missing_mask(monkeypatch):
    right = planned_ops.conv_data_gradient
    monkeypatch.setattr(planned_ops, "conv_data_gradient", lambda *a, mask=None, **k: right(*a, mask=None, **k))


def stale_branches(monkeypatch):
    refresh = TrainedWeights.refresh

    def once(self):
        if not hasattr(self, "written"):
            self.written = True
            refresh(self)

    monkeypatch.setattr(TrainedWeights, "refresh", once)


def no_decay_of_factors(monkeypatch):
    right = flat_update.sgd

    def wrong(p, v, g, rate, *, weight_decay, **options):
        right(p, v, g, rate, weight_decay=0.0 if p.dim() == 2 else weight_decay, **options)

    monkeypatch.setattr(flat_update, "sgd", wrong)


FAULTS = {
    "sign of SDiv": (wrong_sign, "perturbation"),
    "pair swapped": (swapped_pair, "perturbation"),
    "no ReLU mask in the data gradient": (missing_mask, "perturbation"),
    "weights of the step before": (stale_branches, "step1/"),
    "factors do not decay": (no_decay_of_factors, "/r"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(monkeypatch, fault):
    plant, where = FAULTS[fault]
    plant(monkeypatch)
    errors = parity.run(RECORDING, "fused", torch.float64 if fault == "factors do not decay" else None)
    seen = {name: error for name, error in errors.items() if error > (1e-5 if "decay" in fault else 1e-3)}
    assert any(where in name for name in seen), max(errors.values())


ODD = {"teacher": models.odd, "student": models.odd}
CASES = {
    **{name: {"perturbation": name, "M": 3} for name in PERTURBATIONS},
    "two teachers": {"alpha": 0.9},
    "batch-ensemble": {"kind": "batch-ensemble", "alpha": 0.5, "temperature": 2.0},
    "single, mean of 3 teachers": {"kind": "single", "K": 1, "M": 3, "perturbation": "ods"},
    "hydra": {"kind": "hydra", "M": 3, "K": 3},
    "hydra, drawn teachers": {"kind": "hydra", "perturbation": "confods", "K": 3},
    "hydra of an unusual network": {"kind": "hydra", **ODD},
    "more branches than teachers": {"K": 3},
    "more teachers than branches": {"M": 3, "K": 2},
    "wider teachers": {"teacher": lambda seed: network(seed, widen=2)},
    "unlike teachers": {
        "M": 3,
        "perturbation": "none",
        "teacher": lambda seed: network(seed, widen=1 + seed % 2),
    },
    "unlike teachers, drawn": {"M": 3, "K": 3, "teacher": lambda seed: network(seed, widen=1 + seed % 2)},
    "unlike teachers, one drawn": {"M": 3, "perturbation": "ods", "teacher": lambda seed: network(seed, 1 + seed % 2)},
    "unlike teachers of a hydra": {"kind": "hydra", "K": 4, "teacher": lambda seed: network(seed, widen=1 + seed % 2)},
    "unusual network": ODD,
    "no student of rank one over positions": {"kind": "single", "K": 1, "perturbation": "none", **ODD},
    "residual with zero padding": {"teacher": models.resnet, "student": models.resnet},
}


@pytest.mark.parametrize("case", CASES)
def test_every_perturbation_and_student_as_the_reference(case):
    """Three steps in float64: scalars, weights, statistics, momentum and generators."""
    student, teachers, config = setting(**untyped(CASES[case]))
    other = copy.deepcopy(student)
    classes = teachers(batch(0)[0]).shape[-1]
    one = ReferenceStep(student, teachers, config, num_classes=classes)
    two = FusedStep(other, teachers, config)
    for expected, actual in zip(steps(one, 3), steps(two, 3), strict=True):
        assert set(expected) == set(actual)
        for name, value in expected.items():
            check_close(name, actual[name], value, 1e-9)
    check_equal(student, other, one, two, 1e-8)
    check_close("averaged", other.deployed()(batch(5)[0]), student.deployed()(batch(5)[0]), 1e-8)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_noise_is_the_reference_engines_however_images_lie_in_memory(memory_format):
    student, teachers, config = setting(perturbation="gaussian")
    images = batch(0)[0].contiguous(memory_format=memory_format)
    reference = ReferenceStep(copy.deepcopy(student), teachers, config, num_classes=CLASSES)
    fused = FusedStep(student, teachers, config)
    assert torch.equal(fused.perturb(images).images, reference.perturb(images).images)


@pytest.mark.parametrize("build", [network, models.odd], ids=["preresnet", "unusual network"])
def test_teachers_at_once_as_the_reference(build):
    networks, config = teach_setting()
    networks = [build(m) for m in range(3)]
    others = copy.deepcopy(networks)
    one, two = TeachStep(networks, config), FusedTeachStep(others, config, image_shape=(3, 6, 6))
    for i in range(3):
        batches = [batch(10 * i + m) for m in range(3)]
        check_close("loss", two(batches)["loss"], one(batches)["loss"], 1e-9)
    for first, second in zip(networks, others, strict=True):
        check_equal(first, second, one, two, 1e-8)
    moments = one.state_dict()
    assert set(moments) == set(two.state_dict())


@pytest.mark.parametrize("kind", ["latent-be", "single", "hydra"])
def test_kernels_in_the_interpreter(kind):
    """The Triton kernels themselves, float32, a whole step."""
    changes = {"kind": "single", "K": 1, "perturbation": "tdiv"} if kind == "single" else {"kind": kind}
    student, teachers, config = setting(dtype=torch.float32, **changes)
    other = copy.deepcopy(student)
    one, two = ReferenceStep(student, teachers, config, num_classes=CLASSES), FusedStep(other, teachers, config)
    shape = {"B": 2, "size": 5, "dtype": torch.float32}
    expected = steps(one, 1, **untyped(shape))
    with use_kernels():
        actual = steps(two, 1, **untyped(shape))
    check_close("loss", actual[0]["loss"], expected[0]["loss"], 1e-4)
    check_equal(student, other, one, two, 1e-3)


def test_teachers_in_the_interpreter():
    networks, config = teach_setting(2, torch.float32)
    others = copy.deepcopy(networks)
    one, two = TeachStep(networks, config), FusedTeachStep(others, config, image_shape=(3, 5, 5))
    batches = [batch(m, B=2, size=5, dtype=torch.float32) for m in range(2)]
    expected = one(batches)
    with use_kernels():
        check_close("loss", two(batches)["loss"], expected["loss"], 1e-5)
    for first, second in zip(networks, others, strict=True):
        check_equal(first, second, one, two, 1e-3)


def test_resumed_is_bit_equal_in_the_interpreter():
    """Two steps of the Triton kernels; and one step, its state into new objects, one more."""

    def make():
        torch.manual_seed(0)
        small = lambda seed: models.moved(PreResNet(CLASSES, blocks=(1,), in_planes=4), seed)  # noqa: E731
        student, teachers, config = setting(
            dtype=torch.float32, teacher=small, student=small, perturbation="ods", alpha=0.9
        )
        return student, FusedStep(student, teachers, config, image_shape=(3, 5, 5))

    shape = {"B": 2, "size": 5, "dtype": torch.float32}
    (whole, one), (half, two), (rest, three) = make(), make(), make()
    with use_kernels():
        steps(one, 2, rate=0.05, **shape)
        steps(two, 1, rate=0.05, **shape)
        rest.load_state_dict(half.state_dict())
        three.load_state_dict(two.state_dict())
        three.set_learning_rate(0.05 / 2)
        three(*batch(1, **untyped(shape)))
    for name, value in (whole.state_dict() | one.state_dict()).items():
        assert torch.equal(value, (rest.state_dict() | three.state_dict())[name]), name


def test_tf32_is_chosen_explicitly(monkeypatch):
    """fp32 multiplies exactly; tf32 reaches every convolution and the classifier."""
    seen = []
    for name in ("grouped_conv", "conv_data_gradient", "conv_weight_gradient", "head", "head_backward"):
        right = getattr(planned_ops, name)

        def spy(*arguments, right=right, **options):
            seen.append(options["precision"])
            return right(*arguments, **options)

        monkeypatch.setattr(planned_ops, name, spy)
    for precision, expected in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        seen.clear()
        student, teachers, config = setting(dtype=torch.float32, precision=precision)
        steps(FusedStep(student, teachers, config), 1, dtype=torch.float32)
        assert set(seen) == {expected}


def test_bf16_errs_at_most_twice_as_much_as_pytorch():
    """The change of every kind of parameter in two steps, against float64; PyTorch's own bfloat16 beside it."""
    exact, teachers, config = setting(perturbation="none")
    start = copy.deepcopy(exact.state_dict())
    reference, engine = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    narrow = copy.deepcopy(teachers).float()
    half = dataclasses.replace(config, precision="bf16")
    steps(ReferenceStep(exact, teachers, config, num_classes=CLASSES), 2, B=8, size=8)
    steps(ReferenceStep(reference, narrow, half, num_classes=CLASSES), 2, B=8, size=8, dtype=torch.float32)
    step = FusedStep(engine, narrow, half)
    steps(step, 2, B=8, size=8, dtype=torch.float32)
    assert packed(step).layers["classifier"].forward.dtype == torch.bfloat16
    kinds = {"layer.weight", "delta_r", "delta_s", "bn.weight", "running_mean", "running_var"}
    for kind in kinds:
        names = [name for name in start if name.endswith(kind)]
        change = [torch.cat([(m.state_dict()[n].double() - start[n]).flatten() for n in names]) for m in
                  (exact, reference, engine)]  # fmt: skip
        pytorch, ours = relative_error(change[1], change[0]), relative_error(change[2], change[0])
        assert ours <= 2 * pytorch + 1e-3, (kind, ours, pytorch)
    assert {p.dtype for p in engine.parameters()} == {torch.float32}


def test_equal_teachers_and_equal_branches_leave_the_images_as_they_are():
    student, _, config = setting()
    with torch.no_grad():
        for layer in student.layers():
            layer.delta_r.zero_()
            layer.delta_s.zero_()
    teachers = Teachers([network(10), network(11)])
    teachers.networks[1].load_state_dict(teachers.networks[0].state_dict())  # given as such they would be refused
    step = FusedStep(student, teachers, config)
    images, _ = batch(0)
    assert torch.equal(step.perturb(images).images, images)


@pytest.mark.parametrize("kind", ["latent-be", "hydra"])
def test_building_a_step_draws_nothing_from_the_global_generator(kind):
    student, teachers, config = setting(kind)
    before = torch.get_rng_state()
    FusedStep(student, teachers, config)(*batch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_refusals():
    student, teachers, config = setting()
    step = FusedStep(student, teachers, config)
    with pytest.raises(InputError, match="image_shape"):
        step.state_dict()
    step(*batch(0))
    with pytest.raises(InputError, match=r"built for \(3, 3, 6, 6\)"):
        step(*batch(0, B=4))
    with pytest.raises(InputError, match=r"pair \(1, 1\)"):
        step(*batch(0), pair=(1, 1))
    heads, teachers, config = setting("hydra", student=lambda _: torch.nn.Linear(6, CLASSES).double())
    with pytest.raises(InputError, match="nothing but its heads"):
        FusedStep(heads, teachers, config, image_shape=(3, 6, 6))
    student, teachers, config = setting()
    with pytest.raises(InputError, match="no parameter requires gradients"):
        FusedStep(student.requires_grad_(False), teachers, config, image_shape=(3, 6, 6))
    networks, config = teach_setting()
    with pytest.raises(InputError, match="another architecture"):
        FusedTeachStep([*networks, network(0, widen=2)], config, image_shape=(3, 6, 6))
    with pytest.raises(InputError, match="2 batches for 3"):
        FusedTeachStep(networks, config, image_shape=(3, 6, 6))([batch(0), batch(1)])

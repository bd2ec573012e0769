"""Perturbations: each against its definition by autograd in float64, least work, and what must not happen."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastensdistill.config import DistillConfig
from fastensdistill.engine.reference import ReferenceStep
from fastensdistill.errors import InputError
from fastensdistill.method.perturbation import PERTURBATIONS, Perturbation
from fastensdistill.method.student import Hydra, LatentBE, Single
from fastensdistill.method.teachers import Teachers
from fastensdistill.models import create_model
from tests.compare import check_close
from tests.networks import scatter, tiny

B, CLASSES, SIZE, EPSILON = 3, 5, 8, 1 / 255


@pytest.fixture
def setting():
    torch.manual_seed(0)
    teachers = Teachers([scatter(tiny(), i).double() for i in range(3)])
    student = scatter(LatentBE(tiny(), 3), 9).double().eval()
    x = torch.rand(B, 3, SIZE, SIZE, dtype=torch.float64) * 0.9 + 0.05
    return teachers, student, x


def perturbed(name, x, teachers=None, student=None, pair=None, *, size=EPSILON, temperature=4.0, seed=0):
    """``x`` by the perturbation ``name`` of three teachers and three branches."""
    pick, noise = torch.Generator(), torch.Generator().manual_seed(seed)
    chosen = Perturbation(name, 3, 3, size=size, temperature=temperature, pick=pick, noise=noise)
    return chosen.perturb(x, teachers, student, pair)


def ascend(x, objective, factor=1.0):
    """clip(x + ε·√D·factor·g/‖g‖, 0, 1) with g by autograd of ``objective``: docs/method.md, Perturbation."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(objective(x), x)
    norm = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + EPSILON * math.sqrt(x[0].numel()) * factor * g / norm).clamp(0, 1).detach()


def cross_entropy(target, logits):
    return -(target.detach().softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def test_tdiv_minus_sdiv(setting):
    teachers, student, x = setting

    def objective(x):
        t, s = teachers(x), student(x)  # all members both ways, as the authors' code runs it
        return cross_entropy(t[0], t[2]) - cross_entropy(s[0], s[2])

    found = perturbed("tdiv-sdiv", x, teachers, student, (2, 0))
    expected = ascend(x, objective)
    check_close("change", found.images - x, expected - x, 1e-9)
    check_close("tdiv", found.diversities["tdiv"], cross_entropy(teachers(x)[0], teachers(x)[2]), 1e-12)
    check_close("sdiv", found.diversities["sdiv"], cross_entropy(student(x)[0], student(x)[2]), 1e-12)


def test_tdiv_alone(setting):
    teachers, _, x = setting
    found = perturbed("tdiv", x, teachers, pair=(0, 1))
    expected = ascend(x, lambda x: cross_entropy(teachers(x)[1], teachers(x)[0]))
    check_close("change", found.images - x, expected - x, 1e-9)


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_ods_and_confods(setting, confident, temperature):
    teachers, _, x = setting
    w = torch.empty(B, CLASSES, dtype=torch.float64).uniform_(-1, 1, generator=torch.Generator().manual_seed(5))
    name = "confods" if confident else "ods"
    found = perturbed(name, x, teachers, pair=(1, 1), temperature=temperature, seed=5)
    confidence = (teachers(x)[1] / temperature).softmax(-1).max(-1).values.view(-1, 1, 1, 1) if confident else 1.0
    expected = ascend(x, lambda x: (w * (teachers(x)[1] / temperature).softmax(-1)).sum(), confidence)
    check_close("change", found.images - x, expected - x, 1e-9)


def test_gaussian_has_the_standard_deviation_and_the_seed():
    x = torch.full((4, 3, 32, 32), 0.5)
    y = perturbed("gaussian", x, seed=3).images
    assert (y - x).std().item() == pytest.approx(EPSILON, rel=0.03)
    assert torch.equal(y, perturbed("gaussian", x, seed=3).images)
    edge = perturbed("gaussian", torch.ones(4, 3, 8, 8), size=0.5).images
    assert edge.min() >= 0
    assert edge.max() <= 1


@pytest.mark.parametrize("size", [1 / 255, 0.5 / 255])
def test_the_step_has_the_root_mean_square_size(setting, size):
    teachers, student, x = setting
    change = perturbed("tdiv-sdiv", x, teachers, student, (0, 1), size=size).images - x
    check_close("rms", change.square().mean((1, 2, 3)).sqrt(), torch.full((B,), size, dtype=torch.float64), 1e-9)


def test_values_are_clipped_to_pixels(setting):
    teachers, student, x = setting
    x[:, :, ::2], x[:, :, 1::2] = 0.0, 1.0
    y = perturbed("tdiv-sdiv", x, teachers, student, (0, 1), size=0.3).images
    assert y.min() == 0
    assert y.max() == 1
    assert (y != x).any()


def test_zero_gradients_leave_the_images_and_make_no_nan(setting):
    teachers, student, x = setting
    for network in (*teachers.networks, student.module):  # logits that do not depend on the image
        layer = network.classifier if network is not student.module else network.classifier.layer
        layer.weight.data.zero_()
    for name in [name for name, row in PERTURBATIONS.items() if row.differentiated]:
        assert torch.equal(perturbed(name, x, teachers, student, (0, 1)).images, x), name


def test_equal_branches_add_nothing_at_the_start(setting):
    teachers, _, x = setting
    start = LatentBE(tiny(), 3).double().eval()
    both = perturbed("tdiv-sdiv", x, teachers, start, (0, 1))
    check_close("images", both.images, perturbed("tdiv", x, teachers, pair=(0, 1)).images, 1e-12)


def test_modes_gradients_and_statistics_are_left_alone(setting):
    teachers, student, x = setting
    student.train()
    student.module.bn.eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    pick, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    Perturbation("tdiv-sdiv", 3, 3, pick=pick, noise=noise)(x, teachers, student)
    assert student.training
    assert not student.module.bn.training
    assert all(p.grad is None for p in student.parameters())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_draws_do_not_depend_on_the_precision(name):
    """In bfloat16 logits come in another dtype than images."""
    generators = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        teachers, config = Teachers([tiny() for _ in range(2)]), DistillConfig(perturbation=name, precision=precision)
        step = ReferenceStep(LatentBE(tiny(), 2), teachers, config, num_classes=CLASSES)
        assert torch.isfinite(step(torch.rand(2, 3, SIZE, SIZE), torch.tensor([0, 1]))["loss"])
        generators.append([step.perturbation.pick.get_state(), step.perturbation.noise.get_state()])
    assert all(torch.equal(one, other) for one, other in zip(*generators, strict=True))


class Count(TorchDispatchMode):
    """Counts networks' worth of convolutions: forwards, input gradients, weight gradients."""

    def __init__(self):
        super().__init__()
        self.forward = self.inputs = self.weights = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.forward += 1
        if function is torch.ops.aten.convolution_backward.default:
            self.inputs += args[-1][0]
            self.weights += args[-1][1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "perturbation", "forwards", "pixel_gradients"),
    [
        ("latent-be", "tdiv-sdiv", 4, 2),
        ("latent-be", "tdiv", 2, 1),
        ("latent-be", "confods", 1, 1),
        ("latent-be", "ods", 1, 1),
        ("latent-be", "gaussian", 0, 0),
        ("latent-be", "none", 0, 0),
        ("single", "tdiv", 2, 1),
    ],
)
def test_least_work(kind, perturbation, forwards, pixel_gradients):
    """A step of M teachers and K branches costs M + 3K forwards, and the perturbation at most 6.

    Source: docs/method.md, Perturbation.
    """
    m, k = 4, 4 if kind == "latent-be" else 1
    student = LatentBE(tiny(), k) if kind == "latent-be" else Single(tiny())
    teachers = Teachers([tiny() for _ in range(m)])
    config = DistillConfig(student=kind, perturbation=perturbation)
    step = ReferenceStep(student, teachers, config, num_classes=CLASSES)
    convolutions = sum(isinstance(c, torch.nn.Conv2d) for c in tiny().modules())
    batch = torch.rand(2, 3, SIZE, SIZE), torch.tensor([0, 1])
    step(*batch)  # the first one also looks whether the networks are what they are taken for
    with Count() as count:
        step(*batch)
    assert count.forward == (forwards + m + k) * convolutions
    assert count.weights == k * convolutions
    # training needs no gradient of the images, so the stem's is missing there
    assert count.inputs == pixel_gradients * convolutions + k * (convolutions - 1)


@pytest.mark.parametrize(
    ("teachers", "branches", "expected"),
    [
        (3, 3, {(a, b) for a in range(3) for b in range(3) if a != b}),
        (3, 2, {(0, 1), (1, 0)}),
        (2, 4, {(a, b) for a in range(4) for b in range(4) if a % 2 != b % 2}),
    ],
)
def test_pairs_are_uniform_over_branches_whose_teachers_differ(teachers, branches, expected):
    p = Perturbation("tdiv-sdiv", teachers, branches, pick=torch.Generator().manual_seed(0), noise=torch.Generator())
    assert set(p.pairs) == expected
    drawn = [p.pairs[p.choose()] for _ in range(200 * len(expected))]
    assert min(drawn.count(pair) for pair in expected) > 140


def test_hydra_can_be_perturbed(setting):
    teachers, _, x = setting
    hydra = scatter(Hydra(tiny(), 3)).double().eval()
    objective = lambda x: (  # noqa: E731
        cross_entropy(teachers(x)[1], teachers(x)[0]) - cross_entropy(hydra(x)[1], hydra(x)[0])
    )
    found = perturbed("tdiv-sdiv", x, teachers, hydra, (0, 1))
    check_close("change", found.images - x, ascend(x, objective) - x, 1e-9)


@pytest.mark.parametrize(
    ("name", "teachers", "branches", "words"),
    [
        ("tdiv-sdv", 4, 4, "did you mean 'tdiv-sdiv'"),
        ("tdiv", 1, 4, "at least 2 teachers"),
        ("tdiv-sdiv", 1, 4, "at least 2 teachers"),
        ("tdiv-sdiv", 4, 1, "at least 2 branches"),
    ],
)
def test_refusals(name, teachers, branches, words):
    with pytest.raises(InputError, match=words):
        Perturbation(name, teachers, branches, pick=torch.Generator(), noise=torch.Generator())


def test_teachers_stay_frozen_and_in_evaluation_mode():
    teachers = Teachers([tiny(), create_model("resnet", CLASSES, blocks=(1,), mean=(0.1,) * 3)])
    torch.nn.Sequential(teachers).train()
    assert not any(m.training for m in teachers.modules())
    teachers(torch.rand(2, 3, SIZE, SIZE, requires_grad=True)).sum().backward()
    assert all(p.grad is None for p in teachers.parameters())
    with pytest.raises(InputError, match="at least one"):
        Teachers([])
    with pytest.raises(InputError, match="teacher 0 returns 5 values per image; the data has 7 classes"):
        teachers.check((3, SIZE, SIZE), 7)
    with pytest.raises(InputError, match="does not take images of shape"):
        teachers.check((1, SIZE, SIZE), CLASSES)

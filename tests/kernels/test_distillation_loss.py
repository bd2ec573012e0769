"""distillation_loss against the definition, differentiated by autograd."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from fastensdistill.errors import InputError
from fastensdistill.kernels.distillation_loss import (
    LossTerms,
    distillation_loss,
    distillation_loss_reference,
    shares,
)
from tests.compare import check_close
from tests.kernels.losses import definition, soft
from tests.kernels.rounding import rounding
from tests.kernels.rows import LOSSES, logits
from tests.untyped import present, untyped

pytestmark = pytest.mark.usefixtures("each_implementation")
# Float32 arithmetic errs as much in every narrower dtype; the gradient is rounded to it as well.
DTYPES = {torch.float64: 1e-9, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}


NAMES = ("loss", "loss_kd", "loss_ce", "grad_branch_logits")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize(
    ("temperature", "alpha", "target"), [(4.0, 1.0, "one-to-one"), (1.0, 0.9, "one-to-one"), (2.5, 0.3, "mean")]
)
def test_equals_the_definition(case, dtype, temperature, alpha, target):
    operands = logits(LOSSES[case], dtype)
    actual = distillation_loss(*operands, temperature, alpha, target)
    expected = definition(*operands, temperature, alpha, target)
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    assert [value.dtype for value in actual] == [scalar] * 3 + [dtype]
    for name, a, e in zip(NAMES[:3], actual, expected, strict=False):
        check_close(name, a, e, DTYPES[dtype])
    check_close(NAMES[3], actual[3], expected[3], rounding(expected[3], dtype))


# id: case of LOSSES, teachers' weights
OPTIONS = {
    "two-classes": ("two-classes", (1.0, 3.0)),
    "more-branches": ("more-branches", (0.0, 2.0, 0.5)),  # ten classes
    "more-teachers": ("more-teachers", (3.0, 1.0, 0.0, 0.0, 2.0)),
    "imagenet": ("imagenet", (2.0, 5.0)),
}
SWITCHES = {"label_smoothing": (0.0, 0.1), "standardize_logits": (False, True), "soft": (False, True)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", ["one-to-one", "mean"])
@pytest.mark.parametrize("case", OPTIONS)
def test_every_combination_of_options(case, target, dtype):
    name, weights = OPTIONS[case]
    teacher, branch, labels = logits(LOSSES[name], dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = 1e-12 if dtype == torch.float64 else DTYPES[dtype]
    for smoothing, standardize, as_soft in itertools.product(*SWITCHES.values()):
        for alpha, given in itertools.product((1.0, 0.3), ((), weights)):
            y = soft(labels, branch.shape[-1], wide) if as_soft else labels
            options = {
                "label_smoothing": smoothing, "standardize_logits": standardize, "teacher_weights": given
            }  # fmt: skip
            actual = untyped(distillation_loss)(teacher, branch, y, 2.5, alpha, target, **options)
            expected = untyped(definition)(teacher, branch, y, 2.5, alpha, target, **options)
            about = f"of {options}, alpha {alpha}, soft {as_soft}"
            for what, a, e in zip(NAMES[:3], actual, expected, strict=False):
                check_close(f"{what} {about}", a, e, exact)
            bound = 1e-12 if dtype == torch.float64 else rounding(expected[3], dtype)
            if standardize and name == "two-classes":  # of which only the 1e-7 leaves a gradient: terms cancel
                terms = definition(teacher, branch, y, 2.5, alpha, target, smoothing)[3]
                bound *= max(1, float(terms.norm() / expected[3].norm()))
            check_close(f"{NAMES[3]} {about}", actual[3], expected[3], bound)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_options_that_are_off_change_no_bit(alpha):
    teacher, branch, labels = logits(LOSSES["more-branches"], torch.float32)
    for target in ("one-to-one", "mean"):
        expected = distillation_loss(teacher, branch, labels, 4.0, alpha, target)
        same = distillation_loss(
            teacher, branch, labels, 4.0, alpha, target, label_smoothing=0.0, standardize_logits=False,
            teacher_weights=(0.7, 0.7, 0.7),
        )  # fmt: skip
        assert all(torch.equal(a, e) for a, e in zip(same, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_are_standardised_to_zero(dtype):
    """A standard deviation of nothing; values whose mean would be rounded."""
    teacher, branch, labels = logits((2, 2, 3, 10), dtype)
    teacher[0, 0], branch[0, 1], branch[1, 2] = 0.1, 1e4 / 3, 0.0
    outputs = distillation_loss(teacher, branch, labels, 4.0, 0.5, standardize_logits=True)
    expected = definition(teacher, branch, labels, 4.0, 0.5, "one-to-one", standardize_logits=True)
    for name, a, e in zip(NAMES[:3], outputs, expected, strict=False):
        check_close(name, a, e, DTYPES[dtype])
    assert not outputs[3].isnan().any()
    others = [b for b in range(3) if b == 0]
    check_close("gradient", outputs[3][:, others], expected[3][:, others], rounding(expected[3][:, others], dtype))


@pytest.mark.parametrize("target", ["one-to-one", "mean"])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_gradcheck_of_options(alpha, target):
    """Of labels that add up to anything."""
    teacher, branch, labels = logits((2, 3, 2, 5), torch.float64)
    y = 0.7 * soft(labels, 5)

    def loss(z):
        return distillation_loss(
            teacher, z, y, 3.0, alpha, target, label_smoothing=0.2, standardize_logits=True, teacher_weights=(1, 3)
        )[0]

    assert torch.autograd.gradcheck(loss, branch.requires_grad_())


def test_probabilities_that_are_nan_have_no_say_with_the_teachers_alone():
    teacher, branch, labels = logits(LOSSES["more-branches"], torch.float32)
    y = soft(labels, 10, torch.float32)
    y[2, 3] = math.nan
    loss, _, ce, gradient = distillation_loss(teacher, branch, y, 4.0, 1.0)
    assert math.isnan(ce)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    loss, _, _, gradient = distillation_loss(teacher, branch, y, 4.0, 0.5)
    assert math.isnan(loss)
    assert gradient.isnan().any(-1).nonzero()[:, 1].unique().tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("target", ["one-to-one", "mean"])
def test_extreme_logits(dtype, target):
    teacher, branch, labels = logits((2, 2, 4, 11), dtype)
    teacher, branch = teacher.sign() * 1e4, branch.sign() * 1e4 + branch
    teacher[0, 0], branch[1, 2] = 1e4, -1e4  # rows of equal logits
    actual = distillation_loss(teacher, branch, labels, 4.0, 0.5, target)
    for name, a, e in zip(NAMES, actual, definition(teacher, branch, labels, 4.0, 0.5, target), strict=True):
        check_close(name, a, e, 1e-9 if dtype == torch.float64 else 1e-6)


def test_reference_computes_the_same_as_the_op():
    operands = logits(LOSSES["more-branches"], torch.float64)
    for mean in (False, True):
        actual = distillation_loss(*operands, 4.0, 0.7, "mean" if mean else "one-to-one")
        expected = distillation_loss_reference(*operands, LossTerms(4.0, 0.7, mean))
        for name, a, e in zip(NAMES, actual, expected, strict=True):
            check_close(name, a, e, 1e-12)


def test_every_output_is_written(uninitialised_is_nan):
    teacher, branch, labels = logits(LOSSES["more-branches"], torch.float32)
    for options in ({}, {"label_smoothing": 0.1, "standardize_logits": True, "teacher_weights": (1, 2, 3)}):
        outputs = untyped(distillation_loss)(teacher, branch, labels, 4.0, 0.5, **options)
        assert all(torch.isfinite(output).all() for output in outputs)


def test_operands_that_are_not_contiguous():
    teacher, branch, labels = logits(LOSSES["cifar100"], torch.float64)
    expected = distillation_loss(teacher, branch, labels, 4.0, 0.5)
    spread = [z.permute(2, 0, 1).contiguous().permute(1, 2, 0) for z in (teacher, branch)]
    every_other = torch.stack([labels, labels], 1)[:, 0]
    assert not any(z.is_contiguous() for z in (*spread, every_other))
    for name, a, e in zip(NAMES, untyped(distillation_loss)(*spread, every_other, 4.0, 0.5), expected, strict=True):
        check_close(name, a, e, 1e-12)


@pytest.mark.parametrize("target", ["one-to-one", "mean"])
@pytest.mark.parametrize("alpha", [1.0, 0.4, 0.0])
def test_gradcheck(alpha, target):
    teacher, branch, labels = logits((2, 3, 2, 5), torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: distillation_loss(teacher, z, labels, 3.0, alpha, target)[0], branch.requires_grad_()
    )


def test_backward_scales_the_gradient_and_frees_it():
    teacher, branch, labels = logits(LOSSES["cifar100"], torch.float32)
    outputs = distillation_loss(teacher, branch.requires_grad_(), labels, 4.0, 0.9)
    assert [output.requires_grad for output in outputs] == [True, False, False, False]
    (3 * outputs[0]).backward()
    check_close("gradient", present(branch.grad), 3 * outputs[3], 1e-7)
    with pytest.raises(RuntimeError, match="second time"):
        outputs[0].backward()


def test_second_derivative_is_refused():
    teacher, branch, labels = logits(LOSSES["two-classes"], torch.float64)
    loss = distillation_loss(teacher, branch.requires_grad_(), labels, 4.0, 0.9)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, branch, create_graph=True)


def test_full_graph_compile():
    teacher, branch, labels = logits(LOSSES["cifar100"], torch.float64)

    def step(z):
        return distillation_loss(teacher, z, labels, 4.0, 0.9, "mean")[0].exp()

    expected = torch.autograd.grad(step(branch.requires_grad_()), branch)[0]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    check_close("gradient", torch.autograd.grad(compiled(branch), branch)[0], expected, 1e-12)


@pytest.mark.parametrize("label", [-1, -100, 10, 1 << 40])
def test_label_outside_the_classes(label):
    teacher, branch, labels = logits(LOSSES["more-branches"], torch.float32)
    expected = distillation_loss(teacher, branch, labels, 4.0, 1.0)
    labels = labels.clone()
    labels[2] = label
    loss, kd, ce, gradient = distillation_loss(teacher, branch, labels, 4.0, 1.0)
    assert math.isnan(ce)
    for name, a, e in (("loss", loss, expected[0]), ("kd", kd, expected[1]), ("gradient", gradient, expected[3])):
        check_close(name, a, e, 1e-7)
    loss, kd, ce, gradient = distillation_loss(teacher, branch, labels, 4.0, 0.5)
    assert math.isnan(loss)
    assert math.isnan(ce)
    assert gradient[:, 2].isnan().all()
    others = [b for b in range(len(labels)) if b != 2]
    assert gradient[:, others].isfinite().all()


def test_nan_logit_spoils_its_rows_only():
    teacher, branch, labels = logits(LOSSES["cifar100"], torch.float32)
    branch[1, 3, 17] = math.nan
    loss, _, _, gradient = distillation_loss(teacher, branch, labels, 4.0, 1.0)
    assert math.isnan(loss)
    rows = gradient.isnan().any(-1)
    assert rows.nonzero().tolist() == [[1, 3]]


T, S, Y = logits((2, 2, 3, 5), torch.float32)
REFUSED = {
    "integer-logits": ((T.int(), S, Y, 4.0, 1.0), "teacher_logits has dtype torch.int32"),
    "two-axes": ((T, S[0], Y, 4.0, 1.0), r"branch_logits has shape \(3, 5\); expected \[K, B, C\]"),
    "dtypes-differ": ((T.double(), S, Y, 4.0, 1.0), "float64 but branch_logits has torch.float32"),
    "batches-differ": ((T[:, :2], S, Y, 4.0, 1.0), r"\(2, 2, 5\) and branch_logits \(2, 3, 5\)"),
    "no-classes": ((T[..., :0], S[..., :0], Y, 4.0, 1.0), "none of them empty"),
    "devices-differ": ((T.to("meta"), S, Y, 4.0, 1.0), "teacher_logits is on meta but branch_logits is on cpu"),
    "trainable-teacher": ((T.clone().requires_grad_(), S, Y, 4.0, 1.0), "teachers are frozen"),
    "narrow-labels": ((T, S, Y.int(), 4.0, 1.0), "labels has dtype torch.int32; expected torch.int64, or floating"),
    "probabilities-of-others": ((T, S, S[0, :, 1:], 4.0, 1.0), r"labels has shape \(3, 4\); expected \(3, 5\), a prob"),
    "trainable-labels": ((T, S, S[0].clone().requires_grad_(), 4.0, 1.0), "labels requires gradients"),
    "too-few-labels": ((T, S, Y[:2], 4.0, 1.0), r"labels has shape \(2,\); expected \(3,\)"),
    "cold": ((T, S, Y, 0.0, 1.0), "temperature is 0.0"),
    "alpha": ((T, S, Y, 4.0, 1.5), "alpha is 1.5"),
    "target": ((T, S, Y, 4.0, 1.0, "avg"), "unknown target 'avg'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    operands, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        untyped(distillation_loss)(*operands)


REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "smoothing": ({"label_smoothing": 1.1}, "label_smoothing is 1.1; expected a number from 0 to 1"),
    "no-smoothing": ({"label_smoothing": math.nan}, "label_smoothing is nan; expected a number from 0 to 1"),
    "count": ({"teacher_weights": (1, 2, 3)}, "teacher_weights has 3 numbers for 2 teachers; expected one for each"),
    "negative": ({"teacher_weights": (1, -2)}, r"teacher_weights is \[1.0, -2.0\]; expected finite numbers of at l"),
    "infinite": ({"teacher_weights": (1, math.inf)}, "expected finite numbers of at least 0"),
    "all-zero": ({"teacher_weights": (0, 0)}, "teacher_weights are all 0; expected one above 0"),
}


@pytest.mark.parametrize("case", REFUSED_OPTIONS)
def test_refuses_options(case):
    options, message = REFUSED_OPTIONS[case]
    with pytest.raises(InputError, match=message):
        untyped(distillation_loss)(T, S, Y, 4.0, 1.0, **options)


def test_shares():
    assert shares([1, 3], 2, 5, "mean") == [0.25, 0.75]
    assert shares([1, 3], 2, 3, "one-to-one") == pytest.approx([0.6, 1.8, 0.6])  # mean 1
    assert shares([1e308, 1e308, 0], 3, 3, "mean") == [0.5, 0.5, 0.0]  # whose sum is more than a float holds
    for equal in ([], [2, 2], [0.3, 0.3]):
        assert shares(equal, 2, 4, "mean") == shares(equal, 2, 4, "one-to-one") == []
    assert shares([5, 1], 2, 1, "one-to-one") == []  # the one branch has the first teacher
    with pytest.raises(InputError, match="teacher_weights of the teachers that 1 branches learn from are all 0"):
        shares([0, 1], 2, 1, "one-to-one")

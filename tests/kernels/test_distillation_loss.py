"""distillation_loss and distill_and_diversify against the definition, differentiated by autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.distillation_loss import (
    distill_and_diversify,
    distillation_loss,
    distillation_loss_reference,
)
from fastensdistill.kernels.diversity_seed import diversity_seed
from tests.compare import check_close
from tests.kernels.rounding import rounding
from tests.kernels.rows import LOSSES, logits
from tests.untyped import present, untyped

pytestmark = pytest.mark.usefixtures("each_implementation")
# Float32 arithmetic errs as much in every narrower dtype; the gradient is rounded to it as well.
DTYPES = {torch.float64: 1e-9, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}


def definition(
    teacher: Tensor, branch: Tensor, labels: Tensor, temperature: float, alpha: float, target: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, its two terms and the gradient in float64, from torch.nn.functional and autograd."""
    t, s = teacher.double(), branch.double().requires_grad_()
    kd, ce = [], []
    for k in range(len(s)):
        p = F.softmax(t[k % len(t)] / temperature, 1)
        if target == "mean":
            p = torch.stack([F.softmax(z / temperature, 1) for z in t]).mean(0)
        kd.append(temperature**2 * F.cross_entropy(s[k] / temperature, p))
        ce.append(F.cross_entropy(s[k], labels))
    loss_kd, loss_ce = torch.stack(kd).mean(), torch.stack(ce).mean()
    loss = (1 - alpha) * loss_ce + alpha * loss_kd
    (gradient,) = torch.autograd.grad(loss, s)
    return loss.detach(), loss_kd.detach(), loss_ce.detach(), gradient


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
        for name, a, e in zip(NAMES, actual, distillation_loss_reference(*operands, 4.0, 0.7, mean), strict=True):
            check_close(name, a, e, 1e-12)


def test_every_output_is_written(uninitialised_is_nan):
    teacher, branch, labels = logits(LOSSES["more-branches"], torch.float32)
    outputs = distill_and_diversify(teacher, branch, labels, torch.tensor([2, 0]), 4.0, 0.5)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["more-branches", "more-teachers", "cifar100"])
def test_both_at_once(case, dtype):
    operands = logits(LOSSES[case], dtype)
    teacher, branch, _ = operands
    pair = torch.tensor([1, 0])
    actual = distill_and_diversify(*operands, pair, 4.0, 0.8)
    expected = (*distillation_loss(*operands, 4.0, 0.8), *diversity_seed(teacher[pair], branch[pair]))
    names = (*NAMES, "tdiv", "sdiv", "grad_teacher_a", "grad_branch_a")
    for name, a, e in zip(names, actual, expected, strict=True):
        check_close(name, a, e, 1e-12 if dtype == torch.float64 else 1e-6)
    branch.requires_grad_()
    (gradient,) = torch.autograd.grad(distill_and_diversify(*operands, pair, 4.0, 0.8)[0], branch)
    check_close("gradient", gradient, actual[3], 1e-12)


@pytest.mark.parametrize("pair", [(2, 0), (0, -1), (3, 3)])
def test_pair_outside_gives_nan_seeds(pair):
    operands = logits((3, 2, 4, 5), torch.float32)  # min(M, K) = 2
    outputs = distill_and_diversify(*operands, torch.tensor(pair), 4.0, 0.8)
    assert all(output.isnan().all() for output in outputs[4:])
    assert all(output.isfinite().all() for output in outputs[:4])


T, S, Y = logits((2, 2, 3, 5), torch.float32)
REFUSED = {
    "integer-logits": ((T.int(), S, Y, 4.0, 1.0), "teacher_logits has dtype torch.int32"),
    "two-axes": ((T, S[0], Y, 4.0, 1.0), r"branch_logits has shape \(3, 5\); expected \[K, B, C\]"),
    "dtypes-differ": ((T.double(), S, Y, 4.0, 1.0), "float64 but branch_logits has torch.float32"),
    "batches-differ": ((T[:, :2], S, Y, 4.0, 1.0), r"\(2, 2, 5\) and branch_logits \(2, 3, 5\)"),
    "no-classes": ((T[..., :0], S[..., :0], Y, 4.0, 1.0), "none of them empty"),
    "devices-differ": ((T.to("meta"), S, Y, 4.0, 1.0), "teacher_logits is on meta but branch_logits is on cpu"),
    "trainable-teacher": ((T.clone().requires_grad_(), S, Y, 4.0, 1.0), "teachers are frozen"),
    "narrow-labels": ((T, S, Y.int(), 4.0, 1.0), "labels has dtype torch.int32; expected torch.int64"),
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


@pytest.mark.parametrize("pair", [torch.tensor([0.0, 1.0]), torch.tensor([0, 1, 1])], ids=["float", "three"])
def test_refuses_a_pair(pair):
    with pytest.raises(InputError, match=r"expected two torch\.int64"):
        distill_and_diversify(T, S, Y, pair, 4.0, 1.0)

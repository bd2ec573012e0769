"""The diversity seeds and the ODS seed against their definitions, differentiated by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.diversity_seed import diversity_seed, ods_seed, teacher_diversity_seed
from tests.compare import check_close
from tests.kernels.rounding import rounding
from tests.kernels.rows import PAIRS, pairs
from tests.untyped import present, untyped

pytestmark = pytest.mark.usefixtures("each_implementation")
# Float32 arithmetic errs as much in every narrower dtype; gradients are rounded to it as well.
DTYPES = {torch.float64: 1e-9, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}


def diversity(pair: Tensor) -> Tensor:
    """mean_b − Σ sg(p_b) log p_a."""
    return F.cross_entropy(pair[0], F.softmax(pair[1].detach(), 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PAIRS)
def test_equals_the_definition(case, dtype):
    teacher, branch = pairs(PAIRS[case], dtype)
    tdiv, sdiv, grad_teacher_a, grad_branch_a = diversity_seed(teacher, branch)
    t, s = teacher.double().requires_grad_(), branch.double().requires_grad_()
    expected = diversity(t), diversity(s)
    (expected[0] - expected[1]).backward()
    check_close("tdiv", tdiv, expected[0], DTYPES[dtype])
    check_close("sdiv", sdiv, expected[1], DTYPES[dtype])
    check_close("grad_teacher_a", grad_teacher_a, present(t.grad)[0], rounding(present(t.grad)[0], dtype))
    check_close("grad_branch_a", grad_branch_a, present(s.grad)[0], rounding(present(s.grad)[0], dtype))
    alone = teacher_diversity_seed(teacher)
    check_close("tdiv alone", alone[0], tdiv, 1e-12)
    check_close("grad_teacher_a alone", alone[1], grad_teacher_a, 1e-12)


def test_equal_members_give_no_direction():
    teacher, branch = pairs(PAIRS["cifar100"], torch.float32)
    branch[1] = branch[0]  # as at the first step, when all branches are equal
    assert diversity_seed(teacher, branch)[3].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_ods_equals_the_definition(case, dtype, temperature):
    (z, w), _ = pairs(PAIRS[case], dtype)
    w = (w / 12).clamp(-1, 1)
    gradient, confidence = ods_seed(z, w, temperature)
    x = z.double().requires_grad_()
    p = F.softmax(x / temperature, 1)
    (w.double() * p).sum().backward()
    check_close("gradient", gradient, x.grad, rounding(x.grad, dtype))
    check_close("confidence", confidence, p.amax(1), DTYPES[dtype])
    assert confidence.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_extreme_logits(dtype):
    teacher, branch = pairs((4, 11), dtype)
    teacher, branch = teacher.sign() * 1e4, branch.sign() * 1e4 + branch
    branch[0, 1] = 1e4
    tdiv, sdiv, grad_teacher_a, grad_branch_a = diversity_seed(teacher, branch)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    t, s = teacher.double().requires_grad_(), branch.double().requires_grad_()
    (diversity(t) - diversity(s)).backward()
    for name, a, e in (
        ("tdiv", tdiv, diversity(t)),
        ("sdiv", sdiv, diversity(s)),
        ("grad_teacher_a", grad_teacher_a, present(t.grad)[0]),
        ("grad_branch_a", grad_branch_a, present(s.grad)[0]),
    ):
        check_close(name, a, e, tolerance)


def test_operands_that_are_not_contiguous(uninitialised_is_nan):
    teacher, branch = pairs(PAIRS["odd"], torch.float64)
    spread = [pair.transpose(0, 2).contiguous().transpose(0, 2) for pair in (teacher, branch)]
    for name, a, e in zip("0123", diversity_seed(*spread), diversity_seed(teacher, branch), strict=True):
        check_close(name, a, e, 1e-12)
    for name, a, e in zip("01", untyped(ods_seed)(*spread[0], 2.0), untyped(ods_seed)(*teacher, 2.0), strict=True):
        check_close(name, a, e, 1e-12)


def test_gradcheck():
    teacher, branch = (pair.requires_grad_() for pair in pairs((3, 5), torch.float64))
    a, b = teacher[0].detach().requires_grad_(), teacher[1].detach()
    s, s_b = branch[0].detach().requires_grad_(), branch[1].detach()

    def values(a, s):
        return diversity_seed(torch.stack([a, b]), torch.stack([s, s_b]))[:2]

    assert torch.autograd.gradcheck(values, (a, s))
    assert torch.autograd.gradcheck(lambda a: teacher_diversity_seed(torch.stack([a, b]))[0], a)


def test_member_b_has_no_gradient():
    teacher, branch = (pair.requires_grad_() for pair in pairs((3, 5), torch.float64))
    tdiv, sdiv, grad_teacher_a, grad_branch_a = diversity_seed(teacher, branch)
    (2 * tdiv - 3 * sdiv).backward()
    zeros = torch.zeros_like(grad_teacher_a)
    check_close("teacher pair", present(teacher.grad), torch.stack([2 * grad_teacher_a, zeros]), 1e-12)
    check_close("branch pair", present(branch.grad), torch.stack([3 * grad_branch_a, zeros]), 1e-12)


def test_second_backward_and_second_derivative():
    teacher, branch = (pair.requires_grad_() for pair in pairs((3, 5), torch.float64))
    tdiv = diversity_seed(teacher, branch)[0]
    tdiv.backward()
    with pytest.raises(RuntimeError, match="second time"):
        tdiv.backward()
    for value in (diversity_seed(teacher, branch)[1], teacher_diversity_seed(teacher)[0]):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(value, [teacher, branch], create_graph=True, allow_unused=True)


def test_full_graph_compile():
    teacher, branch = (pair.requires_grad_() for pair in pairs((3, 5), torch.float64))

    def values(teacher, branch):
        tdiv, sdiv, *_ = diversity_seed(teacher, branch)
        return tdiv * sdiv + ods_seed(teacher[0], branch[0], 2.0)[1].sum()

    expected = torch.autograd.grad(values(teacher, branch), (teacher, branch))
    compiled = torch.compile(values, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(teacher, branch), (teacher, branch))
    for name, a, e in zip(("teacher", "branch"), actual, expected, strict=True):
        check_close(name, a, e, 1e-12)


PAIR = torch.randn(2, 3, 5)
REFUSED = {
    "integers": (diversity_seed, (PAIR.int(), PAIR), "teacher_pair has dtype torch.int32"),
    "three-members": (diversity_seed, (PAIR[[0, 1, 1]], PAIR), r"teacher_pair has shape \(3, 3, 5\)"),
    "empty": (diversity_seed, (PAIR, PAIR[..., :0]), "branch_pair has shape"),
    "classes-differ": (diversity_seed, (PAIR, PAIR[..., :4]), r"branch_pair \(2, 3, 4\)"),
    "dtypes-differ": (diversity_seed, (PAIR, PAIR.double()), "branch_pair has dtype torch.float64"),
    "devices-differ": (diversity_seed, (PAIR, PAIR.to("meta")), "branch_pair is on meta"),
    "one-row": (teacher_diversity_seed, (PAIR[0],), r"teacher_pair has shape \(3, 5\)"),
    "ods-shapes": (ods_seed, (PAIR[0], PAIR[0, :2], 1.0), r"weights \(2, 5\)"),
    "ods-rank": (ods_seed, (PAIR, PAIR, 1.0), r"expected \[B, C\]"),
    "ods-temperature": (ods_seed, (PAIR[0], PAIR[0], float("nan")), "temperature is nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    op, operands, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        untyped(op)(*operands)

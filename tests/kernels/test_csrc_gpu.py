"""The extension's CUDA kernels on a device, against the references in float64, and inside a captured graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastensdistill.kernels import extension
from fastensdistill.kernels.distillation_loss import LossTerms, distillation_loss, distillation_loss_reference, shares
from fastensdistill.kernels.diversity_seed import (
    diversity_seed,
    diversity_seed_reference,
    ods_seed,
    ods_seed_reference,
    teacher_diversity_seed,
    teacher_diversity_seed_reference,
)
from fastensdistill.kernels.operands import accumulator
from fastensdistill.kernels.pack import PackOperands, pack_weights, pack_weights_reference
from fastensdistill.kernels.perturb_step import perturb_step, perturb_step_reference
from tests.compare import check_close
from tests.kernels import layouts, rows
from tests.kernels.rounding import rounding
from tests.untyped import untyped

DEVICE = "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def check(actual, expected) -> None:
    for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
        check_close(f"output {n}", a, e, rounding(e, a.dtype))


def test_cuda_kernels_are_built():
    assert extension.describe()["loaded"], extension.describe()["reason"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", rows.LOSSES)
@pytest.mark.parametrize("target", ["one-to-one", "mean"])
@pytest.mark.parametrize("options", [False, True], ids=["", "every-option"])
def test_loss(case, dtype, target, options):
    M, K, _, C = rows.LOSSES[case]
    teacher, branch, labels = (t.to(DEVICE) for t in rows.logits(rows.LOSSES[case], dtype))
    given: dict[str, Any] = {"label_smoothing": 0.1, "standardize_logits": True, "teacher_weights": [*range(1, M + 1)]}
    y = torch.nn.functional.one_hot(labels, C).double().add(1 / C).div(2) if options else labels
    actual = distillation_loss(teacher, branch, y, 4.0, 0.7, target, **(given if options else {}))
    terms = LossTerms(4.0, 0.7, target == "mean")
    if options:
        terms = terms._replace(label_smoothing=0.1, standardize=True, weights=shares(range(1, M + 1), M, K, target))
    check(actual, distillation_loss_reference(teacher.double(), branch.double(), y, terms))
    again = distillation_loss(teacher, branch, y, 4.0, 0.7, target, **(given if options else {}))
    assert all(torch.equal(one, other) for one, other in zip(actual, again, strict=True)), "not reproducible"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", rows.PAIRS)
def test_seeds(case, dtype):
    teacher, branch = (pair.to(DEVICE) for pair in rows.pairs(rows.PAIRS[case], dtype))
    t, s = teacher.double(), branch.double()
    check(diversity_seed(teacher, branch), diversity_seed_reference(t, s))
    check(teacher_diversity_seed(teacher), teacher_diversity_seed_reference(t))
    check(ods_seed(teacher[0], branch[0], 2.0), ods_seed_reference(t[0], s[0], 2.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", rows.IMAGES)
def test_step_on_images(case, dtype):
    images, gradients, confidence = (t.to(DEVICE) for t in rows.images(case, dtype))
    if images.dim() == 4:
        images = images.to(memory_format=torch.channels_last)
    actual = perturb_step(images, gradients, 0.5, 0.1, 0.9, confidence.to(accumulator(dtype)))
    assert actual.stride() == images.stride()
    check([actual], [perturb_step_reference(images.double(), gradients.double(), confidence, 0.5, 0.1, 0.9)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", layouts.CASES)
def test_packing(case, dtype):
    layout, t = layouts.problem(case, dtype)
    operands = [t[name].to(DEVICE) for name in ("parameters", "deviations")]
    packed, expected = torch.zeros(2, 2, layout.packed_size, dtype=torch.bfloat16, device=DEVICE)
    untyped(pack_weights)(*operands, layout, packed[0], packed[1])
    pack_weights_reference(untyped(PackOperands)(*operands, *expected, layout.fields, 0, len(operands[1])))
    assert torch.equal(packed, expected)


def test_inside_a_captured_graph():
    """New labels, new logits and new factors take effect at replay: nothing was read on the host at capture."""
    teacher, branch, labels = (t.to(DEVICE) for t in rows.logits(rows.LOSSES["cifar100"], torch.float32))
    layout, t = layouts.problem("tiles", torch.float32)
    parameters, deviations = (t[name].to(DEVICE) for name in ("parameters", "deviations"))
    packed, expected = torch.zeros(2, 2, layout.packed_size, dtype=torch.bfloat16, device=DEVICE)

    def step():
        pack_weights(parameters, deviations, layout, packed[0], packed[1])
        return distillation_loss(teacher, branch, labels, 4.0, 0.7, teacher_weights=(1, 2, 3, 4))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # loads the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    labels.copy_(labels.flip(0))
    branch.mul_(0.5)
    deviations.mul_(0.5)
    graph.replay()
    pack_weights(parameters, deviations, layout, expected[0], expected[1])
    assert torch.equal(packed, expected)
    launched = distillation_loss(teacher, branch, labels, 4.0, 0.7, teacher_weights=(1, 2, 3, 4))
    for one, other in zip(outputs, launched, strict=True):
        assert torch.equal(one, other)

"""The four passes of one training step over the kernels, against autograd through the modules themselves.

M = 3 teachers, K = 2 branches, a tiny network in float32. On a GPU the kernels run there, else in Triton's interpreter.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.engine.packed import pack
from fastensdistill.engine.part_run import PartRun
from fastensdistill.engine.passes import run_part
from fastensdistill.kernels.distillation_loss import distillation_loss
from fastensdistill.kernels.diversity_seed import diversity_seed
from fastensdistill.kernels.launch import use_kernels
from fastensdistill.method.student import LatentBE
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.models.resnet import ResNet
from fastensdistill.network.fold import fold_branches
from fastensdistill.network.launch import INPUT, grad
from fastensdistill.network.plan import plan_step
from fastensdistill.network.trace import trace
from tests.compare import check_close
from tests.network import models
from tests.network.cases import student_gradients
from tests.untyped import untyped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-4
M, K, BATCH, PAIR, CLASSES = 3, 2, 2, (1, 0), 5


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """TDiv or SDiv summed over the batch: its gradient per image is what the mean's is, times the batch."""
    return -(b.softmax(-1).detach() * a.log_softmax(-1)).sum(-1).mean()


class Networks:
    """Teachers and student, as modules and as the plan's four passes."""

    def __init__(self, kind, blocks, in_planes, size):
        self.teachers = [self.member(kind, blocks, in_planes, seed).eval() for seed in range(M)]
        plain = self.member(kind, blocks, in_planes, 9)
        self.student = models.moved(LatentBE(plain, branches=K), 10).to(DEVICE, torch.float32)
        network = trace(plain, (3, size, size))
        self.output = network.output
        self.plans = plan_step(network, network, M, K, BATCH)
        generator = torch.Generator().manual_seed(3)
        self.x = torch.rand(BATCH, 3, size, size, generator=generator).to(DEVICE)

    @staticmethod
    def member(kind, blocks, in_planes, seed):
        torch.manual_seed(seed)
        return models.moved(kind(CLASSES, blocks=blocks, in_planes=in_planes), seed).to(DEVICE, torch.float32)

    def states(self):
        student = {name: value.detach() for name, value in untyped(self.student).module.state_dict().items()}
        return [teacher.state_dict() for teacher in self.teachers], fold_branches(student, K), student


def weight_index(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("kernels", [False, True], ids=["references", "kernels"])
@pytest.mark.parametrize(
    ("kind", "blocks", "in_planes", "size"),
    [
        pytest.param(PreResNet, (1, 1), 4, 6, id="preresnet"),
        pytest.param(ResNet, (1, 1), 4, 5, id="resnet-odd-size"),
    ],
)
def test_whole_step(kind, blocks, in_planes, size, kernels):
    networks = Networks(kind, blocks, in_planes, size)
    with use_kernels() if kernels and DEVICE == "cpu" else contextlib.nullcontext():
        check_perturbation(networks)
        check_distillation(networks)


def check_perturbation(networks):
    teachers, branches, _ = networks.states()
    (forward,) = networks.plans["perturbation, forward"].parts
    (backward,) = networks.plans["perturbation, input gradient"].parts
    assert [group.name for group in forward.groups] == ["Ta", "Sa", "Tb", "Sb"]
    weights = pack(forward, [*teachers, *branches], torch.float32, DEVICE)
    a, b = PAIR
    buffers = {INPUT: networks.x.permute(0, 2, 3, 1)[None].contiguous()}
    run_part(PartRun(forward, weights, weight_index([a, M + a, b, M + b]), buffers))
    logits = buffers[networks.output]
    _, _, *grad_logits = diversity_seed(logits[::2].contiguous(), logits[1::2].contiguous())
    buffers[grad(networks.output)] = torch.stack(grad_logits)
    run_part(PartRun(backward, weights, weight_index([a, M + a]), buffers))

    x = networks.x.clone().requires_grad_()
    student = networks.student.eval()
    z_a, z_b = networks.teachers[a](x), networks.teachers[b](x)
    q_a, q_b = student(x, branches=[a, b])
    check_close("perturbation logits", logits, torch.stack([z_a, q_a, z_b, q_b]), TOLERANCE)
    (expected,) = torch.autograd.grad(divergence(z_a, z_b) - divergence(q_a, q_b), x)
    check_close("perturbation gradient", buffers[grad(INPUT)].sum(0).permute(0, 3, 1, 2), expected, TOLERANCE)


def check_distillation(networks):
    teachers, branches, student_state = networks.states()
    eval_part, train_part = networks.plans["distillation, forward"].parts
    (backward,) = networks.plans["distillation, backward"].parts
    image = networks.x.permute(0, 2, 3, 1)[None].contiguous()
    teacher_buffers, buffers = {INPUT: image}, {INPUT: image}
    run_part(
        PartRun(eval_part, pack(eval_part, teachers, torch.float32, DEVICE), weight_index(range(M)), teacher_buffers)
    )
    weights = pack(train_part, branches, torch.float32, DEVICE)
    run_part(PartRun(train_part, weights, weight_index(range(K)), buffers))
    targets, logits = teacher_buffers[networks.output], buffers[networks.output]
    labels = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
    loss, _, _, grad_logits = distillation_loss(targets, logits, labels, 4.0, 1.0)
    buffers[grad(networks.output)] = grad_logits
    run_part(PartRun(backward, weights, weight_index(range(K)), buffers))
    actual = student_gradients(student_state, train_part.network, K, buffers)

    student = networks.student.train()
    student.zero_grad()
    z = torch.stack([teacher(networks.x) for teacher in networks.teachers]).detach()
    q = student(networks.x)
    check_close("teacher logits", targets, z, TOLERANCE)
    check_close("branch logits", logits, q, TOLERANCE)
    expected = -16 * (F.softmax(z[:K] / 4, -1) * F.log_softmax(q / 4, -1)).sum(-1).mean()
    check_close("loss", loss, expected, TOLERANCE)
    expected.backward()
    for name, parameter in student.module.named_parameters():
        check_close(name, actual[name], parameter.grad, TOLERANCE)
    for name, norm in weights.norms.items():
        moved = student.module.get_submodule(name)
        check_close(f"{name}.running_mean", norm.running_mean[0], moved.running_mean, TOLERANCE)
        check_close(f"{name}.running_var", norm.running_var[0], moved.running_var, TOLERANCE)

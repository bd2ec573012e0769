"""Values of TDiv and SDiv and their gradients in the logits, where the perturbation's backward pass starts.

With p = softmax of a teacher's logits, q of a branch's, (a, b) the pair of the step, the second member without gradient
(docs/method.md, Perturbation; temperature 1):

    TDiv = mean_b − Σ_c p_b log p_a         ∂TDiv/∂z_Ta = (p_a − p_b) / B
    SDiv = mean_b − Σ_c q_b log q_a         ∂SDiv/∂z_Sa = (q_a − q_b) / B

    ∇_x (TDiv − SDiv) = J_Taᵀ · grad_teacher_a + J_Saᵀ · grad_branch_a
    grad_teacher_a = (p_a − p_b) / B,       grad_branch_a = −(q_a − q_b) / B

Output diversified sampling (ODS; Nam et al., NeurIPS 2021) starts from a random direction w in the simplex instead:

    u = Σ_c w_c p_c,  p = softmax(z / τ)    ∂u/∂z_c = p_c · (w_c − Σ_j w_j p_j) / τ,     confidence = max_c p_c
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.operands import accumulator, check_floating, check_like, check_positive
from fastensdistill.kernels.ops import define, refuse_second_derivative


def teacher_diversity_seed_reference(teacher_pair: Tensor) -> tuple[Tensor, Tensor]:
    """TDiv and (p_a − p_b)/B in plain PyTorch: any device, any floating dtype (narrow ones computed in float32)."""
    z_a, z_b = teacher_pair.to(accumulator(teacher_pair.dtype)).unbind(0)
    B = z_a.shape[0]
    # softmax twice, not exp(log_softmax): equal members then differ by exactly nothing
    p_a, p_b = F.softmax(z_a, -1), F.softmax(z_b, -1)
    value = -(p_b * F.log_softmax(z_a, -1)).sum() / B
    return value, ((p_a - p_b) / B).to(teacher_pair.dtype)


def diversity_seed_reference(teacher_pair: Tensor, branch_pair: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TDiv, SDiv and the gradients of TDiv − SDiv in the logits of teacher a and branch a."""
    tdiv, grad_teacher_a = teacher_diversity_seed_reference(teacher_pair)
    sdiv, grad_sdiv = teacher_diversity_seed_reference(branch_pair)
    return tdiv, sdiv, grad_teacher_a, -grad_sdiv


def ods_seed_reference(logits: Tensor, weights: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """∂u/∂z and the confidence, by the equations above."""
    dtype = accumulator(logits.dtype)
    w, p = weights.to(dtype), F.softmax(logits.to(dtype) / temperature, -1)
    gradient = p * (w - (w * p).sum(-1, keepdim=True)) / temperature
    return gradient.to(logits.dtype), p.amax(-1)


def empty_value(logits: Tensor) -> Tensor:
    """A scalar of what the ops on ``logits`` compute in, unwritten."""
    return logits.new_empty((), dtype=accumulator(logits.dtype))


def _empty_seeds(teacher_pair: Tensor, branch_pair: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = teacher_pair.shape[1:]
    gradients = teacher_pair.new_empty(shape), branch_pair.new_empty(shape)
    return empty_value(teacher_pair), empty_value(branch_pair), *gradients


def _empty_teacher_seed(teacher_pair):
    return empty_value(teacher_pair), teacher_pair.new_empty(teacher_pair.shape[1:])


def _empty_ods(logits, weights, temperature):
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape[0], dtype=accumulator(logits.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gradients = output[len(output) // 2 :]
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)


def _pair_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """Gradient of a pair's logits: member a has one, member b (no gradient in the definition) has zeros."""
    first = gradient * factor.to(gradient.dtype)
    return torch.stack([first, torch.zeros_like(first)])


def _teacher_backward(ctx: Any, grad_tdiv: Tensor, unused: Tensor) -> Tensor:
    refuse_second_derivative("teacher_diversity_seed")
    return _pair_gradient(ctx.saved_tensors[0], grad_tdiv)


def _pair_backward(ctx: Any, grad_tdiv: Tensor, grad_sdiv: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor]:
    refuse_second_derivative("diversity_seed")
    grad_teacher_a, grad_branch_a = ctx.saved_tensors
    return _pair_gradient(grad_teacher_a, grad_tdiv), _pair_gradient(grad_branch_a, -grad_sdiv)


_teacher_diversity_seed = define("teacher_diversity_seed", teacher_diversity_seed_reference, _empty_teacher_seed)
_diversity_seed = define("diversity_seed", diversity_seed_reference, _empty_seeds)
_ods_seed = define("ods_seed", ods_seed_reference, _empty_ods)
for _name, _backward in (("teacher_diversity_seed", _teacher_backward), ("diversity_seed", _pair_backward)):
    torch.library.register_autograd(f"fastensdistill::{_name}", _backward, setup_context=_setup_context)


def _check_pair(name: str, pair: Tensor) -> None:
    check_floating(name, pair, 3, "[2, B, C]")
    good = pair.shape[0] == 2 and 0 not in pair.shape
    if not good:
        raise InputError(f"{name} has shape {tuple(pair.shape)}; expected [2, B, C], not empty")


def diversity_seed(teacher_pair: Tensor, branch_pair: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TDiv and SDiv of an ordered pair, and the gradient of TDiv − SDiv in the logits of teacher a and branch a.

    Args:
        teacher_pair: [2, B, C] logits of teachers a and b; float32, bfloat16, float16 or float64.
        branch_pair: [2, B, C] logits of branches a and b, the same dtype and device.

    Returns:
        ``(tdiv, sdiv, grad_teacher_a, grad_branch_a)``: two scalars (float32; float64 for float64 logits) and two
        [B, C] in the dtype of the logits. ``tdiv`` and ``sdiv`` are differentiable, once, in the logits of member a.

    Raises:
        InputError: a dtype, shape or device that does not fit.

    Source: Nam et al., ICML 2022; docs/method.md, Perturbation.
    """
    _check_pair("teacher_pair", teacher_pair)
    _check_pair("branch_pair", branch_pair)
    check_like("branch_pair", branch_pair, "teacher_pair", teacher_pair)
    if teacher_pair.shape != branch_pair.shape:
        raise InputError(
            f"teacher_pair has shape {tuple(teacher_pair.shape)} but branch_pair {tuple(branch_pair.shape)}; "
            "expected the same [2, B, C]"
        )
    return _diversity_seed(teacher_pair, branch_pair)


def teacher_diversity_seed(teacher_pair: Tensor) -> tuple[Tensor, Tensor]:
    """TDiv alone: ``(tdiv, grad_teacher_a)`` of ``teacher_pair`` [2, B, C]; otherwise as :func:`diversity_seed`."""
    _check_pair("teacher_pair", teacher_pair)
    return _teacher_diversity_seed(teacher_pair)


def ods_seed(logits: Tensor, weights: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Seed of the ODS and ConfODS perturbations: the gradient of Σ_{b,c} w · softmax(z/τ) in the logits.

    Args:
        logits: [B, C]; float32, bfloat16, float16 or float64.
        weights: [B, C] w, drawn from U(−1, 1) in the paper; the same dtype and device.
        temperature: τ > 0.

    Returns:
        ``(grad_logits, confidence)``: [B, C] in the dtype of the logits, and [B], the largest probability of each
        image, by which ConfODS multiplies the step (float32; float64 for float64 logits). Neither is differentiable.

    Raises:
        InputError: a dtype, shape, device or temperature that does not fit.

    Source: Nam et al., NeurIPS 2021, ODS and ConfODS.
    """
    check_floating("logits", logits, 2, "[B, C]")
    check_floating("weights", weights, 2, "[B, C]")
    check_like("weights", weights, "logits", logits)
    if not (logits.shape == weights.shape and 0 not in logits.shape):
        raise InputError(
            f"logits has shape {tuple(logits.shape)} and weights {tuple(weights.shape)}; "
            "expected the same [B, C], not empty"
        )
    check_positive("temperature", temperature)
    return _ods_seed(logits.detach(), weights.detach(), temperature)

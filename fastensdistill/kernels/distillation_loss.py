"""Distillation loss with its gradient, in one pass over the logits.

For branch k, image b, temperature τ, and the target p of branch k (docs/method.md, Loss)

    L_KD = τ² · mean_{k,b} − Σ_c p_c · log softmax(z_S[k,b] / τ)_c
    L_CE =      mean_{k,b} − Σ_c y[b]_c · log softmax(z_S[k,b])_c
    L    = (1 − α) · L_CE + α · L_KD

    p = softmax(z_T[k mod M, b] / τ)          target "one-to-one"
    p = mean_m softmax(z_T[m, b] / τ)         target "mean"

    ∂L/∂z_S[k,b] = ( α·τ·(softmax(z_S/τ) − p) + (1 − α)·(softmax(z_S)·Σ_c y_c − y) ) / (K·B)

Labels y are probabilities, or classes, which stand for one-hot rows.

The gradient costs two more multiplications per logit once the softmaxes are there, so the op returns it with the value;
``backward`` only scales it. A label outside [0, C) cannot be reported without reading it back from the device: it makes
``loss_ce``, and with α < 1 the loss and the gradient of its row, NaN. With α = 1 labels do not enter the loss at all.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels.cross_entropy import cross_entropy
from fastensdistill.kernels.diversity_seed import diversity_seed_reference, empty_seeds, empty_value
from fastensdistill.kernels.operands import (
    FLOATING,
    accumulator,
    check_device,
    check_floating,
    check_like,
    check_positive,
)
from fastensdistill.kernels.ops import define, refuse_second_derivative

TARGETS = ("one-to-one", "mean")
Loss = tuple[Tensor, Tensor, Tensor, Tensor]
LossAndSeeds = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def distillation_loss_reference(
    teacher_logits: Tensor, branch_logits: Tensor, labels: Tensor, temperature: float, alpha: float, mean_target: bool
) -> Loss:
    """The equations above in plain PyTorch: any device, any floating dtype (narrow ones computed in float32)."""
    K, B, C = branch_logits.shape
    dtype = accumulator(branch_logits.dtype)
    z = branch_logits.to(dtype)
    p = F.softmax(teacher_logits.to(dtype) / temperature, -1)
    if mean_target:
        p = p.mean(0, keepdim=True).expand(K, B, C)
    else:
        p = p[torch.arange(K, device=z.device) % teacher_logits.shape[0]]
    log_q = F.log_softmax(z / temperature, -1)
    loss_kd = -(p * log_q).sum() * (temperature**2 / (K * B))
    classes = labels if labels.is_floating_point() else labels.clamp(0, C - 1)
    rows, hard = cross_entropy(F.log_softmax(z, -1), classes)
    if classes is not labels:
        rows = torch.where(labels == classes, rows, math.nan)
        hard = hard + 0 * rows.unsqueeze(-1)
    loss_ce = rows.mean()
    gradient = (log_q.exp() - p) * (alpha * temperature / (K * B))
    if alpha == 1:
        return loss_kd, loss_kd.clone(), loss_ce, gradient.to(branch_logits.dtype)
    gradient = gradient + hard * ((1 - alpha) / (K * B))
    return (1 - alpha) * loss_ce + alpha * loss_kd, loss_kd, loss_ce, gradient.to(branch_logits.dtype)


def distill_and_diversify_reference(
    teacher_logits: Tensor, branch_logits: Tensor, labels: Tensor, pair: Tensor, temperature: float, alpha: float,
    mean_target: bool,
) -> LossAndSeeds:  # fmt: skip
    """Both ops, one after the other."""
    loss = distillation_loss_reference(teacher_logits, branch_logits, labels, temperature, alpha, mean_target)
    limit = min(teacher_logits.shape[0], branch_logits.shape[0])
    inside = ((pair >= 0) & (pair < limit)).all()
    safe = pair.clamp(0, limit - 1)
    seed = diversity_seed_reference(teacher_logits.index_select(0, safe), branch_logits.index_select(0, safe))
    tdiv, sdiv, grad_teacher_a, grad_branch_a = (torch.where(inside, value, math.nan) for value in seed)
    return *loss, tdiv, sdiv, grad_teacher_a, grad_branch_a


def _empty_loss(teacher_logits, branch_logits, *unused):
    return *(empty_value(branch_logits) for _ in range(3)), branch_logits.new_empty(branch_logits.shape)


def _empty_both(teacher_logits, branch_logits, *unused):
    return *_empty_loss(teacher_logits, branch_logits), *empty_seeds(branch_logits, branch_logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[3])
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("distillation_loss")
    (gradient,) = ctx.saved_tensors
    return None, gradient * grad_loss.to(gradient.dtype), *([None] * (ctx.num_inputs - 2))


_distillation_loss = define("distillation_loss", distillation_loss_reference, _empty_loss)
_distill_and_diversify = define("distill_and_diversify", distill_and_diversify_reference, _empty_both)
for _name in ("distillation_loss", "distill_and_diversify"):
    torch.library.register_autograd(f"fastensdistill::{_name}", _backward, setup_context=_setup_context)


def _check(
    teacher_logits: Tensor, branch_logits: Tensor, labels: Tensor, temperature: float, alpha: float, target: str
) -> None:
    check_floating("teacher_logits", teacher_logits, 3, "[M, B, C]")
    check_floating("branch_logits", branch_logits, 3, "[K, B, C]")
    check_like("teacher_logits", teacher_logits, "branch_logits", branch_logits)
    if not (
        teacher_logits.shape[1:] == branch_logits.shape[1:] and 0 not in (*branch_logits.shape, *teacher_logits.shape)
    ):
        raise InputError(
            f"teacher_logits has shape {tuple(teacher_logits.shape)} and branch_logits {tuple(branch_logits.shape)}; "
            "expected [M, B, C] and [K, B, C] with the same images and classes, none of them empty"
        )
    if teacher_logits.requires_grad:
        raise InputError("teacher_logits requires gradients; teachers are frozen: detach it or run them in no_grad")
    if not (labels.dtype == torch.int64 or labels.dtype in FLOATING):
        raise InputError(f"labels has dtype {labels.dtype}; expected torch.int64, or floating probabilities")
    _, B, C = branch_logits.shape
    if labels.shape != ((B, C) if labels.is_floating_point() else (B,)):
        expected = f"({B}, {C}), a probability per class" if labels.is_floating_point() else f"({B},), one per image"
        raise InputError(f"labels has shape {tuple(labels.shape)}; expected {expected}")
    if labels.requires_grad:
        raise InputError("labels requires gradients, which the loss does not give: detach them")
    check_device("labels", labels, "branch_logits", branch_logits)
    check_positive("temperature", temperature)
    if not (0 <= alpha <= 1):
        raise InputError(f"alpha is {alpha}; expected a number from 0 to 1")
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)


def _as_operand(labels: Tensor, branch_logits: Tensor) -> Tensor:
    """Probabilities in what the op computes in."""
    return labels.to(accumulator(branch_logits.dtype)) if labels.is_floating_point() else labels


def distillation_loss(
    teacher_logits: Tensor, branch_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
    target: str = "one-to-one",
) -> Loss:  # fmt: skip
    """Distillation loss of K branches against M teachers, with its gradient.

    Args:
        teacher_logits: [M, B, C], float32, bfloat16, float16 or float64; must not require gradients.
        branch_logits: [K, B, C], the same dtype and device.
        labels: [B] int64, or probabilities [B, C], floating, as ``torch.nn.functional.cross_entropy`` takes them.
        temperature: τ > 0, on both sides.
        alpha: weight of the distillation term, 0 to 1; cross-entropy with the labels has weight 1 − α.
        target: "one-to-one" (branch k learns from teacher k mod M) or "mean" (every branch from the teachers' mean).

    Returns:
        ``(loss, loss_kd, loss_ce, grad_branch_logits)``: three scalars (float32; float64 for float64 logits) and
        [K, B, C] in the dtype of ``branch_logits``. Only ``loss`` is differentiable, in ``branch_logits``, once.

    Raises:
        InputError: a dtype, shape, device or number that does not fit.

    Source: Nam et al., ICML 2022; docs/method.md, Loss.
    """
    _check(teacher_logits, branch_logits, labels, temperature, alpha, target)
    labels = _as_operand(labels, branch_logits)
    return _distillation_loss(teacher_logits, branch_logits, labels, temperature, alpha, target == "mean")


def distill_and_diversify(
    teacher_logits: Tensor, branch_logits: Tensor, labels: Tensor, pair: Tensor, temperature: float, alpha: float,
    target: str = "one-to-one",
) -> LossAndSeeds:  # fmt: skip
    """:func:`distillation_loss` and ``diversity_seed`` of members (a, b) = ``pair``, from one read of the same logits.

    Args:
        pair: [2] int64 on the logits' device, a and b below min(M, K). It is read on the device, so that a captured
            graph can draw a new pair each step; an index outside makes the four seed outputs NaN.
        teacher_logits, branch_logits, labels, temperature, alpha, target: as for :func:`distillation_loss`.

    Returns:
        ``(loss, loss_kd, loss_ce, grad_branch_logits, tdiv, sdiv, grad_teacher_a, grad_branch_a)``. Only ``loss`` is
        differentiable, in ``branch_logits``, once.

    Raises:
        InputError: as for :func:`distillation_loss`, or a pair that is not two int64 on the same device.
    """
    _check(teacher_logits, branch_logits, labels, temperature, alpha, target)
    if not (pair.dtype == torch.int64 and pair.shape == (2,)):
        raise InputError(f"pair has dtype {pair.dtype} and shape {tuple(pair.shape)}; expected two torch.int64")
    check_device("pair", pair, "branch_logits", branch_logits)
    labels = _as_operand(labels, branch_logits)
    return _distill_and_diversify(teacher_logits, branch_logits, labels, pair, temperature, alpha, target == "mean")

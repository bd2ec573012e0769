"""Distillation loss with its gradient, in one pass over the logits.

For branch k, image b, temperature τ, labels y, and the target p of branch k (docs/method.md, Loss)

    L_KD = τ² · mean_{k,b} − Σ_c p_c · log softmax(z_S[k,b] / τ)_c
    L_CE =      mean_{k,b} − Σ_c y'_c · log softmax(z_S[k,b])_c                 y' = (1 − ε) · y + ε / C
    L    = (1 − α) · L_CE + α · L_KD

    p = softmax(z_T[k mod M, b] / τ)          target "one-to-one"
    p = mean_m softmax(z_T[m, b] / τ)         target "mean"

    ∂L/∂z_S[k,b] = ( α·τ·(softmax(z_S/τ) − p) + (1 − α)·(softmax(z_S)·Σ_c y'_c − y') ) / (K·B)

Labels y are probabilities, or classes, which stand for one-hot rows; ε is the label smoothing. Teachers' weights w make
Σ_m w_m · softmax(z_T[m]) / Σ_m w_m of the mean; one-to-one, branch k's term of L_KD is multiplied by
v_k = w_{k mod M} · K / Σ_k w_{k mod M}, whose mean is 1. With standardised logits, L_KD takes

    z̃ = (z − mean_c z) / (σ + 1e-7),   σ² = Σ_c (z − mean_c z)² / (C − 1)

in the place of z on both sides, and the gradient g of L_KD with respect to z̃ passes through it:

    ∂L_KD/∂z = ( g − mean_c g − z̃ · Σ_c g_c·z̃_c · (σ + 1e-7) / (σ·(C − 1)) ) / (σ + 1e-7)

without its last term where σ = 0, as torch.std has it. (Sun et al., CVPR 2024; σ is that of their code, Bessel's.)

The gradient costs two more multiplications per logit once the softmaxes are there, so the op returns it with the value;
``backward`` only scales it. A label outside [0, C) cannot be reported without reading it back from the device: it makes
``loss_ce``, and with α < 1 the loss and the gradient of its row, NaN. With α = 1 labels do not enter the loss at all.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels.cross_entropy import cross_entropy
from fastensdistill.kernels.diversity_seed import empty_value
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
STABLE = 1e-7  # beside σ, as Sun et al.'s code has it
Loss = tuple[Tensor, Tensor, Tensor, Tensor]


class LossTerms(NamedTuple):
    """What the loss is made of, as the op takes it."""

    temperature: float
    alpha: float
    mean_target: bool
    label_smoothing: float = 0.0
    standardize: bool = False
    weights: Sequence[float] = ()  # of :func:`shares`; none where all count alike


def distillation_loss_reference(
    teacher_logits: Tensor, branch_logits: Tensor, labels: Tensor, terms: LossTerms
) -> Loss:
    """The equations above in plain PyTorch: any device, any floating dtype (narrow ones computed in float32)."""
    K, B, C = branch_logits.shape
    dtype = accumulator(branch_logits.dtype)
    temperature, alpha = terms.temperature, terms.alpha
    z = soft = branch_logits.to(dtype)
    t = teacher_logits.to(dtype)
    sigma = None
    if terms.standardize:
        (t, _), (soft, sigma) = _standardized(t), _standardized(z)
    weights = torch.stack([z.new_full((1, 1), w) for w in terms.weights]) if terms.weights else None
    p = F.softmax(t / temperature, -1)
    if terms.mean_target:
        p = (p.mean(0, keepdim=True) if weights is None else (weights * p).sum(0, keepdim=True)).expand(K, B, C)
    else:
        p = p[torch.arange(K, device=z.device) % teacher_logits.shape[0]]
    log_q = F.log_softmax(soft / temperature, -1)
    each, gradient = p * log_q, (log_q.exp() - p) * (alpha * temperature / (K * B))
    if weights is not None and not terms.mean_target:
        each, gradient = weights * each, weights * gradient
    if sigma is not None:
        gradient = _through_standardization(gradient, soft, sigma)
    loss_kd = -each.sum() * (temperature**2 / (K * B))
    classes = labels if labels.is_floating_point() else labels.clamp(0, C - 1)
    rows, hard = cross_entropy(F.log_softmax(z, -1), classes, terms.label_smoothing)
    if classes is not labels:
        rows = torch.where(labels == classes, rows, math.nan)
        hard = hard + 0 * rows.unsqueeze(-1)
    loss_ce = rows.mean()
    if alpha == 1:
        return loss_kd, loss_kd.clone(), loss_ce, gradient.to(branch_logits.dtype)
    gradient = gradient + hard * ((1 - alpha) / (K * B))
    return (1 - alpha) * loss_ce + alpha * loss_kd, loss_kd, loss_ce, gradient.to(branch_logits.dtype)


def _standardized(z: Tensor) -> tuple[Tensor, Tensor]:
    """z̃, and σ of each row. About the largest logit first, so that equal logits differ by exactly nothing."""
    z = z - z.amax(-1, keepdim=True)
    z = z - z.mean(-1, keepdim=True)
    sigma = (z.square().sum(-1, keepdim=True) / max(z.shape[-1] - 1, 1)).sqrt()
    return z / (sigma + STABLE), sigma


def _through_standardization(gradient: Tensor, standardized: Tensor, sigma: Tensor) -> Tensor:
    """The gradient with respect to z from that with respect to z̃."""
    C, spread = gradient.shape[-1], sigma + STABLE
    inner = (gradient * standardized).sum(-1, keepdim=True)
    pull = torch.where(sigma > 0, inner * spread / (sigma * (C - 1)), 0)
    return (gradient - gradient.mean(-1, keepdim=True) - standardized * pull) / spread


def _empty(teacher_logits: Tensor, branch_logits: Tensor, *unused: Any) -> Loss:
    loss, kd, ce = (empty_value(branch_logits) for _ in range(3))
    return loss, kd, ce, branch_logits.new_empty(branch_logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[3])
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("distillation_loss")
    (gradient,) = ctx.saved_tensors
    return None, gradient * grad_loss.to(gradient.dtype), *([None] * (ctx.num_inputs - 2))


_distillation_loss = define("distillation_loss", distillation_loss_reference, _empty)
torch.library.register_autograd("fastensdistill::distillation_loss", _backward, setup_context=_setup_context)


def shares(weights: Sequence[float], teachers: int, branches: int, target: str) -> list[float]:
    """What the op multiplies by: a share of each teacher in the mean, or one-to-one a factor of each branch's term.

    None where all count alike. Raises InputError for other than a number of at least 0 for each teacher, and where no
    teacher that a branch learns from has any weight.
    """
    weights = [float(w) for w in weights]
    if not weights:
        return []
    if len(weights) != teachers:
        raise InputError(f"teacher_weights has {len(weights)} numbers for {teachers} teachers; expected one for each")
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise InputError(f"teacher_weights is {weights}; expected finite numbers of at least 0")
    if target == "one-to-one":
        weights = [weights[k % teachers] for k in range(branches)]
    if not any(weights):
        whose = "" if len(weights) == teachers else f" of the teachers that {branches} branches learn from"
        raise InputError(f"teacher_weights{whose} are all 0; expected one above 0")
    if len(set(weights)) == 1:
        return []
    scaled = [w / max(weights) for w in weights]  # whose sum cannot overflow
    size = branches if target == "one-to-one" else 1
    return [w * size / math.fsum(scaled) for w in scaled]


def _check(
    teacher_logits: Tensor, branch_logits: Tensor, labels: Tensor, temperature: float, alpha: float, target: str,
    label_smoothing: float,
) -> None:  # fmt: skip
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
    for name, value in (("alpha", alpha), ("label_smoothing", label_smoothing)):
        if not (0 <= value <= 1):
            raise InputError(f"{name} is {value}; expected a number from 0 to 1")
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)


def distillation_loss(
    teacher_logits: Tensor, branch_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
    target: str = "one-to-one", *, label_smoothing: float = 0.0, standardize_logits: bool = False,
    teacher_weights: Sequence[float] = (),
) -> Loss:  # fmt: skip
    """Distillation loss of K branches against M teachers, with its gradient.

    Args:
        teacher_logits: [M, B, C], float32, bfloat16, float16 or float64; must not require gradients.
        branch_logits: [K, B, C], the same dtype and device.
        labels: [B] int64, or probabilities [B, C], floating, as ``torch.nn.functional.cross_entropy`` takes them.
        temperature: τ > 0, on both sides.
        alpha: weight of the distillation term, 0 to 1; cross-entropy with the labels has weight 1 − α.
        target: "one-to-one" (branch k learns from teacher k mod M) or "mean" (every branch from the teachers' mean).
        label_smoothing: ε of the cross-entropy, 0 to 1.
        standardize_logits: whether the distillation term takes logits of mean 0 and standard deviation 1 per image.
        teacher_weights: M numbers of at least 0, not all 0; none weighs all alike.

    Returns:
        ``(loss, loss_kd, loss_ce, grad_branch_logits)``: three scalars (float32; float64 for float64 logits) and
        [K, B, C] in the dtype of ``branch_logits``. Only ``loss`` is differentiable, in ``branch_logits``, once.

    Raises:
        InputError: a dtype, shape, device or number that does not fit.

    Source: Nam et al., ICML 2022; Sun et al., CVPR 2024 (arXiv 2403.01427); docs/method.md, Loss.
    """
    _check(teacher_logits, branch_logits, labels, temperature, alpha, target, label_smoothing)
    weights = shares(teacher_weights, len(teacher_logits), len(branch_logits), target)
    terms = LossTerms(temperature, alpha, target == "mean", label_smoothing, standardize_logits, weights)
    labels = labels.to(accumulator(branch_logits.dtype)) if labels.is_floating_point() else labels
    return _distillation_loss(teacher_logits, branch_logits, labels, *terms)

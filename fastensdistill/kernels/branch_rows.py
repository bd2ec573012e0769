"""Per-channel values of K branches that their packed weights need beside them, all layers in one launch.

With scale = γ / √(var + ε) and shift = β − scale·mean of every BatchNorm as running statistics give them, each value is

    out[target] = (1 + deviation) · scale · parameter + shift

of which any part may be a constant: the bias of a layer that carries a BatchNorm (s_k·scale·b + shift), a BatchNorm's
own scale and shift, and the deviation of s'_k = s_k·scale from one, which folds the BatchNorm into the packed weights.

``table`` [5, n] int64 says for every value its target and the indices of the four parts, or a negative number instead:

    deviation, scale   −1: the factor is 1
    parameter          −1: 0,  −2: 1
    shift              −1: 0,  −2: −1
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.operands import check_contiguous, check_device, check_like
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.tiles import Tile

ROWS_TILE = Tile(0, 256, 0, 4, 1, "gathers: latency decides, 2 values a thread")


class BranchRowsOperands(NamedTuple):
    """What ``branch_rows`` takes."""

    out: Tensor  # (values,), written at the targets
    table: Tensor  # (5, n) int64
    parameters: Tensor  # flat: every γ from ``scales`` on, then every β
    deviations: Tensor  # (K, R)
    running_mean: Tensor  # (P,), a value per channel of every BatchNorm
    running_var: Tensor
    eps: Tensor
    scales: int


def branch_rows_reference(o: BranchRowsOperands) -> None:
    target, deviation, norm, parameter, shifted = o.table
    start, P, one = o.scales, len(o.eps), o.parameters.new_ones(1)
    gamma, beta = o.parameters[start : start + P], o.parameters[start + P : start + 2 * P]
    scale = gamma * (o.running_var + o.eps).rsqrt()
    shift = torch.cat([beta - scale * o.running_mean, one])  # an index of −1 is the last
    factor = torch.cat([1 + o.deviations.flatten(), one])[deviation] * torch.cat([scale, one])[norm]
    value = torch.where(parameter < 0, (-1 - parameter).to(factor.dtype), o.parameters[parameter.clamp_min(0)])
    added = torch.where(shifted < 0, (1 + shifted).to(factor.dtype), shift[shifted.clamp_min(-1)])
    o.out.index_copy_(0, target, torch.addcmul(added, factor, value))


@triton.jit
def branch_rows_kernel(
    p_out, p_table, p_parameters, p_deviations, p_running_mean, p_running_var, p_eps, n, scales, P,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    i_deviation = tl.load(p_table + n + o_n, mask=m_n, other=-1)
    i_norm = tl.load(p_table + 2 * n + o_n, mask=m_n, other=-1)
    i_parameter = tl.load(p_table + 3 * n + o_n, mask=m_n, other=-1)
    i_shift = tl.load(p_table + 4 * n + o_n, mask=m_n, other=-1)
    p_gamma = p_parameters + scales
    p_beta = p_gamma + P
    b_factor = 1.0 + tl.load(p_deviations + i_deviation, mask=i_deviation >= 0, other=0.0)
    m_norm = i_norm >= 0
    b_var = tl.load(p_running_var + i_norm, mask=m_norm, other=1.0) + tl.load(p_eps + i_norm, mask=m_norm, other=0.0)
    b_factor *= tl.load(p_gamma + i_norm, mask=m_norm, other=1.0) / tl.sqrt_rn(b_var)
    b_value = tl.load(p_parameters + i_parameter, mask=i_parameter >= 0, other=0.0)
    b_value = tl.where(i_parameter < -1, 1.0, b_value)
    m_shift = i_shift >= 0
    b_var = tl.load(p_running_var + i_shift, mask=m_shift, other=1.0) + tl.load(
        p_eps + i_shift, mask=m_shift, other=0.0
    )
    b_scale = tl.load(p_gamma + i_shift, mask=m_shift, other=0.0) / tl.sqrt_rn(b_var)
    b_shift = tl.load(p_beta + i_shift, mask=m_shift, other=0.0)
    b_shift -= b_scale * tl.load(p_running_mean + i_shift, mask=m_shift, other=0.0)
    b_shift = tl.where(i_shift < -1, -1.0, b_shift)
    o_out = tl.load(p_table + o_n, mask=m_n, other=0)
    tl.store(p_out + o_out, b_factor * b_value + b_shift, mask=m_n)


def _launch(o):
    n = o.table.shape[1]
    launch(branch_rows_kernel, (-(-n // ROWS_TILE.BLOCK_N),), ROWS_TILE, o, n=n, P=len(o.eps))


_branch_rows = define("branch_rows", branch_rows_reference, launcher=_launch, mutates=("out",))


def branch_rows(
    out: Tensor,
    table: Tensor,
    parameters: Tensor,
    deviations: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: Tensor,
    scales: int,
) -> None:
    """Writes out[table[0]], every target once; other values stay as they are.

    Args:
        out: [values] float32 or float64, contiguous like everything here; all of one dtype and device.
        table: [5, n] int64 on the same device, see above. Its indices are not checked: they are on the device.
        parameters: flat buffer; every γ from ``scales`` on, then every β.
        deviations: [K, R], r − 1 and s − 1.
        running_mean, running_var, eps: [P], a value per channel of every BatchNorm.
        scales: offset of the first γ.

    Raises:
        InputError: a dtype, shape or device that does not fit.
    """
    o = BranchRowsOperands(out, table, parameters.detach(), deviations.detach(), running_mean, running_var, eps, scales)
    P = len(eps)
    if table.dtype != torch.int64 or table.dim() != 2 or table.shape[0] != 5:
        raise InputError(f"table has dtype {table.dtype} and shape {tuple(table.shape)}; expected torch.int64, (5, n)")
    check_device("table", table, "out", out)
    if not 0 <= scales <= parameters.numel() - 2 * P:
        raise InputError(f"scales is {scales}; {parameters.numel()} parameters hold no 2 x {P} values from there on")
    named = {name: tensor for name, tensor in o._asdict().items() if name not in ("table", "scales")}
    for name, tensor in named.items():
        check_like(name, tensor, "out", out)
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tuple(tensor.shape) != (P,):
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {(P,)}, that of eps")
    check_contiguous(("table", table), *named.items())
    _branch_rows(*o)

"""What the weights of a launch carry: an evaluation-mode BatchNorm, or a branch's rank-one factors.

    conv then BatchNorm:  W' = scale ⊗ W,  b' = scale·b + shift,   scale = γ/√(var + ε),  shift = β − scale·mean
    branch k:             W_k = s_k ⊗ W ⊗ r_k,  b_k = s_k·b                    (docs/method.md, Student)

With channel groups, an output's row of W is multiplied by the r of the inputs of its group.

Parameters are given as in a state dict, name → tensor. A student's rank-one layer at ``path`` holds
``path.layer.weight`` (and bias) and the deviations ``path.delta_r`` (K, Ci) and ``path.delta_s`` (K, Co); in a plain
network it is ``path.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastensdistill.network.nodes import Layer, Norm

Parameters = Mapping[str, Tensor]


def norm_scale_shift(parameters: Parameters, norm: Norm) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of an evaluation-mode BatchNorm."""
    scale = parameters[f"{norm.name}.weight"] * (parameters[f"{norm.name}.running_var"] + norm.eps).rsqrt()
    return scale, parameters[f"{norm.name}.bias"] - scale * parameters[f"{norm.name}.running_mean"]


def image_scale_shift(parameters: Parameters, name: str) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of the image normalisation ``name``."""
    mean, std = parameters[f"{name}.mean"].flatten(), parameters[f"{name}.std"].flatten()
    return 1 / std, -mean / std


def layer_weights(parameters: Parameters, layer: Layer, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution or linear layer, carrying ``norm`` where one is given."""
    weight = parameters[f"{layer.name}.weight"]
    bias = parameters[f"{layer.name}.bias"] if layer.bias else None
    if norm is None:
        return weight, bias
    scale, shift = norm_scale_shift(parameters, norm)
    return weight * _rows(scale, weight), shift if bias is None else scale * bias + shift


def _rows(values: Tensor, weight: Tensor) -> Tensor:
    """(…, Co) shaped to multiply the output channels of ``weight`` (Co, Ci, …)."""
    return values[(..., *[None] * (weight.dim() - 1))]


def _columns(values: Tensor, weight: Tensor) -> Tensor:
    """(Ci,) shaped to multiply the input channels of ``weight`` (Co, Ci, …), or (Co, Ci / groups, …) group by group."""
    groups = len(values) // weight.shape[1]
    rows = values.view(groups, -1).repeat_interleave(len(weight) // groups, 0) if groups > 1 else values[None]
    return rows[(..., *[None] * (weight.dim() - 2))]


def _wrapped(name: str, parameters: Parameters) -> tuple[str, str]:
    """Path and kind of a rank-one layer's own tensor; a network may have other layers called "layer"."""
    path, _, kind = name.rpartition(".layer.")
    return (path, kind) if f"{path}.delta_r" in parameters else ("", "")


def fold_branches(parameters: Parameters, branches: int) -> list[dict[str, Tensor]]:
    """The plain network that each branch of a student is: K mappings with a plain network's names."""
    folded: list[dict[str, Tensor]] = [{} for _ in range(branches)]
    for name, value in parameters.items():
        path, kind = _wrapped(name, parameters)
        for k, branch in enumerate(folded):
            if kind == "weight":
                r, s = 1 + parameters[f"{path}.delta_r"][k], 1 + parameters[f"{path}.delta_s"][k]
                branch[f"{path}.weight"] = value * _rows(s, value) * _columns(r, value)
            elif kind == "bias":
                branch[f"{path}.bias"] = (1 + parameters[f"{path}.delta_s"][k]) * value
            elif not name.endswith((".delta_r", ".delta_s")):
                branch[name] = value
    return folded

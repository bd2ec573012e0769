"""The step in JAX under ``jit``: all teachers and branches both ways, as the authors' JAX code does it.

The networks are interpreted from their traced layers, parameters come from ours and are compared with ours afterwards.
Float32 parameters, products in bfloat16 where the config says so, NHWC as XLA likes it.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the device's memory is shared with PyTorch here

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from bench.setting import Batch, Distillation, Problem
from fastensdistill.engine.plain import plain_student
from fastensdistill.network.nodes import Activation, Add, Affine, Conv, Input, Layer, Network, Norm, Pad, Pool
from fastensdistill.network.trace import trace

State = dict[str, Any]


def to_jax(x: Tensor) -> Any:
    return jnp.asarray(x.detach().cpu().numpy())


def forward(network: Network, p: State, x: Any, dtype: Any, factors: State | None = None, training: bool = False):
    """Logits of images (n, H, W, 3) and the moved running statistics. ``factors``: r and s per layer, (K, C); then the
    batch is K·B images, branch by branch."""
    values: State = {}
    moved: State = {}

    def by_branch(rows: Any, y: Any) -> Any:
        rows = jnp.repeat(rows, len(y) // len(rows), axis=0)
        return rows.reshape(rows.shape[0], *[1] * (y.ndim - 2), rows.shape[1])

    def layer(node: Layer, y: Any) -> Any:
        w = p[f"{node.name}.weight"].astype(dtype)
        if factors:
            y = y * by_branch(factors[f"{node.name}.r"], y).astype(y.dtype)
        if isinstance(node, Conv):
            y = jax.lax.conv_general_dilated(
                y.astype(dtype), w, (node.stride,) * 2, [(node.padding,) * 2] * 2,
                dimension_numbers=("NHWC", "OIHW", "NHWC"),
            )  # fmt: skip
        else:
            y = y.reshape(len(y), -1).astype(dtype) @ w.T
        if node.bias:
            y = y + p[f"{node.name}.bias"].astype(y.dtype)
        return y * by_branch(factors[f"{node.name}.s"], y).astype(y.dtype) if factors else y

    for node in network.nodes:
        inputs = [values[name] for name in node.inputs]
        y = inputs[0] if inputs else x
        if isinstance(node, Layer):
            y = layer(node, y)
        elif isinstance(node, Norm):
            wide = y.astype(p[f"{node.name}.weight"].dtype)
            mean, var = p[f"{node.name}.running_mean"], p[f"{node.name}.running_var"]
            if training:
                axes = tuple(range(wide.ndim - 1))
                batch = wide.mean(axes), wide.var(axes)
                for key, old, new in zip(("running_mean", "running_var"), (mean, var), batch, strict=True):
                    moved[f"{node.name}.{key}"] = (1 - node.momentum) * old + node.momentum * new
                mean, var = batch
            scale = p[f"{node.name}.weight"] * jax.lax.rsqrt(var + node.eps)
            y = (wide * scale + (p[f"{node.name}.bias"] - mean * scale)).astype(dtype)
        elif isinstance(node, Affine):
            y = (y - p[f"{node.name}.mean"].reshape(-1)) / p[f"{node.name}.std"].reshape(-1)
        elif isinstance(node, Activation):
            y = jax.nn.relu(y)
        elif isinstance(node, Add):
            y = inputs[0] + inputs[1]
        elif isinstance(node, Pad):
            y = y[:, :: node.stride, :: node.stride]
            y = jnp.pad(y, ((0, 0), (0, 0), (0, 0), (0, node.shape[0] - y.shape[-1])))
        elif isinstance(node, Pool) and node.is_global:
            y = y.mean((1, 2), keepdims=True)
        elif not isinstance(node, Input):
            raise NotImplementedError(f"{type(node).__name__} in the JAX peer")
        values[node.name] = y
    logits = values[network.output]
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), moved


def soft_cross_entropy(target: Any, logits: Any) -> Any:
    return -(target * jax.nn.log_softmax(logits)).sum(-1).mean()


class JaxStep:
    """One distillation step; the arrays live in JAX, and ``state`` copies them back."""

    def __init__(self, problem: Problem):
        assert isinstance(problem, Distillation)
        self.student, self.config, setting = problem.student, problem.config, problem.setting
        first = next(problem.student.parameters())
        jax.config.update("jax_enable_x64", first.dtype == torch.float64)
        shape = problem.image_shape
        self.k, self.single = setting.k, problem.student.kind == "single"
        architectures = plain_student(problem.student).architecture(), problem.teachers.networks[0]
        network, teacher = (trace(module, shape) for module in architectures)
        own = {n.replace(".layer.", "."): p for n, p in problem.student.module.state_dict(keep_vars=True).items()}
        self.names = {name: name for name in own if not name.endswith("num_batches_tracked")}
        self.factors = {
            f"{name.rpartition('.')[0]}.{name[-1]}": 1 + to_jax(p) for name, p in own.items() if ".delta_" in name
        }
        kept = {n: to_jax(p) for n, p in own.items() if ".delta_" not in n and n in self.names}
        self.trained = {n: v for n, v in kept.items() if isinstance(own[n], torch.nn.Parameter)}
        self.rest = {n: v for n, v in kept.items() if n not in self.trained}
        self.teachers = [{n: to_jax(v) for n, v in t.state_dict().items()} for t in problem.teachers.networks]
        zeros = partial(jax.tree.map, jnp.zeros_like)
        self.momentum = zeros((self.trained, self.factors))
        dtype = jnp.bfloat16 if self.config.precision == "bf16" else to_jax(first).dtype
        self.step = jax.jit(partial(self.one_step, network, teacher, dtype), donate_argnums=(0, 1, 2))

    def one_step(self, network, teacher, dtype, weights, rest, momentum, teachers, x, pair):
        c, k = self.config, self.k

        def branches(weights, rest, x, training):
            shared, factors = weights
            p = shared | rest
            logits, moved = forward(network, p, jnp.concatenate([x] * k), dtype, factors or None, training)
            return logits.reshape(k, len(x), -1), moved

        def every_teacher(x):
            return jnp.stack([forward(teacher, p, x, dtype)[0] for p in teachers])

        if c.perturbation == "tdiv-sdiv":

            def objective(x):
                t, s = every_teacher(x), branches(weights, rest, x, False)[0]
                fixed = jax.lax.stop_gradient
                tdiv = soft_cross_entropy(fixed(jax.nn.softmax(t[pair[1]])), t[pair[0]])
                return tdiv - soft_cross_entropy(fixed(jax.nn.softmax(s[pair[1]])), s[pair[0]])

            g = jax.grad(objective)(x)
            norm = jnp.sqrt((g**2).sum((1, 2, 3), keepdims=True))
            x = jnp.clip(x + c.step_size * x[0].size ** 0.5 * g / jnp.maximum(norm, 1e-30), 0, 1)
        targets = jax.nn.softmax(every_teacher(x) / c.temperature)
        targets = targets.mean(0, keepdims=True) if self.single else targets

        def loss(weights):
            logits, moved = branches(weights, rest, x, True)
            decay = sum((v**2).sum() for v in weights[0].values())
            decay = decay + sum(((v - 1) ** 2).sum() for v in weights[1].values()) / k
            distil = c.temperature**2 * soft_cross_entropy(targets, logits / c.temperature)
            return distil + c.weight_decay / 2 * decay, moved

        gradient, moved = jax.grad(loss, has_aux=True)(weights)
        gradient = gradient[0], jax.tree.map(lambda g: k * g, gradient[1])
        momentum = jax.tree.map(lambda m, g: c.momentum * m + g, momentum, gradient)
        descend = lambda w, m, g: w - c.learning_rate * (g + c.momentum * m)  # noqa: E731
        return jax.tree.map(descend, weights, momentum, gradient), rest | moved, momentum

    def __call__(self, batch: Batch) -> None:
        x = jnp.from_dlpack(batch.images.permute(0, 2, 3, 1).contiguous())
        weights = (self.trained, self.factors)
        pair = jnp.asarray(batch.pair)
        weights, self.rest, self.momentum = self.step(weights, self.rest, self.momentum, self.teachers, x, pair)
        self.trained, self.factors = weights
        jax.block_until_ready(self.trained)

    def state(self) -> dict[str, list[Tensor]]:
        def back(array: Any) -> Tensor:
            return torch.from_numpy(np.array(array))

        names = [n.replace(".layer.", ".") for n, _ in self.student.module.named_parameters()]
        factors = [n for n in names if ".delta_" in n]
        buffers = [n for n, _ in self.student.module.named_buffers() if n.endswith(("running_mean", "running_var"))]
        return {
            "shared": [back(self.trained[n]) for n in names if ".delta_" not in n],
            "factors": [back(self.factors[f"{n.rpartition('.')[0]}.{n[-1]}"]) - 1 for n in factors],
            "statistics": [back(self.rest[n]) for n in buffers],
        }

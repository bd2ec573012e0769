"""A plan run by plain PyTorch, launch by launch: the oracle of the fused engine, on any device and in any dtype.

Nothing here is fast: buffers are (G, N, C, H, W), every step is its own operation, gradients are written out by the
formulas of the ops and not taken by autograd, so that a mistake in the plan shows as a wrong number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from fastensdistill.network.build import find_head
from fastensdistill.network.fold import Parameters, image_scale_shift, layer_weights, norm_scale_shift
from fastensdistill.network.launch import Launch, Part, Step
from fastensdistill.network.nodes import Conv, Linear, Norm, Pad, Pool


def execute(part: Part, parameters: Sequence[Parameters], buffers: dict[str, Tensor]) -> None:
    """Run the launches of ``part`` and add what they write to ``buffers``.

    Args:
        parameters: one state dict per group, in the part's order; branches as ``fold_branches`` gives them.
        buffers: in a forward pass "input" (1, N, C, H, W), pixels in [0, 1]; in a backward pass what the forward pass
            left, and the gradient of the logits, "NAME.grad" (G, N, classes) with the output's name.

    Results under the plan's names: logits (G, N, classes), "input.grad" (G, N, C, H, W), parameters' gradients
    "PATH.grad", (G, …) of layers and (Q, C) of BatchNorm, moved running mean and variance "PATH.running" (Q, 2, C).
    """
    run = _Run(part, parameters, buffers)
    for launch in part.launches:
        getattr(run, launch.op.replace(" ", "_"))(launch)


def wide(rows: Tensor) -> Tensor:
    """(…, C) → (…, 1, C, 1, 1), to multiply (…, N, C, H, W)."""
    return rows[..., None, :, None, None]


def mean_windows(x: Tensor, node: Pool) -> Tensor:
    """Mean pooling of (images, C, H, W): windows, or however many adaptive ones make the output's size."""
    if node.kind == "avg":
        return F.avg_pool2d(x, node.kernel, node.stride)
    return F.adaptive_avg_pool2d(x, node.shape[1:])


def mean_windows_gradient(d: Tensor, node: Pool) -> Tensor:
    """Gradient of ``mean_windows``; it is linear, so the input does not matter."""
    with torch.enable_grad():
        x = d.new_zeros(len(d), *node.in_shape, requires_grad=True)
        return torch.autograd.grad(mean_windows(x, node), x, d)[0]


class _Run:
    """One method per op; ``epilogue`` interprets the steps."""

    def __init__(self, part: Part, parameters: Sequence[Parameters], buffers: dict[str, Tensor]):
        self.part, self.parameters, self.buffers = part, parameters, buffers
        self.nodes, self.groups = part.network.by_name, len(part.groups)
        # one group of each set of groups that share statistics
        self.leaders = range(part.sets) if part.training else range(self.groups)

    def read(self, name: str) -> Tensor:
        """The part's share of a buffer: its first groups, or the one which all groups read."""
        held = self.buffers[name]
        return held[: self.groups] if len(held) >= self.groups else held.expand(self.groups, *held.shape[1:])

    def each(self, name: str) -> Tensor:
        """A parameter of every group, stacked."""
        return torch.stack([parameters[name] for parameters in self.parameters])

    def sets(self, name: str) -> Tensor:
        """A parameter of every set, stacked (Q, C)."""
        return torch.stack([self.parameters[g][name] for g in self.leaders])

    def weights(self, launch: Launch) -> list[tuple[Tensor, Tensor | None]]:
        node, norm = self.nodes[launch.node], self.nodes.get(launch.folded)
        assert isinstance(node, Conv | Linear)
        assert norm is None or isinstance(norm, Norm)
        return [layer_weights(parameters, node, norm) for parameters in self.parameters]

    def scale_shift(self, name: str, batch: bool = False) -> tuple[Tensor, Tensor]:
        """(G, C) each: of a BatchNorm, with this batch's or the running statistics, or of the image's normalisation."""
        node = self.nodes[name]
        if batch:
            mean, inv_std = self.read(f"{name}.statistics").unbind(1)
            scale = self.each(f"{name}.weight") * inv_std
            return scale, self.each(f"{name}.bias") - scale * mean
        pairs = [
            norm_scale_shift(p, node) if isinstance(node, Norm) else image_scale_shift(p, name) for p in self.parameters
        ]
        return torch.stack([scale for scale, _ in pairs]), torch.stack([shift for _, shift in pairs])

    def prologue(self, launch: Launch) -> Tensor:
        x = self.read(launch.reads[0] if "gradient" not in launch.op else launch.reads[launch.op == "head gradient"])
        for step in launch.prologue:
            x = self.step(step, x, launch)
        return x

    def epilogue(self, launch: Launch, value: Tensor) -> None:
        for step in launch.epilogue:
            value = self.step(step, value, launch)

    def step(self, step: Step, value: Tensor, launch: Launch) -> Tensor:
        kind, backward = step.kind, launch.op.endswith("gradient")
        if kind == "add" and backward:
            value = value.clone()
            part = value[..., :: step.stride, :: step.stride]
            part += self.read(step.arg)[:, :, : value.shape[2]]
        elif kind == "add":
            residual = self.read(step.arg)[..., :: step.stride, :: step.stride]
            value = value + F.pad(residual, (0, 0, 0, 0, 0, value.shape[2] - residual.shape[2]))
        elif kind == "relu":
            value = value.relu()
        elif kind in ("scale_shift", "affine", "batch_norm"):
            scale, shift = self.scale_shift(step.arg, batch=kind == "batch_norm")
            value = value * wide(scale) + wide(shift)
        elif kind == "scale":
            value = value * wide(self.scale_shift(step.arg)[0])
        elif kind == "mask":
            value = value * self.read(step.arg)
        elif kind == "store":
            self.buffers[step.arg] = value
        elif kind == "bits":
            self.buffers[step.arg] = value > 0
        elif kind == "sums" and backward:
            self.buffers[f"{step.arg}.grad_sums"] = self.gradient_sums(value, step.arg)
        elif kind == "sums":
            self.buffers[f"{step.arg}.sums"] = self.forward_sums(value, step.arg)
        else:
            assert kind == "bias", f"{step} in {launch}"  # the ops add it themselves
        return value

    def forward_sums(self, value: Tensor, norm: str) -> Tensor:
        rest = value - wide(self.each(f"{norm}.running_mean"))
        return torch.stack([rest.sum((1, 3, 4)), rest.square().sum((1, 3, 4))], 1)

    def gradient_sums(self, gradient: Tensor, norm: str) -> Tensor:
        mean, inv_std = self.read(f"{norm}.statistics").unbind(1)
        normalized = (self.read(self.nodes[norm].inputs[0]) - wide(mean)) * wide(inv_std)
        return torch.stack([gradient.sum((1, 3, 4)), (gradient * normalized).sum((1, 3, 4))], 1)

    def per_set(self, sums: Tensor) -> Tensor:
        """(G, 2, C) → (Q, 2, C)."""
        return sums.unflatten(0, (self.part.sets, -1)).sum(1)

    def count(self, norm: str) -> int:
        """Values per channel of one set."""
        return (
            self.buffers[self.nodes[norm].inputs[0]][0].numel()
            // self.nodes[norm].shape[0]
            * (self.groups // self.part.sets)
        )

    def conv(self, launch: Launch) -> None:
        node = self.nodes[launch.node]
        results = []
        for x, (weight, bias) in zip(self.prologue(launch), self.weights(launch), strict=True):
            if isinstance(node, Conv):
                results.append(F.conv2d(x, weight, bias, node.stride, node.padding))
            else:
                results.append(F.linear(x.flatten(1), weight, bias)[:, :, None, None])
        self.epilogue(launch, torch.stack(results))

    def conv_gradient(self, launch: Launch) -> None:
        node = self.nodes[launch.node]
        assert isinstance(node, Conv | Linear)
        results = []
        for d, (weight, _) in zip(self.read(launch.reads[0]), self.weights(launch), strict=True):
            size = [len(d), *node.in_shape]
            if any(step.stride > 1 for step in launch.steps("store")):  # of a 1x1 convolution, where it is not 0
                results.append(F.conv_transpose2d(d, weight))
            elif isinstance(node, Conv):
                results.append(conv2d_input(size, weight, d, node.stride, node.padding))
            else:
                results.append((d.flatten(1) @ weight).view(size))
        self.epilogue(launch, torch.stack(results))

    flat_gradient = conv_gradient

    def weight_gradient(self, launch: Launch) -> None:
        node, name = self.nodes[launch.node], launch.node
        x, d = self.read(launch.reads[0]), self.read(launch.reads[1])
        for step in launch.prologue:
            x = self.step(step, x, launch)
        if isinstance(node, Conv):
            shape = self.parameters[0][f"{name}.weight"].shape
            pairs = zip(x, d, strict=True)
            weight = torch.stack([conv2d_weight(a, shape, b, node.stride, node.padding) for a, b in pairs])
        else:
            weight = d.flatten(2).transpose(1, 2) @ x.flatten(2)
        self.buffers[f"{name}.weight.grad"] = weight
        if isinstance(node, Conv | Linear) and node.bias:
            self.buffers[f"{name}.bias.grad"] = d.sum((1, 3, 4))

    def norm_sums(self, launch: Launch) -> None:
        self.buffers[launch.writes[0]] = self.forward_sums(self.read(launch.reads[0]), launch.node)

    def norm_statistics(self, launch: Launch) -> None:
        name, node = launch.node, self.nodes[launch.node]
        assert isinstance(node, Norm)
        n = self.count(name)
        running = torch.stack([self.sets(f"{name}.running_mean"), self.sets(f"{name}.running_var")], 1)
        first, second = (self.per_set(self.buffers[launch.reads[0]]) / n).unbind(1)
        mean, var = running[:, 0] + first, second - first.square()
        self.buffers[f"{name}.statistics"] = torch.stack([mean, (var + node.eps).rsqrt()], 1)
        moved = torch.stack([mean, var * n / (n - 1) if node.unbiased else var], 1)
        self.buffers[f"{name}.running"] = running.lerp(moved, node.momentum)

    def norm(self, launch: Launch) -> None:
        self.epilogue(launch, self.read(launch.reads[0]))

    elementwise = elementwise_gradient = norm

    def norm_sums_gradient(self, launch: Launch) -> None:
        self.buffers[launch.writes[0]] = self.gradient_sums(self.read(launch.reads[0]), launch.node)

    def norm_gradient(self, launch: Launch) -> None:
        d, z, sums, batch = (self.buffers[name] for name in launch.reads[:4])
        d_bias, d_weight = self.per_set(sums).unbind(1)
        mean, inv_std = batch.unbind(1)
        n, a = self.count(launch.node), self.sets(f"{launch.node}.weight") * inv_std
        b = -a * inv_std * d_weight / n
        c = -a * d_bias / n - b * mean
        self.buffers[f"{launch.node}.weight.grad"], self.buffers[f"{launch.node}.bias.grad"] = d_weight, d_bias
        self.epilogue(launch, wide(a) * d + wide(b) * z + wide(c))

    def pool(self, launch: Launch) -> None:
        node = self.nodes[launch.node]
        assert isinstance(node, Pool)
        x = self.read(launch.reads[0])
        images = x.flatten(0, 1)
        if node.kind == "max":
            y, index = F.max_pool2d(images, node.kernel, node.stride, node.padding, return_indices=True)
            self.buffers[f"{node.name}.index"] = index.unflatten(0, x.shape[:2])
        else:
            y = mean_windows(images, node)
        self.epilogue(launch, y.unflatten(0, x.shape[:2]))

    def pool_gradient(self, launch: Launch) -> None:
        node = self.nodes[launch.node]
        assert isinstance(node, Pool)
        d = self.read(launch.reads[0])
        empty = d.new_zeros(*d.shape[:2], *node.in_shape)
        if node.kind == "max":
            index = self.read(launch.reads[1]).flatten(3)
            result = empty.flatten(3).scatter_add(3, index, d.flatten(3)).view_as(empty)
        else:
            result = mean_windows_gradient(d.flatten(0, 1), node).view_as(empty)
        self.epilogue(launch, result)

    def pad(self, launch: Launch) -> None:
        node, x = self.nodes[launch.node], self.read(launch.reads[0])
        assert isinstance(node, Pad)
        empty = x.new_zeros(*x.shape[:2], *node.shape)
        self.epilogue(launch, self.step(Step("add", launch.reads[0], node.stride), empty, launch))

    def pad_gradient(self, launch: Launch) -> None:
        node, d = self.nodes[launch.node], self.read(launch.reads[0])
        assert isinstance(node, Pad)
        empty = d.new_zeros(*d.shape[:2], *node.in_shape)
        self.epilogue(launch, self.step(Step("add", launch.reads[0], node.stride), empty, launch))

    def head(self, launch: Launch) -> None:
        x = self.prologue(launch)
        features = x.flatten(2) if self.pooling == 1 else x.mean((3, 4))
        self.buffers[f"{launch.node}.pooled"] = features
        logits = [F.linear(f, *weights) for f, weights in zip(features, self.weights(launch), strict=True)]
        self.buffers[launch.node] = torch.stack(logits)

    @property
    def pooling(self) -> int:
        """Positions which the head averages."""
        head = find_head(self.part)
        return head.pool.in_shape[1] * head.pool.in_shape[2] if head.pool else 1

    def head_gradient(self, launch: Launch) -> None:
        logits, name = self.buffers[launch.reads[0]], launch.node
        if f"{name}.weight.grad" in launch.writes:
            self.buffers[f"{name}.weight.grad"] = logits.transpose(1, 2) @ self.buffers[f"{name}.pooled"]
            self.buffers[f"{name}.bias.grad"] = logits.sum(1)
        value = self.prologue(launch)
        features = torch.stack([d @ weight for d, (weight, _) in zip(logits, self.weights(launch), strict=True)])
        if self.pooling > 1:
            d = (features / self.pooling)[..., None, None].expand_as(value)
        else:
            d = features.view_as(value)
        for step in reversed(launch.prologue):
            if step.kind == "relu":
                d = d * (value > 0)
            elif step.kind == "scale_shift":
                d = d * wide(self.scale_shift(step.arg)[0])
        self.epilogue(launch, d)

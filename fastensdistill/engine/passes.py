"""A plan run by the kernels: one op per launch, its prologue and epilogue as the op's arguments.

Activations are (G, N, H, W, C) in the weights' dtype, masks packed bits, statistics float32. On CUDA tensors the ops
run their Triton kernels, elsewhere their references (or the kernels in the interpreter). The few launches that no
kernel covers (a sum or BatchNorm in an unusual place, mean pooling over windows) use PyTorch's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastensdistill.engine.statistics import part_momentum
from fastensdistill.engine.weights import Weights, unpack_gradient
from fastensdistill.kernels.batch_norm import batch_norm_apply, batch_norm_statistics
from fastensdistill.kernels.batch_norm_backward import batch_norm_backward, batch_norm_backward_statistics
from fastensdistill.kernels.conv_data_gradient import conv_data_gradient
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient
from fastensdistill.kernels.elementwise_gradient import elementwise_gradient
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.head import head
from fastensdistill.kernels.head_backward import head_backward
from fastensdistill.kernels.operands import accumulator
from fastensdistill.kernels.pool import max_pool, max_pool_backward
from fastensdistill.kernels.reference import shortcut, unpack_mask
from fastensdistill.network.execute import mean_windows, mean_windows_gradient
from fastensdistill.network.launch import Launch, Part, Step
from fastensdistill.network.nodes import Conv, Linear, Norm, Pad, Pool

Buffers = dict[str, Any]
Implement = Callable[[Part, Launch, Callable[..., Any]], Callable[..., Any]]


def run_part(
    part: Part,
    weights: Weights,
    slots: Tensor,
    buffers: Buffers,
    precision: str = "ieee",
    *,
    after: Callable[[Launch], None] | None = None,
    implement: Implement = lambda part, launch, op: op,
    updates: int = 1,
    sharers: int = 1,
    sinks: Mapping[str, Tensor] | None = None,
    add: bool = False,
) -> None:
    """Run the launches of ``part`` and add what they write to ``buffers``.

    Args:
        weights: of a part with the same network and mode. In training mode its running statistics are moved in place.
        slots: int32 (G,) on the device, the slot of each group; in training mode 0, 1, …, G − 1.
        buffers: in a forward pass "input" (1, N, H, W, C) float32, pixels in [0, 1]; in a backward pass what the
            forward pass left, and "NAME.grad" (G, N, classes) float32 with the output's name.
        precision: how float32 is multiplied, "ieee" or "tf32".
        after: called after every launch, to take what it wrote and to drop what nobody reads any more.
        implement: (part, launch, convolution op) → what computes it, with the op's arguments and results.
        updates: how often a step moves the running statistics; all together they move as far as once.
        sharers: over how many batches like this one ``after`` makes the sums of BatchNorm a mean.
        sinks: where parameters' gradients are written instead, by name: of weights (G, taps, Ci, Co), of a linear layer
            (G, 1, H·W·C, Co), the rest as in ``buffers``. add: on top of what is there.

    Results under the plan's names: logits (G, N, classes), "input.grad" (G, N, H, W, C), parameters' gradients as in
    ``network.execute``, all float32.
    """
    run = _Run(part, weights, slots, buffers, precision, implement, updates, sharers, sinks or {}, add)
    for launch in part.launches:
        getattr(run, launch.op.replace(" ", "_"))(launch)
        if after:
            after(launch)


class _Run:
    """One method per op."""

    def __init__(
        self, part: Part, weights: Weights, slots: Tensor, buffers: Buffers, precision: str, implement: Implement,
        updates: int, sharers: int, sinks: Mapping[str, Tensor], add: bool,
    ):  # fmt: skip
        self.part, self.weights, self.slots, self.buffers, self.precision = part, weights, slots, buffers, precision
        self.implement, self.updates, self.sharers = implement, updates, sharers
        self.sinks, self.add = sinks, add
        self.nodes, self.groups = part.network.by_name, len(part.groups)

    def read(self, name: str) -> Tensor:
        """The part's share of a buffer: its first groups."""
        return self.buffers[name][: self.groups]

    def write(self, steps: tuple[Step, ...], *values: Tensor | None) -> None:
        """Name an op's results, in the order of the steps that store them."""
        self.buffers.update(zip((step.arg for step in steps), values, strict=True))

    def sink(self, name: str) -> Tensor | None:
        """Where the gradient of the parameter ``name`` is to be written, if not into a buffer of its own."""
        return self.sinks.get(f"{name}.grad")

    def find(self, launch: Launch, kind: str) -> Step | None:
        return next((step for step in launch.epilogue if step.kind == kind), None)

    def residual(self, launch: Launch) -> dict[str, Any]:
        step = self.find(launch, "add")
        return {"residual": self.read(step.arg), "residual_stride": step.stride} if step else {}

    def by_group(self, name: str) -> tuple[Tensor, Tensor]:
        """Scale and shift of an evaluation-mode BatchNorm or of the image, a row per group."""
        scale, shift = self.weights.scale_shift[name]
        if self.part.training:  # slot g is group g's
            return scale[: self.groups], shift[: self.groups]
        return scale.index_select(0, self.slots), shift.index_select(0, self.slots)

    def statistics(self, norm: str) -> dict[str, Tensor]:
        batch = self.buffers[f"{norm}.statistics"]
        return {"mean": batch.mean, "inv_std": batch.inv_std}

    def geometry(self, node: Conv | Linear) -> dict[str, Any]:
        if isinstance(node, Conv):
            return {"kernel": node.kernel, "stride": node.stride, "padding": node.padding}
        return {"kernel": 1}

    def layer(self, launch: Launch) -> Conv | Linear:
        node = self.nodes[launch.node]
        assert isinstance(node, Conv | Linear)
        return node

    def flat(self, x: Tensor, node: Conv | Linear) -> Tensor:
        """A linear layer's input as one position with all values."""
        return x if isinstance(node, Conv) else x.flatten(2)[:, :, None, None, :].contiguous()

    def conv(self, launch: Launch) -> None:
        node, layer = self.layer(launch), self.weights.layers[launch.node]
        kinds = [step.kind for step in launch.epilogue]
        options: dict[str, Any] = self.residual(launch)
        for step in launch.prologue:
            options["in_scale"], options["in_shift"] = self.weights.scale_shift[step.arg]
        if second := self.find(launch, "scale_shift"):
            options["next_scale"], options["next_shift"] = self.weights.scale_shift[second.arg]
        if sums := self.find(launch, "sums"):
            options["center"] = self.weights.norms[sums.arg].running_mean
        result = self.implement(self.part, launch, grouped_conv)(
            self.flat(self.buffers[launch.reads[0]], node),
            layer.forward,
            self.slots,
            bias=layer.bias,
            relu="relu" in kinds[: kinds.index("store")],
            mask="bits" in kinds,
            precision=self.precision,
            **self.geometry(node),
            **options,
        )
        self.write(launch.steps("store"), *(result[:2] if second else result[:1]))
        self.write(launch.steps("bits"), *([result.mask] if "bits" in kinds else []))
        if sums:
            self.buffers[f"{sums.arg}.sums"] = result.statistics

    def conv_gradient(self, launch: Launch) -> None:
        node, kinds = self.layer(launch), [step.kind for step in launch.epilogue]
        options: dict[str, Any] = self.residual(launch)
        if options:
            options["residual_first"] = "mask" in kinds[kinds.index("add") :] or "scale" in kinds[kinds.index("add") :]
        if mask := self.find(launch, "mask"):
            options["mask"] = self.read(mask.arg)
        if scale := self.find(launch, "scale"):
            options["scale"] = self.weights.scale_shift[scale.arg][0]
        if sums := self.find(launch, "sums"):
            options |= {"z": self.read(self.nodes[sums.arg].inputs[0]), **self.statistics(sums.arg)}
        d = self.read(launch.reads[0])
        in_size, geometry = (node.in_shape[1], node.in_shape[2]), self.geometry(node)
        if any(step.stride > 1 for step in launch.steps("store")):  # of a 1x1 convolution, where it is not 0
            in_size, geometry = (d.shape[2], d.shape[3]), {"kernel": 1}
        result = self.implement(self.part, launch, conv_data_gradient)(
            d,
            self.weights.layers[launch.node].gradient,
            self.slots,
            in_size=in_size,
            out_dtype=accumulator(d.dtype) if "input.grad" in launch.writes else d.dtype,
            precision=self.precision,
            **geometry,
            **options,
        )
        self.write(launch.steps("store"), result.d)
        if sums:
            self.buffers[f"{sums.arg}.grad_sums"] = result.statistics

    def flat_gradient(self, launch: Launch) -> None:
        node, weight = self.layer(launch), self.weights.layers[launch.node].gradient
        C, H, W = node.in_shape
        op = self.implement(self.part, launch, conv_data_gradient)
        d = op(self.read(launch.reads[0]), weight, self.slots, in_size=(1, 1), kernel=1, precision=self.precision).d
        self.write(launch.steps("store"), d.view(*d.shape[:2], H, W, C))

    def weight_gradient(self, launch: Launch) -> None:
        node, d = self.layer(launch), self.read(launch.reads[1])
        prologue: dict[str, Any] = {}
        for step in launch.prologue:
            prologue["in_scale"], prologue["in_shift"] = self.by_group(step.arg)
        x = self.flat(self.buffers[launch.reads[0]], node)
        op = self.implement(self.part, launch, conv_weight_gradient)
        out = self.sink(f"{node.name}.weight")
        gradient = op(x, d, precision=self.precision, out=out, add=self.add, **self.geometry(node), **prologue)
        if out is None:
            self.buffers[f"{node.name}.weight.grad"] = unpack_gradient(gradient, node)
        if node.bias:
            self.bias_gradient(f"{node.name}.bias", d)

    def bias_gradient(self, name: str, d: Tensor) -> None:
        out, over = self.sink(name), (1, 2, 3)
        if out is None:
            self.buffers[f"{name}.grad"] = d.sum(over, dtype=accumulator(d.dtype))
        elif self.add:
            out.add_(d.sum(over, dtype=out.dtype))
        else:
            torch.sum(d, over, dtype=out.dtype, out=out)

    def norm_sums(self, launch: Launch) -> None:
        z = self.read(launch.reads[0])
        rest = z.to(accumulator(z.dtype)) - self.weights.norms[launch.node].running_mean[:, None, None, None]
        sums = torch.stack([rest.sum((1, 2, 3)), rest.square().sum((1, 2, 3))], 1)
        self.buffers[launch.writes[0]] = sums[:, None]

    def count(self, norm: str) -> int:
        """Values per channel of one set of groups."""
        _, H, W = self.nodes[norm].shape
        return self.part.batch * H * W * self.groups // self.part.sets

    def norm_statistics(self, launch: Launch) -> None:
        node, norm, n = self.nodes[launch.node], self.weights.norms[launch.node], self.count(launch.node)
        assert isinstance(node, Norm)
        every = n * self.sharers
        self.buffers[f"{launch.node}.statistics"] = batch_norm_statistics(
            self.buffers[launch.reads[0]], n, norm.weight, norm.bias, norm.running_mean, norm.running_var,
            momentum=part_momentum(node.momentum, self.updates), eps=node.eps,
            correction=every / (every - 1) if node.unbiased else 1.0,
        )  # fmt: skip

    def norm(self, launch: Launch) -> None:
        first, kinds = launch.epilogue[0], [step.kind for step in launch.epilogue]
        z = self.read(launch.reads[0])
        if first.kind == "batch_norm":
            batch = self.buffers[f"{first.arg}.statistics"]
            scale, shift = batch.scale, batch.shift
        elif first.kind == "scale_shift":
            scale, shift = self.by_group(first.arg)
        else:
            scale = torch.ones(1, z.shape[-1], dtype=accumulator(z.dtype), device=z.device)
            shift = torch.zeros_like(scale)
        result = batch_norm_apply(z, scale, shift, relu="relu" in kinds, mask="bits" in kinds, **self.residual(launch))
        self.write(launch.steps("store"), result.y)
        self.write(launch.steps("bits"), *([result.mask] if "bits" in kinds else []))

    elementwise = norm

    def elementwise_gradient(self, launch: Launch) -> None:
        d = self.read(launch.reads[0])
        kinds = [step.kind for step in launch.epilogue if step.kind != "sums"]
        if kinds in (["mask", "store"], ["add", "mask", "store"]) and launch.epilogue[0].stride == 1:
            self.masked_gradient(launch, d)
            return
        u = d.to(accumulator(d.dtype))
        for step in launch.epilogue:
            if step.kind == "add":
                u = u.clone()
                r = self.read(step.arg)
                u[:, :, :: step.stride, :: step.stride] += r[..., : u.shape[-1]]
            elif step.kind == "mask":
                u = u * unpack_mask(self.read(step.arg), u.shape[-1])
            elif step.kind == "scale":
                u = u * self.by_group(step.arg)[0][:, None, None, None]
            elif step.kind == "store":
                u = u.to(d.dtype)
                self.buffers[step.arg] = u
            else:
                self.buffers[f"{step.arg}.grad_sums"] = self.gradient_sums(u, step.arg)

    def masked_gradient(self, launch: Launch, d: Tensor) -> None:
        """Residual and mask, with the sums where a training-mode BatchNorm follows: one kernel."""
        residual, mask, sums = (self.find(launch, kind) for kind in ("add", "mask", "sums"))
        options: dict[str, Any] = self.statistics(sums.arg) if sums else {}
        result = elementwise_gradient(
            d,
            z=self.read(self.nodes[sums.arg].inputs[0]) if sums else None,
            mask=self.read(mask.arg) if mask else None,
            residual=self.read(residual.arg) if residual else None,
            **options,
        )
        self.write(launch.steps("store"), result.d)
        if sums:
            self.buffers[f"{sums.arg}.grad_sums"] = result.statistics

    def gradient_sums(self, d: Tensor, norm: str) -> Tensor:
        z = self.read(self.nodes[norm].inputs[0])
        sums = batch_norm_backward_statistics(d, z, **self.statistics(norm)).statistics
        assert sums is not None
        return sums

    def norm_sums_gradient(self, launch: Launch) -> None:
        self.buffers[launch.writes[0]] = self.gradient_sums(self.read(launch.reads[0]), launch.node)

    def norm_gradient(self, launch: Launch) -> None:
        name, residual = launch.node, self.find(launch, "add")
        d, z, sums = (self.read(buffer) for buffer in launch.reads[:3])
        result = batch_norm_backward(
            d, z, sums, self.count(name), self.weights.norms[name].weight, **self.statistics(name),
            residual=self.read(residual.arg) if residual else None,
            d_weight=self.sink(f"{name}.weight"), d_bias=self.sink(f"{name}.bias"), add=self.add,
        )  # fmt: skip
        self.write(launch.steps("store"), *([result.d] if launch.epilogue else []))
        if self.sink(f"{name}.weight") is None:
            self.buffers[f"{name}.weight.grad"], self.buffers[f"{name}.bias.grad"] = result.d_weight, result.d_bias

    def pool(self, launch: Launch) -> None:
        node, x = self.nodes[launch.node], self.read(launch.reads[0])
        assert isinstance(node, Pool)
        if node.kind == "max":
            y, self.buffers[f"{node.name}.index"] = max_pool(
                x, kernel=node.kernel, stride=node.stride, padding=node.padding
            )
        else:
            y = channels_last(mean_windows(channels_first(x), node), self.groups)
        self.write(launch.steps("store"), y)

    def pool_gradient(self, launch: Launch) -> None:
        node, d = self.nodes[launch.node], self.read(launch.reads[0])
        assert isinstance(node, Pool)
        if node.kind == "max":
            size = node.in_shape[1], node.in_shape[2]
            window = {"kernel": node.kernel, "stride": node.stride, "padding": node.padding}
            result = max_pool_backward(d, self.read(launch.reads[1]), in_size=size, **window)
        else:
            result = channels_last(mean_windows_gradient(channels_first(d), node), self.groups)
        self.write(launch.steps("store"), result)

    def pad(self, launch: Launch) -> None:
        node = self.nodes[launch.node]
        assert isinstance(node, Pad)
        C, H, W = node.shape
        self.write(launch.steps("store"), shortcut(self.read(launch.reads[0]), node.stride, H, W, C).contiguous())

    def pad_gradient(self, launch: Launch) -> None:
        node, d = self.nodes[launch.node], self.read(launch.reads[0])
        assert isinstance(node, Pad)
        C, H, W = node.in_shape
        result = d.new_zeros(*d.shape[:2], H, W, C)
        result[:, :, :: node.stride, :: node.stride] = d[..., :C]
        self.write(launch.steps("store"), result)

    def head_input(self, launch: Launch, source: str) -> tuple[Tensor, dict[str, Any]]:
        """What the head reads, and its prologue."""
        node = self.layer(launch)
        x = self.read(source)
        if node.macs // node.shape[0] != x.shape[-1]:  # no pooling: all values are features
            x = self.flat(x, node)
        options: dict[str, Any] = {"relu": any(step.kind == "relu" for step in launch.prologue)}
        for step in launch.prologue:
            if step.kind == "batch_norm":
                batch = self.buffers[f"{step.arg}.statistics"]
                options["scale"], options["shift"] = batch.scale, batch.shift
            elif step.kind == "scale_shift":
                options["scale"], options["shift"] = self.weights.scale_shift[step.arg]
        return x, options

    def head(self, launch: Launch) -> None:
        layer = self.weights.layers[launch.node]
        x, options = self.head_input(launch, launch.reads[0])
        result = head(x, layer.forward[:, 0], layer.bias, self.slots, precision=self.precision, **options)
        self.buffers[launch.node], self.buffers[f"{launch.node}.pooled"] = result.logits, result.pooled

    def head_gradient(self, launch: Launch) -> None:
        node, sums = self.layer(launch), self.find(launch, "sums")
        x, options = self.head_input(launch, launch.reads[1])
        out, weighted = self.sink(f"{node.name}.weight"), f"{node.name}.weight.grad" in launch.writes
        if weighted:
            options |= {"pooled": self.read(f"{node.name}.pooled"), "d_weight": None if out is None else out[:, 0]}
            options |= {"d_bias": self.sink(f"{node.name}.bias"), "add": self.add}
        if sums:
            options |= self.statistics(sums.arg)
        weight = self.weights.layers[node.name].forward[:, 0]
        result = head_backward(self.read(launch.reads[0]), x, weight, self.slots, precision=self.precision, **options)
        self.write(launch.steps("store"), result.d.view_as(self.read(launch.reads[1])))
        if sums:
            self.buffers[f"{sums.arg}.grad_sums"] = result.statistics
        if weighted and out is None:
            assert result.d_weight is not None
            self.buffers[f"{node.name}.weight.grad"] = unpack_gradient(result.d_weight[:, None], node)
            if node.bias:
                self.buffers[f"{node.name}.bias.grad"] = result.d_bias


def channels_first(x: Tensor) -> Tensor:
    """(G, N, H, W, C) → (G·N, C, H, W)."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def channels_last(x: Tensor, groups: int) -> Tensor:
    """(G·N, C, H, W) → (G, N, H, W, C)."""
    return x.permute(0, 2, 3, 1).unflatten(0, (groups, -1)).contiguous()

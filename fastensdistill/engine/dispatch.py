"""Which code computes each convolution of a plan: the op itself, the vendor library (cuDNN), or CUDA kernels.

    triton   the op: its Triton kernel where that runs, else its reference (``kernels.ops`` says in which order)
    cudnn    PyTorch's own convolution (``kernels.vendor_conv``), on any device
    cuda     the extension's halo convolution (``kernels.halo_conv``), for 3x3 convolutions at stride 1 and their data
             gradients (``halo_rows`` lists them); naming it for another launch is refused when that runs
    wgmma    the extension's kernels for compute capability 9.0 (``kernels.wgmma``), forward and both gradients

The table is filled by measurement (``bench.kernels --dispatch FILE`` writes rows). A row matches a launch by its op
and, where given, its layer, its shape and the device's compute capability; the first that matches decides. Where none
does, ``PREDICTED`` rows count, on a device on which the kernels that they name have been proven (``engine.proof``); a
launch that those do not cover, and all else, the op itself computes. What the plan leaves to convolutions
(``network.on_load``) follows from the same table: :meth:`Dispatch.fusions`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastensdistill.engine import part_run, proof
from fastensdistill.engine.part_run import JointOp, Op, Side
from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels import halo_conv, wgmma
from fastensdistill.kernels.conv_data_gradient import conv_data_gradient
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.halo_conv import HALO
from fastensdistill.kernels.operands import Window
from fastensdistill.kernels.tiles import device_arch
from fastensdistill.kernels.vendor_conv import VENDOR
from fastensdistill.kernels.wgmma_conv import takes_norm
from fastensdistill.kernels.wgmma_joint_conv import wgmma_joint_conv
from fastensdistill.network.launch import Launch, Part
from fastensdistill.network.nodes import Affine, Conv, Input, Layer, Network, Node, Norm, Pad, ReLU
from fastensdistill.network.on_load import NONE, Abilities, Fusions

IMPLEMENTATIONS = ("triton", "cudnn", "cuda", "wgmma")
OPS = ("conv", "conv gradient", "flat gradient", "weight gradient")
# Those that CUDA kernels can take the place of
CALLED: dict[str, Op] = {
    "conv": grouped_conv,
    "conv gradient": conv_data_gradient,
    "weight gradient": conv_weight_gradient,
}
# Implementation → an op → its joint form: takes the arguments of the evaluation side and of the training side, each by
# name as the op does, and gives the results of both: bit for bit those of the op by this implementation, except that
# the rows of partial sums may be others with the same totals. It raises InputError, before it launches anything, for
# two sides that it cannot run together.
JOINT: dict[str, dict[Op, JointOp]] = {"triton": part_run.JOINT, "wgmma": {grouped_conv: wgmma_joint_conv}}
COVERED = {"cuda": ("conv", "conv gradient"), "wgmma": tuple(CALLED)}


class ConvShape(NamedTuple):
    """Of a convolution; a linear layer is 1x1 over its positions. ``height`` and ``width`` are its input's."""

    kernel: int
    stride: int
    in_channels: int
    out_channels: int
    height: int
    width: int


def shape_of(part: Part, launch: Launch) -> ConvShape:
    """The shape of the layer that ``launch`` computes, forward or backward. Raises InputError where it has none."""
    node = part.network.by_name[launch.node]
    if not isinstance(node, Layer):
        raise InputError(f"{launch.op} {launch.node} is no convolution")
    return shape_of_layer(node)


def shape_of_layer(node: Layer) -> ConvShape:
    """The shape of a convolution or linear layer."""
    kernel, stride = (node.kernel, node.stride) if isinstance(node, Conv) else (1, 1)
    C, H, W = node.in_shape
    return ConvShape(kernel, stride, C, node.shape[0], H, W)


@dataclass(frozen=True)
class Choice:
    """A row of the table. ``op`` is a launch's op; what is left out matches everything.

    ``layer`` is a layer's name, ``shape`` its :class:`ConvShape`, ``arch`` the compute capability as one number (90 for
    an H200). ``predicted``: by a model, from the numbers in ``reason``, and not by a measurement. Raises InputError for
    an unknown op or implementation, and for one that does not exist for the op.
    """

    op: str
    implementation: str
    reason: str
    layer: str = ""
    shape: ConvShape | None = None
    arch: int | None = None
    predicted: bool = False

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise unknown("op", self.op, OPS)
        if self.implementation not in IMPLEMENTATIONS:
            raise unknown("implementation", self.implementation, IMPLEMENTATIONS)
        if self.op not in COVERED.get(self.implementation, OPS):
            others = " or ".join(name for name in IMPLEMENTATIONS if self.op in COVERED.get(name, OPS))
            raise InputError(f"{self.op} has no {self.implementation} implementation; expected {others}")

    def __str__(self) -> str:
        where = [self.layer, *([f"{self.shape}"] if self.shape else []), *([f"sm_{self.arch}"] if self.arch else [])]
        predicted = "predicted, not measured: " if self.predicted else ""
        return f"{' '.join([self.op, *filter(None, where)])} by {self.implementation} ({predicted}{self.reason})"

    @staticmethod
    def read(fields: Mapping[str, Any]) -> Choice:
        """The row of JSON ``fields``, whose shape is a list."""
        return Choice(**{**fields, "shape": ConvShape(*fields["shape"]) if fields.get("shape") else None})

    def matches(self, op: str, node: Node, arch: int) -> bool:
        """Whether the row is about ``op`` of this layer on such a device."""
        return (
            self.op == op
            and self.layer in ("", node.name)
            and self.arch in (None, arch)
            and (self.shape is None or (isinstance(node, Layer) and self.shape == shape_of_layer(node)))
        )

    def usable(self, arch: int) -> bool:
        """Whether the extension has what the row names, on a GPU; elsewhere references compute it."""
        if arch == 0 or self.implementation not in COVERED:
            return True
        return halo_conv.built(arch) if self.implementation == "cuda" else wgmma.built(CALLED[self.op], arch)


# Measured choices, with their numbers as the reason. None has been measured.
TABLE: tuple[Choice, ...] = ()
# As long as nothing has been measured there. The model is that of ``bench.predictions``; TFLOP/s in bf16.
PREDICTED: tuple[Choice, ...] = (
    Choice(
        "conv", "wgmma", "540-710 TFLOP/s from 64 channels on and 250-400 below, where loading every tap through L2 "
        "holds Triton's kernel at 281", arch=90, predicted=True,
    ),
    Choice("conv gradient", "wgmma", "as the forward convolution", arch=90, predicted=True),
    Choice(
        "weight gradient", "wgmma", "250 FLOP for a byte of L2 instead of 32: 580-700 TFLOP/s, where Triton's kernel "
        "has 176-224", arch=90, predicted=True,
    ),
)  # fmt: skip


class Dispatch:
    """Picks what computes a launch, from a table of rows.

    ``predicted`` rows count after those of the ``table``, and only for launches that what they name covers. Give them
    only where it is known to run: :meth:`on` asks for that. ``built``: to plan alone, as if every build had everything.
    Without ``joint`` no two parts of a plan share launches.
    """

    def __init__(
        self, table: Sequence[Choice] = TABLE, predicted: Sequence[Choice] = (), built: bool = False, joint: bool = True
    ):
        self.table, self.predicted, self.built, self.joint = tuple(table), tuple(predicted), built, joint

    @staticmethod
    def on(device: torch.device, table: Sequence[Choice] = TABLE) -> Dispatch:
        """``table``, and on a device on which the wgmma kernels have been proven the predicted rows, too.

        The first time in a process that may take a while: ``engine.proof`` runs them in another. Of several processes
        all have to call it.
        """
        return Dispatch(table, () if proof.trouble(device) is not None else PREDICTED)

    @staticmethod
    def load(path: str | Path) -> Dispatch:
        """The table in a file of ``bench.kernels --dispatch``. Raises InputError for anything else."""
        try:
            return Dispatch([Choice.read(row) for row in json.loads(Path(path).read_text())])
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no table of implementations: {error}") from error

    def choice(self, op: str, node: Node, arch: int, dtype: torch.dtype = torch.bfloat16) -> Choice | None:
        """The row that decides about ``op`` of a layer on activations of ``dtype``; None where the op itself computes.

        ``arch`` 0 is a CPU. On a GPU a row is passed over where the extension was not built with what it names.
        """
        matching = [
            [row for row in rows if row.matches(op, node, arch) and (self.built or row.usable(arch))]
            for rows in (self.table, self.predicted)
        ]
        rows, predicted = iter(matching[0]), (row for row in matching[1] if covered(row, node, arch, dtype))
        return next(rows, None) or next(predicted, None)

    def implementation(self, part: Part, launch: Launch, arch: int = 0, dtype: torch.dtype = torch.bfloat16) -> str:
        """The implementation of a ``launch`` of ``part``, one of ``IMPLEMENTATIONS``; see :meth:`choice`."""
        row = self.choice(launch.op, part.network.by_name[launch.node], arch, dtype)
        return row.implementation if row else "triton"

    def fusions(self, arch: int, dtype: torch.dtype = torch.bfloat16) -> Fusions:
        """What convolutions take in as they load, on such a device and activations of ``dtype``: ``plan`` asks it.

        Only the wgmma kernels take in anything. Where they refuse a launch the op computes it, which cannot do this;
        so nothing is asked of them where a residual may come that they refuse.
        """

        def abilities(part: Part, node: Conv) -> Abilities:
            network, source = part.network, node.inputs[0]
            image = isinstance(network.by_name[source], Input | Affine)  # is float32
            if image or not takes_residuals(part, node):
                return NONE
            rows = [self.choice(op, node, arch, dtype) for op in CALLED]
            names = [row.implementation if row and covered(row, node, arch, dtype) else "triton" for row in rows]
            forward, data, weight = (name == "wgmma" for name in names)
            masks = names[1] != "cuda"  # the data gradient takes the ReLU's mask from what BatchNorm read
            window = Window(node.kernel, node.stride, node.padding)
            # a shortcut of the same input may become a second source of the data gradient
            channels = max(user.shape[0] for user in network.consumers[source] if isinstance(user, Conv))
            normed = takes_norm(channels, node.in_channels, window, *node.in_shape[1:])
            return Abilities(forward and weight and masks, data and weight and normed, forward, data)

        return abilities

    def missing(self, arch: int) -> bool:
        """Whether rows for this device name CUDA kernels that an extension would have had it been built with them."""
        rows = [row for row in (*self.table, *self.predicted) if row.arch in (None, arch) and not row.usable(arch)]
        return any(row.implementation != "cuda" or not halo_conv.without_body(arch) for row in rows)

    def __call__(self, part: Part, launch: Launch, op: Op) -> Op:
        """What computes the ``launch``: takes the op's arguments, its tensor first, and gives its results."""
        node = part.network.by_name[launch.node]

        def run(x: Tensor, *arguments: Any, **options: Any) -> Any:
            row = self.choice(launch.op, node, device_arch(x), x.dtype)
            if row is None or row.implementation == "triton":
                return op(x, *arguments, **options)
            try:
                return implementation(row.implementation, op)(x, *arguments, **options)
            except InputError as error:
                if row.predicted:  # of a launch that it does not cover, or whose operands the op refuses as well
                    return op(x, *arguments, **options)
                named = f'the table names "{row.implementation}" for {launch.op} {launch.node}'
                raise InputError(f"{named}: {error}") from error

        return run

    def joint_op(self, evaluation: Side, training: Side, op: Op) -> JointOp:
        """What computes both sides of a joint launch of ``op`` (``JOINT``), by the arguments of either.

        It gives None, having done nothing, where the sides are to be launched one by one: where their rows name
        different implementations, or one that has no joint form, or a predicted one whose joint form refuses them.
        """

        def run(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Any, Any] | None:
            rows = [self._row(side, given) for side, given in ((evaluation, first), (training, second))]
            names = {row.implementation if row else "triton" for row in rows}
            joint = JOINT.get(names.pop(), {}).get(op) if len(names) == 1 else None
            if joint is None:
                return None
            try:
                return joint(first, second)
            except InputError:
                if rows[0] is None:
                    raise
                return None  # launched one by one, a side is computed, or refused in words that name its row

        return run

    def _row(self, side: Side, given: Mapping[str, Any]) -> Choice | None:
        """The row that decides about one side; its tensor is the first of what its op is given."""
        (part, launch), x = side, next(iter(given.values()))
        return self.choice(launch.op, part.network.by_name[launch.node], device_arch(x), x.dtype)


def implementation(name: str, op: Op) -> Op:
    """What ``name`` has in the place of ``op``. Raises InputError where it has nothing."""
    found = wgmma.kernel(op) if name == "wgmma" else {"cudnn": VENDOR, "cuda": HALO}[name].get(op)
    if found is None:
        raise InputError(f"there is no {name} kernel for it")
    return found


def covered(row: Choice, node: Node, arch: int, dtype: torch.dtype) -> bool:
    """Whether the kernels that ``row`` names cover a layer; what a launch fuses they may still refuse."""
    if not isinstance(node, Layer) or row.implementation not in COVERED:
        return isinstance(node, Layer)
    window = Window(node.kernel, node.stride, node.padding) if isinstance(node, Conv) else Window(1)
    kernels = halo_conv if row.implementation == "cuda" else wgmma
    return not kernels.unsupported(node.in_channels, node.shape[0], window, dtype, arch)


def takes_residuals(part: Part, node: Conv) -> bool:
    """Whether the wgmma kernels take every residual that may be added in a launch of this convolution.

    Its channels are to be multiples of 8, and shortcuts of what it reads to have its stride or none: zero-padded ones
    and, in evaluation mode, 1x1 convolutions, whose gradient may be stored at their stride (``Backward.grid``).
    """
    network, sources = part.network, [node.inputs[0]]
    inputs: list[str] = []
    while sources:
        inputs.append(sources.pop())
        source = network.by_name[inputs[-1]]
        sources += source.inputs if isinstance(source, Norm | ReLU) else ()
    kinds = Pad if part.training else Pad | Conv
    users = (user for name in inputs for user in network.consumers[name] if isinstance(user, kinds))
    shortcuts = [user for user in users if isinstance(user, Pad) or user.kernel == 1]
    eights = all(other.shape[0] % 8 == 0 for other in network.nodes if isinstance(other, Conv))
    return eights and all(user.stride in (1, node.stride) for user in shortcuts)


def decisions(parts: Iterable[Part], arch: int) -> list[str]:
    """A line for each row of the tables that decides about convolutions of ``parts``, and one for all others.

    On a device of compute capability ``arch`` on which everything that the rows name can be used.
    """
    count: Counter[str] = Counter()
    for part in parts:
        for launch in part.launches:
            node = part.network.by_name[launch.node]
            if launch.op in OPS:
                rows = (row for row in (*TABLE, *PREDICTED) if row.matches(launch.op, node, arch))
                covering = (row for row in rows if not row.predicted or covered(row, node, arch, torch.bfloat16))
                count[str(next(covering, "others by triton, the op itself"))] += 1
    return [f"{number} launches: {row}" for row, number in count.items()]


def halo_rows(network: Network, reason: str) -> list[Choice]:
    """Rows that name "cuda" for every convolution of ``network`` which the halo kernels cover in bf16."""
    rows = []
    for node in network.nodes:
        if isinstance(node, Conv):
            window = Window(node.kernel, node.stride, node.padding)
            if halo_conv.supports(node.in_shape[0], node.shape[0], window, torch.bfloat16):
                rows += [Choice(op, "cuda", reason, node.name) for op in ("conv", "conv gradient")]
    return rows

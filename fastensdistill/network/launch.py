"""What a plan consists of: groups, steps, launches, buffers, parts; and the rules by which launches are chosen.

A launch runs one op over all groups of a part. What it does besides is written out as steps, in order: the prologue
transforms the input as it is read, the epilogue the result before and while it is written.

    prologue  affine NAME                    (x - mean) / std of the image, zero padding coming after it
              scale_shift NORM, relu         BatchNorm in evaluation mode, then ReLU
              batch_norm NORM, relu          BatchNorm with this batch's statistics, then ReLU
              norm_gradient NORM             of a gradient: what that BatchNorm makes of it, A·d + B·z + C
    epilogue  bias                           the layer's own, or that of the BatchNorm its weights carry
              activation NODE                that node's function, of a gradient its derivative at the same place
              input I                        what is stored next is the gradient of the node's I-th input
              second CONV [every S]          plus the products of a 1x1 convolution at every S-th position of its input
                                             or, of a gradient, to every S-th; its buffer is the launch's second
              add BUFFER [every S]           plus a residual; every S-th position of it, or to every S-th (gradients)
              relu, scale_shift, batch_norm  as above
              mask BUFFER                    keep a gradient where the forward pass's ReLU was open
              open NORM                      the same for the ReLU behind that BatchNorm, by the BatchNorm's input
              scale NORM                     times an evaluation-mode BatchNorm's scale, or 1 / std of the image
              store BUFFER [every S]         write the value; only every S-th position, the others being 0 (gradients)
              bits BUFFER                    write one bit per value, whether it is positive
              sums NORM                      per-channel sums which that BatchNorm needs next

What a launch reads and writes are buffers, a share per group (of statistics one for all groups where these have them
together; where only some do, the same one for each of these). Their names are made by the functions below and nowhere
else:

    INPUT             (N, H, W, C)           the image in [0, 1], float32, one for all groups
    NODE              (N, H, W, C)           a node's value; the network's output (N, classes), float32
    grad(NODE)        as the value           ∂loss/∂value; of the output it is given, float32
    grad(PARAMETER)   as the parameter       ∂loss/∂parameter, float32; of a BatchNorm or a Function per set
    waiting(NODE, i)  as the value, or fewer the gradient by one reader, stored apart until the others have come
    mask(RELU)        a bit per value        where the ReLU was open
    index(POOL)       as the value           which value of its window each maximum was
    drawn(DROPOUT)    as the value, or 1 for what is drawn together    0, or what the others are multiplied by
    pooled(LINEAR)    (N, features)          what the last layer multiplies, float32
    recorded(NODE)    -                      what autograd keeps of a module that is no plan's, per group
    sums(NORM)        (rows, 2, C)           partial sums of x − running mean and of its square, float32
    grad_sums(NORM)   (rows, 2, C)           partial sums of a gradient and of its product with the normalised input
    statistics(NORM)  per set, or group      the batch's mean and 1/std, scale and shift, float32
    coefficients(NORM) per set, or group     A, B and C of its gradient, float32
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from fastensdistill.errors import InputError, unknown
from fastensdistill.network.nodes import Conv, GeneralConv, Network, Node, Norm

INPUT = "input"  # the image: a node and a buffer


def grad(name: str) -> str:
    """The gradient of the value or parameter ``name``."""
    return f"{name}.grad"


def waiting(name: str, number: int) -> str:
    """The gradient of the value ``name`` by one of its readers, which waits for the others'."""
    return f"{name}.grad{number}"


def mask(relu: str) -> str:
    """One bit per value, whether it was positive."""
    return f"{relu}.mask"


def index(pool: str) -> str:
    """Where in its window each maximum was."""
    return f"{pool}.index"


def drawn(dropout: str) -> str:
    """What a value is multiplied by in training."""
    return f"{dropout}.drawn"


def pooled(linear: str) -> str:
    """The input of the last layer, after pooling."""
    return f"{linear}.pooled"


def recorded(node: str) -> str:
    """What autograd keeps of a network that runs as its own module."""
    return f"{node}.recorded"


def sums(norm: str) -> str:
    """Partial sums for the statistics of a batch."""
    return f"{norm} sums"


def grad_sums(norm: str) -> str:
    """Partial sums for the gradient of a training-mode BatchNorm."""
    return f"{norm} gradient sums"


def is_sums(name: str) -> bool:
    """Whether ``name`` is one of the two kinds of partial sums, rows of which add up; a layer may be called "sums"."""
    return name.endswith(" sums")


def statistics(norm: str) -> str:
    """A batch's own statistics."""
    return f"{norm}.statistics"


def coefficients(norm: str) -> str:
    """What a gradient is multiplied by on its way through a BatchNorm."""
    return f"{norm}.coefficients"


RULES = (
    "Groups of one architecture and one BatchNorm mode share their launches; another architecture forms its own.",
    "Of one architecture in both modes a convolution and the head are one joint launch with two sides, each with its "
    "own input, weights, prologue and epilogue.",
    "BatchNorm in evaluation mode goes into the weights of the convolution before it, if nothing else reads that.",
    "Else it is a scale-shift-ReLU, a second output of the launch before it, where a ReLU follows; else a launch.",
    "Normalisation of the image is a prologue of the stem: zero padding comes after it, so weights cannot carry it.",
    "BatchNorm in training mode: sums in the epilogue before it, one small launch to finish them, one to apply them "
    "with the residual and the ReLU. A convolution that loads every tap would compute it once per tap.",
    "Convolutions that keep a tile apply BatchNorm and ReLU as they load it. Where nothing else reads the result it is "
    "not stored, and the data gradient's mask comes from BatchNorm's input.",
    "For the gradient of a BatchNorm right behind such a convolution, data and weight gradient apply coefficients as "
    "they load, which a small launch makes.",
    "A 1x1 shortcut is further products of the convolution whose result it is added to, if that can, its data gradient "
    "further products of that of the same input; its weight gradient is a launch.",
    "Another activation than ReLU is a launch, with a BatchNorm before it that nothing else reads; its gradient reads "
    "its input.",
    "Convolutions of other kinds carry a BatchNorm in evaluation mode, too; depthwise ones make sums in training mode.",
    "Where no gradient follows, a depthwise convolution applies the activation behind it, a ReLU too.",
    "Dropout, in training alone, is a launch that draws and multiplies; the gradient is multiplied by what was drawn.",
    "What no kernel computes is a function of PyTorch's, one call for all groups, or one for each where it has tensors "
    "of its own; the gradient computes it again.",
    "The last linear layer, the pooling, ReLU and BatchNorm before it are one launch, forward and backward.",
    "An addition belongs to the launch that computes its last operand; a zero-padded shortcut is a strided read.",
    "ReLU leaves one bit per value where a gradient follows; the data gradient applies it, the evaluation-mode scale "
    "or the sums of the training-mode BatchNorm, and adds the residual's gradient.",
    "No gradient is computed that nobody reads: in training the stem has a weight gradient only.",
)


@dataclass(frozen=True)
class Group:
    """One network's run in a pass.

    Args:
        name: for printing, such as "T1".
        network: its index in the list given to ``plan``.
        statistics: None for evaluation mode; else groups with the same label take BatchNorm's mean and variance (and
            have its scale, shift and running estimates) together: as many neighbours for each of a part's labels.
        gradient: None; "input", of the image (evaluation mode); or "parameters" (training mode).
    """

    name: str
    network: int = 0
    statistics: str | None = None
    gradient: str | None = None

    def __post_init__(self) -> None:
        if self.gradient not in (None, "input", "parameters"):
            raise unknown("gradient", str(self.gradient), ["input", "parameters"])
        if self.gradient and (self.gradient == "parameters") != (self.statistics is not None):
            raise InputError(
                f"group {self.name!r} asks for the gradient of its {self.gradient} in "
                f"{'evaluation' if self.statistics is None else 'training'} mode; expected the parameters' in training "
                "mode or the input's in evaluation mode"
            )


@dataclass(frozen=True)
class Step:
    """One step of a prologue or epilogue, as the module's docstring lists them."""

    kind: str
    arg: str = ""
    stride: int = 1

    def __str__(self) -> str:
        return " ".join([self.kind, *([self.arg] if self.arg else []), *([f"every {self.stride}"] * (self.stride > 1))])


@dataclass(frozen=True)
class Buffer:
    """``shape`` of one group's share, (N, H, W, C) for activations; ``bits`` per element; ``groups`` shares."""

    shape: tuple[int, ...]
    bits: int
    groups: int

    @property
    def nbytes(self) -> float:
        """Of all shares."""
        return self.groups * prod(self.shape) * self.bits / 8


@dataclass(frozen=True)
class Launch:
    """One op over all groups of its part.

    ``folded`` names the evaluation-mode BatchNorm which the weights carry.
    ``reads`` and ``writes`` are the buffers it touches, its main input first; weights and parameters are not buffers.
    ``flops`` counts convolutions and linear layers, two per multiply-accumulate; ``nbytes`` what it must move.
    """

    op: str
    node: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    prologue: tuple[Step, ...] = ()
    epilogue: tuple[Step, ...] = ()
    folded: str = ""
    flops: int = 0
    nbytes: float = 0.0

    def steps(self, kind: str) -> tuple[Step, ...]:
        """Those of the epilogue of one kind."""
        return tuple(step for step in self.epilogue if step.kind == kind)


@dataclass
class Part:
    """The launches over groups that share an architecture and a BatchNorm mode. Buffers belong to the part.

    Groups whose gradient is asked for come first, so that a backward part's groups are the first of the forward's.
    """

    name: str
    network: Network
    groups: tuple[Group, ...]
    batch: int
    launches: list[Launch] = field(default_factory=list)
    buffers: dict[str, Buffer] = field(default_factory=dict)

    @property
    def training(self) -> bool:
        """BatchNorm's mode."""
        return self.groups[0].statistics is not None

    @property
    def gradient(self) -> str | None:
        """What the first groups ask for; see :class:`Group`."""
        return self.groups[0].gradient

    @property
    def sets(self) -> int:
        """How many sets of groups share BatchNorm statistics, each of as many neighbours."""
        return len({group.statistics for group in self.groups}) if self.training else len(self.groups)

    @property
    def rows(self) -> int:
        """Rows of statistics and coefficients, as kernels read them: one for all groups, or one each."""
        return 1 if self.sets == 1 else len(self.groups)

    def folded(self, node: Node | None) -> bool:
        """Whether this BatchNorm goes into the convolution's weights: evaluation mode, and nothing else reads that."""
        if not isinstance(node, Norm) or self.training:
            return False
        source = node.inputs[0]
        return isinstance(self.network.by_name[source], Conv | GeneralConv) and self.network.sole(source) is node


def after(fusions: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """The fusions still possible once ``kind`` has been used."""
    rest = fusions[fusions.index(kind) + 1 :]
    return tuple(k for k in rest if k != "add") if kind == "add" else rest

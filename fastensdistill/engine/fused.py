"""The fused step: the whole of a distillation step as one fixed list of launches, captured once as a CUDA graph.

    evaluation slots of the branches ← flat parameters            only for TDiv − SDiv
    perturbation: forward, seed, input gradient, ascent           images → perturbed images
    training slots of the branches ← flat parameters
    distillation: teachers forward, branches forward, loss        → ∂loss/∂logits
    backward, un-fold, (mean over processes), update              flat parameters ← flat parameters

Micro-batches go through the perturbation one after another, and then each through distillation and backward; slots are
written, gradients un-folded and weights updated once for the whole batch.

Teachers and branches are groups of the same launches. The backward pass is written out; autograd sees nothing. A step
reads the images, the labels, the index of the drawn pair and the learning rate from tensors that never move, and the
noise from a generator the graph knows: one captured graph serves the whole run, or one per pair of architectures that
drawn teachers have. ``train_on`` puts the reading of the batch, its crops and flips into the graph too. Ops allocate
their results; inside a capture these come from a pool that the graphs share, at the same addresses in every replay, and
since each buffer is freed after its last reader the pool is as large as ``engine.memory`` says beforehand.
Source of the step: Nam et al., ICML 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig, TrainConfig
from fastensdistill.data.loader import DeviceLoader
from fastensdistill.engine.checks import FirstBatch, check_images, check_labels, check_parts
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.evaluation import FusedPerturbation, Slots, Targets, by_architecture
from fastensdistill.engine.graph import Capturing, Graphs
from fastensdistill.engine.heads import Heads, join, split
from fastensdistill.engine.parallel import rank, same_start
from fastensdistill.engine.parameters import FlatParameters
from fastensdistill.engine.part_run import Execution
from fastensdistill.engine.reference import precision_on
from fastensdistill.engine.trained import Trained
from fastensdistill.errors import InputError
from fastensdistill.kernels.distillation_loss import distillation_loss
from fastensdistill.method.arguments import checked_config, checked_student, checked_teachers
from fastensdistill.method.perturbation import NEED_GRADIENT, Perturbation, Perturbed
from fastensdistill.method.student import BatchEnsemble, Hydra, Single, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.launch import Group
from fastensdistill.network.nodes import Network
from fastensdistill.network.plan import plan
from fastensdistill.network.probe import compared
from fastensdistill.network.unseen import check_unseen, refusing

State = dict[str, Tensor]
ImageShape = tuple[int, int, int]


def arithmetic(config: TrainConfig, network: nn.Module) -> tuple[torch.dtype, str]:
    """Dtype of activations and packed weights, and how float32 is multiplied, for ``config.precision``."""
    first = next(network.parameters())
    precision = precision_on(config, first.device)
    if precision == "bf16":
        return torch.bfloat16, "ieee"
    return first.dtype, "tf32" if precision == "tf32" else "ieee"


def plain(student: Student) -> nn.Module:
    """The student's architecture: without its factors, or with its heads as one layer.

    Raises InputError for a student of another kind.
    """
    if isinstance(student, Single):
        return student.module
    if isinstance(student, BatchEnsemble):
        return student.average()
    if isinstance(student, Hydra):
        return Heads(student).module
    raise InputError(f"no plan covers a student of the kind {type(student).__name__}")


@refusing("the fused engine")
def check_networks(
    student: Student, teachers: Teachers, shape: ImageShape, perturbation: str = "tdiv-sdiv"
) -> list[Network]:
    """Traced networks of the teachers, in order, and of the student last.

    Of the teachers a gradient with respect to the images is asked only where the ``perturbation`` needs one.

    Raises InputError for what the engine cannot run, or would run as something else: an operation that cannot be traced
    or planned, hooks, dropout in the student, a teacher that the student shares weights with.
    """
    check_unseen(student)
    check_unseen(teachers)
    own, ascended = plain(student), perturbation in NEED_GRADIENT
    networks = [compared(teacher, shape, gradient=ascended) for teacher in teachers.networks]
    networks.append(compared(own, shape, trains=True))
    plan(networks, distillation_groups(networks, student), "backward", 1)
    ranked = isinstance(student, BatchEnsemble)
    FlatParameters.check(student.module if ranked else own, networks[-1], ranked)
    trained = {p.data_ptr(): name for name, p in student.named_parameters() if p.device.type != "meta"}
    dtype = next(student.parameters()).dtype
    for m, teacher in enumerate(teachers.networks):
        if (found := next(teacher.parameters()).dtype) != dtype:
            raise InputError(f"teacher {m} is {found}; the fused engine expects {dtype}, as the student is")
        shared = next((trained[p.data_ptr()] for p in teacher.parameters() if p.data_ptr() in trained), None)
        if shared:
            raise InputError(f"the student's parameter {shared!r} is teacher {m}'s too; expected networks of their own")
    return networks


def distillation_groups(networks: list[Network], student: Student) -> list[Group]:
    """Who runs in the distillation passes; ``networks`` are the teachers' and, last, the student's."""
    groups = [Group(f"T{m + 1}", m) for m in range(len(networks) - 1)]
    copies = 1 if isinstance(student, Hydra) else student.branches
    return groups + [Group(f"S{k + 1}", len(networks) - 1, "S", "parameters") for k in range(copies)]


def mean_of_parts(scalars: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """The scalars of every micro-batch, averaged; those of one as they are, without a launch."""
    if len(scalars) == 1 or not scalars[0]:
        return scalars[0]
    return torch.stack([torch.stack(list(own)) for own in scalars]).mean(0).unbind()


class FusedStep(Capturing):
    """One step of distillation as a fixed list of launches; the interface of ``ReferenceStep``.

    ``step = FusedStep(student, teachers, config)``, then ``step(images, labels)`` for images (B, channels, H, W) in
    [0, 1], float32, and labels int64 (B,), always of one shape. Set the learning rate with :meth:`set_learning_rate`
    before a step. Returns scalars on the device: loss (without weight decay), loss_kd, loss_ce and, where the
    perturbation ascends them, tdiv and sdiv. On a CUDA device the first call captures the graph (``capture=False``
    launches every op from Python instead); ``captured`` says whether that worked, ``capture_error`` why not.

    From the first step (or from the start, with ``image_shape`` (channels, H, W) given) the student's parameters and
    running statistics live in this object's buffers: do not move or cast the student any more. The teachers' weights
    are copied at the first step. Parameters that do not require gradients stay as they are, to the bit.
    ``implementations`` names what computes each convolution (``engine.dispatch``). Of several processes each takes
    BatchNorm's statistics over its own images; with ``config.sync_batch_norm`` over those of all (one all-reduce per
    layer and direction).
    Raises InputError for networks and students that only the reference engine can train: each architecture is compared
    with its module once, on two random images.
    """

    graphs: Graphs | None = None

    def __init__(
        self,
        student: Student,
        teachers: Teachers | Sequence[nn.Module],
        config: DistillConfig,
        *,
        image_shape: ImageShape | None = None,
        capture: bool = True,
        implementations: Dispatch | None = None,
    ):
        self.student, self.teachers = checked_student(student), checked_teachers(teachers)
        self.config = checked_config(config, DistillConfig)
        self.device = next(student.parameters()).device
        self.target = "mean" if isinstance(student, Single) else "one-to-one"
        seed = config.seed + 2 * rank()  # a process of its own draws its own pairs and noise
        self.pick = torch.Generator().manual_seed(seed)
        own = "cpu" if self.device.type == "meta" else self.device  # the meta device has no generators
        self.noise = torch.Generator(own).manual_seed(seed + 1)
        self.perturbation = Perturbation(
            config.perturbation, len(self.teachers), student.branches, size=config.step_size,
            temperature=config.temperature, pick=self.pick, noise=self.noise,
        )  # fmt: skip
        self.dtype, self.precision = arithmetic(config, student)
        self.parts, self.implementations = config.micro_batches, implementations or Dispatch()
        self.execution = Execution(self.precision, self.implementations, config.sync_batch_norm, self.parts)
        self.capture = capture and self.device.type == "cuda"
        self._rate = config.learning_rate
        self.networks: list[Network] = []
        self.images: Tensor | None = None
        self.first = FirstBatch()
        self.loader: DeviceLoader | None = None
        if image_shape:
            self._adopt(image_shape)

    # ---- what is built once

    @refusing("the fused engine")
    def _adopt(self, shape: ImageShape) -> None:
        """Trace, and take over the student's parameters."""
        networks = check_networks(self.student, self.teachers, shape, self.config.perturbation)
        ranked = isinstance(self.student, BatchEnsemble)
        self.heads = Heads(self.student) if isinstance(self.student, Hydra) else None
        module = self.heads.module if self.heads else self.student.module
        self.parameters = FlatParameters([module], networks[-1], ranked)
        if self.heads:
            self.heads.tie()
            self.heads.hold(self.parameters)
        own = networks[-1]
        self.classes = own.by_name[own.output].shape[0] // (self.heads.K if self.heads else 1)
        same_start(self.parameters.state())
        self.rate = torch.tensor(self._rate, dtype=self.parameters.dtype, device=self.device)
        self.draw = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.networks = networks

    @refusing("the fused engine")
    def _build(self, shape: tuple[int, ...]) -> None:
        """Plans, weight slots and static inputs for this shape (B, channels, H, W) of a batch."""
        B, C, H, W = shape
        check_parts(self.config, B)
        if not self.networks:
            self._adopt((C, H, W))
        self.images = torch.zeros(B, H, W, C, dtype=self.parameters.dtype, device=self.device)
        self.labels = torch.zeros(B, dtype=torch.int64, device=self.device)
        groups = distillation_groups(self.networks, self.student)
        part = B // self.parts
        forward, backward = (plan(self.networks, groups, way, part).parts for way in ("forward", "backward"))
        (gradient,) = backward
        trained = next(part for part in forward if part.training)
        self.trained = Trained(self.networks[-1], trained, gradient, self.parameters, self.dtype, self.execution)
        slots = Slots(self.networks, self.teachers, self.dtype, self.device, self.heads)
        lists, self.places = by_architecture(self.perturbation, slots)
        self.ascends = [
            FusedPerturbation(self.config, self.perturbation, slots, self.parameters, part, self.execution, choices)
            for choices in lists
        ]
        self.ascend = self.ascends[0]
        self.targets = Targets([part for part in forward if not part.training], slots, self.execution)
        self.graphs = Graphs(self.parameters.state, self.device) if self.capture else None

    # ---- the launches

    def _perturb(self, x: Tensor) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        """The parts of ``x`` (B, H, W, C), perturbed, and the diversities."""
        self.ascend.write()
        images, found = zip(*(self.ascend(part, self.draw) for part in x.chunk(self.parts)), strict=True)
        means = mean_of_parts([list(scalars.values()) for scalars in found])
        return images, dict(zip(found[0], means, strict=True))

    def _distil(self, parts: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The update on perturbed images."""
        self.trained.write()
        losses = [
            self._gradients(x, own, add=i > 0)
            for i, (x, own) in enumerate(zip(parts, labels.chunk(self.parts), strict=True))
        ]
        self.trained.finish()
        self.trained.update(self.rate, self.config.momentum, self.config.weight_decay)
        return dict(zip(("loss", "loss_kd", "loss_ce"), mean_of_parts(losses), strict=True))

    def _gradients(self, x: Tensor, labels: Tensor, add: bool) -> list[Tensor]:
        """Those of one part of a batch, on top of the earlier ones with ``add``; the three losses."""
        targets = self.targets(x)
        logits = self.trained.forward(x[None])
        self.branch_logits = logits = split(logits, self.heads.K) if self.heads else logits
        *losses, seed = distillation_loss(
            targets, logits, labels, self.config.temperature, self.config.alpha, self.target
        )
        seed = join(seed) if self.heads else seed
        self.trained.backward(seed / self.parts if self.parts > 1 else seed, add)
        return losses

    def _body(self) -> dict[str, Tensor]:
        """The step as it is captured: it reads ``images``, ``labels``, ``draw`` and ``rate``, and waits for nothing."""
        assert self.images is not None
        parts, diversities = self._perturb(self.images)
        return self._distil(parts, self.labels) | diversities

    def _body_with_loader(self) -> dict[str, Tensor]:
        """The same on the batch that the loader has chosen."""
        assert self.loader is not None
        images, labels = self.loader.read()
        parts, diversities = self._perturb(images.permute(0, 2, 3, 1).to(self.parameters.dtype).contiguous())
        return self._distil(parts, labels) | diversities

    # ---- what the trainer calls

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, pair: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """One step; ``pair`` (a, b) instead of a drawn one."""
        self._load(images, labels)
        self._draw(pair)
        return self._run(self._body)

    @torch.no_grad()
    def train_on(self, loader: DeviceLoader) -> dict[str, Tensor]:
        """A step on the loader's next batch. The captured graph contains the reading, the crops and the flips."""
        if self.loader is not loader:
            if self.images is None:
                self._build(loader.batch_shape)
            self._check(loader.batch_shape)
            self.loader = loader
        loader.advance()
        self._follow()
        self._draw()
        return self._run(self._body_with_loader, loader)

    @torch.no_grad()
    def perturb(self, images: Tensor, pair: tuple[int, int] | None = None) -> Perturbed:
        """The first half of a step, not captured; ``pair`` (a, b) instead of a drawn one."""
        self._load(images, None)
        self._draw(pair)
        assert self.images is not None
        parts, diversities = self._perturb(self.images)
        x = torch.cat(tuple(parts)).permute(0, 3, 1, 2)
        return Perturbed(x, diversities.get("tdiv"), diversities.get("sdiv"))

    @torch.no_grad()
    def distil(self, perturbed: Perturbed, labels: Tensor) -> dict[str, Tensor]:
        """The second half, not captured, on images that are perturbed already."""
        self._load(perturbed.images, labels)
        assert self.images is not None
        scalars = self._distil(self.images.chunk(self.parts), self.labels)
        given = {"tdiv": perturbed.tdiv, "sdiv": perturbed.sdiv}
        return scalars | {name: value for name, value in given.items() if value is not None}

    def _load(self, images: Tensor, labels: Tensor | None) -> None:
        check_images(images)
        if labels is not None:
            check_labels(labels, len(images))
        if self.images is None:
            self._build(tuple(images.shape))
        self._check(tuple(images.shape))
        self.first.see(images, labels, self.classes)
        self.first.over = labels is not None
        assert self.images is not None
        self.images.copy_(images.permute(0, 2, 3, 1))
        if labels is not None:
            self.labels.copy_(labels)
        self._follow()

    def _follow(self) -> None:
        """Parameters may have been frozen, or may require gradients again, since the last step."""
        if self.parameters.follow() and self.graphs:
            self.graphs = Graphs(self.parameters.state, self.device)

    def _check(self, shape: tuple[int, ...]) -> None:
        assert self.images is not None
        B, H, W, C = self.images.shape
        if shape != (B, C, H, W):
            raise InputError(f"images have shape {shape}; this step was built for {(B, C, H, W)}")

    def _draw(self, pair: tuple[int, int] | None = None) -> None:
        """Choose by the host's generator, as the reference engine does; the device sees one number change.

        Where teachers differ in architecture, the choice also decides which launches run: one graph per pair of these.
        """
        choices = self.perturbation.pairs
        if pair is not None and pair not in choices:
            raise InputError(f"pair {pair} is not among those that can be drawn, {choices}")
        number = self.perturbation.choose() if pair is None else choices.index(pair)
        if choices:
            which, place = self.places[number]
            self.ascend = self.ascends[which]
            self.draw.fill_(place)

    def _run(self, body: Callable[[], dict[str, Tensor]], loader: DeviceLoader | None = None) -> dict[str, Tensor]:
        if self.graphs is None:
            return body()
        generators = [self.noise, loader.generator] if loader else [self.noise]
        if (self.ascend, loader) not in self.graphs.made:
            self._capture_all(self.graphs, body, loader, generators)
        return self.graphs((self.ascend, loader), body, generators)

    def _capture_all(
        self,
        graphs: Graphs,
        body: Callable[[], dict[str, Tensor]],
        loader: DeviceLoader | None,
        generators: list[torch.Generator],
    ) -> None:
        """The graphs of all pairs of architectures at the first step, whichever pair this process drew.

        Warming up averages over processes as a step does, so that all of them have to warm up the same bodies.
        """
        drawn, place = self.ascend, self.draw.clone()
        self.draw.zero_()  # a place that every list of choices has
        for ascend in self.ascends:
            self.ascend = ascend
            graphs.prepare((ascend, loader), body, generators)
        self.ascend = drawn
        self.draw.copy_(place)

    def set_learning_rate(self, rate: float) -> None:
        self._rate = rate
        if self.networks:
            self.rate.fill_(rate)

    def _momenta(self) -> list[Tensor]:
        """Momentum buffers in the order of the reference engine's optimiser."""
        names = {id(p): name for name, p in self.student.module.named_parameters()}
        buffers = self.parameters.momenta(0)
        buffers = self.heads.by_head(buffers) if self.heads else buffers
        groups = self.student.parameter_groups(0.0)
        return [buffers[names[id(p)]] for group in groups for p in group["params"]]

    def state_dict(self) -> State:
        """Momentum and generators, as the reference engine's; the student's weights are the student's own."""
        self._need_networks()
        momenta = {f"momentum.{i}": buffer.clone() for i, buffer in enumerate(self._momenta())}
        return momenta | {"pick": self.pick.get_state(), "noise": self.noise.get_state()}

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        self._need_networks()
        for i, buffer in enumerate(self._momenta()):
            saved = state.get(f"momentum.{i}")
            buffer.zero_() if saved is None else buffer.copy_(saved)
        self.pick.set_state(state["pick"])
        self.noise.set_state(state["noise"])

    def _need_networks(self) -> None:
        if not self.networks:
            raise InputError("the step has not seen an image; give image_shape=(channels, H, W) when creating it")

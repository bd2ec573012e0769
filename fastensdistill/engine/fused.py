"""The fused step: the whole of a distillation step as one fixed list of launches, captured once as a CUDA graph.

    evaluation slots of the branches ← master weights             only for TDiv − SDiv
    perturbation: forward, seed, input gradient, ascent           images → perturbed images
    training slots of the branches ← master weights
    distillation: teachers forward, branches forward, loss        → ∂loss/∂logits
    backward, un-fold, (mean over processes), update              master weights ← master weights

Teachers and branches are groups of the same launches. The backward pass is written out; autograd sees nothing. A step
reads the images, the labels, the index of the drawn pair and the learning rate from tensors that never move, and the
noise from a generator the graph knows: one captured graph serves the whole run. Ops allocate their results; inside a
capture these come from the graph's own pool, at the same addresses in every replay, and since each buffer is freed
after its last reader the pool is as large as ``engine.memory`` says beforehand.
Source of the step: Nam et al., ICML 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastensdistill.config import DistillConfig, TrainConfig
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.graph import Captured
from fastensdistill.engine.master import Master
from fastensdistill.engine.passes import Buffers
from fastensdistill.engine.slots import BranchSlots
from fastensdistill.engine.trained import Runner, Trained, dead_after
from fastensdistill.engine.weights import Weights
from fastensdistill.errors import InputError
from fastensdistill.kernels.distillation_loss import distillation_loss
from fastensdistill.kernels.diversity_seed import diversity_seed, ods_seed, teacher_diversity_seed
from fastensdistill.kernels.perturb_step import perturb_step
from fastensdistill.method.perturbation import Perturbation, Perturbed, gaussian, step_length
from fastensdistill.method.student import BatchEnsemble, Hydra, Single, Student
from fastensdistill.method.teachers import Teachers
from fastensdistill.network.launch import Group
from fastensdistill.network.nodes import Network
from fastensdistill.network.plan import PERTURBED, Plan, plan
from fastensdistill.network.trace import trace

State = dict[str, Tensor]
ImageShape = tuple[int, int, int]


def arithmetic(config: TrainConfig, network: nn.Module) -> tuple[torch.dtype, str]:
    """Dtype of activations and packed weights, and how float32 is multiplied, for ``config.precision``."""
    dtype = next(network.parameters()).dtype
    if config.precision == "bf16":
        return torch.bfloat16, "ieee"
    return dtype, "tf32" if config.precision == "tf32" else "ieee"


def plain(student: Student) -> nn.Module:
    """The student without its factors, for its architecture. Raises InputError for a student of another kind."""
    if isinstance(student, Single):
        return student.module
    if isinstance(student, BatchEnsemble):
        return student.average()
    raise InputError(f"a {student.kind} student has a layer per branch of its own, which no plan covers")


def architectures(student: Student, teachers: Teachers, shape: ImageShape, perturbation: str) -> list[Network]:
    """Traced networks of the teachers, in order, and of the student last.

    Raises InputError for what the engine cannot run: an operation that cannot be traced, a hydra, teachers of several
    architectures where the perturbation would draw among them.
    """
    if isinstance(student, Hydra):
        plain(student)
    networks = [trace(teacher, shape) for teacher in teachers.networks]
    drawn = any(name[0] == "T" for name in PERTURBED[perturbation])
    if drawn and any(network != networks[0] for network in networks):
        raise InputError(
            f"teachers of several architectures with perturbation {perturbation!r}, which draws among them"
        )
    return [*networks, trace(plain(student), shape)]


class FusedStep:
    """One step of distillation as a fixed list of launches; the interface of ``ReferenceStep``.

    ``step = FusedStep(student, teachers, config)``, then ``step(images, labels)`` for images (B, channels, H, W) in
    [0, 1], float32, and labels int64 (B,), always of one shape. Set the learning rate with :meth:`set_learning_rate`
    before a step. Returns scalars on the device: loss (without weight decay), loss_kd, loss_ce and, where the
    perturbation ascends them, tdiv and sdiv. On a CUDA device the first call captures the graph (``capture=False``
    launches every op from Python instead).

    From the first step (or from the start, with ``image_shape`` (channels, H, W) given) the student's parameters and
    running statistics live in this object's buffers: do not move or cast the student any more.
    ``implementations`` names what computes each convolution (``engine.dispatch``).
    Raises InputError for networks and students that only the reference engine can train.
    """

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
        self.student, self.config = student, config
        self.teachers = teachers if isinstance(teachers, Teachers) else Teachers(teachers)
        self.device = next(student.parameters()).device
        self.target = "mean" if isinstance(student, Single) else "one-to-one"
        self.pick = torch.Generator().manual_seed(config.seed)
        self.noise = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.perturbation = Perturbation(
            config.perturbation, len(self.teachers), student.branches, size=config.step_size,
            temperature=config.temperature, pick=self.pick, noise=self.noise,
        )  # fmt: skip
        self.drawn = PERTURBED[config.perturbation]
        self.dtype, self.precision = arithmetic(config, student)
        self.run = Runner(self.precision, implementations or Dispatch())
        self.capture = capture and self.device.type == "cuda"
        self.networks: list[Network] = []
        self.images: Tensor | None = None
        if image_shape:
            self._adopt(image_shape)

    # ---- what is built once

    def _adopt(self, shape: ImageShape) -> None:
        """Trace, and take over the student's parameters."""
        self.networks = architectures(self.student, self.teachers, shape, self.config.perturbation)
        ranked = isinstance(self.student, BatchEnsemble)
        self.master = Master([self.student.module], self.networks[-1], ranked)
        self.rate = torch.tensor(self.config.learning_rate, dtype=self.master.dtype, device=self.device)
        self.draw = torch.zeros(1, dtype=torch.int64, device=self.device)

    def _build(self, images: Tensor) -> None:
        """Plans, weight slots and static inputs for this batch shape."""
        B, C, H, W = images.shape
        if not self.networks:
            self._adopt((C, H, W))
        self.images = torch.zeros(B, H, W, C, dtype=self.master.dtype, device=self.device)
        self.labels = torch.zeros(B, dtype=torch.int64, device=self.device)
        *teacher_networks, own = self.networks
        unique = list(dict.fromkeys(self.networks))
        student = unique.index(own)
        members = [unique.index(network) for network in teacher_networks]
        groups = [Group(f"T{m + 1}", index) for m, index in enumerate(members)]
        groups += [Group(f"S{k + 1}", student, "S", "parameters") for k in range(self.student.branches)]
        forward, backward = plan(unique, groups, "forward", B), plan(unique, groups, "backward", B)
        trained = next(part for part in forward.parts if part.training)
        self.teacher_parts = [part for part in forward.parts if not part.training]
        (gradient,) = backward.parts
        self.trained = Trained([self.student.module], own, trained, gradient, self.master, self.dtype, self.run)
        self.perturb_plans = self._plan_perturbation(unique, members, student, B)
        self._build_teachers(unique, members, student)
        self.captured = Captured(self._body, self._state, [self.noise], self.device) if self.capture else None

    def _plan_perturbation(self, unique: list[Network], members: list[int], student: int, B: int) -> list[Plan]:
        groups = [
            Group(name, student if name[0] == "S" else members[0], gradient="input" if name[1] == "a" else None)
            for name in self.drawn
        ]
        return [plan(unique, groups, way, B) for way in ("forward", "backward")] if groups else []

    def _build_teachers(self, unique: list[Network], members: list[int], student: int) -> None:
        """Evaluation weights per architecture: a slot per teacher, then one per branch where those are perturbed."""
        self.evaluation: dict[int, Weights] = {}
        self.branch_slots: BranchSlots | None = None
        drawn_parts = list(self.perturb_plans[0].parts) if self.perturb_plans else []
        for part in [*drawn_parts, *self.teacher_parts]:
            index = unique.index(part.network)
            if index in self.evaluation:
                continue
            own = [m for m, member in enumerate(members) if member == index]
            if index == student and "Sa" in self.drawn:
                slots = len(own) + self.student.branches
                self.branch_slots = BranchSlots(part, self.master, self.dtype, slots, len(own))
                self.evaluation[index] = self.branch_slots.weights
            else:
                self.evaluation[index] = Weights(part, len(own), self.dtype, self.device)
            for slot, m in enumerate(own):
                self.evaluation[index].write(slot, self.teachers.networks[m].state_dict())
        self.teacher_runs = []
        for part in self.teacher_parts:
            index = unique.index(part.network)
            rows = [m for m, member in enumerate(members) if member == index]
            slots_ = torch.arange(len(rows), dtype=torch.int32, device=self.device)
            output = part.network.output
            self.teacher_runs.append((part, self.evaluation[index], slots_, dead_after([part], ["input", output])[0]))
        order = [m for part in self.teacher_parts for m, i in enumerate(members) if i == unique.index(part.network)]
        self.order = torch.tensor(order, device=self.device).argsort() if order != sorted(order) else None
        self.perturb_runs = []
        forward, backward = (plan.parts for plan in self.perturb_plans) if self.perturb_plans else ((), ())
        for first, second in zip(forward, backward, strict=True):
            index = unique.index(first.network)
            offset = self.branch_slots.first if self.branch_slots and index == student else 0
            table = [[self._slot(group.name, choice, offset) for group in first.groups] for choice in self.choices]
            output = first.network.output
            dead = dead_after([first, second], ["input", output, f"{output}.grad", "input.grad"])
            slots_ = torch.tensor(table, dtype=torch.int32, device=self.device)
            self.perturb_runs.append((first, second, self.evaluation[index], slots_, dead))

    @property
    def choices(self) -> list[tuple[int, int]]:
        """What can be drawn: ordered pairs, or a teacher alone."""
        if self.config.perturbation in ("ods", "confods"):
            return [(m, m) for m in range(len(self.teachers))]
        return self.perturbation.pairs

    def _slot(self, name: str, choice: tuple[int, int], first_branch: int) -> int:
        member = choice[0] if name[1] == "a" else choice[1]
        return first_branch + member if name[0] == "S" else member % len(self.teachers)

    # ---- the launches

    def _perturb(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Perturbed images of ``x`` (B, H, W, C), and the diversities."""
        name = self.config.perturbation
        if name == "none":
            return x, {}
        if name == "gaussian":
            noisy = gaussian(x.permute(0, 3, 1, 2), self.config.step_size, self.noise).images
            return noisy.permute(0, 2, 3, 1), {}
        if self.branch_slots:
            self.branch_slots.write()
        logits: dict[str, Tensor] = {}
        kept: list[tuple[Buffers, Tensor]] = []
        for first, _, weights, table, dead in self.perturb_runs:
            slots = table.index_select(0, self.draw)[0]
            buffers: Buffers = {"input": x[None]}
            self.run(first, weights, slots, buffers, dead[0])
            logits |= dict(zip((group.name for group in first.groups), buffers[first.network.output], strict=True))
            kept.append((buffers, slots))
        seeds, scalars, confidence = self._seeds(logits)
        gradients = []
        for (_, second, weights, _, dead), (buffers, slots) in zip(self.perturb_runs, kept, strict=True):
            buffers[f"{second.network.output}.grad"] = torch.stack([seeds[group.name] for group in second.groups])
            self.run(second, weights, slots[: len(second.groups)].contiguous(), buffers, dead[1])
            gradients.append(buffers["input.grad"])
        gradient = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
        length = step_length(x, self.config.step_size)
        return perturb_step(x, gradient, length, confidence=confidence), scalars

    def _seeds(self, logits: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
        """Gradients in the logits of the drawn members, the diversities, and ConfODS's factor."""
        name = self.config.perturbation
        if name in ("ods", "confods"):
            weights = torch.empty_like(logits["Ta"]).uniform_(-1, 1, generator=self.noise)
            seed, confidence = ods_seed(logits["Ta"], weights, self.config.temperature)
            return {"Ta": seed}, {}, confidence if name == "confods" else None
        teachers = torch.stack([logits["Ta"], logits["Tb"]])
        if name == "tdiv":
            tdiv, seed = teacher_diversity_seed(teachers)
            return {"Ta": seed}, {"tdiv": tdiv}, None
        branches = torch.stack([logits["Sa"], logits["Sb"]])
        tdiv, sdiv, seed_t, seed_s = diversity_seed(teachers, branches)
        return {"Ta": seed_t, "Sa": seed_s}, {"tdiv": tdiv, "sdiv": sdiv}, None

    def _distil(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The update on perturbed images ``x`` (B, H, W, C)."""
        outputs = []
        for part, weights, slots, dead in self.teacher_runs:
            buffers: Buffers = {"input": x[None]}
            self.run(part, weights, slots, buffers, dead)
            outputs.append(buffers[part.network.output])
        targets = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        if self.order is not None:
            targets = targets.index_select(0, self.order)
        self.branch_logits = logits = self.trained.forward(x[None])
        loss, loss_kd, loss_ce, seed = distillation_loss(
            targets, logits, labels, self.config.temperature, self.config.alpha, self.target
        )
        self.trained.backward(seed)
        self.trained.update(self.rate, self.config.momentum, self.config.weight_decay)
        return {"loss": loss, "loss_kd": loss_kd, "loss_ce": loss_ce}

    def _body(self) -> dict[str, Tensor]:
        """The step as it is captured: it reads ``images``, ``labels``, ``draw`` and ``rate``, and waits for nothing."""
        assert self.images is not None
        x, diversities = self._perturb(self.images)
        return self._distil(x, self.labels) | diversities

    # ---- what the trainer calls

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self._load(images, labels)
        self._draw()
        return self.captured() if self.captured else self._body()

    @torch.no_grad()
    def perturb(self, images: Tensor, pair: tuple[int, int] | None = None) -> Perturbed:
        """The first half of a step, not captured; ``pair`` (a, b) instead of a drawn one."""
        self._load(images, None)
        self._draw(pair)
        assert self.images is not None
        x, diversities = self._perturb(self.images)
        return Perturbed(x.permute(0, 3, 1, 2), diversities.get("tdiv"), diversities.get("sdiv"))

    @torch.no_grad()
    def distil(self, perturbed: Perturbed, labels: Tensor) -> dict[str, Tensor]:
        """The second half, not captured, on images that are perturbed already."""
        self._load(perturbed.images, labels)
        assert self.images is not None
        scalars = self._distil(self.images, self.labels)
        given = {"tdiv": perturbed.tdiv, "sdiv": perturbed.sdiv}
        return scalars | {name: value for name, value in given.items() if value is not None}

    def _load(self, images: Tensor, labels: Tensor | None) -> None:
        if self.images is None:
            self._build(images)
        assert self.images is not None
        B, H, W, C = self.images.shape
        if tuple(images.shape) != (B, C, H, W):
            raise InputError(f"images have shape {tuple(images.shape)}; this step was built for {(B, C, H, W)}")
        self.images.copy_(images.permute(0, 2, 3, 1))
        if labels is not None:
            self.labels.copy_(labels)

    def _draw(self, pair: tuple[int, int] | None = None) -> None:
        """Choose by the host's generator, as the reference engine does; the device sees one number change."""
        if pair is not None:
            if pair not in self.choices:
                raise InputError(f"pair {pair} is not among those that can be drawn, {self.choices}")
            self.draw.fill_(self.choices.index(pair))
        elif self.drawn:
            self.draw.fill_(int(torch.randint(len(self.choices), (), generator=self.pick)))

    def set_learning_rate(self, rate: float) -> None:
        if self.networks:
            self.rate.fill_(rate)
        else:
            self.config.learning_rate = rate

    def _state(self) -> list[Tensor]:
        """Everything a step changes, for the warm-up before the capture to be undone."""
        master = self.master
        return [
            master.parameters, master.momentum, master.deviations, master.deviation_momentum, master.running_mean,
            master.running_var, master.batches,
        ]  # fmt: skip

    def _momenta(self) -> list[Tensor]:
        """Momentum buffers in the order of the reference engine's optimiser."""
        names = {id(p): name for name, p in self.student.module.named_parameters()}
        buffers = self.master.momenta(0)
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

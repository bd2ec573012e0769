"""One step of a listed network in float64 on both engines, as the teachers of a small student and as a student.

Weights are moved off their initial values (zero scales hide what stands before them), BatchNorm's statistics are those
of random images, branches' factors differ, and both engines draw from one seed. Errors are the largest differences,
relative to the largest value of their tensor: of the perturbation, the losses, the update and the running statistics.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.networks import CLASSES, NETWORKS, build
from bench.setting import settle
from fastensdistill.config import DistillConfig
from fastensdistill.engine.captured import CapturedReferenceStep
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.host_reads import HostReads
from fastensdistill.engine.module_check import planned_or_module
from fastensdistill.engine.plain import plain_student
from fastensdistill.engine.probe import compared, moved
from fastensdistill.engine.reference import ReferenceStep
from fastensdistill.errors import InputError
from fastensdistill.method.student import LatentBE
from fastensdistill.method.teachers import Teachers
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.network.nodes import GeneralConv, Network
from fastensdistill.network.unplanned import Unplanned

M = K = 2
IMAGES = 2
RATE = 0.05
ROLES = ("teacher", "student")


def described(name: str, reads: bool = True) -> dict[str, Any]:
    """Tiers and, of what is planned, nodes by kind and our kernels' share of a forward pass's FLOPs.

    Without ``reads`` what cannot be planned counts as captured: only a step shows what it reads on the host.
    """
    module, network = build(name), None
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in module.parameters())}
    for role in ROLES:
        found, row[role] = tier(name, role, reads)
        network = found or network
    if network is not None:
        row["nodes"] = dict(Counter(type(node).__name__ for node in network.nodes).most_common())
        ours = sum(x.macs for x in network.layers if not isinstance(x, GeneralConv) or x.depthwise)
        row["share"] = round(2 * ours / total_flops(module, NETWORKS[name].shape), 4)
    return row


def tier(name: str, role: str, reads: bool = True) -> tuple[Network | None, dict[str, Any]]:
    """The network as it is planned in that role, or None; its tier, and why it is not planned."""
    module, shape = build(name), NETWORKS[name].shape
    try:
        if role == "student":
            return compared(plain_student(LatentBE(module, K)).architecture(), shape, trains=True), {"tier": "planned"}
        network = planned_or_module(module, shape, "teacher", gradient=True, dtype=torch.float32)
        if not isinstance(network, Unplanned):
            return network, {"tier": "planned"}
        return None, {"tier": "mixed", "why": network.reason}
    except InputError as error:
        found = host_reads(name, role) if reads else []
        return None, {"tier": "eager" if found else "captured", "why": "; ".join([str(error), *found])}


def host_reads(name: str, role: str) -> list[str]:
    """What keeps a step of the reference engine from being captured, a line each."""
    step = captured_step(name, role)
    reads = HostReads({"the student": step.student, "the teachers": step.teachers}, torch.device("cpu"))
    for step.bodies.around in (nullcontext, lambda: reads):  # others look at a network when it is first called
        step(*batch(name))
    return reads.found


def total_flops(module: nn.Module, shape: tuple[int, int, int]) -> int:
    """Of convolutions and matrix products, of one image in evaluation mode, as PyTorch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops()


def small(seed: int) -> nn.Module:
    """A network that is planned, for images of any size."""
    torch.manual_seed(seed)
    return PreResNet(CLASSES, blocks=(1, 1), in_planes=4)


def made(name: str, seed: int, small_one: bool) -> nn.Module:
    """A network with moved weights and the statistics of images, always the same."""
    torch.manual_seed(seed)
    network = moved((small(seed) if small_one else build(name)).double())
    generator = torch.Generator().manual_seed(seed)
    settle(network, torch.rand(8, *NETWORKS[name].shape, generator=generator, dtype=torch.float64))
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
                noise = torch.rand(2, len(norm.running_mean), generator=generator, dtype=torch.float64)
                spread = NETWORKS[name].spread
                norm.running_mean.add_(0.3 * spread * norm.running_var.sqrt() * (noise[0] - 0.5))
                norm.running_var.mul_(1 + 0.4 * spread * (noise[1] - 0.5))
    return network


def networks_of(name: str, role: str) -> tuple[LatentBE, Teachers, DistillConfig]:
    """What a step trains, the same every time."""
    teachers = Teachers([made(name, 10 + m, role == "student") for m in range(M)])
    student = LatentBE(made(name, 3, role == "teacher"), K)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in student.layers():
            for factor in (layer.delta_r, layer.delta_s):
                factor.add_(0.2 * (torch.rand(factor.shape, generator=generator, dtype=factor.dtype) - 0.5))
    return student, teachers, DistillConfig(learning_rate=RATE, weight_decay=0.0, precision="fp32", seed=7)


def captured_step(name: str, role: str) -> CapturedReferenceStep:
    """As it would be captured on a GPU."""
    return CapturedReferenceStep(*networks_of(name, role), num_classes=CLASSES, capture=False)


def batch(name: str) -> tuple[Tensor, Tensor]:
    """Images and labels, the same every time."""
    generator = torch.Generator().manual_seed(100)
    images = torch.rand(IMAGES, *NETWORKS[name].shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    return images.contiguous(memory_format=torch.channels_last), labels


def outcome(name: str, role: str, fused: bool) -> dict[str, dict[str, Tensor]]:
    """What a step has come to: by kind, the tensors by name."""
    own = networks_of(name, role)
    step: FusedStep | ReferenceStep
    if fused:
        step = FusedStep(*own, image_shape=NETWORKS[name].shape, capture=False)
    else:
        step = ReferenceStep(*own, num_classes=CLASSES)
    before = {key: value.clone() for key, value in step.student.state_dict().items()}
    images, labels = batch(name)
    step.set_learning_rate(RATE)
    perturbed = step.perturb(images)
    torch.manual_seed(5)  # a first call may have drawn something, to look at the networks
    scalars = step.distil(perturbed, labels)
    found: dict[str, dict[str, Tensor]] = {"update": {}, "statistics": {}}
    trained = dict(step.student.named_parameters())
    for key, value in step.student.state_dict().items():
        if key in trained:
            found["update"][key] = value - before[key]
        elif value.is_floating_point() and not torch.equal(value, before[key]):
            found["statistics"][key] = value.clone()
    found["losses"] = {key: value.detach().clone() for key, value in scalars.items()}
    return found | {"images": {"": perturbed.images - images}}


def step_errors(name: str, role: str) -> dict[str, Any]:
    """The largest error of each kind, and of the tensor in which it is."""
    right, found = (outcome(name, role, fused) for fused in (False, True))
    errors, where = {}, {}
    for kind, tensors in right.items():
        if tensors.keys() != found[kind].keys():
            missing = sorted(tensors.keys() ^ found[kind].keys())
            raise InputError(f"{kind}: {missing[0]!r} is in one engine's step alone")
        least = 1e-3 * max((float(value.abs().max()) for value in tensors.values()), default=0.0)
        own = {key: apart(found[kind][key], value, least) for key, value in tensors.items()}
        if own:
            where[kind] = max(own, key=lambda key: own[key])
            errors[kind] = own[where[kind]]
    size = {kind: max(float(v.abs().max()) for v in tensors.values()) for kind, tensors in right.items() if tensors}
    return {"errors": errors, "where": where, "largest": size}


def apart(found: Tensor, right: Tensor, least: float) -> float:
    """Largest difference relative to the largest value, which counts as ``least`` at least; infinite for a NaN."""
    difference = float((found - right).abs().max())
    return difference / max(float(right.abs().max()), least, 1e-30) if difference == difference else float("inf")

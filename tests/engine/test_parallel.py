"""Two processes on CPU against the same arithmetic done by hand in one."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from fastensdistill.engine.captured import CapturedReferenceStep
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.graph import warm_up
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep
from tests.compare import check_close
from tests.engine.cases import CLASSES, Everything, batch, setting, teach_setting
from tests.engine.unplanned import some_unplanned
from tests.network import models
from tests.untyped import untyped

STEPS, RATE = 2, 0.05
SHARED = {
    "preresnet": {},
    "unbiased running variance": {"student": models.odd, "teacher": models.odd},
    "BatchNorm as convolutions load": {},
}
TABLES = {"BatchNorm as convolutions load": Everything()}


class WarmedUp:
    """In the place of ``engine.graph.Graphs``: bodies are warmed up as before a capture, then launched."""

    captured, error = True, ""

    def __init__(self, state):
        self.state, self.made = state, set()

    def prepare(self, key, body, generators):
        if key not in self.made:
            self.made.add(key)
            warm_up(body, self.state, [*generators, torch.default_generator])
        return body


def captured(index, capture):
    """A student after steps of the reference engine whose bodies are, or are not, warmed up; pairs differ."""
    student, teachers, config = setting(K=3, M=3)
    if index == 1:
        with torch.no_grad():
            student.module.stem.layer.weight.add_(1)
    if not capture:
        step = ReferenceStep(student, teachers, config, num_classes=CLASSES)
    else:
        step = CapturedReferenceStep(student, teachers, config, num_classes=CLASSES)
        step.bodies.graphs = untyped(WarmedUp(step.bodies.state))
    step.set_learning_rate(RATE)
    for i in range(STEPS):
        step(*batch(10 * index + i))
    return student.state_dict()


def process(index, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    student, teachers, config = setting(K=3, M=3, teacher=some_unplanned)
    if index == 1:  # somewhere else: process 0's start counts
        with torch.no_grad():
            student.module.stem.layer.weight.add_(1)
    step = FusedStep(student, teachers, config, image_shape=(3, 6, 6))
    step.set_learning_rate(RATE)
    for i in range(STEPS):
        step(*batch(10 * index + i))
    networks, config = teach_setting(2)
    teach = FusedTeachStep(networks, config, image_shape=(3, 6, 6))
    teach([batch(10 * index + m) for m in range(2)])
    halves = []
    for name in SHARED:
        shared, teachers, config = setting(perturbation="none", sync_batch_norm=True, **SHARED[name])
        step = FusedStep(shared, teachers, config, implementations=TABLES.get(name))
        for i in range(STEPS):
            step(*(half.chunk(2)[index] for half in batch(i, B=6)))
        halves.append(shared.state_dict())
    found = [dict(zip(SHARED, halves, strict=True)), student.state_dict(), *(n.state_dict() for n in networks)]
    found += [captured(index, capture) for capture in (False, True)]
    torch.save(found, f"{folder}/{index}.pt")
    dist.destroy_process_group()


def averaged(parameters):
    """The mean gradient of the processes, for every one of them."""
    for group in zip(*parameters, strict=True):
        mean = torch.stack([p.grad for p in group]).mean(0)
        for p in group:
            p.grad = mean.clone()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{index}.pt") for index in range(2)]


def test_students_take_the_mean_gradient_with_their_own_pair_and_statistics(results):
    student, teachers, config = setting(K=3, M=3, teacher=some_unplanned)
    students = [copy.deepcopy(student) for _ in range(2)]
    steps = [
        ReferenceStep(s, teachers, dataclasses.replace(config, seed=config.seed + 2 * r), num_classes=CLASSES)
        for r, s in enumerate(students)
    ]
    for i in range(STEPS):
        for r, step in enumerate(steps):
            step.set_learning_rate(RATE)
            x = step.perturb(batch(10 * r + i)[0]).images
            step.student.train()
            q, p = step.student(x) / config.temperature, teachers(x).detach() / config.temperature
            step.optimizer.zero_grad()
            (-(config.temperature**2) * (p.softmax(-1) * F.log_softmax(q, -1)).sum(-1).mean()).backward()
        averaged([list(s.parameters()) for s in students])
        for step in steps:
            step.optimizer.step()
    for r, expected in enumerate(students):
        for name, value in expected.state_dict().items():
            check_close(f"{r}: {name}", results[r][1][name].double(), value.double(), 1e-9)
    one, two = (result[1] for result in results)
    assert torch.equal(one["module.stem.layer.weight"], two["module.stem.layer.weight"])
    assert not torch.equal(one["module.bn.running_mean"], two["module.bn.running_mean"])


def test_captured_they_warm_up_the_same_exchanges_and_take_the_same_steps(results):
    """Each draws its own pairs, so that some capture a perturbation where others replay."""
    for result in results:
        launched, replayed = result[-2:]
        for name, value in launched.items():
            assert torch.equal(value, replayed[name]), name
    assert torch.equal(*(result[-1]["module.stem.layer.weight"] for result in results))
    assert not torch.equal(*(result[-1]["module.bn.running_mean"] for result in results))


def test_teachers_take_the_mean_gradient(results):
    both = [teach_setting(2)[0] for _ in range(2)]
    config = teach_setting(2)[1]
    optimizers = [TeachStep(networks, config).optimizers for networks in both]
    for r, networks in enumerate(both):
        for m, network in enumerate(networks):
            images, labels = batch(10 * r + m)
            F.cross_entropy(network.train()(images), labels).backward()
    for m in range(2):
        averaged([list(networks[m].parameters()) for networks in both])
        for r in range(2):
            optimizers[r][m].step()
            for name, value in both[r][m].state_dict().items():
                check_close(f"{r}, {m}: {name}", results[r][2 + m][name].double(), value.double(), 1e-9)


@pytest.mark.parametrize("name", SHARED)
def test_with_synchronised_statistics_two_halves_are_one_batch(results, name):
    """Parameters and running statistics, against one process that has all the images."""
    student, teachers, config = setting(perturbation="none", **SHARED[name])
    step = FusedStep(student, teachers, config)
    for i in range(STEPS):
        step(*batch(i, B=6))
    for result in results:
        for key, value in student.state_dict().items():
            check_close(key, result[0][name][key].double(), value.double(), 1e-9)

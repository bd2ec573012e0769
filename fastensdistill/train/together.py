"""Students of several seeds in one step (``engine/seeds.py``): a trainer for each, in lockstep.

Each has its own stream of batches, record, folder, validation and checkpoint, which are those of the run alone: any
seed can be resumed by itself, and what was begun alone goes on here. A seed that diverges drops out; its student goes
on in the launches, where nothing reaches the others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from fastensdistill.config import DistillConfig
from fastensdistill.data.loader import EvaluationSet
from fastensdistill.engine.seeds import SeedsStep
from fastensdistill.engine.seeds_gain import joint_seeds_gain
from fastensdistill.engine.select import in_a_line
from fastensdistill.errors import InputError
from fastensdistill.method.arguments import checked_config
from fastensdistill.method.copying import copy_network
from fastensdistill.network.gpu import gpu_named
from fastensdistill.train import checkpoint
from fastensdistill.train.distill import DistillTrainer
from fastensdistill.train.folder import RunFolder
from fastensdistill.train.record import DivergedError, Recorder
from fastensdistill.train.setup import enough_values
from fastensdistill.train.stop import Interrupted, Stopper

ROOM = 0.9  # of the free memory that a step may be predicted to take


def chosen(trainer: DistillTrainer, seeds: int) -> tuple[bool, str]:
    """Whether so many seeds of ``trainer``'s run are to be trained at once, and a line that says why."""
    if trainer.engine.name != "fused" or trainer.device.type != "cuda":
        return False, f"the engine is {trainer.engine.name}, on {trainer.device.type}"
    device = torch.cuda.get_device_name(trainer.device)
    gpu = gpu_named(device)
    if gpu is None:
        return False, f"what it would give is not predicted for {device}"
    try:
        students = [trainer.student, *(copy_network(trainer.student) for _ in range(seeds - 1))]
        gain = joint_seeds_gain(students, trainer.teachers, settings(trainer), image_shape(trainer), gpu)
    except Exception as error:  # of a network that can be trained, but not on the meta device
        return False, in_a_line(error)
    if not gain.worth_it:
        return False, str(gain)
    needed = gain.peak + trainer.data.train.images.nbytes + seeds * trainer.validation.nbytes
    free = free_memory(trainer.device)
    if needed > ROOM * free:
        return False, f"they need about {needed / 2**30:.2f} GiB at once, of {free / 2**30:.2f} that are free"
    return True, str(gain)


def free_memory(device: torch.device) -> int:
    """Bytes that a tensor could still have on a CUDA ``device``."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def settings(trainer: DistillTrainer) -> DistillConfig:
    """What ``trainer`` trains with."""
    return checked_config(trainer.config, DistillConfig)


def image_shape(trainer: DistillTrainer) -> tuple[int, int, int]:
    """(channels, H, W) of its images."""
    return (trainer.data.channels, *trainer.data.image_size)


def one_step(trainers: Sequence[DistillTrainer]) -> SeedsStep:
    """The step of all ``trainers``, whose runs differ in their seeds alone; what they trained with before is left.

    Raises InputError, with the trainers as they were, for what is trained one after another.
    """
    first = trainers[0]
    learned_from = {checkpoint.digest_networks(trainer.frozen()) for trainer in trainers}
    if len(learned_from) > 1:
        raise InputError("each seed has teachers of its own")
    if any(trainer.engine.name != "fused" for trainer in trainers):
        raise InputError(f"the engine is {first.engine.name}")
    students, seeds = [trainer.student for trainer in trainers], [trainer.config.seed for trainer in trainers]
    step = SeedsStep(students, first.teachers, settings(first), seeds, image_shape=image_shape(first))
    for number, trainer in enumerate(trainers):
        trainer.join(step, number, first)
    return step


def train_together(trainers: Sequence[DistillTrainer], step: SeedsStep) -> dict[int, DivergedError]:
    """Train to the end, as ``Trainer.fit`` does each of the ``trainers``, by the ``step`` that they have joined.

    Returns the errors of those that diverged, by their place; the others have come to their end. Raises Interrupted
    after a signal, with a checkpoint of each, and InputError for runs that have not come equally far.
    """
    folders = [RunFolder(trainer.out) for trainer in trainers]
    failed: dict[int, DivergedError] = {}
    try:
        images = EvaluationSet(trainers[0].data.train, trainers[0].device)
        for trainer, folder in zip(trainers, folders, strict=True):
            trainer.speaker = f"seed {trainer.config.seed}: "
            trainer.begin(folder, images)
            trainer.random = checkpoint.random_state(trainer.device)
        if len({trainer.step_index for trainer in trainers}) > 1:
            raise InputError("the runs of the seeds have not come equally far")
        _train(trainers, step, failed)
        for _, trainer in _running(trainers, failed):
            with _own_random(trainer):
                trainer.finish()
    finally:
        for trainer, folder in zip(trainers, folders, strict=True):
            folder.release(unused=trainer.step_index == 0)
    return failed


def _train(trainers: Sequence[DistillTrainer], step: SeedsStep, failed: dict[int, DivergedError]) -> None:
    """The loop of ``Trainer.train``; those that diverge are put into ``failed``."""
    first = trainers[0]
    shown = not sys.stderr.isatty()  # a terminal has one line that moves, which is the first's
    with Stopper(first.step_index) as stopper, ExitStack() as stack:
        recorders: list[Recorder] = []
        for number, trainer in enumerate(trainers):
            title = f"{trainer.title}, seed {trainer.config.seed}"
            recorders.append(stack.enter_context(trainer.recording(title, quiet=number > 0 and not shown)))
        for at in range(first.step_index, first.rate.total_steps):
            if len(failed) == len(trainers):
                return
            first.step.set_learning_rate(first.rate(at))
            with enough_values(first.config):
                scalars = step.train_on([trainer.loaders[0] for trainer in trainers])
            running = [*_running(trainers, failed)]
            for number, trainer in running:
                trainer.note({name: values[number] for name, values in scalars.items()}, recorders[number])
            stop = stopper.agreed(at + 1, ask=True)
            for number, trainer in running:
                if stop or trainer.record_due:
                    with _dropping(trainer, number, failed), _own_random(trainer):
                        trainer.after_step(recorders[number], stop)
            if stop:
                numbers = " ".join(str(trainer.config.seed) for trainer in trainers)
                raise Interrupted(stop, f"{running[0][1].where} of seeds {numbers}")
        for number, trainer in _running(trainers, failed):
            with _dropping(trainer, number, failed), _own_random(trainer):
                trainer.after_last_step(recorders[number])


def _running(
    trainers: Sequence[DistillTrainer], failed: dict[int, DivergedError]
) -> Iterator[tuple[int, DistillTrainer]]:
    return ((number, trainer) for number, trainer in enumerate(trainers) if number not in failed)


@contextmanager
def _dropping(trainer: DistillTrainer, number: int, failed: dict[int, DivergedError]) -> Iterator[None]:
    """A ``trainer`` that diverges inside is no longer among those that run."""
    try:
        yield
    except DivergedError as error:
        failed[number] = error
        trainer.say(f"warning: {error}")


@contextmanager
def _own_random(trainer: DistillTrainer) -> Iterator[None]:
    """PyTorch's generators as the run alone would have them; no launch of the step draws from them."""
    checkpoint.set_random_state(trainer.random, trainer.device)
    try:
        yield
    finally:
        trainer.random = checkpoint.random_state(trainer.device)

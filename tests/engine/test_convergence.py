"""A tiny ensemble distilled by both engines ends at the same loss, within the spread of two seeds."""

import statistics

import pytest
import torch

from fastensdistill.data.augment import Augment
from tests.runs import dataset, make
from tests.untyped import untyped


def final_loss(**settings) -> float:
    """Mean loss of the last ten of 60 steps."""
    trainer = make(data=dataset(80), epochs=6, **settings)
    trainer.augment = Augment(pad=1, flip=False)
    losses = []
    inner = trainer.train_step

    def train_step():
        scalars = inner()
        losses.append(float(scalars["loss"]))
        return scalars

    untyped(trainer).train_step = train_step
    trainer.fit()
    assert len(losses) == 60
    assert losses[-1] < losses[0]
    return statistics.fmean(losses[-10:])


@pytest.fixture(scope="module")
def reference():
    return [final_loss(engine="reference", seed=seed) for seed in (0, 1)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_engines_end_at_the_same_loss(reference, precision):
    noise = abs(reference[0] - reference[1])
    for seed, expected in enumerate(reference):
        assert abs(final_loss(engine="fused", precision=precision, seed=seed) - expected) < noise
    assert torch.isfinite(torch.tensor(noise))
    assert noise > 0

"""A run whose loss, weights or statistics are no longer finite says where and at which rate, and saves none of it."""

import re

import pytest
import torch
from safetensors.torch import load_file

from fastensdistill.config import TeachConfig
from fastensdistill.train.finite import NotFinite
from fastensdistill.train.record import DivergedError
from fastensdistill.train.teach import TeachTrainer
from tests.networks import tiny
from tests.runs import dataset, make
from tests.untyped import untyped

RATE = r"at learning rate [\d.e+-]+ \(learning_rate=0.05, precision fp32\); stopped\. Lower learning_rate$"


def check_files(folder):
    """Every number of every file of the run is finite."""
    files = list(folder.glob("*.safetensors"))
    assert (folder / "checkpoint.safetensors") in files
    for path in files:
        for name, value in load_file(path).items():
            assert not value.is_floating_point() or bool(torch.isfinite(value).all()), (path.name, name)


BROKEN = {  # what becomes infinite in step 12, and what is said of it
    "weights": ("layer.weight", rf"^the weights of student are not finite \(\S+layer\.weight\) after step 1\d, {RATE}"),
    "variance": ("bn.running_var", rf"^the statistics of student are .* \(\S+bn\.running_var\) after step 14, {RATE}"),
    "mean": ("bn.running_mean", rf"^the statistics of student are .* \(\S+bn\.running_mean\) after step 14, {RATE}"),
    "loss": ("loss", rf"^the loss is not finite since step 12, {RATE}"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_diverges_is_named_with_its_rate_and_not_saved(tmp_path, what):
    trainer = make(out=tmp_path / "run", perturbation="none")
    inner, (key, words) = trainer.train_step, BROKEN[what]

    def poisoned():
        scalars = inner()
        if trainer.step_index == 12 and key == "loss":
            return scalars | {"loss": scalars["loss"] * float("inf")}
        if trainer.step_index == (14 if key == "layer.weight" else 12):
            name = [k for k in trainer.student.state_dict() if k.endswith(key)][-1]
            trainer.student.state_dict()[name].view(-1)[0] = float("inf")
        return scalars

    untyped(trainer).train_step = poisoned
    with pytest.raises(DivergedError) as error:
        trainer.fit()
    assert re.search(words, str(error.value)), error.value
    assert "\n" not in str(error.value)
    check_files(tmp_path / "run")
    assert make(out=tmp_path / "run", perturbation="none", resume=True).fit().step_index == 20


@pytest.mark.parametrize("rate", [1e5, 1e30])
def test_a_rate_that_is_too_high_is_named(tmp_path, rate):
    config = TeachConfig(members=2, epochs=8, batch_size=8, learning_rate=rate, device="cpu")
    networks = [torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
                                    torch.nn.Linear(144, 4)) for _ in range(2)]  # fmt: skip
    trainer = TeachTrainer(networks, dataset(), config, out=tmp_path / "run", quiet=True)
    with pytest.raises(DivergedError, match=rf"learning_rate={rate:g}, precision fp32".replace("+", r"\+")):
        trainer.fit()
    assert not [path for path in (tmp_path / "run").glob("teacher-*") if not all_finite(path)]


def all_finite(path):
    return all(bool(torch.isfinite(value).all()) for value in load_file(path).values())


def test_another_precision_is_named_as_a_way_out():
    trainer = make(epochs=1, precision="bf16")
    inner = trainer.train_step
    untyped(trainer).train_step = lambda: inner() | {"loss": torch.tensor(float("nan"))}
    words = r"step 0, .*precision bf16\).* Lower learning_rate, or use precision fp32$"
    with pytest.raises(DivergedError, match=words):
        trainer.fit()


def test_a_buffer_that_was_never_finite_is_none_of_the_trainings_doing():
    """A mask of -inf, as attention has it."""

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny(4)
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

        def forward(self, x):
            return self.inner(x)

    config = TeachConfig(members=1, epochs=1, batch_size=8, device="cpu")
    assert TeachTrainer([Masked()], dataset(), config, quiet=True).fit().step_index == 5
    network = Masked()
    check = NotFinite({"teacher-0": network})
    assert check() == ""
    untyped(network).inner.bn.running_var[0] = torch.inf
    assert check() == "the statistics of teacher-0 are not finite (inner.bn.running_var)"

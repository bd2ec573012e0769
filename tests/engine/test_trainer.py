"""The trainer with the fused engine: what it reads, resumption bit for bit, checkpoints of the other engine."""

import pytest
import torch
from safetensors.torch import load_file

from fastensdistill.config import TeachConfig
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep
from fastensdistill.engine.select import PLANNED, EngineChoice, choose_engine
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from fastensdistill.train.setup import seeded
from fastensdistill.train.stop import Interrupted
from fastensdistill.train.teach import TeachTrainer
from tests.compare import check_close
from tests.engine.cases import network, setting
from tests.networks import tiny
from tests.runs import StopAt, dataset, make
from tests.untyped import untyped


def stopped(out, step, **settings):
    trainer = make(out=out, **settings)
    StopAt(trainer, step)
    with pytest.raises(Interrupted):
        trainer.fit()


@pytest.mark.parametrize("settings", [{}, {"kind": "single", "perturbation": "ods"}], ids=["latent-be", "single"])
def test_interrupted_and_resumed_is_bit_equal(tmp_path, settings):
    settings = {"engine": "fused", "epochs": 3, **settings}
    whole = make(out=tmp_path / "whole", **settings).fit()
    assert isinstance(whole.step, FusedStep)
    stopped(tmp_path / "stopped", 7, **settings)
    resumed = make(out=tmp_path / "stopped", resume=True, **settings).fit()
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name
    one, two = (load_file(tmp_path / f / "checkpoint.safetensors") for f in ("whole", "stopped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("engines", [("fused", "reference"), ("reference", "fused")], ids="-then-".join)
def test_either_engine_continues_the_others_checkpoint(tmp_path, engines):
    # Mirrored: on the plain images rounding grows over these steps to 2e-2 of a momentum in float32, 1e-14 in float64
    make(out=tmp_path / "whole", engine="reference", epochs=3, flip=True).fit()
    stopped(tmp_path / "run", 7, engine=engines[0], epochs=3, flip=True)
    resumed = make(out=tmp_path / "run", resume=True, engine=engines[1], epochs=3, flip=True).fit()
    one, two = (load_file(tmp_path / f / "checkpoint.safetensors") for f in ("whole", "run"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name.startswith(("networks/", "step/momentum")) or name.endswith(("pick", "noise", "generator")):
            check_close(name, two[name], value, 1e-3)
    assert resumed.step_index == 15


def test_teachers_resume_bit_for_bit_and_follow_the_reference(tmp_path):
    def build(out, **changes):
        config = TeachConfig(**{"members": 2, "epochs": 3, "batch_size": 8, "engine": "fused", **changes})
        networks = [seeded(i, lambda: tiny(4)) for i in range(2)]
        return TeachTrainer(networks, dataset(), config, out=tmp_path / out, quiet=True, resume=out == "stopped")

    whole = build("whole").fit()
    assert isinstance(whole.step, FusedTeachStep)
    trainer = TeachTrainer(
        [seeded(i, lambda: tiny(4)) for i in range(2)], dataset(),
        TeachConfig(members=2, epochs=3, batch_size=8, engine="fused"), out=tmp_path / "stopped", quiet=True,
    )  # fmt: skip
    StopAt(trainer, 8)
    with pytest.raises(Interrupted):
        trainer.fit()
    build("stopped").fit()
    build("reference", engine="reference").fit()
    one, two, three = (load_file(tmp_path / f / "checkpoint.safetensors") for f in ("whole", "stopped", "reference"))
    assert one.keys() == two.keys() == three.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    for name, value in three.items():
        if name.startswith(("networks/", "step/")):
            check_close(name, one[name], value, 1e-3)


def test_everyone_who_reads_the_student_sees_the_current_weights():
    """The average, the state dict and the parameters themselves move with every step; nothing is written back."""
    trainer = make(engine="fused", perturbation="none", epochs=1)
    before = {k: v.clone() for k, v in trainer.student.state_dict().items()}
    average = untyped(trainer.student).average().state_dict()["stem.weight"].clone()
    trainer.fit()
    after = trainer.student.state_dict()
    assert not torch.equal(before["module.stem.layer.weight"], after["module.stem.layer.weight"])
    assert not torch.equal(average, untyped(trainer.student).average().state_dict()["stem.weight"])
    assert int(after["module.bn.num_batches_tracked"]) == 5
    flat = untyped(trainer.step).parameters.values
    assert (
        untyped(trainer.student).module.stem.layer.weight.untyped_storage().data_ptr()
        == flat.untyped_storage().data_ptr()
    )


def test_weights_written_from_outside_are_used(tmp_path):
    """Loading a state dict between steps takes effect in the next one: nothing packed is kept over a step."""
    one, two = make(engine="fused", perturbation="none"), make(engine="fused", perturbation="none")
    images, labels = torch.rand(8, 3, 8, 8), torch.randint(4, (8,))
    one.distil(images, labels)
    state = {k: v.clone() for k, v in two.student.state_dict().items()}
    one.student.load_state_dict(state)
    check_close("loss", one.distil(images, labels)["loss"], two.distil(images, labels)["loss"], 0.0)


def test_the_choice_is_explained():
    student, teachers, config = setting()
    shape, cpu, cuda = (3, 6, 6), torch.device("cpu"), torch.device("cuda")

    def choose(student, teachers, device, engine="auto"):
        config.engine = engine
        return choose_engine(config, student, teachers, device, shape)

    assert choose(student, teachers, cpu) == EngineChoice("reference", "no CUDA device, training on cpu")
    assert choose(student, teachers, cuda) == EngineChoice("fused", PLANNED)
    assert choose(student, teachers, cpu, "fused") == EngineChoice("fused", "asked for")
    assert choose(student, teachers, cuda, "reference") == EngineChoice("reference", "asked for")
    hydra, _, _ = setting("hydra")
    assert choose(hydra, teachers, cuda) == EngineChoice("fused", PLANNED)

    class Mirrored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(0)

        def forward(self, x):
            return self.inner(x) + self.inner(x.flip(3))

    foreign, _, _ = setting(student=lambda _seed: Mirrored().double())
    choice = choose(foreign, teachers, cuda)
    assert choice.name == "captured"
    assert "used twice" in choice.reason
    assert "\n" not in choice.reason
    with pytest.raises(InputError, match=r"engine='fused' cannot train this: .*used twice"):
        choose(foreign, teachers, cuda, "fused")
    trainer = make()
    assert isinstance(trainer.step, ReferenceStep)
    assert str(trainer.engine) == "reference engine: no CUDA device, training on cpu"


def test_a_student_that_draws_what_no_plan_draws_goes_to_the_reference():
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop = network(0), torch.nn.AlphaDropout(0.5)

        def forward(self, x):
            return self.drop(self.inner(x))

    student, teachers, config = setting(student=lambda _seed: Dropped().double())
    choice = choose_engine(config, student, teachers, torch.device("cuda"), (3, 6, 6))
    assert choice.name == "captured"
    assert "operation 'alpha_dropout': draws random numbers" in choice.reason

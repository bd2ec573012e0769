"""Branches that part are measured and said, in time and at the end; those that stay together are not."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from fastensdistill import cli
from fastensdistill.config import DistillConfig
from fastensdistill.data.loader import EvaluationSet
from fastensdistill.evaluate import landscape, metrics
from fastensdistill.evaluate.landscape import Averaging
from fastensdistill.evaluate.predict import predict
from fastensdistill.evaluate.validate import Evaluator
from fastensdistill.method.student import LatentBE
from fastensdistill.train import collapse
from fastensdistill.train.collapse import Guard
from fastensdistill.train.keeping import Keeper, Score
from fastensdistill.train.stop import Interrupted
from fastensdistill.weights import read_card, save_network
from tests.networks import scatter, tiny
from tests.runs import At, StopAt, dataset, make
from tests.students import Quadrants, merged, pull_apart
from tests.untyped import present

CONFIG = DistillConfig(epochs=60, learning_rate=0.1)
FINE = Averaging(0.9, 0.3, [0.89, 0.9], [0.31, 0.3], 0.91, 0.28, [0.3, 0.31], -0.01, 0.002, -0.005, 0.004)
APART = replace(FINE, accuracy=0.461, nll=2.4, branch_accuracy=[0.70, 0.726], barrier=1.9, gap=0.252, gap_error=0.02)


def measured(student: LatentBE, engine: str = "reference", images: int = 24) -> Averaging:
    data, evaluator = dataset().validation, Evaluator(engine, (3, 8, 8))
    split = EvaluationSet(data, "cpu", dtype=next(student.parameters()).dtype)
    average, branches = evaluator.student(student, split)
    index = landscape.spread(len(split), images)
    sample = EvaluationSet(
        replace(data, images=data.images[index], labels=data.labels[index]), "cpu", dtype=split.dtype
    )
    way = evaluator.mixed(student, landscape.midpoints(student.branches), sample)
    return landscape.averaging(average[0], present(branches), way, split.labels, index)


def test_a_planted_collapse_is_found_and_healthy_branches_are_not():
    student = LatentBE(Quadrants(), 2)
    healthy = measured(student)
    assert healthy.barrier == pytest.approx(0, abs=1e-7)
    assert healthy.gap == 0
    assert not collapse.parted(healthy)
    pull_apart(student, 1)
    found = measured(student)
    assert found.branch_accuracy == healthy.branch_accuracy == [1.0, 1.0]  # each as good as before
    assert found.branch_nll == pytest.approx(healthy.branch_nll, abs=1e-6)
    assert found.nll == pytest.approx(math.log(4))  # the average says nothing
    assert found.barrier == pytest.approx(math.log(4) - healthy.nll, abs=1e-5)
    assert found.gap > 0.5
    assert found.ensemble_accuracy == 1
    assert collapse.parted(found)


def test_one_branch_alone_is_seen_on_its_way():
    """Average and other branches are well; half-way to one branch the network is worse than both."""
    student = LatentBE(Quadrants(), 8)
    pull_apart(student, 3)
    found = measured(student)
    assert found.accuracy == 1
    assert found.midpoint_nll[3] == max(found.midpoint_nll)
    assert found.barrier == pytest.approx(
        found.midpoint_nll[3] - 0.5 * (sum(found.branch_nll) / 8 + found.branch_nll[3])
    )
    assert collapse.parted(found)
    assert not collapse.behind(found)


@pytest.mark.parametrize(("engine", "images"), [("reference", 24), ("fused", 7)])
def test_numbers_against_merged_state_dicts(engine, images):
    """Barrier, its error and the gap, of a student whose branches differ, on all images and on a sample."""
    student = scatter(LatentBE(tiny(4), 3)).double()
    found, data = measured(student, engine, images), EvaluationSet(dataset().validation, "cpu", dtype=torch.float64)
    labels, index = data.labels, landscape.spread(24, images)

    def at(weights) -> torch.Tensor:
        return predict(merged(student, torch.tensor(weights, dtype=torch.float64)), data)[0].double()

    third, unit = [1 / 3] * 3, torch.eye(3).tolist()
    branches = [at(row) for row in unit]
    middle = [at([(a + b) / 2 for a, b in zip(third, row, strict=True)]) for row in unit]
    average = at(third)
    assert found.accuracy == metrics.accuracy(average, labels)
    assert found.nll == pytest.approx(metrics.nll(average, labels), rel=1e-6)
    assert found.branch_nll == pytest.approx([metrics.nll(p, labels) for p in branches], rel=1e-6)
    assert found.midpoint_nll == pytest.approx([metrics.nll(p[index], labels[index]) for p in middle], rel=1e-6)
    assert found.ensemble_nll == pytest.approx(metrics.nll(torch.stack(branches).mean(0), labels), rel=1e-6)
    losses = [-(p[torch.arange(24), labels] + 1e-8).log()[index] for p in (average, *branches, *middle)]
    mean = sum(losses[1:4]) / 3
    excesses = [losses[0] - mean] + [losses[4 + k] - (mean + losses[1 + k]) / 2 for k in range(3)]
    worst = max(excesses, key=lambda e: float(e.mean()))
    assert found.barrier == pytest.approx(float(worst.mean()), rel=1e-5)
    assert found.barrier_error == pytest.approx(float(worst.std()) / images**0.5, rel=1e-5)
    right = [(p.argmax(1) == labels).double() for p in (average, *branches)]
    lost = sum(right[1:]) / 3 - right[0]
    assert (found.gap, found.gap_error) == pytest.approx((float(lost.mean()), float(lost.std()) / 24**0.5))


def test_a_sample_is_spread_over_the_set():
    assert landscape.spread(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert landscape.spread(10, 4).tolist() == [0, 2, 5, 7]
    assert len(landscape.spread(5000)) == 1000


def test_what_counts_as_parted():
    assert not collapse.parted(None)
    assert not collapse.parted(FINE)
    assert collapse.parted(APART)
    assert collapse.parted(replace(FINE, barrier=0.12, barrier_error=0.03))
    assert not collapse.parted(replace(FINE, barrier=0.12, barrier_error=0.05))  # within the error of the images
    assert not collapse.parted(replace(FINE, barrier=0.08, barrier_error=0.001))  # certain, and small
    assert collapse.parted(replace(FINE, gap=0.07, gap_error=0.02))
    assert not collapse.parted(replace(FINE, gap=0.07, gap_error=0.03))
    assert not collapse.parted(replace(FINE, gap=0.04, gap_error=0.001))


def test_the_guard_speaks_once_and_again_where_it_is_clearly_worse():
    guard = Guard()
    assert guard.look(None, 1, CONFIG) == guard.look(FINE, 6, CONFIG) == []
    assert guard.look(APART, 12, CONFIG) == [
        "epoch 12: the average of the branches has 46.1%, they have 71.3% (barrier 1.9 nats): they are parting; lower "
        "learning_rate (0.1) or factor_rate, or lengthen warmup_epochs (5)"
    ]
    again = Guard()
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again == guard
    for one, much_worse in ((guard, replace(APART, barrier=3.9)), (again, replace(APART, gap=0.46))):
        assert one.look(replace(APART, barrier=3.0, gap=0.4), 18, CONFIG) == []
        assert one.look(FINE, 24, CONFIG) == []
        (line,) = one.look(much_worse, 30, CONFIG)
        assert line.startswith("epoch 30: ")
        assert one.look(replace(APART, barrier=9.0, gap=0.9), 36, CONFIG) == []
    guard.load_state_dict({})  # of a run from before
    assert guard == Guard()


def test_what_is_said_at_the_end():
    name, nothing = "network.safetensors", Score(0.9, 0.3)
    one_branch = Score(0.9, 0.3, replace(FINE, barrier=1.2), 60)
    fine, apart = Score(0.9, 0.3, FINE, 60), Score(0.461, 2.4, APART, 120)
    for score in (nothing, fine, one_branch):
        assert collapse.at_the_end(score, score, CONFIG, name) == []
    numbers = "46.1% (NLL 2.40), they have 70.0 72.6%, their ensemble 91.0% (NLL 0.28)"
    change = (
        "Lower learning_rate (0.1) or factor_rate, or lengthen warmup_epochs (5), or train with --student "
        "batch-ensemble, which keeps them as an ensemble"
    )
    for last in (apart, fine):
        assert collapse.at_the_end(apart, last, CONFIG, name) == [
            f"{name} is the average of branches that have parted: it has {numbers}. Better than it are the branches as "
            f"an ensemble, which is student.safetensors, and branch 1 alone. {change}"
        ]
    (line,) = collapse.at_the_end(apart, apart, CONFIG, "ema.safetensors")
    assert "Better than it are the branches as an ensemble and branch 1 alone." in line
    assert collapse.at_the_end(fine, apart, CONFIG, name) == [
        f"the branches parted: at the end their average has {numbers}. {name} is from before that, with 90.0%. {change}"
    ]


def test_scores_keep_it_and_those_of_older_runs_are_read():
    keeper = Keeper(300, 0)
    keeper.note("student", Score(0.461, 2.4, APART, 12), torch.nn.Linear(1, 1))
    saved = json.loads(
        json.dumps({k: {"student": {**v["student"], "weights": {}}} for k, v in keeper.state_dict().items()})
    )
    again = Keeper(300, 0)
    again.load_state_dict(saved)
    assert again.kept()["student"] == again.last["student"] == Score(0.461, 2.4, APART, 12)
    old = {"accuracy": 0.5, "nll": 1.0, "branches": 0.6, "step": 3}
    again.load_state_dict({"best": {"student": {**old, "weights": {}}}, "last": {"student": old}})
    assert again.kept()["student"] == Score(0.5, 1.0, None, 3)


def parting(folder, **settings):
    """A run of two quadrant networks whose second branch is pulled apart after step 8, in its second epoch."""
    trainer = make(out=folder, epochs=3, learning_rate=1e-6, perturbation="none", network=Quadrants, **settings)

    def apart(scalars):
        pull_apart(trainer.student, 1)
        return scalars

    At(trainer, 8, apart)
    return trainer


def records(folder):
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in every if r["event"] in ("validation", "kept")]


def test_a_run_says_it_in_time_and_at_the_end(tmp_path, capsys):
    trainer = parting(tmp_path / "apart")
    trainer.quiet = False
    trainer.fit()
    *looks, kept = records(tmp_path / "apart")
    assert ["warnings" in look for look in looks] == [False, True, False]
    assert [look["barrier"] > 1 for look in looks] == [False, True, True]
    assert all(len(look["branch_nll"]) == len(look["midpoint_nll"]) == 2 for look in looks)
    shown = capsys.readouterr().err.splitlines()
    (line,) = [line for line in shown if "they are parting" in line]
    assert line == f"warning: {looks[1]['warnings'][0]}"
    assert line.startswith("warning: epoch 2: the average of the branches has ")
    end = [w for w in trainer.warnings if w.startswith("the branches parted: at the end their average has ")]
    assert len(end) == 1
    assert end[0] in kept["warnings"]
    assert shown[-2:] == [f"warning: {end[0]}", trainer.kept]
    assert read_card(tmp_path / "apart" / "network.safetensors")["warnings"] == end
    healthy = make(out=tmp_path / "fine", epochs=2, learning_rate=1e-6, perturbation="none", network=Quadrants).fit()
    *looks, _ = records(tmp_path / "fine")
    assert not any("warnings" in look or look["barrier"] > 0.01 for look in looks)
    assert not any("parted" in warning for warning in healthy.warnings)
    assert "warnings" not in read_card(tmp_path / "fine" / "network.safetensors")


def test_what_was_said_survives_a_stop(tmp_path):
    parting(tmp_path / "whole").fit()
    stopped = parting(tmp_path / "stopped")
    StopAt(stopped, 12)
    with pytest.raises(Interrupted):
        stopped.fit()
    make(
        out=tmp_path / "stopped", epochs=3, learning_rate=1e-6, perturbation="none", network=Quadrants, resume=True
    ).fit()
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["single", "batch-ensemble", "hydra"])
def test_students_that_are_no_average_have_no_barrier(tmp_path, kind):
    make(kind, out=tmp_path, epochs=1, perturbation="none").fit()
    look, kept = records(tmp_path)
    assert "barrier" not in look
    assert not any("parted" in warning for warning in kept["warnings"])
    assert asdict(Score(0.5, 1.0))["averaging"] is None


def test_whatever_is_made_of_the_network_says_it(tmp_path, capsys):
    """Its file alone, without the run."""
    file, line = tmp_path / "network.safetensors", "network.safetensors is the average of branches that have parted"
    save_network(file, tiny(10, mean=(0.3,), std=(0.3,)), {"warnings": [line]})
    assert cli.main(["evaluate", str(file), "--data", "digits", "--out", str(tmp_path / "report")]) == 0
    assert f"warning: network: {line}\n" in capsys.readouterr().err
    facts = json.loads((tmp_path / "report" / "results.json").read_text())["facts"]
    assert facts["warnings"] == f"network: {line}"
    arguments = ["export", str(file), "--data", "digits", "--formats", "safetensors", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert f"warning: {line}\n" in capsys.readouterr().err
    (exported,) = (tmp_path / "out").glob("*.safetensors")
    assert read_card(exported)["trained"]["warnings"] == [line]

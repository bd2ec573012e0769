"""The diagnosis of ``bench.gpu_run``: each planted fault is found, named and, where possible, cured; nothing else is.

The kernels run in Triton's interpreter, a few launches of the rehearsal's network alone; whole steps by references.
"""

from __future__ import annotations

import numpy
import pytest
import torch

from bench.gpu_run import captures, faults, launches, steps
from bench.gpu_run.captures import diagnose_capture
from bench.gpu_run.context import REHEARSED, Context
from bench.gpu_run.faults import CULPRIT, StandIn, planted
from bench.gpu_run.launches import check_launches
from bench.gpu_run.record import Record
from bench.gpu_run.remedies import NAME, Capture, Halved, Keeper, Remedies, Varied
from bench.gpu_run.steps import COVERED, METHODS, check_step
from bench.gpu_run.walk import walk
from bench.launches import compare, prepare
from bench.setting import Setting
from fastensdistill.engine import flat_update, fused, graph, planned_ops
from fastensdistill.engine.dispatch import Choice, ConvShape
from fastensdistill.engine.graph import Captured
from fastensdistill.engine.part_run import Execution
from fastensdistill.engine.trained import TrainedPass
from fastensdistill.kernels import tiles
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient
from fastensdistill.kernels.distillation_loss import distillation_loss
from fastensdistill.kernels.launch import (
    HAS_TRITON,
    around_launches,
    kept_to_reference,
    record_launches,
    references_only,
    use_kernels,
)
from fastensdistill.kernels.perturb_step import perturb_step
from fastensdistill.kernels.sgd import sgd
from fastensdistill.kernels.tiles import Tile, changed_tiles
from fastensdistill.method import perturbation
from tests.untyped import present, untyped

SETTING = Setting("tiny", "tdiv-sdiv", 2, 2)
WRONG = f"distillation, backward: {' '.join(CULPRIT)}"
# two before the culprit and one behind it; a head, whose other way is its reference, and a weight gradient, whose tile
# has columns to halve
FEW = (
    "norm statistics groups.1.0.bn2",
    "head gradient classifier",
    " ".join(CULPRIT),
    "weight gradient groups.1.0.conv1",
)
interpreted = pytest.mark.skipif(
    tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4) or not HAS_TRITON,
    reason="Triton's interpreter needs a NumPy before 2.4",
)


def context(folder, stage: str = "stage") -> Context:
    return Context(folder, Record(folder / "results.jsonl", stage), rehearse=True, sizes=REHEARSED)


@pytest.fixture
def here(tmp_path) -> Context:
    return context(tmp_path)


@pytest.fixture(scope="module")
def prepared():
    every = prepare(SETTING, torch.device("cpu"), torch.float32, by_references=True)
    found = [one for one in every if one[0].title in FEW and one[0].where.startswith("distillation")]
    assert [one.title for one, _ in found] == list(FEW)
    return found


@pytest.fixture
def few(monkeypatch, prepared):
    """A check goes over these launches alone."""
    monkeypatch.setattr(launches, "prepare", lambda *_, **__: iter(prepared))


def rows(context: Context, *kinds: str) -> list[dict]:
    return [row for row in context.record.earlier() if row["kind"] in kinds]


def verdicts(context: Context) -> list[tuple[str, str, bool]]:
    return [(row["launch"], row["variant"], row["ok"]) for row in rows(context, "launch")]


@interpreted
def test_right_launches_need_no_remedy(here, few):
    total = check_launches(here, SETTING)
    counts = [total[name] for name in ("checked", "wrong", "crashed", "remedied", "no_remedy", "unjudged")]
    assert counts == [4, 0, 0, 0, 0, 0]
    assert total["by"] == "interpreter"
    assert not (here.out / NAME).exists()
    about = [row for row in rows(here, "launch about to run") if row["variant"] == "own"]
    assert [row["kernels"][0]["kernel"] for row in about] == [
        "batch_norm_statistics_kernel", "head_data_gradient_kernel", "conv_data_gradient_kernel",
        "conv_weight_gradient_kernel",
    ]  # fmt: skip
    assert about[2]["kernels"][0] == {
        "kernel": "conv_data_gradient_kernel", "grid": [1, 2, 4], "warps": 4, "stages": 1, "registers": None,
        "tile": [32, 16, 16],
    }  # fmt: skip
    assert check_launches(here, SETTING) == total, "a check that is done is not done again"


@interpreted
def test_a_wrong_launch_is_named_and_its_remedy_makes_it_right(here, few, tmp_path):
    with planted(["launch"]):
        total = check_launches(here, SETTING)
        assert (total["wrong"], total["remedied"], total["crashed"]) == (1, 1, 0)
        assert total["remedies"] == "conv_data_gradient_kernel 8 warps"
        assert [row["launch"] for row in rows(here, "remedy")] == [WRONG]
        wrong = [row for row in rows(here, "launch") if not row["ok"]]
        assert [(row["launch"], row["variant"], row["output"]) for row in wrong] == [
            (WRONG, "own", "groups.1.0.bn1.grad")
        ]
        after = check_launches(context(tmp_path, "another stage"), SETTING)
    assert (after["checked"], after["wrong"]) == (4, 0), "later stages obey"


CASES = {
    "one stage": ("head_data_gradient_kernel", lambda one: one.num_stages == 1),
    "4 warps": ("head_data_gradient_kernel", lambda one: one.num_warps == 4),
    "8 warps": ("conv_weight_gradient_kernel", lambda one: one.num_warps == 8),
    "half the columns": ("conv_weight_gradient_kernel", lambda one: one.arguments["BLOCK_N"] == 16),
    "cudnn": ("conv_weight_gradient_kernel", lambda one: False),
    "reference": ("head_data_gradient_kernel", lambda one: False),
}


@interpreted
@pytest.mark.parametrize("variant", CASES)
def test_the_first_variant_that_is_right_is_the_remedy(here, monkeypatch, prepared, variant):
    kernel, right = CASES[variant]
    op = "head gradient" if kernel.startswith("head") else "weight gradient"
    alone = [one for one in prepared if one[0].launch.op == op]
    monkeypatch.setattr(launches, "prepare", lambda *_, **__: iter(alone))

    def spoil(launch, do):
        do(launch)
        if launch.kernel.__name__ == kernel and not right(launch):
            out = launch.arguments["p_d" if op == "head gradient" else "p_partial"]
            out.copy_(faults.wrong(out))

    with around_launches(spoil):
        assert check_launches(here, SETTING)["remedied"] == 1
        assert [row["variant"] for row in rows(here, "remedy")] == [variant]
        tried = [name for _, name, ok in verdicts(here) if not ok]
        assert tried == [name for name in ("own", *CASES) if name in tried], "in their order"
        assert not any("reason" in row for row in rows(here, "launch"))
        assert check_launches(context(here.out, "another stage"), SETTING)["wrong"] == 0


class Died(BaseException):
    """The process ended here."""


@interpreted
def test_a_launch_in_which_the_process_dies_is_passed_over(here, few, monkeypatch):
    def die(*_):
        raise Died

    monkeypatch.setattr(faults.os, "kill", die)
    with planted(["launch-dies"]):
        with pytest.raises(Died):
            check_launches(here, SETTING)
        assert rows(here, "launch about to run")[-1]["launch"] == WRONG, "on disk before the launch"
        total = check_launches(here, SETTING)
    assert (total["wrong"], total["crashed"], total["remedied"]) == (1, 1, 1)
    assert [name for name, variant, _ in verdicts(here) if variant == "own"] == [
        f"distillation, {'forward' if i == 0 else 'backward'}: {title}" for i, title in enumerate(FEW)
    ], "each once"
    assert verdicts(here)[2:4] == [(WRONG, "own", False), (WRONG, "8 warps", True)]
    assert total["remedies"] == "conv_data_gradient_kernel 8 warps"


@interpreted
def test_a_remedy_that_was_found_and_not_yet_kept_is_found_again(here, few, monkeypatch):
    def die(*_):
        raise Died

    with planted(["launch"]):
        with monkeypatch.context() as patch:
            patch.setattr(launches.Remedies, "extend", staticmethod(die))
            with pytest.raises(Died):
                check_launches(here, SETTING)
        total = check_launches(here, SETTING)
    assert (total["wrong"], total["remedied"], total["no_remedy"]) == (1, 1, 0)
    assert Remedies.load(here.out / NAME).words == "conv_data_gradient_kernel 8 warps"


@interpreted
def test_an_error_of_the_device_ends_the_process_and_one_of_the_compiler_does_not(here, few):
    """The context is spoiled: nothing that runs after it in the same process can be judged."""

    def fail(launch, do):
        if launch.kernel.__name__ == "head_data_gradient_kernel":
            raise ValueError("out of resource: shared memory\nmore")
        if launch.kernel.__name__ == "conv_data_gradient_kernel":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        do(launch)

    restarts = 0
    with around_launches(fail):
        while True:
            try:
                total = check_launches(here, SETTING)
                break
            except RuntimeError:
                restarts += 1
    assert restarts == 2, "with its own warps and with eight"
    assert (total["wrong"], total["crashed"], total["remedied"]) == (2, 1, 2)
    assert [row["variant"] for row in rows(here, "remedy")] == ["reference", "cudnn"]
    assert {row["reason"] for row in rows(here, "launch") if not row["ok"]} == {
        "ValueError: out of resource: shared memory",
        "RuntimeError: CUDA error: an illegal memory access was encountered",
    }


@interpreted
def test_what_is_unwritten_or_moves_is_wrong(here, few):
    seen = []

    def spoil(launch, do):
        if launch.kernel.__name__ == "batch_norm_statistics_kernel":
            return
        do(launch)
        if launch.kernel.__name__ == "conv_data_gradient_kernel":
            seen.append(launch)
            launch.arguments["p_out"].mul_(1 + 2e-7 * len(seen))

    with around_launches(spoil):
        check_launches(here, SETTING)
    unwritten, moved = (next(row for row in rows(here, "launch") if row["launch"].endswith(FEW[i])) for i in (0, 2))
    assert (unwritten["ok"], unwritten["error"]) == (False, "inf")
    assert (moved["ok"], moved["moving"]) == (False, True)
    assert moved["error"] <= moved["allowed"]


@interpreted
def test_forced_warps_are_checked_and_not_cured(here, few):
    def spoil(launch, do):
        do(launch)
        if launch.num_warps == 8 and launch.kernel.__name__ == "conv_weight_gradient_kernel":
            launch.arguments["p_partial"].zero_()

    with around_launches(spoil):
        total = check_launches(here, SETTING, 8)
        assert check_launches(here, SETTING)["wrong"] == 0
    assert (total["warps"], total["checked"], total["wrong"], total["remedied"]) == (8, 4, 1, 0)
    assert not (here.out / NAME).exists()
    about = [row for row in rows(here, "launch about to run") if row["variant"] == "8 warps"]
    assert all(kernel["warps"] == 8 for row in about for kernel in row["kernels"])


def test_partial_sums_are_judged_by_their_total(prepared):
    """PyTorch's own has one row where the kernel has many: beside each of them it would allow any error."""
    one = next(one for one, _ in prepared if one.title == " ".join(CULPRIT))
    allowed = {name: limit for name, _, limit in compare(one)}
    assert allowed["groups.1.0.bn1 gradient sums"] < 1e-5


ROW = Choice("conv", "cudnn", "wrong", shape=ConvShape(3, 2, 8, 16, 8, 8))


def test_remedies_are_read_as_they_were_written(tmp_path):
    path = tmp_path / NAME
    assert Remedies.load(path) == Remedies()
    one = Remedies((Varied("head_kernel", {"C": 8, "p_mask": None}, stages=1),), (Halved("conv", (64, 128, 2)),))
    two = Remedies(rows=(ROW,), references=("head",), capture=Capture(keep_buffers=True, warm_up=6))
    Remedies.extend(path, one)
    assert Remedies.extend(path, two) == one.plus(two)
    found = Remedies.load(path)
    assert found == one.plus(two)
    assert present(found.dispatch).table == (ROW,)
    assert found.words == (
        "head_kernel 1 stage; half the columns of conv 64 → 128; conv 3x3 8 → 16 every 2 by cuDNN; "
        "head by its reference; buffers kept; 6 warm-ups"
    )
    assert (Remedies().words, Remedies().dispatch) == ("", None)
    again = found.plus(Remedies((Varied("head_kernel", {"C": 8, "p_mask": None}, warps=8),)))
    assert [one.words for one in again.launches] == ["head_kernel 8 warps"], "the last word for one kernel"
    assert again.capture == found.capture


def test_a_remedy_meets_the_kernel_it_is_for_and_no_other(prepared):
    gradients = [one for one, _ in prepared if one.launch.op in ("conv gradient", "weight gradient")]
    with record_launches() as found:
        for one in gradients:
            one.run()
    first, *others = found
    remedy = Remedies((Varied(first.kernel.__name__, launches.match_of(first), warps=8, stages=1),))
    assert remedy.varied(first)[3:5] == (8, 1)
    assert [remedy.varied(one) for one in others] == others
    assert not remedy.launches[0].fits(first._replace(arguments=first.arguments | {"p_mask": None}))
    assert remedy.launches[0].fits(first._replace(arguments=first.arguments | {"N": 512})), "whatever the batch"


def test_half_the_columns_are_halved_where_they_are_named():
    tile = Tile(128, 128, 64, 8, 3, "")
    remedies = Remedies(halved=(Halved("conv", (64, 128, 2)),))

    def chosen(kind: str, shape: tuple[int, ...]) -> int:
        return tiles._chosen(kind, 90, shape, tile).BLOCK_N

    with remedies.in_force():
        assert chosen("conv", (64, 128, 2)) == 64
        assert chosen("conv", (128, 128, 2)) == 128
        assert chosen("weight gradient", (64, 128, 2)) == 128
        with remedies.in_force():
            assert chosen("conv", (64, 128, 2)) == 64, "once, in a stage that has its remedies and tries others"
        with Remedies().in_force():
            assert chosen("conv", (64, 128, 2)) == 128
        assert chosen("conv", (64, 128, 2)) == 64
    assert chosen("conv", (64, 128, 2)) == 128


def test_a_kernel_whose_registers_are_limited_is_tried_without_the_limit(prepared):
    one = next(one for one, _ in prepared if one.launch.op == "weight gradient")
    with changed_tiles(lambda kind, shape, tile: tile._replace(maxnreg=128)):
        found = launches.variants(one, Remedies(), None)
        assert list(found)[:2] == ["own", "no register limit"]
        assert found["no register limit"].words == "conv_weight_gradient_kernel without a register limit"
        limits = [launches.kernels(one, found[name])[0]["registers"] for name in ("own", "no register limit")]
    assert limits == [128, None]
    assert "no register limit" not in launches.variants(one, Remedies(), None)


def test_remedies_of_the_capture_end_with_their_context():
    before = Captured.prepare, graph.WARM_UP, Execution.watch
    with Remedies(capture=Capture(keep_buffers=True, warm_up=6, pool_per_graph=True)).in_force():
        assert (graph.WARM_UP, type(Execution.watch)) == (6, Keeper)
        captured = Captured(dict, list, [], torch.device("cpu"), pool="of all graphs")
        untyped(captured)._capture = lambda: untyped(setattr)(captured, "graph", captured.pool or "its own")
        captured.prepare()
        assert captured.graph == "its own"
    with Remedies(capture=Capture(on=False)).in_force():
        captured = Captured(untyped(lambda: {"loss": 1.0}), list, [], torch.device("cpu"))
        assert captured() == {"loss": 1.0}, "launched from Python"
        assert captured.failed
        with Remedies().in_force():
            assert before == (Captured.prepare, graph.WARM_UP, Execution.watch), "the innermost counts"
    assert before == (Captured.prepare, graph.WARM_UP, Execution.watch)


def test_right_steps_are_right_captured_and_launched(here):
    assert check_step(here)
    done = [(row["network"], row["method"], row["ok"]) for row in rows(here, "step")]
    assert done == [*(("tiny", method, True) for method in METHODS), (COVERED, METHODS[0], True)]
    for row in rows(here, "replay"):
        assert (row["same"], row["twice_same"], row["captured"], row["differs_in"]) == (True, True, True, [])
    count = len(here.record.earlier())
    assert check_step(here)
    assert len(here.record.earlier()) == count, "what is done is not done again"


@pytest.mark.parametrize(
    ("fault", "wrong", "captured"),
    [("step", ["step"], True), ("captured", ["replay"], True), ("uncapturable", [], False)],
)
def test_a_wrong_step_is_seen(here, monkeypatch, fault, wrong, captured):
    monkeypatch.setattr(steps, "METHODS", ("tdiv-sdiv",))
    with planted([fault]):
        assert check_step(here) == (wrong == [])
    found = rows(here, "step", "replay")
    assert [row["network"] for row in found] == ["tiny", "tiny", COVERED, COVERED]
    for step, replay in (found[:2], found[2:]):
        assert [row["kind"] for row in (step, replay) if not (row["ok"] if row is step else row["same"])] == wrong
        assert replay["captured"] == captured
        assert ("not permitted" in replay["capture_error"]) == (not captured)


@pytest.mark.parametrize("check", ["launches", "step", "walk", "captures"])
def test_cudnn_searches_nothing_in_a_diagnosis(here, monkeypatch, check):
    """A stage that times has it search."""

    def look(*_, **__):
        raise ValueError(f"searching: {torch.backends.cudnn.benchmark}")

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(launches, "prepare", look)
    monkeypatch.setattr(captures, "run_steps", look)
    monkeypatch.setattr("bench.gpu_run.walk.build", look)
    monkeypatch.setattr("bench.gpu_run.steps.Remedies.load", look)
    run = {"launches": check_launches, "walk": walk, "captures": diagnose_capture, "step": lambda c, _: check_step(c)}
    if check != "step":
        monkeypatch.setattr("bench.gpu_run.remedies.Remedies.load", lambda _: Remedies())
    with pytest.raises(ValueError, match="searching: False"):
        run[check](here, SETTING)
    assert torch.backends.cudnn.benchmark


def test_a_step_that_raises_is_recorded(here, monkeypatch):
    monkeypatch.setattr(steps, "METHODS", ("kd",))
    monkeypatch.setattr(steps, "run_steps", lambda *_, **__: 1 / 0)
    assert not check_step(here)
    assert rows(here, "replay")[0]["error"] == "ZeroDivisionError: division by zero"


def test_beside_float64_a_right_step_shows_nothing(here):
    for method in METHODS:
        row = walk(here, Setting("tiny", method, 2, 2))
        assert row["first_wrong"] == "nothing found"
        assert row["buffers"] > 100


def stale(self, refresh=TrainedPass.refresh):
    """Packs the weights once only."""
    if not oracle() and not hasattr(self, "packed"):
        self.packed = True
        refresh(self)
    elif oracle():
        refresh(self)


def turned(*arguments, **options):
    *losses, seed = distillation_loss(*arguments, **options)
    return *losses, seed if oracle() else -seed


def forgetful(p, v, g, *rest, **options):
    if not oracle():
        v.zero_()
    sgd(p, v, g, *rest, **options)


def unmoved(x, *arguments, **options):
    return perturb_step(x, *arguments, **options) if oracle() else x.clone()


def lost(x, d, out=None, **options):
    gradient = conv_weight_gradient(x, d, out=out, **options)
    return gradient if oracle() else gradient.zero_()


def oracle() -> bool:
    return kept_to_reference()


WALKED = {
    "stale weights": (TrainedPass, "refresh", stale, {"pass": "distillation, forward", "op": "weights",
                                                      "node": "stem"}),
    "sign of the seed": (fused, "distillation_loss", turned, {"pass": "distillation, backward", "op": "given",
                                                              "buffer": "classifier.grad"}),
    "a gradient that is not where it is read": (planned_ops, "conv_weight_gradient", lost, {
        "pass": "distillation, backward", "op": "weight gradient", "node": "groups.1.0.shortcut",
    }),
    "no momentum": (flat_update, "sgd", forgetful, {"pass": "update", "buffer": "parameters"}),
    "no perturbation": (perturbation, "perturb_step", unmoved, {"pass": "distillation, teachers", "op": "given",
                                                              "buffer": "perturbation of the images"}),
}  # fmt: skip


@pytest.mark.parametrize("case", WALKED)
def test_the_walk_names_the_first_wrong_buffer(here, monkeypatch, case):
    owner, name, fault, expected = WALKED[case]
    monkeypatch.setattr(owner, name, fault)
    row = walk(here, SETTING)
    assert expected.items() <= row["first_wrong"].items(), row
    assert row["error"] > row["allowed"]


def test_the_walk_names_the_launch_that_is_wrong_in_the_step_alone(here):
    with planted(["step"]):
        row = walk(here, SETTING)
    found = row["first_wrong"]
    assert (found["pass"], found["op"], found["node"]) == ("distillation, backward", *CULPRIT)
    assert found["buffer"] == "groups.1.0.bn1 gradient sums"
    assert row["before"] == {
        "pass": "distillation, backward", "index": found["index"] - 1, "op": "norm gradient",
        "node": "groups.1.0.bn2", "buffer": "groups.1.0.conv1.grad",
    }  # fmt: skip


@interpreted
def test_the_walk_runs_kernels_and_obeys_the_remedies(here):
    """Kernels in the step, for the sake of time those of the gradients, references beside it."""
    small = Setting("tiny", "kd", 1, 1)
    quick = references_only("grouped_conv", "conv_weight_gradient", "head", "head_backward", "batch_norm_apply")
    with use_kernels(), planted(["launch"]), quick:
        assert walk(here, small)["first_wrong"]["node"] == CULPRIT[1]
        for one, _ in prepare(small, here.device, here.dtype, by_references=True):
            if one.title == " ".join(CULPRIT):
                remedy = launches.variants(one, Remedies(), None)["8 warps"]
        Remedies.extend(here.out / NAME, remedy)
        assert walk(here, small)["first_wrong"] == "nothing found"


def test_what_is_captured_right_needs_no_remedy(here):
    row = diagnose_capture(here, SETTING)
    assert (row["differs_in"], row["launch"], row["remedy"]) == ("", None, "")
    assert not (here.out / NAME).exists()


@pytest.mark.parametrize(("method", "fault"), [*((method, "captured") for method in METHODS), ("kd", "uncapturable")])
def test_a_capture_that_differs_is_traced_to_its_launch(here, method, fault):
    setting = Setting("tiny", method, 2, 2)
    with planted([fault]):
        row = diagnose_capture(here, setting)
        assert (row["differs_in"], row["remedy"]) == ("backward", "not captured")
        found = row["launch"]
        assert (found["pass"], found["op"], found["node"]) == ("distillation, backward", *CULPRIT)
        assert ("not permitted" in row["how"]) == (fault == "uncapturable")
        remedies = Remedies.load(here.out / NAME)
        assert not remedies.capture.on
        run = steps.run_steps(here, setting, remedies, capture=True)
    assert not run.captured
    assert not steps.differing(run.changes, steps.run_steps(here, setting, remedies, capture=False).changes)


HELPS = {
    "buffers kept": lambda: isinstance(Execution.watch, Keeper),
    "6 warm-ups": lambda: graph.WARM_UP > 2,
    "a pool per graph": lambda: present(StandIn.replaying).pool is None,
}


@pytest.mark.parametrize("remedy", HELPS)
def test_the_first_way_to_capture_that_helps_is_the_remedy(here, remedy):
    helps = HELPS[remedy]
    with faults.in_steps(lambda value: faults.wrong(value) if StandIn.replaying and not helps() else value):
        row = diagnose_capture(here, SETTING)
        assert (row["remedy"], row["differs_in"], row["launch"]["node"]) == (remedy, "backward", CULPRIT[1])
        tried = [(row["way"], row["same"]) for row in rows(here, "capture tried")]
        every = ["as it is", *HELPS]
        assert tried == [(way, way == remedy) for way in every[: every.index(remedy) + 1]]
        found = Remedies.load(here.out / NAME)
        after, launched = (steps.run_steps(here, SETTING, found, capture=capture) for capture in (True, False))
    assert found.words == remedy
    assert after.captured
    assert not steps.differing(after.changes, launched.changes)


def test_a_way_in_which_the_process_died_is_passed_over(here, monkeypatch):
    def die(*_, **__):
        raise Died

    original = captures.run_steps
    with planted(["captured"]):
        monkeypatch.setattr(captures, "run_steps", lambda *given, capture: die() if capture else untyped(original)(
            *given, capture=capture))  # fmt: skip
        with pytest.raises(Died):
            diagnose_capture(here, SETTING)
        monkeypatch.setattr(captures, "run_steps", original)
        assert diagnose_capture(here, SETTING)["remedy"] == "not captured"
    assert [row["way"] for row in rows(here, "capture tried")] == [*HELPS], "not as it is once more"


def test_what_differs_outside_of_any_launch_is_told_by_its_part(here, monkeypatch):
    def spoiled(p, v, g, *rest, **options):
        sgd(p, v, g, *rest, **options)
        if StandIn.replaying:
            p.mul_(2)

    monkeypatch.setattr(flat_update, "sgd", spoiled)
    row = diagnose_capture(here, SETTING)
    assert (row["differs_in"], row["launch"], row["how"]) == ("un-fold and update", None, "parameters, deviations")


def test_launches_that_move_are_not_the_captures_fault(here):
    counter = iter(range(1000))
    with faults.in_steps(lambda value: value * (1 + next(counter))):
        row = diagnose_capture(here, SETTING)
    assert row["differs_in"] == "two launched runs"
    assert not (here.out / NAME).exists()

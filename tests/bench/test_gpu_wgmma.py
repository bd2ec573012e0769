"""The wgmma kernels' stages of ``bench.gpu_run``: what is wrong is named and passed over, and later stages obey."""

from __future__ import annotations

import pytest
import torch

from bench import driver
from bench.gpu_run import launches, measurements, proving, timing
from bench.gpu_run.context import REHEARSED, Context
from bench.gpu_run.findings import summary
from bench.gpu_run.launches import check_launches
from bench.gpu_run.record import Record, read
from bench.gpu_run.remedies import NAME, Remedies, replaced
from bench.gpu_run.steps import COVERED
from bench.launches import prepare
from bench.setting import Setting
from fastensdistill.engine import dispatch
from fastensdistill.engine.dispatch import PREDICTED, Choice, Dispatch
from fastensdistill.kernels import wgmma
from tests.untyped import untyped

SETTING = Setting(COVERED, "tdiv-sdiv", 2, 2)
FEW = ("conv groups.1.0.conv1", "weight gradient groups.1.0.conv2", "norm statistics groups.1.0.bn2")


def context(folder, **more) -> Context:
    return Context(folder, Record(folder / "results.jsonl", "stage"), rehearse=True, sizes=REHEARSED, **more)


def rows(here: Context, kind: str) -> list[dict]:
    return [row for row in read(here.record.path) if row["kind"] == kind]


@pytest.fixture(scope="module")
def prepared():
    every = prepare(SETTING, torch.device("cpu"), torch.bfloat16, by_references=True)
    return [one for one in every if one[0].title in FEW and one[0].where.startswith("distillation")]


@pytest.fixture
def here(tmp_path, monkeypatch, prepared):
    """A stage that goes over a few launches, on a machine where predicted rows count."""
    monkeypatch.setattr(launches, "prepare", lambda *_, **__: iter(prepared))
    everywhere = tuple(Choice(row.op, row.implementation, row.reason, predicted=True) for row in PREDICTED)
    with replaced(dispatch, "PREDICTED", everywhere):
        yield context(tmp_path)


def test_launches_by_wgmma_are_those_that_it_covers(here):
    total = check_launches(here, SETTING, by_wgmma=True)
    assert (total["by"], total["wrong"], total["unjudged"]) == ("references", 0, 0)
    assert {row["launch"].split(": ")[1] for row in rows(here, "launch")} == set(FEW[:2])
    assert not (here.out / NAME).exists()


@pytest.mark.parametrize(("right", "variants"), [("copies", ["own", "copies"]), ("no", ["own", "copies", "triton"])])
def test_a_wrong_one_is_tried_with_copies_and_then_by_triton(here, monkeypatch, right, variants):
    original = wgmma.kernel

    def kernel(op):
        def wrong(*arguments, **options):
            found = untyped(original(op))(*arguments, **options)
            if wgmma.copies() and right == "copies":
                return found
            return found.neg_() if isinstance(found, torch.Tensor) else found._replace(z=-found.z)

        return wrong

    monkeypatch.setattr(wgmma, "kernel", kernel)
    total = check_launches(here, SETTING, by_wgmma=True)
    first = [row["variant"] for row in rows(here, "launch") if row["index"] == rows(here, "launch")[0]["index"]]
    assert first == variants
    assert total["no_remedy"] == 0
    kept = Remedies.load(here.out / NAME)
    assert not kept.wgmma, "what is not proven is not used for that"
    if right == "copies":
        assert kept.copies
        assert kept.words == "copies of tiles"
        assert total["wrong"] == 1, "the others are begun with copies"
        with kept.in_force():
            assert wgmma.copies()
        assert not wgmma.copies()
    else:
        assert {(row.op, row.implementation) for row in kept.rows} == {
            ("conv", "triton"), ("weight gradient", "triton"),
        }  # fmt: skip
        part, launch = (getattr(prepared_of(here), name) for name in ("part", "launch"))
        assert Dispatch(kept.rows, dispatch.PREDICTED).implementation(part, launch) == "triton"


def prepared_of(here):
    return next(one for one, _ in untyped(launches.prepare)() if one.title == FEW[0])


def said(monkeypatch, **lines: str) -> list[list[str]]:
    """Let the driver say these lines for the first word of its arguments that is a key; its calls."""
    calls: list[list[str]] = []

    def run(command, limit):
        calls.append(list(command[1:]))
        key = next(word for word in command[1:] if word in lines)
        text, _, status = lines[key].partition("|")
        return driver.parse(text.replace(";", "\n")) | {"status": int(status or 0), "last": ""}

    monkeypatch.setattr(driver, "run", run)
    monkeypatch.setattr(proving, "names", lambda context, layout: ["kernel", layout])
    return calls


def on_device(tmp_path, monkeypatch) -> Context:
    binary = tmp_path / "driver"
    binary.touch()
    monkeypatch.setattr(driver, "BINARY", binary)
    return Context(tmp_path, Record(tmp_path / "results.jsonl", "driver"), seconds=60)


def test_the_drivers_layout_is_obeyed(tmp_path, monkeypatch):
    here = on_device(tmp_path, monkeypatch)
    calls = said(monkeypatch, operands="right operands;layout copies", kernel="right kernel;WRONG other: z[0] is 1|1")
    proving.check_driver(here, 90)
    assert calls == [["run", "operands"], ["run", "kernel", "copies"]]
    (row,) = rows(here, "driver")
    assert (row["layout"], row["right"], row["wrong"], row["status"]) == ("copies", 2, ["other: z[0] is 1"], 1)
    assert Remedies.load(here.out / NAME).copies
    assert "driver: 2 right, 1 wrong, layout copies, status 1: other: z[0] is 1" in summary(read(here.record.path))


def test_a_driver_that_dies_checks_each_kernel_apart(tmp_path, monkeypatch):
    here = on_device(tmp_path, monkeypatch)
    calls = said(monkeypatch, operands="layout tile", kernel="right kernel|-6", check="right a;WRONG b: trap|1")
    proving.check_driver(here, 90)
    assert [call[0] for call in calls] == ["run", "run", "check"]
    (row,) = rows(here, "driver")
    assert (row["died"], row["right"], row["wrong"]) == (-6, 1, ["b: trap"])
    assert not (here.out / NAME).exists()


def test_without_the_driver_or_on_another_device_it_is_left_out(tmp_path, monkeypatch):
    here = on_device(tmp_path, monkeypatch)
    proving.check_driver(here, 80)
    driver.BINARY.unlink()
    monkeypatch.setattr(driver, "build", lambda: "no nvcc")
    proving.check_driver(here, 90)
    assert [row["left_out"] for row in rows(here, "driver")] == ["compute capability 80", "no nvcc"]


def test_measurements_are_made_once_each_and_one_that_fails_costs_itself(tmp_path, monkeypatch):
    def broken(context):
        raise ValueError("no such kernel")

    few = {"driver": measurements.MEASUREMENTS["driver"], "nodes": measurements.MEASUREMENTS["nodes"]}
    monkeypatch.setattr(measurements, "MEASUREMENTS", {"broken": ("nothing", broken), **few})
    here = context(tmp_path)
    here.record.add("measuring", name="nodes")  # the process died in it
    measurements.measure(here)
    measurements.measure(here)
    found = {row["name"]: row["values"] for row in rows(here, "measured")}
    assert found == {"broken": {"error": "ValueError: no such kernel"}, "driver": {"status": 0, "all": [1.0, "cycles"]}}


def test_times_far_from_their_predictions_are_listed_the_dearest_first():
    row = {"count": 1, "wgmma": None, "wgmma_predicted_us": 5.0}
    found = timing.misses([
        row | {"launch": "a", "us": 10.0, "predicted_us": 9.0},
        row | {"launch": "b", "us": 10.0, "predicted_us": 5.0},
        row | {"launch": "c", "us": 10.0, "predicted_us": 10.0, "wgmma": 2.0, "count": 9},
        row | {"launch": "d", "predicted_us": 1.0},
        row | {"launch": "e", "us": 10.0, "predicted_us": None},
    ])  # fmt: skip
    assert [(one["launch"], one["by"], one["ratio"]) for one in found] == [("c", "wgmma", 0.4), ("b", "triton", 2.0)]

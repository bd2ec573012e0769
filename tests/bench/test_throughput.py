"""Rows are saved as they come, whoever fails; who may fail comes last; a fused row says how it was run."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from bench import contenders, throughput
from bench.common import Meter, interleave
from bench.contenders import CONTENDERS, Contender, reference_engine
from bench.setting import Setting
from fastensdistill.network.gpu import GPUS

CPU = torch.device("cpu")
SETTING = Setting("tiny", "kd", 3, 2)


def run(monkeypatch, *others: Contender, rounds: int = 3):
    """The rows, and what ``note`` was given, as (contender, status, rounds) each time."""
    monkeypatch.setattr(throughput, "CONTENDERS", {"reference": CONTENDERS["reference"]} | {c.name: c for c in others})
    seen = []

    def note(rows):
        seen.append([(row["contender"], row["status"], row.get("rounds"), row.get("ratio")) for row in rows])

    options = SimpleNamespace(contenders=[*(c.name for c in others), "reference"], rounds=rounds, energy=False)
    return throughput.measure(SETTING, options, CPU, GPUS["h100"], time.monotonic() + 60, note), seen


class Failing:
    """The reference engine, which raises at its n-th step after the gate."""

    def __init__(self, problem, at: int, error: Exception):
        self.inner, self.left, self.error = reference_engine(problem), at, error

    def __call__(self, batch):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.inner(batch)

    def state(self):
        return self.inner.state()


def failing(name: str, at: int, error: Exception, **options) -> Contender:
    return Contender(name, name, lambda problem: Failing(problem, at, error), **options)


def test_every_build_and_every_round_is_noted(monkeypatch):
    rows, seen = run(monkeypatch, CONTENDERS["eager"])
    assert [[name for name, *_ in rows] for rows in seen[:2]] == [["reference"], ["reference", "eager"]]
    assert seen[0][0][1:3] == ("timed", 3), "ours has a number before anybody else is built"
    assert seen[0][0][3] is None
    assert [rows[0][2] for rows in seen[2:]] == [1, 2, 3, 3]
    assert rows[0]["how"] == "launched from Python"
    assert rows[0]["captured"] is False


@pytest.mark.parametrize(
    ("error", "says"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "out of memory"), (ValueError("no\nmore"), "ValueError: no")],
)
def test_who_fails_when_built_costs_one_row(monkeypatch, error, says):
    def build(problem):
        raise error

    rows, _ = run(monkeypatch, Contender("broken", "broken", build), CONTENDERS["eager"])
    by_name = {row["contender"]: row for row in rows}
    assert by_name["broken"]["status"] == f"not timed: {says}"
    assert by_name["reference"]["rounds"] == by_name["eager"]["rounds"] == 3
    assert by_name["eager"]["ratio"] > 0


def test_who_fails_while_timed_keeps_what_it_had(monkeypatch):
    # one step at the build, five alone, two untimed, one a round
    rows, _ = run(monkeypatch, failing("late", 1 + 5 + 2 + 2, RuntimeError("gone")))
    by_name = {row["contender"]: row for row in rows}
    assert by_name["late"]["status"] == "not timed to the end: RuntimeError: gone"
    assert by_name["late"]["rounds"] == 1
    assert by_name["reference"]["rounds"] == 3


def test_who_is_apart_comes_last_and_leaves_the_others_their_rounds(monkeypatch):
    apart = Contender("apart", "apart", reference_engine, apart=True)
    rows, seen = run(monkeypatch, apart, CONTENDERS["eager"])
    assert [row["contender"] for row in rows] == ["reference", "eager", "apart"]
    assert rows[0]["beside"] == rows[1]["beside"] == ["reference", "eager"]
    assert rows[2]["beside"] == ["reference", "apart"]
    before = next(rows for rows in seen if len(rows) == 3)
    assert before[0][2:] == (3, 1.0), "timed with the others before this one was built"
    assert seen[-1][0] == before[0]


def test_a_gate_that_cannot_be_built_is_a_row(monkeypatch):
    def gate(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(throughput, "Gate", gate)
    rows, seen = run(monkeypatch)
    assert rows[0]["status"].startswith("not timed: the gate: RuntimeError: CUDA error: an illegal")
    assert len(seen) == 1


def test_how_a_step_is_run():
    def step(**facts):
        return SimpleNamespace(step=SimpleNamespace(**facts))

    assert contenders.how(step(captured=True, capture_error=None)) == {"captured": True, "how": "one CUDA graph"}
    failed = contenders.how(step(captured=False, capture_error="no"))
    assert failed == {"captured": False, "how": "launched from Python (no)"}
    peer = SimpleNamespace(run=SimpleNamespace(graph=object()))
    assert contenders.how(peer)["captured"] is True


def test_rounds_end_with_the_time_but_never_before_two():
    times = interleave({"a": lambda: None}, 9, CPU, deadline=0.0)
    assert len(times["a"]) == 2


def test_without_a_place_for_errors_one_ends_the_run():
    def broken():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        interleave({"a": broken}, 2, CPU)
    lost: dict[str, str] = {}
    assert interleave({"a": broken, "b": lambda: None}, 2, CPU, lost=lost)["a"] == []
    assert lost == {"a": "ValueError: no"}


def test_a_query_that_nvml_does_not_have_is_no_reading():
    meter = Meter(CPU)
    meter.nvml, meter.handle = SimpleNamespace(NVMLError=OSError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2), object()
    assert meter.clocks() == dict.fromkeys(["sm_mhz", "sm_max_mhz", "memory_mhz", "power_limit_w", "temperature_c"])

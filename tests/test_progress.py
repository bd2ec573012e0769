"""What a long job shows: a line that fits and moves, the time left, a log that says as much, a hint of threads."""

import io
import re
import time

import pytest
import torch
from rich.console import Console

from fastensdistill.train import progress, record, threads
from fastensdistill.train.progress import Pace, Piece, Progress, in_words, rate_in_words
from fastensdistill.train.record import Recorder
from tests.networks import tiny
from tests.runs import dataset, make
from tests.untyped import present


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def terminal(width, **options):
    return Console(width=width, force_terminal=True, file=io.StringIO(), legacy_windows=False, **options)


def drawn(shown, console):
    """The line as it stands, without escape sequences."""
    with console.capture() as captured:
        console.print(shown)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", captured.get())


@pytest.mark.parametrize("seconds", [0.003, 1.0, 45.0, 7200.0])
def test_the_time_left_whatever_a_step_costs(seconds):
    clock = Clock()
    pace = Pace(0, clock)
    assert pace.left(100) is None
    clock.now += 30 * seconds  # the first step compiles
    pace.mark(1)
    assert pace.left(100) == pytest.approx(99 * 30 * seconds)
    for step in range(2, 11):
        clock.now += seconds
        pace.mark(step)
    assert pace.per_step == pytest.approx(seconds)
    assert pace.left(100) == pytest.approx(90 * seconds)
    clock.now += seconds / 2
    assert pace.left(100) == pytest.approx(89.5 * seconds), "it goes down within a step"
    clock.now += 100 * seconds
    assert pace.left(100) == pytest.approx(89 * seconds), "a step that takes long does not bring the end nearer"
    assert pace.left(100, besides=60) == pytest.approx(89 * seconds + 60)


def test_the_time_left_follows_a_machine_that_becomes_busy_and_leaves_validation_out():
    clock = Clock()
    pace = Pace(0, clock)
    for step in range(1, 101):
        clock.now += 1
        pace.mark(step)
    clock.now += 500
    pace.skip(500)
    assert pace.left(200) == pytest.approx(100)
    for step in range(101, 131):
        clock.now += 30
        pace.mark(step)
    assert pace.left(200) == pytest.approx(70 * 30, rel=0.05)


def test_the_validations_to_come_are_reckoned_in(tmp_path):
    recorder = Recorder(None, title="teach", epochs=20, steps_per_epoch=5, images=8, quiet=True)
    recorder.pauses = {True: 10.0, False: 1.0}
    recorder.progress.at(5 * 17)  # epochs 18, 19 and 20 remain; looks at each even one and at the last two
    assert recorder._pauses_left() == 10 + 10 + 10
    recorder = Recorder(None, title="teach", epochs=20, steps_per_epoch=5, images=8, start_step=5 * 10, quiet=True)
    recorder.pauses = {True: 10.0, False: 1.0}
    assert recorder._pauses_left() == 6 * 10 + 4 * 1


def full(console, done=140_400, total=281_200, seconds=0.5):
    shown = Progress("distill", total, console=console)
    clock = Clock()
    shown.pace = Pace(done - 2, clock)
    for step in (done - 1, done):
        clock.now += seconds
        shown.at(step)
    shown.notes = [Piece("loss 12.3456", 7), Piece("val 54.9%", 5), Piece("274 images/s", 4)]
    return shown


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [
        (50, " 49%|loss 12.3456|19 h 33 min left", "140400/281200|distill|val|images"),
        (60, " 49%|140400/281200|loss 12.3456|19 h 33 min left", "distill|val|images"),
        (80, " 49%|140400/281200|loss 12.3456|val 54.9%|274 images/s|19 h 33 min left", "distill"),
        (120, "distill| 49%|━|140400/281200|loss 12.3456|val 54.9%|274 images/s|19 h 33 min left", "nothing"),
        (200, "distill| 49%|━|140400/281200|loss 12.3456|val 54.9%|274 images/s|19 h 33 min left", "nothing"),
    ],
)
def test_the_line_fits_and_says_what_matters(width, there, gone):
    console = terminal(width)
    line = drawn(full(console), console).rstrip("\n")
    assert len(line) <= width
    assert line[0] in progress.SPINNER
    assert [part for part in there.split("|") if part not in line] == [], line
    assert [part for part in gone.split("|") if part in line] == [], line


def test_fifty_columns_hold_all_that_an_ordinary_run_says():
    console = terminal(50)
    shown = full(console, 141, 1410, 0.2)
    line = drawn(shown, console).rstrip("\n")
    assert len(line) <= 50
    for part in ("10%", "141/1410", "loss 12.3456", "4 min 13 s left"):
        assert part in line, line


@pytest.mark.parametrize("width", [1, 8, 15, 30])
def test_a_narrow_terminal_gets_one_line_too(width):
    console = terminal(width)
    line = drawn(full(console), console).rstrip("\n")
    assert "\n" not in line
    assert len(line) <= width
    assert width < 8 or "49%" in line
    assert not line.strip() or line[0] in progress.SPINNER


def test_before_the_first_step_it_says_how_long_it_waits():
    console = terminal(80)
    shown = Progress("teach", 10, console=console)
    shown.pace.began -= 75
    assert "1 min 15 s so far" in drawn(shown, console)
    assert "0/10" in drawn(shown, console)


def test_it_moves_by_itself_within_a_step():
    console = terminal(80)
    with Progress("teach", 10, console=console) as shown:
        shown.at(1)
        time.sleep(0.9)
        text = console.file.getvalue()
    assert len(set(re.findall(f"[{progress.SPINNER}]", text))) >= 2, "redrawn while nothing was reported"


def test_a_log_says_something_while_a_step_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.1)
    with Progress("teach", 10, console=Console(file=io.StringIO())) as shown:
        shown.at(1)
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5
    assert re.fullmatch(r"teach: step 1/10, .* left", lines[0]), lines


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_log_with_colours_is_a_log(monkeypatch, capsys, name):
    monkeypatch.setenv(name, "1")
    shown = Progress("teach", 10)
    with shown:
        shown.at(1)
        shown.log()
    assert re.fullmatch(r"teach: step 1/10, \d+ s left\n", capsys.readouterr().err)


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_is_quiet(monkeypatch, capsys, quiet):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    with Progress("teach", 10, console=Console(file=io.StringIO()), quiet=quiet):
        time.sleep(0.2)
    assert bool(capsys.readouterr().err) != quiet


def test_a_runs_log_says_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 1)
    trainer = make(epochs=3)
    trainer.quiet = False
    trainer.fit()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distill: epoch")]
    assert len(lines) == 3
    number = r"\d+(\.\d+)?"
    said = rf"loss \d+\.\d{{4}}, validation {number} %, {number} images/s, \d+ s left"
    assert re.fullmatch(f"distill: epoch 1/3, step 5/15, {said}", lines[0]), lines[0]
    assert re.search(r"epoch 3/3, step 15/15, .*, took \d+ s$", lines[2]), lines[2]


def test_every_step_moves_the_count_and_slow_ones_say_what_they_cost():
    recorder = Recorder(None, title="teach", epochs=3, steps_per_epoch=1000, images=128)
    recorder.progress.pace.clock = clock = Clock()
    recorder.progress.pace.at = clock.now
    for step in range(3):  # long before the first record is read
        clock.now += 32
        recorder.step(step, {"loss": torch.tensor([2.0, 4.0])})
        assert recorder.progress.pace.done == step + 1
    console = terminal(100)
    line = drawn(recorder.progress, console)
    for part in ("3/3000", "loss 3.0000", "4 images/s, 32 s/step", "1 d 2 h left"):
        assert part in line, line


def test_durations_and_rates():
    assert [in_words(s) for s in (0.4, 59.9, 61, 599, 600, 754, 3600, 3660, 200_000)] == [
        "0 s", "59 s", "1 min 1 s", "9 min 59 s", "10 min", "12 min", "1 h", "1 h 1 min", "2 d 7 h"
    ]  # fmt: skip
    assert [rate_in_words(r) for r in (0.0123, 8.04, 274.6, 41_234.0)] == ["0.0123", "8.04", "275", "41234"]


def test_work_deep_inside_moves_what_is_shown():
    progress.advance(3)  # nothing is shown
    with progress.shown(Progress("evaluate", 10, quiet=True)) as shown:
        progress.advance(3)
        progress.advance(4)
    progress.advance(3)
    assert shown.pace.done == 7


def test_evaluation_counts_every_image_of_every_network(monkeypatch):
    from fastensdistill.evaluate import comparison
    from fastensdistill.evaluate.runs import Candidate

    seen = []

    class Watched(Progress):
        def advance(self, by):
            super().advance(by)
            seen.append((self.notes[0].text, self.pace.done, self.total))

    monkeypatch.setattr(comparison, "Progress", Watched)
    candidates = [Candidate("two", "student", [tiny(4), tiny(4)]), Candidate("one", "student", [tiny(4)])]
    comparison.compare(candidates, dataset(), torch.device("cpu"))
    assert seen == [(name, 24 * i, 144) for i, name in enumerate(4 * ["two"] + 2 * ["one"], 1)]


# ---- threads


HINTS = {  # threads, cores, load, OMP_NUM_THREADS, processes: what is hinted at
    "as-many-as-cores": (2, 2, 0.5, None, 1, None),
    "more-than-a-container-may-use": (64, 2, 0.5, None, 1, r"^64 threads on 2 cores.*: set OMP_NUM_THREADS=2$"),
    "asked-for-too-many": (8, 2, 0.5, "8", 1, "OMP_NUM_THREADS=2"),
    "of-several-processes": (2, 4, 0.5, None, 4, "8 threads on 4 cores.*OMP_NUM_THREADS=1"),
    "one-each-of-several": (1, 2, 0.5, "1", 4, None),
    "a-busy-machine": (2, 2, 9.7, None, 1, r"busy \(load 10 on 2 cores\).*OMP_NUM_THREADS=1"),
    "busy-with-one-thread": (1, 2, 9.7, None, 1, None),
    "busy-and-chosen": (2, 2, 9.7, "2", 1, None),
}


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_of_threads(monkeypatch, name):
    count, cores, load, chosen, processes, expected = HINTS[name]
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(threads.os, "getloadavg", lambda: (load, 1.0, 1.0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    found = threads.thread_hint(torch.device("cpu"))
    assert (found is None) == (expected is None), found
    assert expected is None or re.search(expected, present(found)), found
    assert threads.thread_hint(torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
    ids=["v2", "v2-without", "v1", "v1-without", "nonsense", "none"],
)
def test_a_containers_quota(tmp_path, files, expected):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert threads.cpu_quota(tmp_path) == expected


def test_the_hint_is_told_once_and_is_no_warning(monkeypatch, capsys):
    monkeypatch.setattr("fastensdistill.train.trainer.thread_hint", lambda device: "one thread")
    trainer = make(epochs=1)
    trainer.quiet = False
    trainer.fit()
    assert capsys.readouterr().err.count("hint: one thread\n") == 1
    assert not any("thread" in warning for warning in trainer.warnings)


def test_a_resumed_run_reckons_with_what_is_left():
    recorder = Recorder(None, title="teach", epochs=2, steps_per_epoch=100, images=8, start_step=150, quiet=True)
    assert record.is_validation_epoch(2, 2)
    recorder.progress.pace.clock = clock = Clock()
    recorder.progress.pace.at = clock.now
    for step in (150, 151):
        clock.now += 2
        recorder.step(step, {"loss": torch.tensor(1.0)})
    assert recorder.progress.time_left == pytest.approx(48 * 2)

"""What is read off the driver's lines, and that nothing it does ends the process that started it."""

from __future__ import annotations

import sys

from bench import driver

SAID = """right descriptor K-major shifted 1
right wgmma_conv 3x3 s1 64
WRONG wgmma_conv 3x3 s2 64: z[0, 1, 2, 3, 4] is 1, expected 2
layout copies
measured wgmma n256 shifted 128.3 cycles
measured L2 boxes 5.9e+12 bytes/s with multicast
layout nonsense
measured nothing
"""


def command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_its_lines_are_read():
    found = driver.parse(SAID)
    assert found["right"] == 2
    assert found["wrong"] == ["wgmma_conv 3x3 s2 64: z[0, 1, 2, 3, 4] is 1, expected 2"]
    assert found["layout"] == "copies"
    assert found["measured"] == {
        "wgmma n256 shifted": [128.3, "cycles"], "L2 boxes": [5.9e12, "bytes/s with multicast"],
    }  # fmt: skip
    assert driver.parse("") == {"right": 0, "wrong": [], "layout": None, "measured": {}}


def test_however_it_ends_its_lines_count():
    found = driver.run(command(f"print({SAID!r}); raise SystemExit(1)"), 20)
    assert (found["status"], found["right"]) == (1, 2)
    found = driver.run(command("import time; print('right a', flush=True); time.sleep(30)"), 3)
    assert (found["status"], found["right"], found["last"]) == ("hung", 1, "right a")
    found = driver.run(command("print('right a', flush=True); import os; os.abort()"), 20)
    assert (found["status"], found["right"]) == (-6, 1)
    assert driver.run(["/no/such/program"], 1)["status"] == "not started: No such file or directory"


def test_without_compiler_or_source_it_is_not_built(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(driver.shutil, "which", lambda tool: None)
    assert driver.build(binary=tmp_path / "x") == "no nvcc"
    assert driver.main([]) == 1
    assert "not built: no nvcc" in capsys.readouterr().err
    monkeypatch.setattr(driver.shutil, "which", lambda tool: "/bin/false")
    monkeypatch.setattr(driver, "SOURCES", ("csrc/no.cu",))
    assert driver.build(binary=tmp_path / "x") == "its source is not part of this version"
    monkeypatch.setattr(driver, "SOURCES", ("csrc/pack.cu",))
    assert driver.build(binary=tmp_path / "x") == "nvcc: 1"

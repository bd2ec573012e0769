"""The examples run, print what they promise, and use nothing but the public interface."""

import re
import runpy
from typing import Any

import pytest

from tests.runs import ROOT

EXAMPLES: dict[str, tuple[dict[str, Any], str]] = {
    "own_loop": (
        {},
        r"with_the_step\n  epoch 1: loss \d+\.\d+, tdiv \d.*\n  test accuracy [01]\.\d+\n"
        r"with_your_optimiser\n  epoch 1: .* sdiv \d\.\d+\n  test accuracy [01]\.\d+\n",
    ),
    "own_networks": (
        {"folder": None},
        r"teachers +accuracy .*\nstudent +accuracy .*\nexported network\.safetensors: logits differ by 0\.0e\+00\n"
        r"exported network\.pt2: .*\n",
    ),
    "compare_baselines": (
        {"seeds": 1},
        r"(\|.*\n){2}\| teachers, each \| 2 .*\n\| ensemble of 2 \| 1 .*\n\| KD \| 1 .*\n\| LatentBE \| 1 .*\n"
        r"\| LatentBE \+ TDiv-SDiv \| 1 .*\n",
    ),
}


def test_every_example_is_run_and_short():
    files = list((ROOT / "examples").glob("*.py"))
    assert {file.stem for file in files} == set(EXAMPLES)
    for file in files:
        text = file.read_text()
        assert len(text.splitlines()) <= 80, file
        assert re.findall(r"^ *(?:from|import) +(fastensdistill.*)", text, re.M) == ["fastensdistill as fed"]
        assert not re.search(r"\._[a-z]", text), "a private name"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_epoch_of_it(name, tmp_path, capsys):
    arguments, printed = EXAMPLES[name]
    example = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    example["main"](1, **{key: tmp_path if key == "folder" else value for key, value in arguments.items()})
    assert re.fullmatch(printed, capsys.readouterr().out)

"""The results table, the pictures and the page: what they say, not only that they exist."""

from __future__ import annotations

import base64
import errno
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from rich.console import Console
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.evaluate import Metrics, ece
from fastensdistill.evaluate.drawing import line_styles, series, smooth, without_seed
from fastensdistill.evaluate.metrics import calibration_bins
from fastensdistill.evaluate.plots import (
    diversity_over_training,
    learning_curves,
    metric_dots,
    png,
    reliability_diagram,
)
from fastensdistill.evaluate.report import Row, markdown_table, print_table, read_metrics, table, write_report
from fastensdistill.evaluate.strips import Augmented, augmentation_strip, perturbation_strip
from fastensdistill.evaluate.tables import short
from tests.untyped import untyped


def metrics(acc: float, nll: float = 0.5, kl: float | None = None) -> Metrics:
    return Metrics(acc, nll, 0.0304, nll - 0.1, 0.0151, 0.25, 1.3, kl, None if kl is None else 0.875)


ROWS = [
    Row("teachers <i>alone</i>", "teachers", [metrics(0.70), metrics(0.72)], 375_348, 54_970_000),
    Row("ensemble of 4", "ensemble", [metrics(0.99, 0.2, kl=0.3125)], 1_501_392, 219_880_000),
    Row("KD", "student", [metrics(0.7912, 0.51), metrics(0.7952, 0.53), metrics(0.7892, 0.52)], 375_348, 54_970_000),
    Row("LatentBE | TDiv", "student", [metrics(0.8009, 0.5204)], 375_348, 54_970_000),
]


def run(final: float, branches: bool = False, members: int = 1, teacher_kl: float = 0.4) -> list[dict]:
    """Records of twelve epochs of ten steps."""
    records: list[dict] = []
    for step in range(0, 120, 2):
        loss = 20 * math.exp(-step / 50) + 0.1 * (step % 3)
        records.append({"event": "train", "step": step, "epoch": step / 10, "lr": 0.1, "loss": loss})
        if step % 10 == 0:
            accuracy, nll = final * (1 - math.exp(-step / 20)), 0.5 + 2 * math.exp(-step / 20)
            record = {"event": "validation", "step": step, "epoch": step / 10, "accuracy": accuracy, "nll": nll}
            if members > 1:
                record |= {"accuracy": [accuracy + 0.01 * m for m in range(members)], "nll": [nll] * members}
            if branches:
                record |= {"branch_kl": step / 1000, "branch_agreement": 1 - step / 500}
                record |= {"teacher_kl": teacher_kl, "teacher_agreement": 0.8}
            records.append(record)
    return records


def predictions(seed: int = 0, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(400, 5, generator=g)
    return torch.softmax(sharpness * z, 1), torch.multinomial(torch.softmax(z, 1), 1, generator=g)[:, 0]


def strip(channels: int = 3, n: int = 4) -> tuple[Tensor, Tensor, list[str]]:
    g = torch.Generator().manual_seed(2)
    x = torch.rand(n, channels, 8, 8, generator=g)
    return x, (x + 0.004 * torch.randn(x.shape, generator=g)).clamp(0, 1), [f"class {i}" for i in range(n)]


def pixels(data: bytes) -> np.ndarray:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return matplotlib.image.imread(io.BytesIO(data), format="png")


# --- the table


def test_table_holds_means_and_sample_deviations() -> None:
    teachers, ensemble, kd, latent = table(ROWS)
    assert kd["seeds"] == "3"
    # mean of 79.12, 79.52, 78.92; their sample deviation is sqrt((0.0667² + 0.3333² + 0.2667²) / 2)
    assert kd["accuracy"] == {"mean": "79.19", "sd": "0.31", "best": False}
    assert kd["nll"] == {"mean": "0.520", "sd": "0.010", "best": False}
    assert latent["accuracy"] == {"mean": "80.09", "sd": "", "best": True}
    assert ensemble["diversity_kl"]["mean"] == "0.312"
    assert kd["diversity_kl"] == {"mean": "–", "sd": "", "best": False}
    assert (teachers["parameters"], ensemble["macs"]) == ("375.3 k", "219.9 M")
    assert not any(ensemble[key]["best"] or teachers[key]["best"] for key in ("accuracy", "nll", "ece"))


def test_best_is_decided_by_the_printed_mean() -> None:
    kd, latent = table(ROWS)[2:]
    # 0.5200 and 0.5204 print the same, as all ECEs do: nothing is best where all students are equal.
    assert kd["nll"]["mean"] == latent["nll"]["mean"] == "0.520"
    assert not kd["nll"]["best"]
    assert not latent["nll"]["best"]
    worse = Row("worse", "student", [metrics(0.5, 0.9)], 1, 1)
    lines = table([*ROWS, worse])
    assert [line["nll"]["best"] for line in lines] == [False, False, True, True, False]
    unknown = Row("unknown", "student", [metrics(0.9, math.nan)], 1, 1)
    assert [line["nll"]["best"] for line in table([*ROWS, worse, unknown])][2:] == [True, True, False, False]
    assert not table([ROWS[3]])[0]["accuracy"]["best"]  # nobody to be better than


@pytest.mark.parametrize(
    ("count", "expected"),
    [(7, "7"), (999, "999"), (1000, "1 k"), (31_836, "31.84 k"), (5_872_180, "5.872 M"), (999_999, "1 M"),
     (5_243_390_000, "5.243 G"), (999_949_999, "999.9 M")],
)  # fmt: skip
def test_short_counts(count: int, expected: str) -> None:
    assert short(count) == expected


@pytest.mark.parametrize("width", [30, 50, 80, 130, 220])
@pytest.mark.parametrize("name", ["KD", "a student with quite a long name, and all of its settings"])
def test_print_table_breaks_no_number(width: int, name: str) -> None:
    rows = [*ROWS, Row(name, "student", [metrics(0.8123, 0.4567), metrics(0.8323, 0.4767)], 375_348, 54_970_000)]
    console = Console(width=width, file=io.StringIO(), color_system=None)
    print_table(rows, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for value in ("82.23", "0.467", "80.09", "375.3 k", "219.9 M", "0.312", "agreement", "seeds"):
        assert value in text, value
    for title in ("ACC %", "NLL", "ECE", "cNLL", "cECE", "Brier", "KL", "agreement", "parameters", "MACs"):
        assert len(re.findall(rf"(?<!\w){title}(?!\w)", text)) == 1, title
    assert re.search(r"±\s?1\.41", text)
    single = next(line for line in text.splitlines() if "80.09" in line)
    assert "±" not in single


def test_print_table_makes_the_best_bold() -> None:
    console = Console(width=220, file=io.StringIO(), force_terminal=True, color_system="standard")
    print_table(ROWS, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1m80.09" in text
    assert "\x1b[1m99.00" not in text


def test_print_table_aligns_means_with_and_without_deviation() -> None:
    console = Console(width=220, file=io.StringIO(), color_system=None)
    print_table(ROWS, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    ends = {line.index(mean) for mean in ("71.00", "99.00", "79.19", "80.09") for line in lines if mean in line}
    assert len(ends) == 1


def test_markdown_table() -> None:
    lines = markdown_table(ROWS).splitlines()
    assert lines[0].startswith("|  | seeds | ACC % | NLL |")
    assert lines[4].startswith("| KD | 3 | 79.19 ± 0.31 | 0.520 ± 0.010 |")
    assert lines[5].startswith("| LatentBE \\| TDiv | 1 | **80.09** | 0.520 |")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_rows_are_checked() -> None:
    with pytest.raises(InputError, match="did you mean 'student'"):
        Row("KD", "students", [metrics(0.5)], 1, 1)
    with pytest.raises(InputError, match="at least one seed"):
        Row("KD", "student", [], 1, 1)


# --- metrics.jsonl


@pytest.mark.parametrize("cut", ['{"event": "tr', '{"event": "train", "step": 3}', '{"a": "\xff', "7", "", "\n\n"])
def test_read_metrics_leaves_a_cut_last_line_out(tmp_path: Path, cut: str) -> None:
    whole = [{"event": "train", "step": 1, "loss": 2.5}, {"event": "validation", "accuracy": [0.5, 0.25]}]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(("".join(json.dumps(r) + "\n" for r in whole) + cut).encode("latin-1"))
    expected = [*whole, {"event": "train", "step": 3}] if cut.endswith("}") else whole
    assert read_metrics(path) == expected


def test_read_metrics_refuses_what_a_cut_does_not_explain(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train"}\nnonsense\n{"event": "train"}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(path)
    with pytest.raises(InputError, match="No such file"):
        read_metrics(tmp_path / "none.jsonl")


# --- pictures


def test_series_sorts_and_keeps_the_last_of_a_step() -> None:
    records = [
        {"event": "train", "epoch": 1.0, "loss": 5.0},
        {"event": "train", "epoch": 0.5, "loss": 4.0},
        {"event": "train", "epoch": 1.0, "loss": 3.0},  # written again after resuming
        {"event": "train", "epoch": 2.0, "loss": math.nan},
        {"event": "train", "epoch": 3.0, "loss": None},
        {"event": "validation", "epoch": 4.0, "loss": 9.0},
    ]
    epochs, values = series(records, "train", "loss")
    assert epochs.tolist() == [0.5, 1.0]
    assert values.tolist() == [[4.0], [3.0]]


def test_smooth_is_a_moving_mean() -> None:
    values = np.random.default_rng(0).standard_normal(200)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(200)]  # half a fortieth of 200 either side: 2
    np.testing.assert_allclose(smooth(values), expected, atol=1e-12)
    np.testing.assert_allclose(smooth(values[:79]), values[:79], atol=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("KD, seed 3", "KD"), ("KD (seed 3)", "KD"), ("KD/seed3", "KD"), ("KD seed=11", "KD"), ("KD_seed_2", "KD"),
     ("seed 3", "seed 3"), ("linseed 3", "linseed 3"), ("4 seeds", "4 seeds"), ("KD", "KD")],
)  # fmt: skip
def test_without_seed(name: str, expected: str) -> None:
    assert without_seed(name) == expected


def test_line_styles_are_distinct_and_shared_by_seeds() -> None:
    styles = line_styles([f"run {i}, seed {j}" for i in range(21) for j in range(2)])
    assert list(styles) == [f"run {i}" for i in range(21)]
    assert len({(style.colour, style.dashes) for style in styles.values()}) == 21


def test_reliability_bars_are_the_bins() -> None:
    p, labels = predictions()
    figure = untyped(reliability_diagram)({"a": (p, labels), "b": predictions(1)})
    counts, confidence, correct = (t.numpy() for t in calibration_bins(p, labels))
    filled = counts > 0
    upper, lower = figure.axes[:2]
    assert f"ECE {ece(p, labels):.3f}" in upper.get_title(loc="left")
    tops: dict[int, float] = {}
    for bar in upper.patches:  # stacked: the common part, then what one exceeds the other by
        place = round(bar.get_x() * 15)
        tops[place] = max(tops.get(place, 0.0), bar.get_y() + bar.get_height())
    expected = np.maximum(correct, confidence)[filled]
    np.testing.assert_allclose([tops[i] for i in np.flatnonzero(filled)], expected, atol=1e-9)
    np.testing.assert_allclose([bar.get_height() for bar in lower.patches], 100 * counts / 400, atol=1e-9)


def test_learning_curves_draw_the_records() -> None:
    runs = {"teachers": run(0.9, members=3), "KD, seed 0": run(0.8), "KD, seed 1": run(0.7)}
    figure = untyped(learning_curves)(runs)
    loss, accuracy, nll, legend = figure.axes
    assert loss.get_yscale() == "log"
    # Teachers' mean; two seeds and their mean
    ends = [float(line.get_ydata()[-1]) for line in accuracy.lines]
    reached = 1 - math.exp(-110 / 20)
    assert ends == pytest.approx([100 * (0.9 * reached + 0.01), 80 * reached, 70 * reached, 75 * reached])
    assert len(nll.lines) == 4
    assert accuracy.lines[1].get_color() == accuracy.lines[3].get_color() != accuracy.lines[0].get_color()
    band = accuracy.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(100 * (0.9 * reached + 0.02))
    texts = [text.get_text() for text in legend.get_legend().get_texts()]
    assert texts == ["teachers (mean and range of 3)", "KD (2 seeds)"]
    # The last values are in view.
    low, high = accuracy.get_ylim()
    assert all(low < end < high for end in ends)


def test_a_dot_marks_the_weights_that_were_kept() -> None:
    def kept(epoch: object, accuracy: object, nll: object) -> list[dict]:
        return [{"event": "kept", "step": 118, "epoch": 11.8, "kept_epoch": epoch, "accuracy": accuracy, "nll": nll}]

    broken = [{"event": "kept", "step": 1, "epoch": 1.0}, *kept([1.0, 2.0], [0.5], [math.nan])]
    runs = {
        "teachers": run(0.9, members=2) + kept([10.0, 11.0], [0.85, 0.9], [0.3, 0.2]),
        "KD, seed 0": run(0.8) + kept(9.0, 0.75, 0.5), "KD, seed 1": run(0.7), "LatentBE": run(0.7) + broken,
    }  # fmt: skip
    figure = untyped(learning_curves)(runs)
    plain = untyped(learning_curves)(
        {name: [r for r in records if r["event"] != "kept"] for name, records in runs.items()}
    )
    for panel, expected, before in (
        (1, [[(10, 85), (11, 90)], [(9, 75)]], plain.axes[1]), (2, [[(10, 0.3), (11, 0.2)], [(9, 0.5)]], plain.axes[2])
    ):  # fmt: skip
        axes = figure.axes[panel]
        dots = [c for c in axes.collections if len(c.get_offsets()) and type(c).__name__ == "PathCollection"]
        assert len(dots) == len(expected)
        for dot, points in zip(dots, expected, strict=True):
            assert np.allclose(dot.get_offsets(), untyped(points))
        assert dots[1].get_facecolor()[0].tolist() == pytest.approx(list(to_rgba(axes.lines[1].get_color())))
        assert (axes.get_xlim(), axes.get_ylim()) == (before.get_xlim(), before.get_ylim())
    texts = [[t.get_text() for t in f.axes[3].get_legend().get_texts()] for f in (figure, plain)]
    assert texts[0] == [*texts[1], "the weights that were kept"]


def test_diversity_draws_branches_and_teachers() -> None:
    runs = {"KD": run(0.8), "LatentBE": run(0.8, branches=True), "TDiv": run(0.8, branches=True)}
    figure = untyped(diversity_over_training)(runs)
    kl, agreement = figure.axes
    assert [float(line.get_ydata()[-1]) for line in kl.lines] == pytest.approx([0.11, 0.11, 0.4])
    assert [float(line.get_ydata()[-1]) for line in agreement.lines] == pytest.approx([78, 78, 80])
    assert kl.get_yscale() == "linear"
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["LatentBE", "TDiv", "teachers"]
    # Teachers that differ between runs are drawn for each, and far larger ones on a log scale.
    figure = untyped(diversity_over_training)({"a": run(0.8, True), "b": run(0.8, True, teacher_kl=40.0)})
    assert [float(line.get_ydata()[-1]) for line in figure.axes[0].lines] == pytest.approx([0.11, 0.11, 0.4, 40])
    assert figure.axes[0].get_yscale() == "log"
    assert figure.legends[0].get_texts()[-1].get_text().startswith("its teachers")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [1, 5, 9])
def test_strip_shows_the_amplified_difference(channels: int, n: int) -> None:
    x, y, titles = strip(channels, n)
    figure = perturbation_strip(x, y, titles)
    largest = float((y - x).abs().max())
    heading = figure.get_suptitle()
    assert f"×{0.5 / largest:.3g}" in heading
    assert f"{255 * float((y - x).square().mean().sqrt()):.2f}/255" in heading
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(images) == 3 * n
    columns = min(n, 8)
    first, third = images[0], images[2 * columns]  # rows come one after the other
    grey = 0.5 + 0.5 / largest * (y - x)[0].permute(1, 2, 0).double().numpy()
    np.testing.assert_allclose(np.asarray(first).reshape(8, 8, -1), x[0].permute(1, 2, 0).numpy(), atol=1e-7)
    np.testing.assert_allclose(np.asarray(third).reshape(8, 8, -1), np.clip(grey, 0, 1), atol=1e-5)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == titles


def test_strip_without_a_difference_says_so() -> None:
    x, _, titles = strip()
    figure = perturbation_strip(x, x, titles)
    assert "no difference" in figure.get_suptitle()
    assert np.ptp(pixels(png(figure))) > 0
    assert "×4" in perturbation_strip(x, x / 2, titles, amplification=4).get_suptitle()


def augmented(channels: int = 3, n: int = 4) -> Augmented:
    x, y, titles = strip(channels, n)
    return Augmented(x, [1 - x, y], titles, "moved by up to 4 pixels, mirrored at random")


@pytest.mark.parametrize(("channels", "n"), [(1, 5), (3, 9)])
def test_augmented_images_stand_below_their_own(channels: int, n: int) -> None:
    given = augmented(channels, n)
    figure = augmentation_strip(given)
    assert figure.get_suptitle().replace("\n", " ").endswith(given.about)
    images = [np.asarray(axes.images[0].get_array()).reshape(8, 8, -1) for axes in figure.axes if axes.images]
    assert len(images) == 3 * n
    columns = min(n, 8)
    for i, row in enumerate([given.images, *given.versions]):
        np.testing.assert_allclose(images[i * columns], row[0].permute(1, 2, 0).numpy(), atol=1e-7)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == given.titles
    assert [text.get_text() for axes in figure.axes for text in axes.texts][:3] == ["image", "augmented", ""]


NAMES = [f"run {i} with a name that is long, $cost_{i} and, _all of its settings & <tags>" for i in range(12)]
MANY = {
    "learning": lambda: learning_curves({name: run(0.8) for name in NAMES}),
    "diversity": lambda: diversity_over_training({f"_{name}": run(0.8, True) for name in NAMES}),
    "reliability": lambda: reliability_diagram({name: predictions(i) for i, name in enumerate(NAMES)}),
    "dots": lambda: metric_dots({"ACC": {n: [1.0, 2.0] for n in NAMES}, "NLL": {n: [0.1] for n in NAMES}}),
}


@pytest.mark.parametrize("which", MANY)
def test_twelve_long_names_fit(which: str) -> None:
    figure = MANY[which]()
    image = pixels(png(figure))
    # A margin of two pixels stays white: nothing runs over the edge.
    edge = np.concatenate([image[0].ravel(), image[-1].ravel(), image[:, 0].ravel(), image[:, -1].ravel()])
    assert edge.min() == 1.0
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    panels = [axes.get_window_extent(renderer) for axes in figure.axes if axes.lines or axes.patches]
    legends = figure.legends + [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    for legend in legends:
        box = untyped(legend).get_window_extent(renderer)
        assert len(untyped(legend).get_texts()) >= 3
        assert not any(box.overlaps(panel) for panel in panels)
        assert figure.bbox.containsx(box.x0)
        assert figure.bbox.containsy(box.y0)
        assert figure.bbox.containsx(box.x1)
        assert figure.bbox.containsy(box.y1)


REFUSED = [
    pytest.param(lambda: reliability_diagram({}), "at least one", id="no-classifier"),
    pytest.param(lambda: learning_curves({"a": []}), "no run", id="no-records"),
    pytest.param(lambda: diversity_over_training({"a": run(0.5)}), "branch_kl", id="no-branches"),
    pytest.param(lambda: metric_dots({"ACC": {}}), "at least one", id="no-rows"),
    pytest.param(lambda: metric_dots({"ACC": {"KD": []}}), "at least one", id="no-seeds"),
    pytest.param(lambda: perturbation_strip(*strip()[:2], ["a"]), "1 titles", id="few-titles"),
    pytest.param(lambda: perturbation_strip(strip(1)[0], *strip(3)[1:]), "as many", id="channels-disagree"),
    pytest.param(lambda: perturbation_strip(*strip(2)), "1 or 3", id="two-channels"),
    pytest.param(lambda: perturbation_strip(strip()[0] * 255, *strip()[1:]), r"in \[0, 1\]", id="bytes"),
    pytest.param(lambda: perturbation_strip(*strip(), amplification=0.0), "above zero", id="amplification"),
    pytest.param(lambda: augmentation_strip(augmented()._replace(titles=["a"])), "1 titles", id="few-augmented"),
    pytest.param(lambda: augmentation_strip(augmented()._replace(versions=[])), "found .*none", id="none-augmented"),
    pytest.param(lambda: augmentation_strip(augmented()._replace(images=strip(1)[0])), "as many", id="other-channels"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_pictures_refuse(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_pictures_leave_matplotlib_alone() -> None:
    """Importing the report loads no matplotlib, and drawing leaves pyplot's figures and the settings as they were."""
    code = (
        "import sys, torch; from fastensdistill.evaluate import report, plots, strips\n"
        "assert not any(m.split('.')[0] == 'matplotlib' for m in sys.modules)\n"
        "import matplotlib; before = dict(matplotlib.rcParams)\n"
        "x = torch.rand(1, 1, 4, 4); plots.png(strips.perturbation_strip(x, x, ['a']))\n"
        "assert dict(matplotlib.rcParams) == before\n"
        "from matplotlib import pyplot; assert pyplot.get_fignums() == []\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the page


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and the text, unescaped."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [base64.b64decode(source.split(",", 1)[1], validate=True) for source in sources]


def write(folder: Path, **changes) -> Path:
    everything = {
        "title": "Digits <b>& more</b>",
        "rows": ROWS,
        "curves": {"KD, seed 0": run(0.8), "LatentBE": run(0.8, branches=True)},
        "reliability": {"KD": predictions()},
        "strip": strip(),
        "augmented": augmented(),
        "facts": {"dataset": 'a <set> & "more"', "seeds": "0, 1"},
    }
    return write_report(folder, **(everything | changes))


def test_report_says_what_it_was_given(tmp_path: Path) -> None:
    path = write(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    numbers = ["79.19", "± 0.31", "80.09", "0.312", "375.3 k", "219.9 M"]
    names = ["teachers <i>alone</i>", "LatentBE | TDiv", "Digits <b>& more</b>", 'a <set> & "more"', "dataset"]
    for value in [*numbers, *names, "Reliability", "Learning curves", "Diversity"]:
        assert value in page.text, value
    assert "<b>80.09</b>" in source
    assert "<i>" not in source
    assert "<set>" not in source
    # Self-contained: no scripts, nothing fetched.
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "a"}
    assert not re.search(r"https?:|@import|url\(", source)
    assert "prefers-color-scheme: dark" in source
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags

    images = page.images()
    names = ["metrics", "reliability", "learning_curves", "diversity", "augmentation", "perturbation"]
    assert images == [(path.parent / f"{name}.png").read_bytes() for name in names]
    for image in map(pixels, images):
        assert min(image.shape[:2]) > 300
        # Not blank: something is drawn in every quarter of the height.
        assert all(np.ptp(part[..., :3]) > 0.3 for part in np.array_split(image, 4))
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([f"{name}.png" for name in names] + ["report.html"])


EMPTY: dict[str, Any] = {"rows": [], "curves": {}, "reliability": {}, "strip": None, "augmented": None, "facts": {}}


@pytest.mark.parametrize(
    ("given", "pictures", "headings"),
    [
        ({}, [], []),
        ({"rows": ROWS[3:]}, [], ["Results"]),  # one seed: the table says it all
        ({"rows": ROWS[2:3]}, ["metrics"], ["Results", "Seeds"]),
        ({"curves": {"KD": run(0.5)}}, ["learning_curves"], ["Learning curves"]),
        ({"curves": {"KD": []}}, [], []),
        ({"reliability": {"KD": predictions()}}, ["reliability"], ["Reliability"]),
        ({"strip": strip(1)}, ["perturbation"], ["Perturbation"]),
        ({"augmented": augmented(1)}, ["augmentation"], ["Augmentation"]),
    ],
    ids=["nothing", "one-seed", "seeds", "curves", "empty-curves", "reliability", "strip", "augmented"],
)
def test_parts_without_data_are_left_out(tmp_path: Path, given: dict, pictures: list[str], headings: list[str]) -> None:
    page = Page(write(tmp_path, **(EMPTY | given)).read_text(encoding="utf-8"))
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == pictures
    assert len(page.images()) == len(pictures)
    assert [tag for tag, _ in page.tags].count("h2") == len(headings)
    assert all(heading in page.text for heading in headings)
    assert ("dl" in [tag for tag, _ in page.tags]) is False


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    given = EMPTY | {"rows": ROWS, "strip": strip(), "facts": {"seeds": "0"}}
    assert write(tmp_path / "a", **given).read_bytes() == write(tmp_path / "b", **given).read_bytes()


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, **EMPTY, title="old")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write(tmp_path, **EMPTY, title="new")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*File exists"):
        write(tmp_path / "taken", **EMPTY)


def test_students_losses_are_not_drawn_on_the_scale_of_their_teachers():
    def train(loss, **more):
        return [{"event": "train", "step": s, "epoch": s, "loss": x, **more} for s, x in enumerate(loss, 1)]

    figure = untyped(learning_curves)({"teachers": train([2.0, 0.01]), "KD": train([40.0, 28.0], loss_kd=1.0)})
    panel = figure.axes[0]
    assert panel.get_title(loc="left") == "Training loss of the students"
    assert panel.get_yscale() == "linear"
    drawn = [float(y) for line in panel.lines for y in line.get_ydata()]
    assert drawn
    assert min(drawn) >= 28.0


def validation(accuracy: list, nll: list) -> list[dict]:
    return [
        {"event": "validation", "step": i, "epoch": i, "accuracy": a, "nll": n}
        for i, (a, n) in enumerate(zip(accuracy, nll, strict=True), 1)
    ]


def test_a_curve_that_never_moves_has_an_axis_with_plain_numbers() -> None:
    """A small validation split gives the same accuracy again and again; its axis read ±0.01 around an offset."""
    figure = untyped(learning_curves)({"KD": validation([0.5] * 3, [1.0] * 3)})
    figure.canvas.draw()
    panel = figure.axes[1]
    low, high = panel.get_ylim()
    assert (low, high) == pytest.approx((47.5, 52.5))
    assert panel.yaxis.get_offset_text().get_text() == ""
    shown = [label.get_text() for label in panel.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert "50" in [text.removesuffix(".0") for text in shown]
    epochs = [x for x in panel.get_xticks() if 1 <= x <= 3]
    assert epochs == [1, 2, 3]


def test_the_best_member_is_in_view() -> None:
    figure = untyped(learning_curves)({"teachers": validation([[0.1, 0.3], [0.4, 0.9]], [[3.0, 2.0], [1.5, 0.2]])})
    assert figure.axes[1].get_ylim()[1] > 90
    assert figure.axes[2].get_ylim()[0] < 0.2

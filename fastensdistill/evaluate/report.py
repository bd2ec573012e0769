"""The report of a run or of a comparison: one HTML file that needs nothing else, and its pictures as PNGs beside it."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.evaluate.drawing import series
from fastensdistill.evaluate.landscape import Landscape
from fastensdistill.evaluate.landscape_plots import barrier_over_training, loss_around_branches
from fastensdistill.evaluate.plots import (
    FEW,
    diversity_over_training,
    learning_curves,
    line_styles,
    metric_dots,
    png,
    reliability_diagram,
)
from fastensdistill.evaluate.strips import Augmented, augmentation_strip, perturbation_strip
from fastensdistill.evaluate.tables import COLUMNS, Row, html_table, markdown_table, print_table, table, values
from fastensdistill.files import expanded, write_atomically

__all__ = ["Row", "markdown_table", "print_table", "read_metrics", "table", "write_report"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --quiet: #62676d; --line: #dcdfe3; --paper: #fff; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --quiet: #9aa1a8; --line: #3a4046; --paper: #16191c; --soft: #20252a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 88rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { color: var(--quiet); font-weight: 600; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); white-space: normal;
  min-width: 8.5rem; max-width: 18rem; }
tbody th { font-weight: 500; }
.sd, .note, figcaption { color: var(--quiet); }
td.sd { font-size: .85em; text-align: left; padding-left: 0; } .mean { padding-right: .3rem; }
.note, figcaption { font-size: .88rem; max-width: 46rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; padding: .8rem 1rem;
  background: var(--soft); border-radius: .5rem; font-size: .9rem; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .5rem; padding: .5rem; }
figcaption { margin-top: .5rem; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; } }
"""

_TABLE_NOTE = (
    "ACC: accuracy. NLL: mean −log(p of the label + 1e-8), nats. ECE: 15 equal bins (lo, hi] of the top probability. "
    "cNLL and cECE: after one temperature fitted on the validation images. Brier: squared error summed over classes. "
    "KL and agreement: over ordered pairs of members. An ensemble predicts the mean of its members' softmaxes. MACs: "
    "one forward pass of one image. Mean ± sample standard deviation over seeds; the best mean among students is bold."
)
_CAPTIONS = {
    "metrics": "Every seed of every row of the table. Differences smaller than the seeds' own spread mean little.",
    "reliability": "Test images sorted by the probability of the predicted class. A calibrated network's bars end on "
    "the dashed line; below it the network is surer than it is right. The lower panels show how many images each bar "
    f"stands for; bars with fewer than {FEW} are pale. Of a row with several seeds it is the first.",
    "learning_curves": "Training loss is smoothed; teachers' (cross-entropy) and students' (distillation) are not the "
    "same quantity. Validation is shown from where runs begin to differ; students are validated as what is deployed, "
    "LatentBE as its averaged network. Thin lines are single seeds; a dot marks the weights that a run ended with.",
    "diversity": "How far branches are apart from one another, and teachers likewise. Branches start equal; the closer "
    "they come to the teachers' line, the more of the ensemble's disagreement they hold.",
    "barrier": "A student that ships the average of its branches is as good as they are only while no wall of loss "
    "stands between them. The barrier is how far the average, or a network half-way from it to a branch, lies above "
    "what the branches' own losses give; below zero the average is better than its branches. In the shaded region the "
    "branches have parted: a lower learning rate or a longer warm-up keeps them together.",
    "landscape": "Left, the loss of networks whose factors lie between the average (star) and each branch (dots), and "
    "a little beyond. Right, the plane through three branches, drawn as an equilateral triangle; light is good. In one "
    "basin the branches and all that lies between them are light, so that the average is as good as they are; a dark "
    "wall between them is why an average fails. On some validation images, with the weights that were kept; of a row "
    "with several seeds it is the first.",
    "augmentation": "Above, training images; below each, three of the images that a network sees in its place. Of what "
    "is shown for one image nothing should make it another class's, unless it was mixed with the image to its left.",
    "perturbation": "Above, test images; in the middle, what the student would be trained on instead; below, the "
    "difference about grey, amplified as the picture says.",
}
_TITLES = {
    "metrics": "Seeds",
    "reliability": "Reliability",
    "learning_curves": "Learning curves",
    "diversity": "Diversity over training",
    "barrier": "The average and its branches",
    "landscape": "The loss around the branches",
    "augmentation": "Augmentation",
    "perturbation": "Perturbation",
}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order. A last line that was cut off, as by a killed run, is left out.

    Raises:
        InputError: no such file, or a line before the last that is not a JSON object.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"metrics {str(path)!r} cannot be read: {error.strerror}") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # of JSON and of UTF-8
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif any(rest.strip() for rest in lines[number:]):
            raise InputError(f"metrics {str(path)!r}: expected a JSON object in line {number}, found {line[:40]!r}")
    return records


def write_report(
    folder: Path,
    *,
    title: str,
    rows: Sequence[Row],
    curves: Mapping[str, list[dict[str, Any]]],
    reliability: Mapping[str, tuple[Tensor, Tensor]],
    strip: tuple[Tensor, Tensor, Sequence[str]] | None,
    facts: Mapping[str, str],
    augmented: Augmented | None = None,
    landscapes: Mapping[str, Landscape] | None = None,
) -> Path:
    """Write ``report.html`` and its pictures into ``folder``, which is made where it is missing.

    Every file appears whole or not at all, the page last. A part without data is left out.

    Args:
        folder: where to.
        title: the page's heading.
        rows: the results table.
        curves: run -> records of its metrics.jsonl (see :func:`read_metrics`); runs that differ in a trailing
            "seed N" of their name are drawn as one.
        reliability: name -> ((N, C) probabilities, (N,) labels), on test images.
        strip: (images (n, 1 or 3, H, W) in [0, 1], the same perturbed, n titles).
        facts: what a reader has to know besides, in order: dataset, recipe, seeds, hardware, versions.
        landscapes: name -> the loss around a student's branches.
        augmented: training images and what the last run's augmentation makes of them.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: data that a picture refuses, or a folder that cannot be written to (also: no space left).
    """
    styles = line_styles([*(row.name for row in rows), *curves, *reliability])
    pictures: dict[str, bytes] = {}
    dots = _dots(rows)
    if dots:
        pictures["metrics"] = png(metric_dots(dots, styles=styles))
    if reliability:
        pictures["reliability"] = png(reliability_diagram(reliability, styles=styles))
    logged = [(event, key) for event, key in (("train", "loss"), ("validation", "accuracy"), ("validation", "nll"))]
    if any(len(series(records, *which)[0]) for records in curves.values() for which in logged):
        pictures["learning_curves"] = png(learning_curves(curves, styles=styles))
    if any(len(series(records, "validation", "branch_kl")[0]) for records in curves.values()):
        pictures["diversity"] = png(diversity_over_training(curves, styles=styles))
    if any(len(series(records, "validation", "barrier")[0]) for records in curves.values()):
        pictures["barrier"] = png(barrier_over_training(curves, styles=styles))
    if landscapes:
        pictures["landscape"] = png(loss_around_branches(landscapes))
    if augmented is not None:
        pictures["augmentation"] = png(augmentation_strip(augmented))
    if strip is not None:
        pictures["perturbation"] = png(perturbation_strip(*strip))

    parts = []
    if facts:
        lines = (f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
        parts.append(f"<dl>{''.join(lines)}</dl>")
    if rows:
        parts.append(f'<h2>Results</h2>\n<div class="wide">{html_table(rows)}</div>\n<p class="note">{_TABLE_NOTE}</p>')
    for stem, data in pictures.items():
        source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
        parts.append(
            f'<h2>{_TITLES[stem]}</h2>\n<figure><img src="{source}" alt="{_TITLES[stem]}: {_CAPTIONS[stem]}">'
            f"<figcaption>{_CAPTIONS[stem]}</figcaption></figure>"
        )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )

    folder = expanded(folder)
    for stem, data in pictures.items():
        write_atomically(folder / f"{stem}.png", data)
    write_atomically(folder / "report.html", page.encode("utf-8"))
    return folder / "report.html"


def _dots(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """What the picture of seeds shows; nothing unless some row has several seeds, since the table says the rest."""
    if len({row.name for row in rows}) < len(rows) or not any(len(row.metrics) > 1 for row in rows):
        return {}
    compared = [column for column in COLUMNS if column.better]
    shown = [row for row in rows if all(math.isfinite(v) for c in compared for v in values(row, c))]
    if not shown:
        return {}
    arrow = {+1: "↑", -1: "↓"}
    return {f"{c.title} {arrow[c.better]}": {row.name: values(row, c) for row in shown} for c in compared}

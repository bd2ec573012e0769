"""The report's pictures. Each function takes data and returns a matplotlib ``Figure``; nothing touches pyplot's state.

Colours are told apart with any colour vision; a name has the same colour in every picture drawn with the same
``styles`` (from :func:`line_styles`; without, colours go by order). Runs that differ only in a trailing seed ("KD,
seed 0", "KD, seed 1") share one colour and one entry in the legend: a thin line for each, a thick one for their mean.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.evaluate.drawing import (
    DOTS,
    QUIET,
    TEACHERS,
    LineStyle,
    Records,
    draw_runs,
    draw_teachers,
    empty_figure,
    kept_handle,
    largest,
    legend_height,
    line_styles,
    log_scale,
    mark_kept,
    run_handles,
    series,
    show_where_runs_end,
    style_of,
    styled,
    whole_epochs,
)
from fastensdistill.evaluate.metrics import accuracy, calibration_bins, ece

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 10
"""Bins of a reliability diagram with fewer images than this are drawn pale."""


@styled
def reliability_diagram(
    entries: Mapping[str, tuple[Tensor, Tensor]], *, bins: int = 15, styles: Mapping[str, LineStyle] | None = None
) -> Figure:
    """One panel for each classifier: accuracy against confidence, and below it where the confidences lie.

    Args:
        entries: name -> ((N, C) probabilities, (N,) labels).
        bins: equal bins (lo, hi] of the top probability, the same as in the ECE of the panel's title.
        styles: a colour for each name.

    Raises:
        InputError: no entries, or predictions that :func:`fastensdistill.evaluate.metrics.ece` refuses.
    """
    if not entries:
        raise InputError("reliability diagram: expected at least one classifier, found none")
    from matplotlib.patches import Patch

    styles = styles or line_styles(entries)
    columns = min(len(entries), 3 if len(entries) in (3, 5, 6, 9) else 4)
    rows = math.ceil(len(entries) / columns)
    names = {name: textwrap.fill(name, 27, max_lines=3, placeholder=" …") for name in entries}
    lines = max(text.count("\n") for text in names.values())
    figure = empty_figure(max(2.65 * columns + 0.5, 6.2), (3.5 + 0.17 * lines) * rows + 0.9, hspace=0, h_pad=0.03)
    figure.suptitle("Reliability: how often a prediction is right, by how sure it is")
    grid = figure.add_gridspec(rows, columns)
    edges = np.arange(bins) / bins
    bars: dict[str, Any] = {"width": 1 / bins, "align": "edge", "linewidth": 0.6}
    for i, (name, (p, labels)) in enumerate(entries.items()):
        counts, confidence, correct = (t.numpy() for t in calibration_bins(p, labels, bins))
        cell = grid[i // columns, i % columns].subgridspec(2, 1, height_ratios=[4, 1])
        upper = figure.add_subplot(cell[0])
        lower = figure.add_subplot(cell[1], sharex=upper)
        colour = style_of(name, styles).colour
        for filled, alpha in ((counts >= FEW, 1.0), ((counts > 0) & (counts < FEW), 0.3)):
            at, right, sure = edges[filled], correct[filled], confidence[filled]
            both = np.minimum(right, sure)
            upper.bar(at, both, color=colour, edgecolor="white", alpha=alpha, **bars)
            looks: list[tuple[np.ndarray, dict[str, Any]]] = [
                (right - both, {"facecolor": colour, "edgecolor": "white", "hatch": "///"}),
                (sure - both, {"facecolor": "#eeeeee", "edgecolor": "#8a8a8a", "hatch": "\\\\\\"}),
            ]
            for gap, look in looks:
                some = gap > 0
                upper.bar(at[some], gap[some], bottom=both[some], alpha=alpha, **look, **bars)
        upper.plot([0, 1], [0, 1], color="#222222", linewidth=1, linestyle=(0, (4, 3)))
        upper.set(xlim=(0, 1), ylim=(0, 1), yticks=[0, 0.5, 1], yticklabels=["0", "0.5", "1"])
        scores = f"ECE {ece(p, labels, bins):.3f}, ACC {100 * accuracy(p, labels):.1f} %"
        upper.set_title(f"{names[name]}\n{scores}", fontsize=10)
        upper.tick_params(labelbottom=False, labelsize=8)
        lower.bar(edges, 100 * counts / counts.sum(), color="#9a9a9a", edgecolor="white", **bars)
        lower.set(ylim=(0, 100), yticks=[0, 100], xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])
        lower.tick_params(labelsize=8)
        if i % columns == 0:
            upper.set_ylabel("accuracy", fontsize=9)
            lower.set_ylabel("images, %", fontsize=9)
            figure.align_ylabels([upper, lower])
        if i // columns == rows - 1:  # not where a column ends early: its panel would shrink
            lower.set_xlabel("top probability", fontsize=9)
    figure.legend(
        handles=[
            Patch(facecolor="#eeeeee", edgecolor="#8a8a8a", hatch="\\\\\\", label="surer than right"),
            Patch(facecolor="#777777", edgecolor="white", hatch="///", label="less sure than right"),
            Patch(facecolor="#777777", alpha=0.3, label=f"fewer than {FEW} images"),
        ],
        loc="outside lower center",
        ncols=3,
        fontsize=9,
    )
    return figure


@styled
def learning_curves(runs: Mapping[str, Records], *, styles: Mapping[str, LineStyle] | None = None) -> Figure:
    """Training loss, validation accuracy and validation NLL over epochs; the fourth quarter is the legend.

    Args:
        runs: name -> records. Values that are lists, one for each member of a training of several networks, are
            drawn as their mean with a band from the smallest to the largest.
        styles: a colour for each name without its seed.

    Raises:
        InputError: no run has a training or validation record.
    """
    panels = [
        ("train", "loss", "Training loss", "loss", 1.0),
        ("validation", "accuracy", "Validation accuracy", "accuracy, %", 100.0),
        ("validation", "nll", "Validation NLL", "NLL, nats", 1.0),
    ]
    if not any(len(series(r, event, key)[0]) for r in runs.values() for event, key, *_ in panels):
        raise InputError("learning curves: no run has a training or validation record")
    styles = styles or line_styles(runs)
    handles = run_handles(runs, styles, 48) + kept_handle(runs)
    figure = empty_figure(10, max(7.4, 2 * legend_height(handles) + 0.8))
    figure.suptitle("Learning curves")
    axes = figure.subplots(2, 2).ravel()
    # A distillation loss, tens of nats of which most are the teachers' own entropy, and a cross-entropy that ends near
    # zero have no scale in common: beside students, the teachers' loss is left out.
    students = {name: r for name, r in runs.items() if len(series(r, "train", "loss_kd")[0])}
    mixed = 0 < len(students) < len(runs)
    if mixed:
        panels[0] = ("train", "loss", "Training loss of the students", "loss", 1.0)
    for panel, (event, key, title, label, factor) in zip(axes, panels, strict=False):
        draw_runs(panel, students if mixed and event == "train" else runs, styles, event, key, factor)
        panel.set(xlabel="epoch", ylabel=label)
        whole_epochs(panel)
        panel.set_title(title)
        panel.grid(True, axis="y")
    if not mixed and any(largest(line) > 0 for line in axes[0].lines):
        log_scale(axes[0])
        axes[0].set_ylabel("loss (log scale)")
    show_where_runs_end(axes[1], higher_is_better=True)
    show_where_runs_end(axes[2], higher_is_better=False)
    for panel, (_, key, _, _, factor) in zip(axes[1:3], panels[1:], strict=True):
        mark_kept(panel, runs, styles, key, factor)
    axes[3].axis("off")
    legend = axes[3].legend(handles=handles, loc="center left", labelspacing=0.75)
    legend.set_in_layout(False)  # its quarter was made large enough
    return figure


@styled
def diversity_over_training(runs: Mapping[str, Records], *, styles: Mapping[str, LineStyle] | None = None) -> Figure:
    """How far the student's branches are from one another, beside their teachers: pairwise KL and agreement.

    Args:
        runs: name -> records; those without "branch_kl" are left out. Teachers that are the same for all runs are
            one grey line, others a dotted line in the run's colour.
        styles: a colour for each name without its seed.

    Raises:
        InputError: no run has a validation record with "branch_kl".
    """
    from matplotlib.lines import Line2D

    runs = {name: r for name, r in runs.items() if len(series(r, "validation", "branch_kl")[0])}
    if not runs:
        raise InputError("diversity: no run has a validation record with branch_kl")
    styles = styles or line_styles(runs)
    handles = run_handles(runs, styles, 48)
    if any(len(series(r, "validation", "teacher_kl")[0]) for r in runs.values()):
        handles.append(Line2D([], [], color=TEACHERS, label="teachers", **DOTS))
    figure = empty_figure(10, 4.2 + legend_height(handles[: math.ceil(len(handles) / 2)]))
    figure.suptitle("Diversity of the student's branches and of its teachers, on the validation images")
    axes = figure.subplots(1, 2)
    for panel, key, title, label, factor in (
        (axes[0], "kl", "Pairwise KL", "KL, nats", 1.0),
        (axes[1], "agreement", "Pairwise agreement of the predicted class", "agreement, %", 100.0),
    ):
        draw_runs(panel, runs, styles, "validation", f"branch_{key}", factor)
        if draw_teachers(panel, runs, styles, f"teacher_{key}", factor):
            handles[-1].set_color(QUIET)
            handles[-1].set_label("its teachers (dotted, in the run's colour)")
        panel.set(xlabel="epoch", ylabel=label)
        whole_epochs(panel)
        panel.set_title(title)
        panel.grid(True, axis="y")
    # Branches start equal and may stay a hundred times closer than the teachers: then only a log scale shows both.
    heights = [height for height in map(largest, axes[0].lines) if height > 0]
    if heights and max(heights) > 10 * min(heights):
        log_scale(axes[0])
        axes[0].set_ylabel("KL, nats (log scale)")
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@styled
def metric_dots(
    values: Mapping[str, Mapping[str, Sequence[float]]], *, styles: Mapping[str, LineStyle] | None = None
) -> Figure:
    """Every seed's value as a dot and their mean as a line: whether a difference is larger than the seeds' own.

    Args:
        values: a metric's label -> name of the classifier -> one value per seed. All metrics have the same names.
        styles: a colour for each name.

    Raises:
        InputError: nothing to show.
    """
    if not values or not all(all(by_name.values()) and by_name for by_name in values.values()):
        raise InputError("metrics: expected at least one metric of one classifier, found none")
    names = list(next(iter(values.values())))
    styles = styles or line_styles(names)
    labels = [textwrap.fill(name, 26, max_lines=3, placeholder=" …") for name in names]
    columns = min(3, len(values))
    rows = math.ceil(len(values) / columns)
    height = sum(0.2 + 0.16 * (label.count("\n") + 1) for label in labels)
    figure = empty_figure(2.6 + 2.5 * columns, 0.6 + rows * (0.75 + height))
    figure.suptitle("Metrics: a dot for each seed, a line at their mean")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel in panels[len(values) :]:
        panel.axis("off")
    for panel, (metric, by_name) in zip(panels, values.items(), strict=False):
        for i, name in enumerate(names):
            seeds = list(by_name[name])
            colour = style_of(name, styles).colour
            panel.plot(seeds, [i] * len(seeds), "o", color=colour, markersize=6, alpha=0.65, markeredgewidth=0)
            panel.plot([sum(seeds) / len(seeds)] * 2, [i - 0.28, i + 0.28], color=colour, linewidth=2)
        panel.set_title(metric)
        panel.set(yticks=range(len(names)), yticklabels=labels, ylim=(len(names) - 0.5, -0.5))
        panel.margins(x=0.12)
        panel.locator_params(axis="x", nbins=4)
        panel.grid(True)
        panel.tick_params(axis="y", length=0, labelcolor="#222222")
    return figure


def png(figure: Figure) -> bytes:
    """``figure`` as a PNG of 140 dots per inch; the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": ""})
    return buffer.getvalue()

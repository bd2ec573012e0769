"""Pictures of a student's average among its branches: over training, and the loss around them at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.nn.functional import interpolate

from fastensdistill.errors import InputError
from fastensdistill.evaluate.drawing import (
    QUIET,
    LineStyle,
    Records,
    draw_runs,
    empty_figure,
    legend_height,
    line_styles,
    run_handles,
    series,
    style_of,
    styled,
    whole_epochs,
)
from fastensdistill.evaluate.landscape import BARRIER, Landscape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BRANCHES: dict[str, Any] = {"linestyle": (0, (5, 2)), "linewidth": 1.6}
HALFWAY: dict[str, Any] = {"linestyle": (0, (1, 1.3)), "linewidth": 1.6}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # of branches


@styled
def barrier_over_training(runs: Mapping[str, Records], *, styles: Mapping[str, LineStyle] | None = None) -> Figure:
    """Accuracy and NLL of the average beside its branches, and the barrier between them, over epochs.

    Args:
        runs: name -> records; those without "barrier" are left out.
        styles: a colour for each name without its seed.

    Raises:
        InputError: no run has a validation record with "barrier".
    """
    from matplotlib.lines import Line2D

    runs = {name: r for name, r in runs.items() if len(series(r, "validation", "barrier")[0])}
    if not runs:
        raise InputError("barrier: no run has a validation record with barrier")
    styles = styles or line_styles(runs)
    average: dict[str, Any] = {"linestyle": "-", "linewidth": 1.8}
    looks = (("the average, which is shipped", average), ("its branches, their mean", BRANCHES),
             ("half-way from it to the worst of them", HALFWAY))  # fmt: skip
    handles = run_handles(runs, styles, 30) if len(runs) > 1 else []
    handles += [Line2D([], [], color=QUIET, label=label, **look) for label, look in looks]
    figure = empty_figure(12, 4.2 + legend_height(handles[: math.ceil(len(handles) / 3)]))
    figure.suptitle("The average of the branches, and its barrier, on the validation images")
    axes = figure.subplots(1, 3)
    for panel, key, title, label, factor in (
        (axes[0], "accuracy", "Accuracy", "accuracy, %", 100.0), (axes[1], "nll", "NLL", "NLL, nats", 1.0),
    ):  # fmt: skip
        draw_runs(panel, runs, styles, "validation", key, factor)
        for name, records in runs.items():
            colour = style_of(name, styles).colour
            epochs, values = series(records, "validation", f"branch_{key}")
            panel.plot(epochs, factor * values.mean(1), color=colour, **BRANCHES)
            if key == "nll":
                epochs, values = series(records, "validation", "midpoint_nll")
                panel.plot(epochs, values.max(1), color=colour, **HALFWAY)
        panel.set(title=title, ylabel=label)
    draw_runs(axes[2], runs, styles, "validation", "barrier", 1.0)
    axes[2].set_yscale("symlog", linthresh=BARRIER)
    low, high = axes[2].get_ylim()
    axes[2].set(ylim=(min(low, -0.05), max(high, 0.3)), title="Barrier", ylabel="barrier, nats")
    ticks = [
        v
        for v in (-10, -3, -1, -0.3, -0.1, -0.05, 0, 0.05, 0.1, 0.3, 1, 3, 10)
        if min(low, -0.05) <= v <= max(high, 0.3)
    ]
    axes[2].set(yticks=ticks, yticklabels=[f"{v:g}" for v in ticks])
    axes[2].minorticks_off()
    axes[2].axhspan(BARRIER, max(high, 0.3), color="#D55E00", alpha=0.08, linewidth=0)
    axes[2].annotate(f"above {BARRIER:g} the branches part", (0.98, BARRIER), xycoords=("axes fraction", "data"),
                     ha="right", va="bottom", xytext=(0, 3), textcoords="offset points", fontsize=8.5,
                     color=QUIET)  # fmt: skip
    for panel in axes:
        panel.set_xlabel("epoch")
        whole_epochs(panel)
        panel.grid(True, axis="y")
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@styled
def loss_around_branches(landscapes: Mapping[str, Landscape]) -> Figure:
    """For each student the NLL along the lines from the average to its branches, and in the plane of three of them.

    Args:
        landscapes: name -> what ``landscape.landscape`` measured.

    Raises:
        InputError: nothing to show.
    """
    if not landscapes:
        raise InputError("loss around the branches: expected at least one student, found none")
    from matplotlib.colors import LogNorm

    rows, columns = len(landscapes), 2 if any(one.chosen for one in landscapes.values()) else 1
    figure = empty_figure(5.6 * columns + 0.6, 4.3 * rows + 0.6)
    figure.suptitle("The loss around the branches of a student")
    axes = figure.subplots(rows, columns, squeeze=False)
    every = list(landscapes.values())
    lowest = min(float(one.ways.nan_to_num(math.inf).min()) for one in every)
    guess = max(math.log(one.classes) for one in every)
    low, high = max(0.8 * lowest, 1e-3), max(1.5 * guess, 2 * lowest)
    for (name, one), (left, *right) in zip(landscapes.items(), axes, strict=True):
        steps = one.steps.numpy()
        for k, way in enumerate(one.ways.numpy()):
            colour = COLOURS[k % len(COLOURS)]
            left.plot(steps, way, color=colour, linewidth=1.8, label=f"to branch {k}")
            left.plot([1], [np.interp(1, steps, way)], "o", color=colour, markersize=7, markeredgecolor="white")
        middle = float(np.interp(0, steps, one.ways[0].numpy()))
        left.plot([0], [middle], "*", color="#222222", markersize=14, markeredgecolor="white", zorder=5)
        left.set_title(f"{name}: from the average to each branch")
        left.set(xticks=[0, 0.5, 1], xticklabels=["average", "half-way", "branch"], ylabel="validation NLL, nats")
        finite = one.ways[one.ways.isfinite()]
        left.set_ylim(0, min(float(finite.max()), max(3 * guess, 1.2 * middle)) * 1.05)
        left.grid(True, axis="y")
        left.legend(loc="best")
        if not right:
            continue
        panel = right[0]
        if not one.chosen:
            panel.axis("off")
            continue
        values, x, y = _finer(one, low, high)
        levels = np.geomspace(low, high, 13)
        filled = panel.contourf(x, y, values, levels=levels, norm=LogNorm(low, high), cmap="viridis_r", extend="max")
        panel.contour(x, y, values, levels=levels, colors="white", linewidths=0.4, alpha=0.7)
        centre = one.corners.mean(0)
        panel.plot(*centre, "*", color="#222222", markersize=16, markeredgecolor="white")
        panel.annotate(
            "average of the three", centre, xytext=(0, -15), textcoords="offset points", ha="center", **_LABEL
        )
        for k, corner in zip(one.chosen, one.corners, strict=True):
            panel.plot(*corner, "o", color=COLOURS[k % len(COLOURS)], markersize=10, markeredgecolor="white")
            panel.annotate(f"branch {k}", corner, xytext=(0, 9), textcoords="offset points", ha="center", **_LABEL)
        panel.set(aspect="equal", xticks=[], yticks=[])
        panel.set_title(f"{name}: the plane of three branches")
        bar = figure.colorbar(filled, ax=panel, shrink=0.9)
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if low <= t <= high]
        bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
        bar.set_label("validation NLL, nats", fontsize=9)
    return figure


def _finer(one: Landscape, low: float, high: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The plane (Y, X) between ``low`` and just above ``high``, interpolated to four times as many points, its x and y.

    Cubic in the logarithm. Around what is not finite nothing is drawn.
    """
    logs = one.plane.clamp(low, 1.05 * high).log()
    sides = [4 * (n - 1) + 1 for n in logs.shape]
    fine = interpolate(logs[None, None], sides, mode="bicubic", align_corners=True)[0, 0].exp().clamp(low, 1.05 * high)
    x, y = (np.linspace(float(line[0]), float(line[-1]), n) for line, n in ((one.x, sides[1]), (one.y, sides[0])))
    return np.ma.masked_invalid(fine.numpy()), x, y


_LABEL: dict[str, Any] = {
    "fontsize": 8.5, "color": "#222222", "bbox": {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5},
}  # fmt: skip

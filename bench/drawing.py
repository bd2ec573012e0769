"""The plots of results: throughput as bars, kernels under their roof, scaling with its fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from bench.contenders import CONTENDERS
from bench.setting import TITLES
from bench.throughput import OURS
from fastensdistill.evaluate.drawing import QUIET, empty_figure, line_styles, styled

if TYPE_CHECKING:
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

Run = dict[str, Any]
NAMES = {
    "branches": "K, branches", "teachers": "M, teachers", "batch": "B, images", "width": "width",
    "depth": "blocks in a group",
}  # fmt: skip


def caption(run: Run) -> str:
    host = run["host"]
    text = f"{host['device']}, PyTorch {host['torch']}, commit {host['commit']}"
    return f"SMOKE RUN, NO RESULT: {text}" if run["smoke"] else text


def setting(row: Run) -> str:
    members = f"M = K = {row['members']}" if row["method"] in ("latentbe", "tdiv-sdiv") else f"M = {row['members']}"
    return f"{row['network']}, {TITLES[row['method']]}, batch {row['batch']}, {members}"


@styled
def throughput(run: Run) -> Figure:
    """A panel per setting, a bar per contender, longest first; whiskers from the 20th to the 80th percentile."""
    rows = [row for row in run["rows"] if row.get("images_per_second")]
    settings = list(dict.fromkeys(setting(row) for row in rows))
    groups = [sorted((r for r in rows if setting(r) == s), key=lambda r: r["images_per_second"]) for s in settings]
    heights = [0.75 + 0.3 * len(group) for group in groups]
    figure = empty_figure(8.6, 0.55 + sum(heights), hspace=0.04)
    panels = np.atleast_1d(figure.subplots(len(groups), 1, height_ratios=heights))
    styles = line_styles(c.title for c in CONTENDERS.values())
    for panel, name, group in zip(panels, settings, groups, strict=True):
        values = np.array([row["images_per_second"] for row in group])
        whiskers = np.abs(np.array([[row["p20"], row["p80"]] for row in group]).T - values)
        ours = [row["contender"] in OURS for row in group]
        colours = [styles[CONTENDERS[row["contender"]].title].colour if own else "#b9c2c9"
                   for row, own in zip(group, ours, strict=True)]  # fmt: skip
        bars = panel.barh(range(len(group)), values, color=colours, height=0.7, xerr=whiskers,
                          error_kw={"ecolor": "#444444", "elinewidth": 1})  # fmt: skip
        panel.set_yticks(range(len(group)), [row["title"] for row in group])  # two may have one, if nothing is captured
        best = values[ours].max() if any(ours) else None
        for bar, row, value in zip(bars, group, values, strict=True):
            notes = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            if best and row["contender"] not in OURS:
                notes += f"   ours {best / value:.2f}x as fast"
            if row.get("share_of_roof"):
                notes += f"   {100 * row['share_of_roof']:.0f}% of the roof"
            panel.text(row["p20"] if row["p20"] > value else max(row["p80"], value), bar.get_y() + bar.get_height() / 2,
                       f"  {notes}", va="center", fontsize=9, color="#333333")  # fmt: skip
        panel.set_title(name)
        panel.set_xlim(0, 1.5 * values.max())
        panel.tick_params(axis="y", length=0, labelcolor="#222222")
        panel.spines["left"].set_visible(False)
        panel.grid(axis="x")
    panels[-1].set_xlabel("images per second: median, 20th to 80th percentile")
    figure.suptitle(caption(run), fontsize=8.5, color=QUIET, x=0.01, ha="left")
    return figure


@styled
def kernels(run: Run) -> Figure:
    """Achieved FLOP/s over FLOPs per byte, under the measured roof; the area of a dot is its share of the step."""
    rows = [row for row in run["rows"] if row.get("us") and row.get("flops")]
    figure = empty_figure(8.6, 5.0)
    axes = figure.subplots()
    roof, total = run["roof"], sum(row["us"] * row["count"] for row in rows)
    styles = line_styles(row["op"] for row in rows)
    intensity = np.array([row["flops"] / row["nbytes"] for row in rows])
    low, high = intensity.min() / 2, max(intensity.max(), roof["flops_per_second"] / roof["bytes_per_second"]) * 3
    x = np.geomspace(low, high, 200)
    axes.plot(
        x, np.minimum(roof["flops_per_second"], x * roof["bytes_per_second"]) / 1e12, color="#222222", linewidth=1.6
    )
    axes.text(high, 1.05 * roof["flops_per_second"] / 1e12, f"measured: {roof['flops_per_second'] / 1e12:.3g} TFLOP/s",
              ha="right", va="bottom", fontsize=9)  # fmt: skip
    corner = (low * roof["flops_per_second"] / roof["bytes_per_second"]) ** 0.5  # the middle of the slope
    axes.annotate(f"{roof['bytes_per_second'] / 1e12:.3g} TB/s", (corner, corner * roof["bytes_per_second"] / 1e12),
                  xytext=(-8, 4), textcoords="offset points", fontsize=9, ha="right")  # fmt: skip
    for op, style in styles.items():
        own = [i for i, row in enumerate(rows) if row["op"] == op]
        sizes = [15 + 1500 * rows[i]["us"] * rows[i]["count"] / total for i in own]
        axes.scatter(intensity[own], [rows[i]["tflops"] for i in own], s=sizes, color=style.colour, alpha=0.65,
                     edgecolor="white", linewidth=0.6, label=op)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that a launch has to move", ylabel="TFLOP/s")
    axes.grid()
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title="area: share of\nthe step's time")
    for handle in legend.legend_handles:
        cast("PathCollection", handle).set_sizes([40])
    of = run["setting"]
    axes.set_title(f"{of['network']}, {TITLES[of['method']]}, batch {of['batch']}, M = K = {of['members']}")
    figure.suptitle(caption(run), fontsize=8.5, color=QUIET, x=0.01, ha="left")
    return figure


@styled
def scaling(run: Run) -> Figure:
    """A panel for each thing varied: milliseconds over its value, both logarithmic, and the fitted exponent."""
    fits = {fit["vary"]: fit for fit in run["fits"]}
    names = list(dict.fromkeys(row["vary"] for row in run["rows"]))
    figure = empty_figure(2.5 * max(len(names), 2) + 0.6, 3.1)
    panels = np.atleast_1d(figure.subplots(1, len(names), sharey=True))
    for panel, name in zip(panels, names, strict=True):
        rows = [row for row in run["rows"] if row["vary"] == name]
        x, y = np.array([row["value"] for row in rows]), np.array([row["ms"] for row in rows])
        panel.fill_between(x, [row["p20"] for row in rows], [row["p80"] for row in rows], color="#0072B2", alpha=0.2)
        panel.plot(x, y, "o-", color="#0072B2", linewidth=1.6, markersize=4.5, label="measured")
        work = np.array([row["gflop"] for row in rows])
        panel.plot(x, work * y[-1] / work[-1], color=QUIET, linestyle=(0, (4, 2)), linewidth=1.2, label="least work")
        panel.set(xscale="log", yscale="log", xlabel=NAMES[name], xticks=x)
        panel.set_xticks(x, [str(v) for v in x])
        panel.minorticks_off()
        panel.grid()
        if name in fits:
            panel.set_title(
                f"exponent {fits[name]['exponent']:.2f}\nleast work {fits[name]['least_work']:.2f}", fontsize=9
            )
    panels[0].set_ylabel("ms a step")
    panels[0].legend(loc="upper left", fontsize=8.5)
    figure.suptitle(f"{run['engine']} engine; {caption(run)}", fontsize=8.5, color=QUIET, x=0.01, ha="left")
    return figure


PLOTS: dict[str, Callable[[Run], Figure]] = {"throughput": throughput, "kernels": kernels, "scaling": scaling}


def draw(stem: str, run: Run, folder: Path) -> list[Path]:
    """The plot of a run as SVG, for the README, and PNG; none for kinds that have a table only, or nothing timed."""
    plot, number = PLOTS.get(run["kind"]), {"throughput": "images_per_second", "kernels": "us", "scaling": "ms"}
    if plot is None or not any(row.get(number[run["kind"]]) for row in run["rows"]):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    figure = plot(run)
    files = [folder / f"{stem}{suffix}" for suffix in (".svg", ".png")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files

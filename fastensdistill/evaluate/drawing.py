"""What the report's pictures share: names and their colours, series from a run's records, and a plain style."""

from __future__ import annotations

import functools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = list[dict[str, Any]]
"""The lines of one run's metrics.jsonl."""

QUIET, TEACHERS = "#666666", "#444444"
DOTS: dict[str, Any] = {"linestyle": (0, (1, 1.5)), "linewidth": 1.6}

# Okabe and Ito's colours without yellow, which is lost on white, and their black softened to a grey
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.3)))
_SEED = re.compile(r"[\s,;:/_(\[-]*(?<![a-zA-Z])seed[\s_=-]*\d+\s*[)\]]?\s*$", re.IGNORECASE)
_LOOK: dict[Any, Any] = {
    "font.size": 10,
    "font.family": ["DejaVu Sans"],
    "text.color": "#222222",
    "text.parse_math": False,  # a name may hold dollars
    "axes.facecolor": "white",
    "axes.titlesize": 11,
    "axes.formatter.useoffset": False,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.labelcolor": "#222222",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "grid.linestyle": "-",
    "xtick.color": "#999999",
    "ytick.color": "#999999",
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "figure.titlesize": 13,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "hatch.linewidth": 0.9,
}
_P = ParamSpec("_P")


@dataclass(frozen=True)
class LineStyle:
    """How one name is drawn: its colour, and the dashes that tell it from another name of that colour."""

    colour: str
    dashes: Any = "-"


def without_seed(name: str) -> str:
    """``name`` less a trailing seed: "KD, seed 3", "KD (seed 3)" and "KD/seed3" all give "KD".

    >>> without_seed("LatentBE + TDiv (seed 12)")
    'LatentBE + TDiv'
    """
    return _SEED.sub("", name) or name


def line_styles(names: Iterable[str]) -> dict[str, LineStyle]:
    """A style for each name without its seed, in order of first appearance: 7 colours, then 7 dashed, then dotted."""
    distinct = list(dict.fromkeys(without_seed(name) for name in names))
    return {
        name: LineStyle(_COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)])
        for i, name in enumerate(distinct)
    }


def style_of(name: str, styles: Mapping[str, LineStyle]) -> LineStyle:
    """The style of ``name`` without its seed; the first colour where ``styles`` does not have it."""
    return styles.get(without_seed(name), LineStyle(_COLOURS[0]))


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """``draw`` under this module's settings, whatever the caller has done to matplotlib's."""

    @functools.wraps(draw)
    def inside(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        from matplotlib import rc_context

        with rc_context(_LOOK):
            return draw(*args, **kwargs)

    return inside


def empty_figure(width: float, height: float, **pads: Any) -> Figure:
    """A white figure (inches) on an Agg canvas, with a layout that keeps texts apart; ``pads`` are that layout's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(**pads)
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def series(records: Records, event: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs (n,) and values (n, members) of one quantity, sorted by epoch.

    Of two records of one epoch the later counts (a resumed run repeats some); values that are not finite are left out.
    """
    found: dict[float, list[float]] = {}
    for record in records:
        value = record.get(key)
        if record.get("event") != event or value is None or "epoch" not in record:
            continue
        members = [float(v) for v in value] if isinstance(value, list) else [float(value)]
        if members and all(math.isfinite(v) for v in members):
            found[float(record["epoch"])] = members
    epochs = sorted(found)
    width = min((len(found[e]) for e in epochs), default=1)
    return np.array(epochs), np.array([found[e][:width] for e in epochs]).reshape(len(epochs), width)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a fortieth of the points, over those there are at either end; (n,) to (n,)."""
    half = len(values) // 80
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def draw_runs(
    axes: Axes, runs: Mapping[str, Records], styles: Mapping[str, LineStyle], event: str, key: str, factor: float
) -> None:
    """Every run's curve, thin where several differ in their seed alone, and then a thick one for their mean.

    Means need the same epochs in all. Several members are drawn as their mean and a band over their range. Only
    training losses are smoothed: there is one for every few steps.
    """
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name, records in runs.items():
        epochs, values = series(records, event, key)
        if len(epochs):
            groups.setdefault(without_seed(name), []).append((epochs, factor * values))
    even = smooth if event == "train" else np.asarray
    for base, curves in groups.items():
        style = style_of(base, styles)
        same = len(curves) > 1 and all(np.array_equal(e, curves[0][0]) for e, _ in curves)
        for epochs, values in curves:
            if values.shape[1] > 1:
                low, high = even(values.min(1)), even(values.max(1))
                axes.fill_between(epochs, low, high, color=style.colour, alpha=0.18, linewidth=0)
            _line(axes, epochs, even(values.mean(1)), style, 1.0 if same else 1.8, 0.4 if same else 1.0)
        if same:
            mean = np.mean([values.mean(1) for _, values in curves], axis=0)
            _line(axes, curves[0][0], even(mean), style, 2.2, 1.0)


def kept_looks(records: Records) -> dict[str, np.ndarray]:
    """Of the weights that a run ended with: "epoch", "accuracy" and "nll", (members,) each; {} where it does not say.

    A member whose values are not finite is left out.
    """
    found = [record for record in records if record.get("event") == "kept" and "kept_epoch" in record][-1:]
    for record in found:
        keys = {"epoch": "kept_epoch", "accuracy": "accuracy", "nll": "nll"}
        looks = {key: np.atleast_1d(np.asarray(record.get(own, ()), dtype=float)) for key, own in keys.items()}
        if len({len(values) for values in looks.values()}) == 1:
            fine = np.isfinite(np.stack(list(looks.values()))).all(0)
            return {key: values[fine] for key, values in looks.items()}
    return {}


def mark_kept(
    axes: Axes, runs: Mapping[str, Records], styles: Mapping[str, LineStyle], key: str, factor: float
) -> None:
    """A dot for the weights that each run, or each member of it, ended with; the axes' limits stay as they are."""
    limits = axes.get_xlim(), axes.get_ylim()
    for name, records in runs.items():
        looks = kept_looks(records)
        if looks:
            look: dict[str, Any] = {"color": style_of(name, styles).colour, "edgecolors": "white", "linewidths": 0.9}
            axes.scatter(looks["epoch"], factor * looks[key], s=34, zorder=4, **look)
    axes.set(xlim=limits[0], ylim=limits[1])


def kept_handle(runs: Mapping[str, Records]) -> list[Any]:
    """The legend's entry for :func:`mark_kept`, where any run says what it ended with."""
    from matplotlib.lines import Line2D

    if not any(kept_looks(records) for records in runs.values()):
        return []
    look: dict[str, Any] = {"marker": "o", "linestyle": "", "color": QUIET, "markeredgecolor": "white"}
    return [Line2D([], [], markersize=7, label="the weights that were kept", **look)]


def draw_teachers(
    axes: Axes, runs: Mapping[str, Records], styles: Mapping[str, LineStyle], key: str, factor: float
) -> bool:
    """The teachers' values, dotted; True if they differ between runs and so were drawn in the runs' colours."""
    found = {name: series(records, "validation", key) for name, records in runs.items()}
    found = {name: (e, factor * v.mean(1)) for name, (e, v) in found.items() if len(e)}
    everything = np.concatenate([v for _, v in found.values()]) if found else np.zeros(0)
    if len(everything) and np.ptp(everything) <= 1e-6 * abs(everything).max():
        first, last = min(e[0] for e, _ in found.values()), max(e[-1] for e, _ in found.values())
        axes.plot([first, last], [everything[0]] * 2, color=TEACHERS, **DOTS)
        return False
    for name, (epochs, values) in found.items():
        axes.plot(epochs, values, color=style_of(name, styles).colour, **DOTS)
    return bool(found)


def run_handles(runs: Mapping[str, Records], styles: Mapping[str, LineStyle], width: int) -> list[Any]:
    """Legend entries: one for each name without its seed, saying how many seeds or members it stands for.

    Texts are broken into lines of ``width`` characters.
    """
    from matplotlib.lines import Line2D

    handles = []
    for base in dict.fromkeys(without_seed(name) for name in runs):
        own = [r for name, r in runs.items() if without_seed(name) == base]
        members = max(series(r, "validation", "accuracy")[1].shape[1] for r in own)
        notes = [f"{len(own)} seeds"] if len(own) > 1 else []
        notes += [f"mean and range of {members}"] if members > 1 else []
        label = textwrap.fill(f"{base} ({', '.join(notes)})" if notes else base, width)
        label = f" {label}" if label.startswith("_") else label  # matplotlib hides labels that begin with one
        style = style_of(base, styles)
        handles.append(Line2D([], [], color=style.colour, linestyle=style.dashes, linewidth=2.2, label=label))
    return handles


def legend_height(handles: Iterable[Any]) -> float:
    """Inches that these entries need, one below the other."""
    return sum(0.12 + 0.16 * (1 + handle.get_label().count("\n")) for handle in handles)


def largest(line: Any) -> float:
    """The largest finite value of a line, 0 where there is none."""
    values = np.asarray(line.get_ydata(), dtype=float)
    return float(values[np.isfinite(values)].max(initial=0.0))


def log_scale(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers, more of them where it spans fewer decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log", nonpositive="mask")
    low, high = axes.get_ylim()
    span = high / low
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if span < 15 else (1.0, 2.0, 5.0) if span < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def whole_epochs(axes: Axes) -> None:
    """No ticks between epochs, where nothing is measured."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def show_where_runs_end(axes: Axes, higher_is_better: bool) -> None:
    """Cut off the first epochs, where all runs look alike, so that the differences they end with can be seen.

    Shown is everything from the best value to three quarters (for a loss, to 2.5 times) of the worst last one.
    """
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    if not lines:
        return
    last = [float(line[-1]) for line in lines]
    bands = [np.asarray(path.vertices)[:, 1] for band in axes.collections for path in band.get_paths()]
    low, high = (float(f([f(values) for values in lines + bands])) for f in (np.min, np.max))
    if higher_is_better:
        low = max(low, 0.75 * min(last))
    else:
        high = min(high, 2.5 * max(last))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.01
    axes.set_ylim(low - margin, high + margin)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, style: LineStyle, width: float, alpha: float) -> None:
    marker = "o" if len(x) == 1 else ""  # a single point has no line
    axes.plot(x, y, color=style.colour, linestyle=style.dashes, linewidth=width, alpha=alpha, marker=marker)

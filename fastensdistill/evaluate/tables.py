"""The results table, as data and rendered for the terminal and the HTML report."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fastensdistill.errors import InputError, unknown
from fastensdistill.evaluate.metrics import Metrics

GROUPS = ("teachers", "student", "ensemble")
MISSING = "–"
NAMES = 32  # columns of a terminal for the names of rows, at most


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: what the reader sees.
        group: "teachers", "student" or "ensemble"; only students are compared with one another.
        metrics: one for each seed.
        parameters: of everything that is evaluated for one prediction.
        macs: multiply-accumulates of the forward pass of one image, of the same.
    """

    name: str
    group: str
    metrics: list[Metrics]
    parameters: int
    macs: int

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise unknown("group of rows", self.group, GROUPS)
        if not self.metrics:
            raise InputError(f"row {self.name!r}: expected the metrics of at least one seed, found none")


@dataclass(frozen=True)
class Column:
    """A metric in the table: its title, the decimals shown after ``factor``, and which end is good (0: neither)."""

    key: str
    title: str
    decimals: int
    factor: float
    better: int


COLUMNS = (
    Column("accuracy", "ACC %", 2, 100.0, +1),
    Column("nll", "NLL", 3, 1.0, -1),
    Column("ece", "ECE", 3, 1.0, -1),
    Column("cnll", "cNLL", 3, 1.0, -1),
    Column("cece", "cECE", 3, 1.0, -1),
    Column("brier", "Brier", 3, 1.0, -1),
    Column("diversity_kl", "KL", 3, 1.0, 0),
    Column("agreement", "agreement", 3, 1.0, 0),
)
_SIZES = (("parameters", "parameters"), ("macs", "MACs"))


def values(row: Row, column: Column) -> list[float]:
    """The column's value for each seed that has one, in the units of the table."""
    found = [getattr(metrics, column.key) for metrics in row.metrics]
    return [column.factor * value for value in found if value is not None]


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The printed table, one dictionary for each row.

    Returns:
        Keys "name", "group", "seeds", "parameters", "macs" (texts), and for each metric by its field's name a
        dictionary of "mean" and "sd" (texts; sd is the sample standard deviation over seeds, empty for one seed) and
        "best": whether this is the best printed mean among students (all that share it; none where all do).
    """
    out: list[dict[str, Any]] = []
    for row in rows:
        line: dict[str, Any] = {"name": row.name, "group": row.group, "seeds": str(len(row.metrics))}
        for column in COLUMNS:
            seeds = values(row, column)
            mean = f"{statistics.fmean(seeds):.{column.decimals}f}" if seeds else MISSING
            # statistics.stdev refuses infinities, which a metric never is, and gives NaN for NaN
            sd = f"{statistics.stdev(seeds):.{column.decimals}f}" if len(seeds) > 1 else ""
            line[column.key] = {"mean": mean, "sd": sd, "best": False}
        line["parameters"], line["macs"] = short(row.parameters), short(row.macs)
        out.append(line)
    students = [line for line in out if line["group"] == "student"]
    for column in COLUMNS:
        cells = [line[column.key] for line in students if line[column.key]["mean"] not in (MISSING, "nan")]
        printed = {float(cell["mean"]) for cell in cells}
        if column.better and len(printed) > 1:
            best = max(printed) if column.better > 0 else min(printed)
            for cell in cells:
                cell["best"] = float(cell["mean"]) == best
    return out


def short(count: int) -> str:
    """A count in four digits: 375348 is "375.3 k", 5872180 is "5.872 M"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size * 0.99995:  # what would round to 1000 of the unit below
            return f"{float(f'{count / size:.4g}'):g} {unit}"
    return str(count)


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown, best students in bold; ends with a newline."""

    def cell(value: dict[str, Any]) -> str:
        mean = f"**{value['mean']}**" if value["best"] else value["mean"]
        return f"{mean} ± {value['sd']}" if value["sd"] else mean

    titles = ["", "seeds", *(column.title for column in COLUMNS), *(title for _, title in _SIZES)]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for line in table(rows):
        name = line["name"].replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
        cells = [name, line["seeds"], *(cell(line[column.key]) for column in COLUMNS)]
        lines.append("| " + " | ".join(cells + [line[key] for key, _ in _SIZES]) + " |")
    return "\n".join(lines) + "\n"


def html_table(rows: Sequence[Row]) -> str:
    """The table as an HTML ``<table>`` with escaped names; standard deviations are columns, so that means align."""

    def cell(value: dict[str, Any]) -> str:
        mean = f"<b>{value['mean']}</b>" if value["best"] else value["mean"]
        return f'<td class="mean">{mean}</td><td class="sd">{"± " + value["sd"] if value["sd"] else ""}</td>'

    head = '<th scope="col"></th><th scope="col">seeds</th>'
    head += "".join(f'<th scope="col" class="mean">{column.title}</th><th></th>' for column in COLUMNS)
    head += "".join(f'<th scope="col">{title}</th>' for _, title in _SIZES)
    body = []
    for line in table(rows):
        cells = f"<td>{line['seeds']}</td>" + "".join(cell(line[column.key]) for column in COLUMNS)
        cells += "".join(f"<td>{line[key]}</td>" for key, _ in _SIZES)
        body.append(f'<tr class="{line["group"]}"><th scope="row">{html.escape(line["name"])}</th>{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(body)}</tbody></table>"


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print the table, as wide as the console allows.

    Mean and standard deviation stand beside each other where there is room, else one above the other; a console
    that is too narrow for that gets several tables, quality first, then diversity and size. No number is ever broken.
    """
    lines = table(rows)
    quality: list[Column | str] = ["seeds", *(c for c in COLUMNS if c.better)]
    others: list[Column | str] = [*(c for c in COLUMNS if not c.better), *(key for key, _ in _SIZES)]
    for separator in (" ± ", "\n±"):
        whole = _rich_table(lines, [*quality, *others], separator)
        if _fits(whole, console):
            console.print(whole)
            return
    parts = [_rich_table(lines, half, "\n±") for half in (quality, others)]
    if not all(_fits(part, console) for part in parts):
        parts = _as_fits(lines, [*quality, *others], console)
    for part in parts:
        console.print(part)


def _as_fits(lines: Sequence[dict[str, Any]], columns: Sequence[Column | str], console: Console) -> list[Table]:
    """Tables of as many ``columns`` each as fit, for a narrow console: names are broken, and columns are close."""
    parts = []
    names = min(NAMES, max(12, console.width // 3))
    while columns:
        for count in range(len(columns), 0, -1):
            part = _rich_table(lines, columns[:count], "\n±", names, padding=(0, 1, 0, 0))
            if _fits(part, console):
                break
        parts.append(part)
        columns = columns[count:]
    return parts


def _fits(candidate: Table, console: Console) -> bool:
    """Whether no cell has to be broken: the widest the table wants to be is within the console."""
    wide = console.options.update(width=10_000, max_width=10_000)
    return Measurement.get(console, wide, candidate).maximum <= console.width


def _rich_table(
    lines: Sequence[dict[str, Any]], columns: Sequence[Column | str], separator: str, names: int = NAMES,
    padding: tuple[int, ...] = (0, 1),
) -> Table:  # fmt: skip
    """One table for the terminal: the names, at most so wide, and ``columns``: metrics, or keys of what is a text."""
    from rich.box import SIMPLE_HEAD

    out = Table(box=SIMPLE_HEAD, pad_edge=False, padding=padding)  # type: ignore[arg-type]
    out.add_column("", max_width=names)
    cells = []
    for column in columns:
        if isinstance(column, Column):
            out.add_column(Text(column.title, justify="right"), no_wrap=True)
            cells.append(_rich_cells([line[column.key] for line in lines], column.title, separator))
        else:
            out.add_column(dict(_SIZES).get(column, column), justify="right", no_wrap=True)
            cells.append([Text(line[column]) for line in lines])
    for i, line in enumerate(lines):
        last = i + 1 < len(lines) and lines[i + 1]["group"] != line["group"]  # of its group: a rule follows
        out.add_row(Text(line["name"]), *(cell[i] for cell in cells), end_section=last)
    return out


def _rich_cells(column: Sequence[dict[str, Any]], title: str, separator: str) -> list[Text]:
    """The cells of one metric, all of one width: means end in one column whether a deviation follows or not."""
    beside = not separator.startswith("\n")
    deviations = [separator + value["sd"] if value["sd"] else "" for value in column]
    right = max(map(len, deviations)) if beside else 0
    left = max(len(title) - right, *(len(value["mean"]) for value in column))
    left = left if beside else max(left, *(len(deviation) - 1 for deviation in deviations))
    cells = []
    for value, deviation in zip(column, deviations, strict=True):
        cell = Text(" " * (left - len(value["mean"])))
        cell.append(value["mean"], style="bold" if value["best"] else "")
        if beside:
            deviation = deviation.ljust(right)
        elif deviation:
            deviation = "\n" + deviation[1:].rjust(left)
        cells.append(cell.append(deviation, style="dim"))
    return cells

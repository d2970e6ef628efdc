"""From rows to a table: mean and spread over seeds, the best and the second of each column, numbers as text."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..core.records import Metric, Record, Row, Scalar

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Cell:
    """One figure of one method over its seeds.

    Attributes: values (one for each seed that has it); mean (None without values); spread (sample standard deviation,
        None below two values); place (1 for the best of the column, 2 for the second, else 0); text, spread_text (as
        shown).
    """

    values: tuple[float, ...]
    mean: float | None
    spread: float | None
    place: int = 0
    text: str = ""
    spread_text: str = ""


@dataclass(frozen=True)
class Column:
    """A metric of the table: `unit` is the one shown, `factor` what the figures were divided by to get it."""

    key: str
    label: str
    unit: str
    metric: Metric
    factor: float = 1.0


@dataclass(frozen=True)
class TableRow:
    """One method with one set of settings."""

    method: str
    settings: dict[str, Scalar]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A record, arranged: setting columns, metric columns, one row for each method and settings."""

    record: Record
    settings: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]

    @property
    def has_seeds(self) -> bool:
        return any(row.seeds for row in self.rows)


def build_table(record: Record) -> Table:
    """Arrange a record's rows: grouped by method and settings in order of appearance, columns in the record's order.

    A metric that no row has is left out. Best and second are by the mean at full precision; equal means share a place;
    figures that are not finite have none, and with a single row there is nothing to compare.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in record.rows:
        groups.setdefault((row.method, json.dumps(dict(row.settings), sort_keys=True)), []).append(row)
    settings = tuple(dict.fromkeys(key for row in record.rows for key in row.settings))
    keys = [key for key in record.metrics if any(key in row.figures for row in record.rows)]
    columns = [_column(key, record.metrics[key], record.rows) for key in keys]
    by_column = []
    for column in columns:
        cells = [
            _cell([row.figures[column.key] for row in rows if column.key in row.figures], column.factor)
            for rows in groups.values()
        ]
        by_column.append(_with_text(_with_places(cells, column.metric)))
    rows = [
        TableRow(
            method=members[0].method,
            settings=dict(members[0].settings),
            seeds=tuple(sorted({row.seed for row in members if row.seed is not None})),
            cells=tuple(cells[index] for cells in by_column),
        )
        for index, members in enumerate(groups.values())
    ]
    return Table(record, settings, tuple(columns), tuple(rows))


def _column(key: str, metric: Metric, rows: Sequence[Row]) -> Column:
    unit, factor = metric.unit, 1.0
    largest = max((abs(row.figures[key]) for row in rows if math.isfinite(row.figures.get(key, math.nan))), default=0.0)
    if unit == "bytes":
        unit, factor = next(
            ((name, size) for name, size in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)) if largest >= size),
            ("bytes", 1.0),
        )
    return Column(key, metric.label or key.replace("_", " "), unit, metric, factor)


def _cell(values: Sequence[float], factor: float) -> Cell:
    scaled = tuple(value / factor for value in values)
    if not scaled:
        return Cell((), None, None)
    finite = all(map(math.isfinite, scaled))
    mean = statistics.fmean(scaled) if finite else math.nan if any(map(math.isnan, scaled)) else sum(scaled)
    return Cell(scaled, mean, statistics.stdev(scaled) if finite and len(scaled) > 1 else None)


def _with_places(cells: list[Cell], metric: Metric) -> list[Cell]:
    means = sorted({cell.mean for cell in cells if cell.mean is not None and math.isfinite(cell.mean)})
    if metric.better is None or len(cells) < 2 or len(means) < 2:
        return cells
    ordered = means[::-1] if metric.better == "higher" else means
    return [
        replace(cell, place=1 if cell.mean == ordered[0] else 2 if cell.mean == ordered[1] else 0) for cell in cells
    ]


def _with_text(cells: list[Cell]) -> list[Cell]:
    """The same number of decimals down the column, from its largest mean (four digits) and its smallest spread."""
    means = [abs(cell.mean) for cell in cells if cell.mean is not None and math.isfinite(cell.mean)]
    whole = all(mean == int(mean) for mean in means)
    largest = max(means, default=0.0)
    smallest = min((mean for mean in means if mean > 0), default=0.0)
    scientific = largest >= 1e9 or (0 < largest < 1e-3)
    if whole:
        decimals = 0
    elif largest >= 1:
        decimals = max(0, 3 - int(math.log10(largest)))
        if smallest < 1 and decimals < 2:
            decimals = 2
    else:
        decimals = 4
    varies = any(cell.spread for cell in cells)  # a count is the same for every seed: nothing to show
    texts = []
    for cell in cells:
        text = number_text(cell.mean, decimals, scientific)
        spread = (
            ""
            if cell.spread is None or not varies
            else number_text(cell.spread, max(decimals, 1 if whole else 0), scientific)
        )
        texts.append(replace(cell, text=text, spread_text=spread))
    return texts


def number_text(value: float | None, decimals: int, scientific: bool = False) -> str:
    """A number for people: thousands separated, a real minus sign, and words for what is no number."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:.2e}" if scientific and value != 0 else f"{value:,.{decimals}f}"
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def setting_text(value: Scalar) -> str:
    """A setting for people."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def seeds_text(row: TableRow) -> str:
    """How many seeds, and which where they fit."""
    count = len(row.seeds)
    return "–" if not count else f"{count} ({', '.join(map(str, row.seeds))})" if count <= 5 else str(count)


def seed_rows(table: Table) -> tuple[list[str], list[tuple[str, list[Scalar]]]]:
    """Every figure of every seed as measured: (heads, with the record's own units; rows of method and cells)."""
    units = [column.metric.unit for column in table.columns]
    labels = [
        f"{column.label} ({unit})" if unit else column.label for column, unit in zip(table.columns, units, strict=True)
    ]
    rows: list[tuple[str, list[Scalar]]] = []
    for row in table.record.rows:
        settings = [row.settings.get(key) for key in table.settings]
        rows.append((row.method, [*settings, row.seed, *(row.figures.get(column.key) for column in table.columns)]))
    return ["method", *table.settings, "seed", *labels], rows


def measured_text(value: Scalar) -> str:
    """A figure or setting as measured, six digits."""
    return f"{value:.6g}" if isinstance(value, float) else setting_text(value)


def heading(column: Column) -> str:
    """Label, unit and direction: "BLEU (%) ↑"."""
    arrow = {"higher": " ↑", "lower": " ↓", None: ""}[column.metric.better]
    return f"{column.label}{f' ({column.unit})' if column.unit else ''}{arrow}"

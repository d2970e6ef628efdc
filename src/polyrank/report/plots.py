"""Plots of a table: scores against costs, quality against diversity. SVG for a page (its colours follow the page),
PNG for a document."""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .tables import Cell, Column, Table, TableRow, setting_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"
"""Colour of text and axes while drawing; in an SVG it is replaced by the page's own (currentColor)."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#3a9bdc", "#7f5fc9", "#888888")
MARKERS = "osD^vP*X<>ph"
BUDGET = "budget"
"""Setting that the marker's area stands for (candidates decoded, forward passes)."""
MAXIMUM_PLOTS = 6
_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}


@dataclass(frozen=True)
class Plot:
    """One figure: `x` and `y` are columns of the table. `alt` says in words what it shows."""

    table: Table
    x: Column
    y: Column
    title: str
    alt: str


def choose_plots(table: Table) -> list[Plot]:
    """Quality against diversity, then every score against every cost, as far as at least two methods have both."""
    quality = [column for column in table.columns if column.metric.role == "quality"]
    diversity = [column for column in table.columns if column.metric.role == "diversity"]
    costs = [column for column in table.columns if column.metric.role == "cost"]
    scores = quality or [c for c in table.columns if c.metric.better is not None and c.metric.role == ""]
    pairs = [(x, y) for y in quality for x in diversity] + [(x, y) for x in costs for y in scores]
    plots = []
    for x, y in pairs:
        points = _points(table, x, y)
        if len(points) >= 2:
            title = f"{y.label} against {x.label}"
            methods = ", ".join(dict.fromkeys(_short(row.method) for row, *_ in points))
            plots.append(
                Plot(table, x, y, title, f"Scatter plot of {title} for {methods}; the figures are in the table")
            )
    return plots[:MAXIMUM_PLOTS]


def figure_caption(plot: Plot) -> str:
    """The title, and what the bars are where there are any."""
    spreads = [cell.spread for _, x, y in _points(plot.table, plot.x, plot.y) for cell in (x, y)]
    bars = ". Bars: sample standard deviation over seeds" if any(spreads) else ""
    return f"{plot.title}{bars}"


def draw_svg(plot: Plot, prefix: str) -> str:
    """The plot as an <svg> element for a page: text stays text, ids start with `prefix`, ink is the page's."""
    with _style(transparent=True):
        figure = _draw(plot)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    return svg.replace(INK, "currentColor").strip()


def draw_png(plot: Plot) -> bytes:
    """The plot as a PNG on white, 160 dots an inch."""
    with _style(transparent=False):
        figure = _draw(plot)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None}, bbox_inches="tight")
    return buffer.getvalue()


def _points(table: Table, x: Column, y: Column) -> list[tuple[TableRow, Any, Any]]:
    i, j = table.columns.index(x), table.columns.index(y)
    found = [(row, row.cells[i], row.cells[j]) for row in table.rows]
    return [item for item in found if all(cell.mean is not None and math.isfinite(cell.mean) for cell in item[1:])]


def _draw(plot: Plot) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.6))  # small: its text can still be read on a phone
    axes = figure.add_subplot()
    points = _points(plot.table, plot.x, plot.y)
    methods = list(dict.fromkeys(row.method for row, *_ in points))
    budgets = [row.settings.get(BUDGET) for row, *_ in points]
    largest = max((b for b in budgets if isinstance(b, (int, float)) and math.isfinite(b)), default=None)
    named = set()
    for row, x, y in points:
        index = methods.index(row.method)
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=x.spread,
            yerr=y.spread,
            fmt=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            markersize=_size(row.settings.get(BUDGET), largest),
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=1,
            capsize=2,
            label=None if row.method in named else _short(row.method),
        )
        named.add(row.method)
    _label(axes, plot, points)
    _name_points(axes, plot, points)
    if len(methods) > 1 or largest is not None:
        title = f"area: {BUDGET}" if largest is not None else None
        handles, labels = axes.get_legend_handles_labels()
        for handle in handles:
            handle[0].set_markersize(7)
        columns = 2 if max(map(len, labels)) <= 18 else 1
        axes.legend(handles, labels, fontsize=9, title=title, title_fontsize=9, ncols=columns, **_BELOW)
    return figure


def _label(axes: Axes, plot: Plot, points: list[tuple[TableRow, Any, Any]]) -> None:
    for column, name in ((plot.x, "x"), (plot.y, "y")):
        better = {"higher": ", higher is better", "lower": ", lower is better", None: ""}[column.metric.better]
        text = f"{_short(column.label)}{f' ({column.unit})' if column.unit else ''}{better}"
        getattr(axes, f"set_{name}label")(text)
    from matplotlib.ticker import EngFormatter, NullFormatter

    positive = [x.mean for _, x, _ in points]
    if plot.x.metric.role == "cost" and min(positive) > 0 and max(positive) / min(positive) > 20:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.12)
    axes.grid(alpha=0.25, linewidth=0.6)


def _name_points(axes: Axes, plot: Plot, points: list[tuple[TableRow, Any, Any]]) -> None:
    """Beside each point what tells it from the others of its method, at the first of four places that is free."""
    size, unit = 8.0, axes.figure.dpi / 72
    axes.get_xlim(), axes.get_ylim()  # fixes the limits, which matplotlib puts off until somebody asks
    frame = axes.get_window_extent()
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in (_at(axes, x, y, unit) for _, x, y in points)]
    for row, x, y in points:
        text = _differing_settings(plot.table, row, [shown for shown, *_ in points])
        if not text:
            continue
        px, py = _at(axes, x, y, unit)
        width, height = 0.56 * size * len(text), 1.1 * size
        costs = []
        for right, up in ((True, True), (False, True), (True, False), (False, False)):
            left, low = (px + 5 if right else px - 5 - width), (py + 4 if up else py - 4 - height)
            box = (left, low, left + width, low + height)
            outside = max(0.0, box[2] - frame.x1 / unit) + max(0.0, frame.x0 / unit - box[0])
            costs.append(
                (sum(_overlap(box, other) for other in taken) + 2 * height * outside, len(costs), box, right, up)
            )
        *_, box, right, up = min(costs)
        taken.append(box)
        axes.annotate(
            text,
            (x.mean, y.mean),
            xytext=(5 if right else -5, 4 if up else -4),
            textcoords="offset points",
            fontsize=size,
            ha="left" if right else "right",
            va="bottom" if up else "top",
        )


def _at(axes: Axes, x: Cell, y: Cell, unit: float) -> tuple[float, float]:
    """Where a point stands in the figure, in points of 1/72 inch."""
    px, py = axes.transData.transform((x.mean, y.mean))
    return float(px) / unit, float(py) / unit


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Area that two boxes (left, low, right, high) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _size(budget: Any, largest: float | None) -> float:
    if largest is None or not isinstance(budget, (int, float)) or not 0 < budget <= largest:
        return 7.0
    return 5.0 + 8.0 * math.sqrt(budget / largest)


def _differing_settings(table: Table, row: TableRow, shown: Sequence[TableRow]) -> str:
    """The settings in which this method's rows of the plot differ, briefly: what a point must be labelled with. The
    marker's area shows the budget, so it is named only where nothing else differs; a word stands without its key."""
    others = [other.settings for other in shown if other.method == row.method]
    keys = [key for key in table.settings if len({repr(other.get(key)) for other in others}) > 1]
    keys = [key for key in keys if key != BUDGET] or keys
    values = {key: row.settings.get(key) for key in keys}
    words = [value if isinstance(value, str) else f"{key} {setting_text(value)}" for key, value in values.items()]
    return _short(", ".join(words), 30)


def _short(text: str, limit: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def _style(transparent: bool) -> Iterator[None]:
    """Drawing settings for one figure, put back afterwards; text is text, never TeX."""
    import matplotlib

    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    ink = INK if transparent else "black"
    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "polyrank",
        "text.parse_math": False,
        "text.usetex": False,
        "font.family": ["sans-serif"],
        "font.size": 10,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "savefig.transparent": transparent,
        **{f"{part}.color": ink for part in ("text", "xtick", "ytick")},
        **{f"axes.{part}": ink for part in ("edgecolor", "labelcolor", "titlecolor")},
        "grid.color": ink,
    }
    try:
        with matplotlib.rc_context(settings):
            yield
    finally:
        logger.setLevel(level)

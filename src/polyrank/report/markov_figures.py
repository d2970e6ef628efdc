"""The two figures of the Markov experiment, and a page that shows them: from plain numbers, without torch.

loss_figure       loss against training steps, one curve for each K, with the exact theoretical lines
matrix_figure     learned transition matrices above the true ones, one colour scale
write_page        both figures and a table on one self-contained HTML page
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..core.files import atomic_write
from .page import page_around, table_region

_COLOURS = ("#1f5fa8", "#c8322b", "#2a8a4a", "#8a4fb0", "#c77a12", "#4a4a4a", "#0c8f8f", "#a83a78")
_MARKERS = "oDs^vP*X"


@dataclass(frozen=True)
class Curve:
    """Loss of one K over training, for one or several seeds.

    Attributes: label; steps (n,); losses (seeds, n), nats per token. Several seeds are drawn as their mean and range.
        colour: index of the curve's colour. thin: a secondary curve, without markers.
    """

    label: str
    steps: Sequence[int]
    losses: Sequence[Sequence[float]]
    colour: int = 0
    thin: bool = False


@dataclass(frozen=True)
class Lines:
    """Exact levels, nats per predicted token. A level that is None is not drawn.

    Attributes:
        mle: entropy of the mixture, the best loss with unlimited memory.
        limited: best loss with the model's memory of `memory` tokens.
        wta: winner-takes-all loss at the true chains. relaxed: the same at the optimum of the relaxed objective.
        band: lower bound and mean entropy rate for stationary starts, as the paper draws them.
    """

    mle: float | None = None
    limited: float | None = None
    memory: int = 0
    wta: float | None = None
    relaxed: float | None = None
    band: tuple[float, float] | None = None


def loss_figure(curves: Sequence[Curve], lines: Lines, title: str = "") -> Figure:
    """Loss against training steps. The first evaluations, before anything is learned, may lie above the axes."""
    figure = _figure(7.6, 5.4)
    axes = figure.add_subplot()
    if lines.band is not None:
        axes.axhspan(*lines.band, color="0.5", alpha=0.22, lw=0, label="band of the optimum, K = 2 (stationary start)")
    if lines.mle is not None:
        axes.axhline(lines.mle, color="0.15", ls="--", lw=1.3, label="entropy of the mixture (unlimited memory)")
    if lines.limited is not None:
        label = f"optimum of one model, memory {lines.memory} tokens"
        axes.axhline(lines.limited, color=_COLOURS[0], ls=":", lw=1.5, label=label)
    if lines.wta is not None:
        axes.axhline(lines.wta, color=_COLOURS[1], ls=":", lw=1.5, label="winner's loss at the true chains")
    if lines.relaxed is not None:
        axes.axhline(lines.relaxed, color=_COLOURS[1], ls="-.", lw=1.2, label="winner's loss at the relaxed optimum")
    top = []
    for curve in curves:
        losses, colour = np.asarray(curve.losses, dtype=float), _COLOURS[curve.colour % len(_COLOURS)]
        mean = losses.mean(0)
        marks = max(1, len(curve.steps) // 25)
        if curve.thin:
            axes.plot(curve.steps, mean, color=colour, lw=1.1, ls=(0, (5, 2)), alpha=0.8, label=curve.label)
            continue
        axes.plot(
            curve.steps,
            mean,
            color=colour,
            marker=_MARKERS[curve.colour % 8],
            ms=4.5,
            lw=1.4,
            markevery=marks,
            label=curve.label,
        )
        if len(losses) > 1:
            axes.fill_between(curve.steps, losses.min(0), losses.max(0), color=colour, alpha=0.25, lw=0)
        top.append(float(mean[min(len(mean) - 1, max(1, len(mean) // 25))]))
    levels = [
        value
        for value in (lines.mle, lines.limited, lines.wta, lines.relaxed, *(lines.band or ()))
        if value is not None
    ]
    ends = [float(np.min(curve.losses)) for curve in curves]
    low, high = min([*levels, *ends]), max([*levels, *top])
    axes.set_ylim(low - 0.06 * (high - low) - 1e-3, high + 0.05 * (high - low))
    axes.set_xlim(left=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(alpha=0.25, lw=0.6)
    figure.legend(fontsize=8.5, frameon=False, loc="outside lower center", ncols=2)
    if title:
        axes.set_title(title, fontsize=11)
    return figure


def matrix_figure(rows: Sequence[tuple[str, Sequence[tuple[str, Any]]]], title: str = "") -> Figure:
    """A grid of 2x2 transition matrices with one colour scale, every entry written out.

    Args: rows: (name of the row, [(label, matrix (S, S)), ...]), from top to bottom, equally many matrices in each.
    """
    width = max(len(cells) for _, cells in rows)
    figure = _figure(2.35 * width + 1.5, 2.35 * len(rows) + 0.9)
    grid = figure.subplots(len(rows), width, squeeze=False)
    image = None
    for (name, cells), line in zip(rows, grid, strict=True):
        for (label, matrix), axes in zip(cells, line, strict=False):
            matrix = np.asarray(matrix, dtype=float)
            image = axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
            states = range(len(matrix))
            for i in states:
                for j in states:
                    colour = "white" if matrix[i, j] > 0.55 else "black"
                    axes.text(j, i, f"{matrix[i, j]:.3f}", ha="center", va="center", color=colour, fontsize=11)
            axes.set_title(label, fontsize=10)
            axes.set_xticks(states, [str(s) for s in states])
            axes.set_yticks(states, [str(s) for s in states])
            axes.tick_params(length=0, labelsize=8.5)
        for axes in line[len(cells) :]:
            axes.axis("off")
        line[0].set_ylabel(f"{name}\n\ncurrent state", fontsize=9.5)
    for axes in grid[-1]:
        axes.set_xlabel("next state", fontsize=9)
    if image is not None:
        bar = figure.colorbar(image, ax=grid, fraction=0.035, pad=0.02)
        bar.set_label("transition probability", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def save_png(figure: Figure, path: str | Path, dots_per_inch: int = 140) -> Path:
    """Write a figure atomically. Returns the path."""
    return atomic_write(path, _png(figure, dots_per_inch))


def write_page(
    path: str | Path,
    title: str,
    paragraphs: Sequence[str],
    header: Sequence[str],
    table: Sequence[Sequence[str]],
    figures: Mapping[str, Path],
) -> Path:
    """One HTML file with text, a table and the figures inside it; nothing is loaded from elsewhere.

    Args: figures: caption -> PNG file.
    """
    rows = []
    for name, *cells in table:
        shown = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{shown}</tr>')
    parts = [f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs]
    heads = [head or "quantity" for head in header]
    parts.append(table_region(f"Table of {title}", "Losses in nats per predicted token.", heads, rows))
    for caption, file in figures.items():
        data = base64.b64encode(Path(file).read_bytes()).decode()
        shown = html.escape(caption)
        parts.append(f'<figure><img alt="Plot: {shown}" src="data:image/png;base64,{data}">')
        parts.append(f"<figcaption>{shown}</figcaption></figure>")
    return atomic_write(path, page_around("\n".join(parts), title))


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure, dots_per_inch: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch)
    return buffer.getvalue()

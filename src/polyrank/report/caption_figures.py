"""Pictures of hypotheses: who speaks which language, as bars, and who wrote what, as points and a table of guesses."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#7f5fc9")
_MARKERS = "osD^vP"


def win_share_figure(panels: Sequence[tuple[str, Mapping[str, Sequence[float]]]]) -> bytes:
    """A PNG with one panel for each run, side by side.

    Args: panels: title and, for each language, the K shares (they sum to 1).
    """
    languages = list(panels[0][1])
    width = 0.8 / max(1, len(panels[0][1][languages[0]]))
    figure = Figure(figsize=(1.2 + 1.9 * len(panels), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, shares) in zip(axes, panels, strict=True):
        for k in range(len(shares[languages[0]])):
            places = [i + (k - (len(shares[languages[0]]) - 1) / 2) * width for i in range(len(languages))]
            heights = [shares[language][k] for language in languages]
            panel.bar(places, heights, width * 0.92, color=_COLOURS[k % len(_COLOURS)], label=f"hypothesis {k + 1}")
        panel.axhline(1 / len(shares[languages[0]]), color="#888888", linewidth=0.8, linestyle="--")
        panel.set_xticks(range(len(languages)), languages)
        panel.set_ylim(0, 1)
        panel.set_title(title, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of references won")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    return _png(figure)


def speakers_figure(
    points: Any, explained: Sequence[float], confusion: Any, accuracy: float, chance: Sequence[float]
) -> bytes:
    """A PNG: candidates on their first two principal axes, a colour for each hypothesis, and who was taken for whom.

    Args: points: (N, K, 2). explained: shares of the variance. confusion: (K, K) counts, row: who wrote. chance:
        accuracies after the writers were exchanged at random.
    """
    count = len(confusion)
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for k in range(count):
        rows = [row[k] for row in points]
        left.scatter([x for x, _ in rows], [y for _, y in rows], s=10, alpha=0.6, color=_COLOURS[k % len(_COLOURS)],
                     marker=_MARKERS[k % len(_MARKERS)], linewidths=0, label=f"hypothesis {k + 1}")  # fmt: skip
    left.set_xlabel(f"first axis, {explained[0]:.0%} of the variance")
    left.set_ylabel(f"second axis, {explained[1]:.0%}")
    left.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=7, frameon=False)
    shares = [[value / max(1, sum(row)) for value in row] for row in confusion]
    right.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for i, row in enumerate(shares):
        for j, value in enumerate(row):
            right.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                       color="white" if value > 0.6 else "black")  # fmt: skip
    names = [str(k + 1) for k in range(count)]
    right.set_xticks(range(count), names)
    right.set_yticks(range(count), names)
    right.set_xlabel("guessed")
    right.set_ylabel("written by hypothesis")
    right.set_title(f"told right: {accuracy:.2f}; by chance {min(chance):.2f} to {max(chance):.2f}", fontsize=9)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()

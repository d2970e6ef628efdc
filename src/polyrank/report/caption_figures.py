"""Who speaks which language: the share of each language's references that each hypothesis wins, as bars."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#7f5fc9")


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
    axes[-1].legend(fontsize=7, frameon=False, loc="upper right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()

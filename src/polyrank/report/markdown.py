"""The tables in Markdown, plots as PNG files beside the document."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from ..core.records import Record
from .page import summary
from .plots import choose_plots, draw_png, figure_caption
from .tables import (
    Cell,
    Table,
    build_table,
    heading,
    measured_text,
    seed_rows,
    seeds_text,
    setting_text,
)


def markdown_page(records: Iterable[Record], title: str, stem: str) -> tuple[str, dict[str, bytes]]:
    """The document and its pictures: file name -> PNG; names are <stem>-<table>-<number>.png."""
    parts, pictures = [f"# {_text(title)}"], {}
    for index, record in enumerate(records):
        table = build_table(record)
        parts += [f"## {_text(record.name)}", _text(summary(record))]
        parts += ["\n".join(f"- {_text(note)}" for note in record.notes)] if record.notes else []
        parts += [_table(table), _caption(table)]
        for number, plot in enumerate(choose_plots(table)):
            name = f"{stem}-{index}-{number}.png"
            pictures[name] = draw_png(plot)
            parts += [f"![{_text(plot.alt)}]({name})", f"*{_text(figure_caption(plot))}.*"]
        if table.has_seeds:
            parts += [f"### {_text(record.name)}: every seed, as measured", _seeds(table)]
        if record.versions:
            versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
            parts.append(f"Versions: {_text(versions)}.")
    return "\n\n".join(parts) + "\n", pictures


def _table(table: Table) -> str:
    heads = ["method", *table.settings, *(["seeds"] if table.has_seeds else []), *map(heading, table.columns)]
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)]]
    for row in table.rows:
        settings = [_text(setting_text(row.settings.get(key))) for key in table.settings]
        seeds = [seeds_text(row)] if table.has_seeds else []
        lines.append([_text(row.method), *settings, *seeds, *map(_cell, row.cells)])
    lines[0] = [_text(head) for head in heads]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seeds(table: Table) -> str:
    heads, rows = seed_rows(table)
    lines = [list(map(_text, heads)), [":--", *["--:"] * (len(heads) - 1)]]
    lines += [[_text(method), *(_text(measured_text(cell)) for cell in cells)] for method, cells in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    text = {1: f"**{cell.text}**", 2: f"*{cell.text}*"}.get(cell.place, cell.text)
    return f"{text} ± {cell.spread_text}" if cell.spread_text else text


def _caption(table: Table) -> str:
    spread = "Mean ± sample standard deviation over seeds. " if table.has_seeds else ""
    return f"{spread}Best of a column in bold, second in italics; ↑ higher is better, ↓ lower is better."


def _text(text: str) -> str:
    """Text that Markdown shows as it is: one line, no markup, no HTML, no link."""
    text = escape(" ".join(text.split()), quote=False)
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    return f"\\{text}" if text[:1] in ("#", "+", "-", ">", "=") else text

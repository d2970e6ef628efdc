"""A table for a paper or a spreadsheet: LaTeX (best bold, second underlined) and CSV, from a record alone."""

from __future__ import annotations

import csv
import io

from .tables import MINUS, Cell, Column, Table, seeds_text, setting_text

_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
          "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MINUS: "$-$", "–": "--", "∞": r"$\infty$",
          "λ": r"$\lambda$", "ε": r"$\varepsilon$"}  # fmt: skip
_ARROW = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", None: ""}


def latex_text(text: str) -> str:
    """Text with LaTeX's own characters escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def latex_table(table: Table, caption: str | None = None) -> str:
    """A `table` environment in booktabs' style: mean ± standard deviation over seeds, the best of each column bold, the
    second underlined (equal means share a place).

    Args: caption: default: the record's name.
    """
    heads = ["method", *table.settings]
    columns = "l" * len(heads) + "r" * len(table.columns)
    titles = [latex_text(head) for head in heads] + [_heading(column) for column in table.columns]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(caption or table.record.name)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(titles) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        cells = [row.method, *(setting_text(row.settings.get(key)) for key in table.settings)]
        lines.append(" & ".join([*map(latex_text, cells), *map(_cell, row.cells)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def csv_table(table: Table) -> str:
    """One line for each method and settings: mean and standard deviation of each figure at full precision, in the unit
    of the record; empty where there is none."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = [name for column in table.columns for name in (column.key, f"{column.key}_std")]
    writer.writerow(["method", *table.settings, "seeds", *names])
    for row in table.rows:
        figures: list[object] = []
        for column, cell in zip(table.columns, row.cells, strict=True):
            figures += [_times(cell.mean, column.factor), _times(cell.spread, column.factor)]
        settings = ["" if row.settings.get(key) is None else row.settings[key] for key in table.settings]
        writer.writerow([*map(_no_formula, (row.method, *settings)), seeds_text(row), *figures])
    return buffer.getvalue()


def _no_formula(value: object) -> object:
    """Text that a spreadsheet would compute, with the apostrophe that has it shown as it is."""
    return f"'{value}" if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@") else value


def _times(value: float | None, factor: float) -> object:
    return "" if value is None else value * factor


def _heading(column: Column) -> str:
    unit = f" ({latex_text(column.unit)})" if column.unit else ""
    return latex_text(column.label) + unit + _ARROW[column.metric.better]


def _cell(cell: Cell) -> str:
    text = latex_text(cell.text)
    if cell.place:
        text = (r"\textbf{%s}" if cell.place == 1 else r"\underline{%s}") % text
    return rf"{text} {{\scriptsize $\pm$ {latex_text(cell.spread_text)}}}" if cell.spread_text else text

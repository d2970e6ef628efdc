"""Result files to tables, plots and one page; no torch, no model: what is shown is what the files say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..core.errors import ConfigError
from ..core.files import atomic_write
from ..core.records import Record
from .results import load_results

__all__ = ["load_results", "write_report"]


def write_report(results: Iterable[str | Path], output: str | Path, title: str = "") -> list[Path]:
    """Write a report of result files (or folders of them).

    Args:
        output: a file that ends with .html (one self-contained page), .md (pictures are written beside it), .tex (a
            table for each result, best bold, second underlined) or .csv (one result).
        title: default: the names of the results.
    Returns: the files written, the report first.
    Raises: ConfigError for another ending, or several results in one .csv; DataError for a file that is no result;
        RunError if it cannot be written.
    """
    output = Path(output)
    ending = output.suffix.lower()
    if ending not in (".html", ".htm", ".md", ".tex", ".csv"):
        raise ConfigError(f"a report ends with .html, .md, .tex or .csv, got {str(output)!r}")
    records = load_results(results)
    if ending in (".tex", ".csv"):
        return [atomic_write(output, _table_file(records, ending))]
    title = title or ", ".join(record.name for record in records)
    if ending == ".md":
        from .markdown import markdown_page

        text, pictures = markdown_page(records, title, output.stem)
        written = [atomic_write(output.parent / name, picture) for name, picture in pictures.items()]
        return [atomic_write(output, text), *written]
    from .page import html_page

    return [atomic_write(output, html_page(records, title))]


def _table_file(records: list[Record], ending: str) -> str:
    """The tables of the records alone, for a paper or a spreadsheet."""
    from .exports import csv_table, latex_table
    from .tables import build_table

    if ending == ".tex":
        return "\n".join(latex_table(build_table(record)) for record in records)
    if len(records) != 1:
        raise ConfigError(f"a .csv holds one result, got {len(records)}: {', '.join(r.name for r in records)}")
    return csv_table(build_table(records[0]))

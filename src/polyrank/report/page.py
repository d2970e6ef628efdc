"""One self-contained HTML page of tables and plots: no network, light and dark, any width, every word escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from string import Template

from ..core.records import Record
from .plots import choose_plots, draw_svg, figure_caption
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


def html_page(records: Iterable[Record], title: str) -> str:
    """The whole page: a section for each record, and where there are several a list of them."""
    records = list(records)
    links = "".join(f'<li><a href="#t{i}">{escape(record.name)}</a></li>' for i, record in enumerate(records))
    contents = f'<nav aria-label="Results"><ul>{links}</ul></nav>\n' if len(records) > 1 else ""
    return page_around(contents + "\n".join(_section(record, index) for index, record in enumerate(records)), title)


def page_around(body: str, title: str) -> str:
    """A page with a title around markup. Nothing in it is loaded from elsewhere; only its own script runs."""
    room = files(__package__)
    script = room.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(room.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        style=room.joinpath("page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        body=body,
    )


def _section(record: Record, index: int) -> str:
    table = build_table(record)
    parts = [f'<section aria-labelledby="t{index}">', f'<h2 id="t{index}">{escape(record.name)}</h2>']
    parts.append(f'<p class="quiet">{escape(summary(record))}</p>')
    if record.notes:
        parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in record.notes) + "</ul>")
    parts.append(_table(table, index))
    plots = choose_plots(table)
    if plots:
        parts.append('<div class="plots">')
        for number, plot in enumerate(plots):
            svg = draw_svg(plot, f"p{index}-{number}")
            svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.alt)}"', 1)
            parts.append(f"<figure>{svg}<figcaption>{escape(figure_caption(plot))}</figcaption></figure>")
        parts.append("</div>")
    if table.has_seeds:
        parts.append(_seeds(table, index))
    parts.append(_provenance(record))
    parts.append("</section>")
    return "\n".join(parts)


def summary(record: Record) -> str:
    """One sentence: when, by which commit, on what, how long."""
    commit = record.code.get("commit")
    code = f"commit {str(commit)[:12]}" if commit else f"version {record.code.get('version') or 'unknown'}"
    words = [record.created[:10], code + (" with uncommitted changes" if record.dirty else "")]
    device = record.device
    gpus = device.get("gpus")
    if isinstance(gpus, list) and gpus:
        words.append(", ".join(map(str, gpus)))
    elif device.get("cpu"):
        threads = f", {device['threads']} threads" if device.get("threads") else ""
        words.append(f"{device['cpu']} ({device.get('cores')} cores{threads})")
    if record.time_s is not None:
        words.append(f"{record.time_s:,.0f} s")
    return " · ".join(words)


def caption(table: Table) -> str:
    """What the marks in the table mean."""
    spread = "Mean ± sample standard deviation over seeds. " if table.has_seeds else ""
    return f"{spread}Best of a column in bold, second underlined; ↑ higher is better, ↓ lower is better."


def _table(table: Table, index: int) -> str:
    heads = ["method", *table.settings, *(["seeds"] if table.has_seeds else []), *map(heading, table.columns)]
    rows = []
    for row in table.rows:
        cells = [f'<th scope="row">{escape(row.method)}</th>']
        for key in table.settings:
            cells.append(f"<td{_value(row.settings.get(key))}>{escape(setting_text(row.settings.get(key)))}</td>")
        if table.has_seeds:
            cells.append(f"<td{_value(len(row.seeds))}>{seeds_text(row)}</td>")
        cells += [f"<td{_value(cell.mean)}>{_cell(cell)}</td>" for cell in row.cells]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return table_region(f"Table of {table.record.name}", caption(table), heads, rows, f"s{index}")


def table_region(label: str, caption: str, heads: Iterable[str], rows: Iterable[str], status: str = "") -> str:
    """A table in a region of its own that scrolls and takes the keyboard's focus.

    Args:
        rows: markup, one <tr> each.
        status: id of the line that says how it is sorted (the script makes its heads buttons); default: not sortable.
    """
    sortable = f' data-sortable="{status}"' if status else ""
    said = f'\n<p id="{status}" class="quiet" role="status"></p>' if status else ""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">'
        f"<table{sortable}><caption><span>{escape(caption)}</span></caption><thead><tr>"
        + "".join(f'<th scope="col"><span>{escape(head)}</span></th>' for head in heads)
        + "</tr></thead><tbody>\n"
        + "\n".join(rows)
        + f"\n</tbody></table></div>{said}"
    )


def _value(value: object) -> str:
    """What a cell is sorted by; nothing for what has no place in an order."""
    if isinstance(value, bool):
        value = int(value)
    text = "" if value is None or value != value else repr(value) if isinstance(value, (int, float)) else str(value)
    return f' data-value="{escape(text.replace("inf", "Infinity"))}"' if not isinstance(value, str) else ""


def _cell(cell: Cell) -> str:
    """Mean and spread; that it is the best or the second stands there in words too, for those who hear the page."""
    text = escape(cell.text)
    if cell.place:
        mark = {1: "best", 2: "second"}[cell.place]
        text = f'<span class="{mark}" title="{mark}">{text}</span>'
    spread = f' <span class="spread">± {escape(cell.spread_text)}</span>' if cell.spread_text else ""
    return text + spread + (f'<span class="unseen"> ({mark})</span>' if cell.place else "")


def _seeds(table: Table, index: int) -> str:
    """Every figure of every seed, as measured."""
    heads, rows = seed_rows(table)
    lines = []
    for method, cells in rows:
        shown = "".join(f"<td{_value(cell)}>{escape(measured_text(cell))}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(method)}</th>{shown}</tr>')
    shown = table_region(f"Every seed of {table.record.name}", "As measured.", heads, lines, f"e{index}")
    return f"<details><summary>Every seed</summary>{shown}</details>"


def _provenance(record: Record) -> str:
    groups = {
        "code": record.code,
        "versions": record.versions,
        "device": record.device,
        "data and model files": record.inputs,
    }
    lists = []
    for name, entries in groups.items():
        if entries:
            items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_plain(v))}</dd>" for k, v in entries.items())
            lists.append(f"<h3>{name}</h3><dl>{items}</dl>")
    config = json.dumps(record.config, indent=1, ensure_ascii=False)
    lists.append(f'<h3>configuration</h3><pre tabindex="0">{escape(config)}</pre>')
    return f"<details><summary>Where these figures come from</summary>{''.join(lists)}</details>"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

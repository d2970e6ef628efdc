"""`polyrank evaluate FOLDER`: every run and decoding below a folder scored, once, on the same inputs; one CSV, one
LaTeX table (best bold, second underlined), the quality-diversity figure, the list of checkpoints.

What is scored is kept in `scored.jsonl`, by content of the predictions, metrics and models: the same command after an
interruption, or with more runs, scores what is new.
"""

from __future__ import annotations

import hashlib
import json
import logging
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, DataError
from ...core.files import append_json_line, atomic_write, read_json_lines, sha256
from ...core.records import Metric, Record, Row, new_record, record_to_json
from ...evaluation.metrics import METRICS, evaluate, read_predictions
from ...evaluation.metrics._session import session
from ...evaluation.metrics.evaluate import PRESETS, chosen_metrics
from ...evaluation.metrics.predictions import Skipped
from .run_folders import FILE, Written, checkpoints, written_below

_log = logging.getLogger("polyrank")
QUALITY = ("oracle_spider", "oracle_cider_d", "leave_one_out_bleu", "oracle_bleu")
DIVERSITY = ("mbleu_4", "pairwise_bleu")
PRINTED = (
    *("oracle_cider_d", "oracle_spice", "oracle_spider", "oracle_meteor", "oracle_rouge_l", "oracle_sbert"),
    *("oracle_fense", "leave_one_out_bleu", "oracle_bleu", "mbleu_4", "pairwise_bleu", "div_2", "oracle_nll"),
    *("mixture_nll",),
)
"""Columns of the LaTeX table where presets, or nothing, were asked for: what papers print."""
FIGURE = "quality-diversity.png"


@dataclass(frozen=True)
class FolderEvaluation:
    """Attributes: record: a row for each predictions.jsonl. printed: the record with the table's columns alone. files:
    those written. left_out: metric -> what it needs. skipped: inputs left out. new: files that were scored now."""

    record: Record
    printed: Record
    files: list[Path]
    left_out: dict[str, str]
    skipped: list[Skipped]
    new: int


def is_folder_of_runs(source: str) -> bool:
    """Whether `polyrank evaluate SOURCE` means all that lies below a folder and not one run."""
    path = Path(source)
    return path.is_dir() and not (path / FILE).is_file()


def evaluate_folder(
    folder: str | Path,
    out: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    *,
    models: Mapping[str, str] | None = None,
    skipped: str | Path | None = None,
    progress: bool = False,
) -> FolderEvaluation:
    """Score every predictions.jsonl below `folder`.

    Args:
        out: folder of scored.jsonl, result.json, table.csv, table.tex, quality-diversity.png and checkpoints.json;
            default: evaluation/ in `folder`.
        metrics, models: as in `evaluate`.
        skipped: file to list inputs in that are incomplete, or missing, in some predictions of their test set; they are
            left out of all of it. None: an error.
    A metric that some file has no fields for is left out there.

    Raises: DataError for no predictions, broken or incomplete ones, inputs that a run lacks, a metric that no file has
        the fields for; as `evaluate`.
    """
    folder = Path(folder)
    out = folder / "evaluation" if out is None else Path(out)
    found = written_below(folder)
    incomplete: list[Skipped] = []
    inputs = common_inputs(found, None if skipped is None else incomplete)
    if skipped is not None:
        lines = [json.dumps(vars(item), ensure_ascii=False) for item in incomplete]
        atomic_write(skipped, "".join(f"{line}\n" for line in lines))
    store = _Store(out / "scored.jsonl", metrics, models)
    scored = [store.score(item.path, ids) for item, ids in _shown(list(zip(found, inputs, strict=True)), progress)]
    store.check(scored)
    left_out = {name: why for entry in scored for name, why in entry["left_out"].items()}
    record = make_record(folder, found, scored, metrics, left_out)
    printed = _printed(record, metrics)
    atomic_write(out / "checkpoints.json", json.dumps(checkpoints(found, folder), indent=1) + "\n")
    files = [atomic_write(out / "result.json", record_to_json(record)), *_tables(record, printed, out)]
    return FolderEvaluation(record, printed, [*files, out / "checkpoints.json"], left_out, incomplete, store.new)


def common_inputs(found: Sequence[Written], skipped: list[Skipped] | None) -> list[set[str] | None]:
    """For each file the ids to score, None for all: those that every file of the same test set has whole.

    Files are of one test set where they share an input (id and references).

    Raises: DataError where an input is missing somewhere and `skipped` is None.
    """
    groups: list[_TestSet] = []
    for item in found:
        own: list[Skipped] = []
        records = read_predictions(item.path, None if skipped is None else own)
        keys = {(record.id, record.references) for record in records}
        missing = {entry.id for entry in own}
        joined = [group for group in groups if group.inputs & keys]
        groups = [group for group in groups if group not in joined]
        groups.append(_TestSet.of(item.path, keys, missing, own, joined))
    for group in groups:
        group.check(skipped)
    whole = {path: group.common for group in groups for path in group.keys}
    return [whole[item.path] for item in found]


@dataclass(eq=False)
class _TestSet:
    """Predictions that share inputs: the keys (id, references) of each file, ids that are broken somewhere."""

    keys: dict[Path, set[Any]] = field(default_factory=dict)
    inputs: set[Any] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    told: list[Skipped] = field(default_factory=list)
    common: set[str] | None = None

    @classmethod
    def of(
        cls, path: Path, keys: set[Any], broken: set[str], told: list[Skipped], joined: Sequence[_TestSet]
    ) -> _TestSet:
        """The sets that share an input with a file, and that file, as one."""
        new = cls({path: keys}, set(keys), set(broken), list(told))
        for other in joined:
            new.keys = {**other.keys, **new.keys}
            new.inputs |= other.inputs
            new.broken |= other.broken
            new.told = [*other.told, *new.told]
        return new

    def check(self, skipped: list[Skipped] | None) -> None:
        """Find the inputs that all files have; tell of the others, or raise DataError."""
        everywhere = set.intersection(*self.keys.values())
        lacking = {path: self.inputs - keys for path, keys in self.keys.items() if self.inputs - keys}
        if skipped is None and lacking:
            path, keys = next(iter(lacking.items()))
            raise DataError(
                f"{path} lacks {len(keys)} of {len(self.inputs)} inputs that other runs have (first: id"
                f" {min(id for id, _ in keys)!r}): finish that run, or give --skipped FILE to leave them out of all"
            )
        if skipped is None:
            return
        skipped += self.told
        told = {(item.id, item.where.split(", line")[0]) for item in self.told}
        skipped += [
            Skipped(id, str(path), "no such input here, but in other runs")
            for path, keys in lacking.items()
            for id in sorted({id for id, _ in keys})
            if (id, str(path)) not in told
        ]
        if lacking or self.broken:
            self.common = {id for id, _ in everywhere} - self.broken
            if not self.common:
                raise DataError(
                    f"no input is whole in all of {len(self.keys)} files, {next(iter(self.keys))} and others"
                )


class _Store:
    """scored.jsonl: figures by content of predictions, inputs, metrics, models, and by what the machine lacks."""

    def __init__(self, path: Path, metrics: Sequence[str] | None, models: Mapping[str, str] | None) -> None:
        self.path, self.metrics, self.models, self.new = path, metrics, models, 0
        named, chosen = chosen_metrics(metrics)
        self.named = [entry for entry in chosen if entry.name in named]
        with session(models):
            absent = {entry.name: lacks for entry in chosen if (lacks := entry.not_installed()) is not None}
        for name in sorted(named & absent.keys()):
            raise DataError(f"metric {name!r} needs {absent[name]}")
        places = {k: sha256(p) if Path(p).exists() else p for k, p in (models or {}).items()}
        self.shared = [None if metrics is None else list(metrics), places, sorted(absent)]
        self.known = {entry["key"]: entry for entry in read_json_lines(path)} if path.is_file() else {}

    def score(self, path: Path, ids: set[str] | None) -> dict[str, Any]:
        """{"key", "figures", "left_out"} of one file, from scored.jsonl or computed now."""
        inputs = None if ids is None else sorted(ids)
        key = hashlib.sha256(json.dumps([sha256(path), inputs, *self.shared]).encode()).hexdigest()[:24]
        if key not in self.known:
            records = read_predictions(path, None if ids is None else [])
            records = [record for record in records if ids is None or record.id in ids]
            lacking = {entry.name: lacks for entry in self.named if (lacks := entry.lacking(records)) is not None}
            names = None if self.metrics is None else [name for name in self.metrics if name not in lacking]
            result = evaluate(path, names, models=self.models, ids=ids)
            entry = {"key": key, "figures": result.figures, "left_out": {**result.left_out, **lacking}}
            append_json_line(self.path, entry)
            self.known[key] = entry
            self.new += 1
        return self.known[key]

    def check(self, scored: Sequence[Mapping[str, Any]]) -> None:
        """Raise DataError for a metric that was asked for by its own name and that no file has the fields for."""
        for metric in self.named:
            if all(metric.name in entry["left_out"] for entry in scored):
                raise DataError(f"metric {metric.name!r} needs {scored[0]['left_out'][metric.name]}")


def make_record(
    folder: Path,
    found: Sequence[Written],
    scored: Sequence[Mapping[str, Any]],
    metrics: Sequence[str] | None,
    left_out: Mapping[str, str],
) -> Record:
    """One row for each file; figures that are lists (one for each hypothesis) go into the details."""
    costs = {key: column for item in found for key, column in item.columns.items()}
    rows, lists = [], {}
    for item, entry in zip(found, scored, strict=True):
        figures = {k: v for k, v in entry["figures"].items() if k in METRICS and not isinstance(v, list)}
        settings = item.settings or {"K": entry["figures"]["num_candidates"]}
        rows.append(Row(item.method, {**figures, **item.costs}, item.seed, settings))
        many = {key: value for key, value in entry["figures"].items() if isinstance(value, list)}
        if many:
            lists[item.path.relative_to(folder).as_posix()] = many
    used = {key for row in rows for key in row.figures}
    axes = {role: next((key for key in names if key in used), None) for role, names in
            (("quality", QUALITY), ("diversity", DIVERSITY))}  # fmt: skip
    columns = {key: _column(key, axes) for key in METRICS.names() if key in used} | costs
    details = {"runs": checkpoints(found, folder), "left_out": dict(left_out), "by_hypothesis": lists}
    return new_record(
        "evaluation",
        "run",
        columns,
        rows,
        config={"folder": str(folder), "metrics": None if metrics is None else list(metrics)},
        inputs=[item.path for item in found],
        details=details,
    )


def _column(key: str, axes: Mapping[str, str | None]) -> Metric:
    entry = METRICS.get(key)
    better = entry.better if entry.better in ("higher", "lower") else None
    role = next((role for role, name in axes.items() if name == key), "")
    return Metric(entry.unit, better, key.replace("_", " "), role)  # type: ignore[arg-type]


def _printed(record: Record, metrics: Sequence[str] | None) -> Record:
    """The record with the columns of the LaTeX table: what was asked for by its own name, else what papers print."""
    names = PRINTED if metrics is None or any(name in PRESETS for name in metrics) else metrics
    return replace(record, metrics={key: column for key, column in record.metrics.items() if key in names})


def _tables(record: Record, printed: Record, out: Path) -> Iterator[Path]:
    from ...report.exports import csv_table, latex_table
    from ...report.plots import choose_plots, draw_png
    from ...report.tables import build_table

    yield atomic_write(out / "table.csv", csv_table(build_table(record)))
    yield atomic_write(out / "table.tex", latex_table(build_table(printed)))
    axes = {key: column for key, column in record.metrics.items() if column.role in ("quality", "diversity")}
    plots = choose_plots(build_table(replace(record, metrics=axes))) if len(axes) == 2 else []
    if plots:
        yield atomic_write(out / FIGURE, draw_png(plots[0]))
    else:
        _log.warning("no figure: it takes two rows with a score (%s, ...) and a diversity (%s, ...)", QUALITY[0],
                     DIVERSITY[0])  # fmt: skip


def _shown(items: list[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, "scoring runs", console=console, disable=not console.is_terminal, transient=True)


def evaluate_folder_command(args: Namespace) -> None:
    """`polyrank evaluate FOLDER [--out FOLDER] [--metrics A,B] [--model KIND=PLACE] [--skipped FILE] [--json]`."""
    from ...report.tables import build_table, heading, setting_text
    from ..commands import _models, _print_json, print_rows

    if not Path(args.source).is_dir():
        raise ConfigError(f"--out goes with a folder of runs, {args.source!r} is none")
    names = [name.strip() for name in args.metrics.split(",") if name.strip()] if args.metrics else None
    models = _models(args.model or ())
    done = evaluate_folder(args.source, args.out, names, models=models, skipped=args.skipped, progress=not args.quiet)
    for reason in dict.fromkeys(done.left_out.values()):
        lacking = [name for name, why in done.left_out.items() if why == reason]
        _log.warning("left out %s: needs %s", ", ".join(lacking), reason)
    if done.skipped:
        _log.warning("left out %d inputs; they are listed in %s", len(done.skipped), args.skipped)
    _log.info("%d files, %d of them scored now", len(done.record.rows), done.new)
    if args.json:
        rows = [
            {"method": r.method, "settings": dict(r.settings), "seed": r.seed, "figures": dict(r.figures)}
            for r in done.record.rows
        ]
        more = {"left_out": done.left_out, "num_skipped": len(done.skipped), "num_scored": done.new}
        _print_json({"files": [str(file) for file in done.files], "rows": rows, **more})
        return
    table = build_table(done.printed)
    lines = [["method", *table.settings, *map(heading, table.columns)]]
    for row in table.rows:
        settings = [setting_text(row.settings.get(key)) for key in table.settings]
        lines.append([row.method, *settings, *(cell.text for cell in row.cells)])
    print_rows(lines)
    print("\n" + "\n".join(str(file) for file in done.files))

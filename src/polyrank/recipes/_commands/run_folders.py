"""The runs below a folder and what each of them wrote: every predictions.jsonl with the method, settings and seed that
the run's result.json gives it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...core.errors import DataError
from ...core.records import Metric, Record, Row, Scalar, read_record
from .._frame.yaml_files import read_yaml

_log = logging.getLogger("polyrank")
FILE, DECODINGS = "predictions.jsonl", "decodings"
PASSED_OVER = ("scratch", "sweeps", "training")


@dataclass(frozen=True)
class Written:
    """One predictions.jsonl.

    Attributes: run: folder of its run. method, settings, seed: as in the run's result.json; where there is none,
        `method` is the folder's path and `settings` are empty. costs: of training and decoding.
    """

    path: Path
    run: Path
    method: str
    settings: dict[str, Scalar] = field(default_factory=dict)
    seed: int | None = None
    costs: dict[str, float] = field(default_factory=dict)
    columns: dict[str, Metric] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int | None]:
        return self.method, json.dumps(self.settings, sort_keys=True), self.seed


def written_below(folder: str | Path) -> list[Written]:
    """Every run's predictions below `folder` (its own included), in the order of their paths.

    Two that are called the same get a setting "run", the path of their run.

    Raises: DataError where there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found: list[Written] = []
    by_run: dict[Path, list[Path]] = {}
    for path in predictions_below(folder):
        by_run.setdefault(run_of(path), []).append(path)
    for run, paths in by_run.items():
        record = _record(run)
        found += [_named(path, run, record, folder) for path in paths]
    if not found:
        raise DataError(f"{folder} holds no {FILE}, nor does a folder below it")
    names = [item.key for item in found]
    return [
        replace(item, settings={**item.settings, "run": _relative(item.run, folder)})
        if names.count(item.key) > 1
        else item
        for item in found
    ]


def predictions_below(folder: Path) -> Iterator[Path]:
    """Paths of predictions.jsonl, those of a run before those of its decodings."""
    if (folder / FILE).is_file():
        yield folder / FILE
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name not in PASSED_OVER and not entry.name.startswith("."):
            yield from predictions_below(entry)


def run_of(path: Path) -> Path:
    """The folder of the run that wrote a predictions.jsonl."""
    return path.parent.parent.parent if path.parent.parent.name == DECODINGS else path.parent


def checkpoints(found: Sequence[Written], folder: Path) -> list[dict[str, Any]]:
    """One entry for each run that kept its adapter: paths relative to `folder`, method, seed, K, recipe, and whether
    the run has ended."""
    entries = {}
    for item in found:
        if item.run in entries or not (item.run / "adapter").is_dir():
            continue
        entries[item.run] = {
            "run": _relative(item.run, folder),
            "adapter": _relative(item.run / "adapter", folder),
            "method": item.method,
            "seed": item.seed,
            "num_hypotheses": item.settings.get("K"),
            "recipe": _recipe(item.run),
            "finished": (item.run / "result.json").is_file(),
        }
    return list(entries.values())


def _record(run: Path) -> Record | None:
    """The run's record; None where it has none (not finished, or made by another program)."""
    if not (run / "result.json").is_file():
        return None
    try:
        return read_record(run / "result.json")
    except DataError as error:
        _log.warning("%s is called by its folder: %s", run, error)
        return None


def _named(path: Path, run: Path, record: Record | None, folder: Path) -> Written:
    row = None if record is None else _row_of(record, run, path)
    if record is None or row is None:
        return Written(path, run, _relative(path.parent, folder))
    costs = {key: value for key, value in row.figures.items() if record.metrics[key].role == "cost"}
    columns = {key: record.metrics[key] for key in costs}
    return Written(path, run, row.method, dict(row.settings), row.seed, costs, columns)


def _row_of(record: Record, run: Path, path: Path) -> Row | None:
    """The row that tells of this file: the first of the run's own, by name of the decoding for the others."""
    if path.parent == run:
        return record.rows[0] if record.rows else None
    names = list(record.details.get(DECODINGS, {}))
    if len(names) != len(record.rows):
        names = [str(row.settings.get("decoding")) for row in record.rows]
    return next((row for name, row in zip(names, record.rows, strict=True) if name == path.parent.name), None)


def _recipe(run: Path) -> str | None:
    """The recipe named in config.yaml of the run, or of the table that it is part of."""
    for place in (run, run.parent):
        if (place / "config.yaml").is_file():
            values = read_yaml(place / "config.yaml")
            return values.get("recipe") if isinstance(values, dict) else None
    return None


def _relative(path: Path, folder: Path) -> str:
    """The path from `folder` on; the folder's own name where they are one."""
    relative = path.relative_to(folder).as_posix()
    return folder.resolve().name if relative == "." else relative

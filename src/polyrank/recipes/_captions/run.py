"""The engine of recipes `translation`, `image_captioning` and `audio_captioning`: train one adapter, decode every test
set in every decoding, score, write one record; or a whole table of such runs.

A run's folder gets adapter/, metrics.jsonl, predictions.jsonl (first test set, first decoding), decodings/<test
set>-<decoding>/predictions.jsonl for each other, result.json; speakers.png beside predictions whose k-th candidate is
hypothesis k's. What is killed goes on: training from its newest checkpoint, decoding with the first batch that is
missing, a table with the first run that has no result.json.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.files import atomic_write
from ...core.records import Metric, Record, Row, new_record, read_record, record_to_json
from ...core.seeding import derive_seed
from ...evaluation.decoding import Cost
from ...evaluation.metrics import METRICS, evaluate_predictions
from .._e2e.config import Decoding
from .config import ManyRuns, OneRun
from .processes import first_process, first_process_first
from .speakers import BY_HYPOTHESIS, speaker_scores
from .speakers import COLUMNS as SPEAKERS
from .training import trained_model

_log = logging.getLogger("polyrank")

COSTS = {
    "prefill_tokens": Metric("tokens", label="prefill tokens", role="cost"),
    "decode_tokens": Metric("tokens", label="decoder tokens", role="cost"),
    "decode_time_s": Metric("s", label="decoding", role="cost"),
    "train_time_s": Metric("s", label="training", role="cost"),
    "trainable_parameters": Metric("", label="trainable parameters", role="cost"),
}
NOTES = (
    "Equal budget means equal beams x separate decodings, not equal compute: see the token counts.",
    "oracle NLL is no likelihood; compare a single model's NLL with the mixture NLL.",
)


class Scores(dict[str, float]):
    """Figures of one predictions.jsonl; `details` is what is no single number."""

    def __init__(self, figures: Mapping[str, float], details: Mapping[str, Any] | None = None) -> None:
        super().__init__(figures)
        self.details = dict(details or {})


@dataclass(frozen=True)
class Task:
    """What the engine needs to know of a recipe.

    Attributes:
        record: name of the result record.
        base: the frozen base model. target_modules: of the adapter. rows, collator: of the Trainer.
        tests: names of the test sets, the first one's first decoding is the run's predictions.jsonl.
        predict: (model, test set, decoding, path, seed, with likelihoods of the references) -> cost.
        score: (test set, path) -> its figures.
        roles: metric -> "quality" or "diversity", for the plots. columns: metrics that METRICS does not hold.
        inputs: files that the result depends on.
        validation: rows of the Trainer's validation. callbacks: of the Trainer.
    """

    record: str
    base: Any
    target_modules: Any
    rows: Any
    collator: Callable[..., Any]
    tests: Sequence[str]
    predict: Callable[[Any, str, Decoding, Path, int, bool], Cost]
    score: Callable[[str, Path], Scores]
    roles: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Metric] = field(default_factory=dict)
    inputs: Sequence[Path] = ()
    validation: Any = None
    details: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()


def run_in_processes(config: OneRun, task_of: Callable[[Any, Path], Task], run_dir: Path) -> None:
    """One run, in one process or several: the first prepares, all train, the first decodes and writes."""
    with first_process_first():
        task = task_of(config, run_dir)
    run_one(config, task, run_dir)


def run_one(config: OneRun, task: Task, run_dir: Path) -> Record | None:
    """One run, on from where it stopped; writes and returns its record (None in a process that is not the first)."""
    model, training = trained_model(
        config, task.base, task.rows, task.collator, task.target_modules, run_dir, task.validation, task.callbacks
    )
    if not first_process():
        return None
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for i, test in enumerate(task.tests):
        likelihood: dict[str, float] = {}
        for j, decoding in enumerate(config.chosen_decodings):
            name = f"{test}-{decoding.name}"
            folder = run_dir if i == j == 0 else run_dir / "decodings" / name
            path = folder / "predictions.jsonl"
            cost = task.predict(model, test, decoding, path, derive_seed(config.seed, name), j == 0)
            scores = task.score(test, path)
            if j == 0:  # likelihoods do not depend on the decoding: they stand in every row
                likelihood = {
                    key: value for key, value in scores.items() if "nll" in key or key.startswith("effective")
                }
            if decoding.method in BY_HYPOTHESIS:
                told, more = speaker_scores(path, config.speakers)
                scores.update(told)
                scores.details.update(more)
            rows.append(_row(config, task, test, decoding, likelihood | scores, cost, training))
            details[name] = scores.details
            shown = ", ".join(f"{key} {value:.3f}" for key, value in scores.items() if key in task.roles)
            _log.info("%s: %s", name, shown)
    record = _record(task, rows, config, training["time_s"], {"training": dict(training), "decodings": details})
    atomic_write(run_dir / "result.json", record_to_json(record))
    return record


def run_table(
    config: ManyRuns, kind: type, task_of: Callable[[Any, Path], Task], run_dir: Path, more: Mapping[str, Any]
) -> Record:
    """All runs of a table, one after the other, each in its folder; then one result.json with every row."""
    records, task = [], None
    todo = config.runs(kind)
    for number, (name, one) in enumerate(todo, start=1):
        folder = run_dir / name
        if (folder / "result.json").is_file():
            _log.info("run %d of %d: %s is finished", number, len(todo), name)
        else:
            _log.info("run %d of %d: %s", number, len(todo), name)
            task = task_of(dataclasses.replace(one, cache_dir=one.cache_dir or run_dir / "cache"), folder)
            run_one(one, task, folder)
        records.append(read_record(folder / "result.json"))
    rows = [row for record in records for row in record.rows]
    metrics = {key: value for record in records for key, value in record.metrics.items()}
    details = {
        "quality_diversity": quality_diversity(rows, metrics),
        "runs": {name: dict(record.details) for (name, _), record in zip(todo, records, strict=True)},
        **more,
    }
    record = dataclasses.replace(
        records[0],
        config=new_record("table", "run", metrics, rows, config=dataclasses.asdict(config)).config,
        metrics=metrics,
        rows=rows,
        time_s=sum(record.time_s or 0.0 for record in records),
        details=details,
    )
    atomic_write(run_dir / "result.json", record_to_json(record))
    return record


def compute(path: Path, names: Sequence[str]) -> Scores:
    """Every metric that the predictions have the fields for, and those of `names` that can be computed here; what has
    one figure for each hypothesis goes into the details."""
    results = evaluate_predictions(path)
    missing = {name: METRICS.get(name).not_installed() for name in names if name not in results}
    absent = [f"{name} needs {what}" for name, what in missing.items() if what is not None]
    results |= evaluate_predictions(path, [name for name, what in missing.items() if what is None])
    details: dict[str, Any] = {key: value for key, value in results.items() if isinstance(value, list)}
    details |= {key: results[key] for key in ("num_examples", "num_references")}
    if absent:
        details["not_computed"] = absent
    return Scores({k: v for k, v in results.items() if k in METRICS and not isinstance(v, list)}, details)


def row_settings(config: OneRun, decoding: Decoding, test: str, num_tests: int) -> dict[str, Any]:
    """What tells rows of a method apart: K, the decoding, its budget, and the test set where there are several."""
    settings = {"K": config.num_hypotheses, "decoding": decoding.name, "budget": config.num_hypotheses * decoding.beams}
    return {**settings, "test": test} if num_tests > 1 else settings


def quality_diversity(rows: Sequence[Row], metrics: Mapping[str, Metric]) -> list[dict[str, Any]]:
    """Points of the quality-diversity plots, one for each row."""
    shown = [key for key, metric in metrics.items() if metric.role in ("quality", "diversity")]
    return [
        {
            "method": row.method,
            "seed": row.seed,
            **row.settings,
            **{k: row.figures[k] for k in shown if k in row.figures},
        }
        for row in rows
    ]


def _row(
    config: OneRun,
    task: Task,
    test: str,
    decoding: Decoding,
    figures: Mapping[str, float],
    cost: Cost,
    training: Mapping[str, Any],
) -> Row:
    costs = {
        "prefill_tokens": cost.prefill_tokens,
        "decode_tokens": cost.decode_tokens,
        "decode_time_s": round(cost.time_s, 3),
        "train_time_s": round(training["time_s"], 3),
        "trainable_parameters": training["trainable_parameters"],
    }
    settings = row_settings(config, decoding, test, len(task.tests))
    return Row(config.label, {**figures, **costs}, config.seed, settings)


def _record(task: Task, rows: Sequence[Row], config: OneRun, train_s: float, details: Mapping[str, Any]) -> Record:
    used = {key for row in rows for key in row.figures}
    names = (*task.columns, *METRICS.names(), *SPEAKERS, *COSTS)
    columns = {key: _column(key, task) for key in names if key in used}
    spent = train_s + sum(row.figures["decode_time_s"] for row in rows)
    return new_record(
        task.record,
        "run",
        columns,
        rows,
        config=dataclasses.asdict(config),
        inputs=task.inputs,
        time_s=round(spent, 3),
        details={"quality_diversity": quality_diversity(rows, columns), **task.details, **details},
        notes=NOTES,
    )


def _column(key: str, task: Task) -> Metric:
    for known in (COSTS, SPEAKERS, task.columns):
        if key in known:
            return known[key]
    entry = METRICS.get(key)
    better = entry.better if entry.better in ("higher", "lower") else None
    return Metric(entry.unit, better, key.replace("_", " "), task.roles.get(key, ""))  # type: ignore[arg-type]

"""Text classification and similarity (GLUE) on a pretrained encoder: adapters against LoRA, full fine-tuning and a
trained head alone.

A run trains one adapter (any registered method, any of PEFT's) and the new head for a fixed number of steps, takes the
checkpoint that is best on validation rows, and scores it once on the test rows: predictions.jsonl, and result.json with
one row. `glue/table` makes such a run for every method, parameter budget, task and seed.

What is killed goes on: training from its newest checkpoint, a table with the first run that has no result.json.

Sources: the tasks and scores of GLUE (Wang et al. 2019); the comparison at equal parameters of LSR (arXiv 2502.13568);
the GLUE settings of LoRMA (arXiv 2506.07621).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.files import atomic_write
from ..core.records import Metric, Record, Row, new_record, read_record, record_to_json
from ..data.glue import get_task, part_files
from ..evaluation.glue_metrics import TASK_SCORES, decide, task_scores
from ._frame.registry import recipes
from ._glue.config import GlueConfig, GlueData, GlueTableConfig
from ._glue.training import Rows, load_encoder, predict, trained_model
from ._methods.budget import budget_parameters, matched_method
from ._methods.entry import MethodEntry

_log = logging.getLogger("polyrank")

COSTS = {
    "trainable_parameters": Metric(label="trainable parameters", role="cost"),
    "adapter_parameters": Metric(label="of the adapter"),
    "head_parameters": Metric(label="of the head"),
    "train_time_s": Metric("s", label="training", role="cost"),
    "step_time_s": Metric("s", label="a step"),
    "best_step": Metric(label="best step"),
}
NOTES = (
    "The checkpoint is chosen on validation rows; test rows are scored once and choose nothing.",
    "Training time is that of the optimiser steps; validation is not in it.",
)
DATA_NAMES = {"mrpc": "MRPC", "stsb": "STS-B", "cola": "CoLA", "sst2": "SST-2"}


@recipes.decorator("glue")
def run(config: GlueConfig, run_dir: Path) -> None:
    """Train, choose, score. `run_dir` gets adapter/ (or model/), metrics.jsonl, predictions.jsonl, result.json."""
    run_one(config, run_dir)


@recipes.decorator("glue/table")
def run_table(config: GlueTableConfig, run_dir: Path) -> None:
    """All runs of a table, one after the other, each in its folder; then one result.json with every row."""
    start = time.perf_counter()
    equal, notes = equal_methods(config)
    todo = config.runs(equal)
    records = []
    for number, (name, one) in enumerate(todo, start=1):
        folder = run_dir / name
        finished = (folder / "result.json").is_file()
        _log.info("run %d of %d: %s%s", number, len(todo), name, " is finished" if finished else "")
        records.append(read_record(folder / "result.json") if finished else run_one(one, folder))
    table = new_record(
        "glue",
        "run",
        {key: value for record in records for key, value in record.metrics.items()},
        [row for record in records for row in record.rows],
        config=dataclasses.asdict(config),
        inputs=[file for data in config.tasks.values() for file in input_files(data)],
        time_s=sum(record.time_s or 0.0 for record in records),
        details={
            "runs": {name: dict(record.details) for (name, _), record in zip(todo, records, strict=True)},
            "last_sitting_s": round(time.perf_counter() - start, 3),
        },
        notes=(*NOTES, *notes),
    )
    atomic_write(run_dir / "result.json", record_to_json(table))


def equal_methods(config: GlueTableConfig) -> tuple[dict[str, MethodEntry], list[str]]:
    """Each method at the budget that all share, and a note that says what it is."""
    import polyrank.hypotheses  # noqa: F401  registers the adapter methods

    if "equal" not in config.sizes:
        return dict(config.methods), []
    base = load_encoder(config.model, next(iter(config.tasks.values())))
    methods = {name: matched_method(config, base, method) for name, method in config.methods.items()}
    changed = [
        f"{method.label} {method.match}={method.options[method.match]}"
        for name, method in methods.items()
        if method != config.methods[name]
    ]
    rank = f" (LoRA of rank {config.match_lora_rank})" if config.match_lora_rank else ""
    note = f"Equal budget: {budget_parameters(config, base):,} adapter parameters{rank}, as near as can be"
    return methods, [f"{note}: {', '.join(changed)}." if changed else f"{note}."]


def run_one(config: GlueConfig, run_dir: Path) -> Record:
    """One run, on from where it stopped; writes and returns its record."""
    trainer, rows, facts = trained_model(config, run_dir)
    start = time.perf_counter()
    outputs = predict(trainer, rows["test"])
    regression = get_task(config.data.task).num_classes is None
    scores = task_scores(config.data.task, rows["test"].labels, outputs, regression)
    facts["test_time_s"] = time.perf_counter() - start
    write_predictions(run_dir / "predictions.jsonl", rows["test"], outputs, regression)
    record = make_record(config, facts, scores)
    atomic_write(run_dir / "result.json", record_to_json(record))
    _log.info("%s %s: %s", config.data.task, config.method.label, ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
    if not config.keep_model:
        shutil.rmtree(run_dir / "model", ignore_errors=True)
    return record


def write_predictions(path: Path, rows: Rows, outputs: Any, regression: bool) -> None:
    """One JSON line for each test row: id, label, prediction, outputs (class logits, or the score)."""
    lines = []
    for name, label, prediction, values in sorted(
        zip(rows.ids, rows.labels, decide(outputs, regression).tolist(), outputs.tolist(), strict=True)
    ):
        finite = [float(f"{value:.8g}") if math.isfinite(value) else None for value in values]
        if regression:
            prediction = finite[0]
        lines.append(json.dumps({"id": name, "label": label, "prediction": prediction, "outputs": finite}))
    atomic_write(path, "\n".join(lines) + "\n")


def make_record(config: GlueConfig, facts: Mapping[str, Any], scores: Mapping[str, float]) -> Record:
    """One row: scores (in columns of the task's own), parameters, times."""
    task = config.data.task
    title = DATA_NAMES.get(task, task.upper())
    metrics = {
        f"{task}_{name}": Metric(better="higher", label=f"{title} {name}", role="quality" if number == 0 else "")
        for number, name in enumerate(TASK_SCORES[task])
    }
    figures: dict[str, float] = {f"{task}_{name}": value for name, value in scores.items()}
    metrics[f"{task}_validation"] = Metric(label=f"{title} validation {config.main_score}")
    figures[f"{task}_validation"] = facts["validation"]
    figures |= {key: round(facts[key], 4) for key in COSTS}
    method = MethodEntry(**facts["method"])
    return new_record(
        "glue",
        "run",
        metrics | COSTS,
        [Row(config.method.label, figures, config.seed, row_settings(config, method, facts))],
        config=dataclasses.asdict(dataclasses.replace(config, method=method)),
        inputs=input_files(config.data),
        time_s=round(facts["train_time_s"] + facts["test_time_s"], 3),
        details={key: value for key, value in facts.items() if key not in ("method", *COSTS)},
        notes=NOTES,
    )


def row_settings(config: GlueConfig, method: MethodEntry, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What tells rows of a method apart: task, the adapter's own options, learning rate, steps."""
    options = {key: value for key, value in method.options.items() if isinstance(value, (str, int, float, bool))}
    return {"data": config.data.task, **options, "learning_rate": config.rate, "steps": facts["num_steps"]}


def input_files(data: GlueData) -> list[Path]:
    """Files that the result depends on; a hub id is left out."""
    return [] if data.path is None else list(part_files(get_task(data.task), data.path).values())

"""Restaurant descriptions (E2E NLG) on a small pretrained language model: one hypothesis against several, equal
budgets.

A run trains one adapter (LoRA or LoRA-MoE by maximum likelihood, or LoRA-MCL), lets it write K candidates for every
test input in each of its decodings, and scores them against all human references: predictions.jsonl for the first
decoding, a folder under decodings/ for each other, result.json with one row for each. `e2e/table` makes such a run for
every method, K and seed.

Scores (which candidate would be shown, were only one allowed): the model's own length-normalised log-likelihood, of the
hypothesis that wrote it; no reference is looked at.

What is killed goes on: training from its newest checkpoint, decoding with the first input that has no candidates, a
table with the first run that has no result.json.

Source: LoRA-MCL (arXiv 2507.10419), its budgets and metrics for translation and captioning, on data-to-text here.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..core.files import atomic_write
from ..core.records import Metric, Record, Row, new_record, read_record, record_to_json
from ..core.seeding import derive_seed
from ..data.e2e import MultiReference, find_split, read_groups
from ..evaluation.decoding import Cost
from ..evaluation.metrics import METRICS, evaluate_predictions
from ..evaluation.predict import predict
from ..evaluation.scoring import own_scores, reference_nll
from ._e2e.config import Decoding, E2eConfig, E2eTableConfig
from ._e2e.training import trained_model
from ._frame.registry import recipes

_log = logging.getLogger("polyrank")

LISTS = ("win_shares", "hypothesis_nll")  # one figure for each hypothesis: kept under details
LIKELIHOOD = ("oracle_nll", "mixture_nll", "oracle_nll_sequence", "mixture_nll_sequence", "effective_hypotheses")
COSTS = {
    "prefill_tokens": Metric("tokens", label="prefill tokens", role="cost"),
    "decode_tokens": Metric("tokens", label="decoder tokens", role="cost"),
    "decode_time_s": Metric("s", label="decoding", role="cost"),
    "train_time_s": Metric("s", label="training", role="cost"),
    "trainable_parameters": Metric("", label="trainable parameters", role="cost"),
}
ROLES = {"oracle_bleu": "quality", "best_scored_bleu": "quality", "mbleu_4": "diversity", "div_2": "diversity"}
NOTES = (
    "Equal budget means equal beams x separate decodings, not equal compute: see the token counts.",
    "oracle NLL is no likelihood; compare a single model's NLL with the mixture NLL.",
    "best-scored BLEU judges the one candidate that the model itself gives the highest likelihood per token.",
)


@recipes.decorator("e2e")
def run(config: E2eConfig, run_dir: Path) -> None:
    """Train, decode, score. `run_dir` gets adapter/, metrics.jsonl, predictions.jsonl, decodings/, result.json."""
    run_one(config, run_dir)


@recipes.decorator("e2e/table")
def run_table(config: E2eTableConfig, run_dir: Path) -> None:
    """All runs of a table, one after the other, each in its folder; then one result.json with every row."""
    start = time.perf_counter()
    records = []
    todo = config.runs()
    for number, (name, one) in enumerate(todo, start=1):
        folder = run_dir / name
        if (folder / "result.json").is_file():
            _log.info("run %d of %d: %s is finished", number, len(todo), name)
        else:
            _log.info("run %d of %d: %s", number, len(todo), name)
            one = dataclasses.replace(one, cache_dir=one.cache_dir or run_dir / "base_model")
            run_one(one, folder)
        records.append(read_record(folder / "result.json"))
    rows = [row for record in records for row in record.rows]
    metrics = {key: value for record in records for key, value in record.metrics.items()}
    table = new_record(
        "e2e",
        "run",
        metrics,
        rows,
        config=dataclasses.asdict(config),
        inputs=_inputs(todo[0][1]),
        time_s=sum(record.time_s or 0.0 for record in records),
        details={
            "quality_diversity": quality_diversity(rows),
            "runs": {name: dict(record.details) for (name, _), record in zip(todo, records, strict=True)},
            "last_sitting_s": round(time.perf_counter() - start, 3),
        },
        notes=NOTES,
    )
    atomic_write(run_dir / "result.json", record_to_json(table))


def run_one(config: E2eConfig, run_dir: Path) -> Record:
    """One run, on from where it stopped; writes and returns its record."""
    examples = test_examples(config)
    model, tokenizer, training = trained_model(config, run_dir)
    several = config.num_hypotheses if config.method.name == "mcl" else None
    results: dict[str, dict[str, Any]] = {}
    costs: dict[str, Cost] = {}
    for number, decoding in enumerate(config.decodings):
        folder = run_dir if number == 0 else run_dir / "decodings" / decoding.name
        nll = partial(reference_nll, model, tokenizer, num_hypotheses=several) if number == 0 else None
        costs[decoding.name] = predict(
            model,
            tokenizer,
            examples,
            folder / "predictions.jsonl",
            decoding.method,
            batch_size=config.decode_batch_size,
            seed=derive_seed(config.seed, decoding.name),
            score=partial(own_scores, model, tokenizer, by_hypothesis=several is not None),
            nll=nll,
            num_candidates=config.num_hypotheses,
            budget=config.num_hypotheses * decoding.beams,
            max_new_tokens=config.max_new_tokens,
            length_penalty=config.length_penalty,
            repetition_penalty=config.repetition_penalty,
            **decoding.options,
        )
        results[decoding.name] = evaluate_predictions(folder / "predictions.jsonl")
        _log.info("%s: oracle BLEU %.2f, mBLEU-4 %.3f", decoding.name, results[decoding.name]["oracle_bleu"],
                  results[decoding.name].get("mbleu_4", float("nan")))  # fmt: skip
    record = make_record(config, training, results, costs)
    atomic_write(run_dir / "result.json", record_to_json(record))
    return record


def test_examples(config: E2eConfig) -> list[MultiReference]:
    """The grouped test set; where `test_limit` is set, the same random choice for every method and seed."""
    examples = read_groups(config.data.path, config.data.test, config.data.template)
    limit = config.data.test_limit
    if limit is not None and limit < len(examples):
        chosen = sorted(random.Random(0).sample(range(len(examples)), limit))
        examples = [examples[i] for i in chosen]
    return examples


def make_record(
    config: E2eConfig,
    training: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    costs: Mapping[str, Cost],
) -> Record:
    """One row for each decoding. Likelihoods do not depend on the decoding and stand in every row."""
    first = config.decodings[0].name
    likelihood = {key: results[first][key] for key in LIKELIHOOD if key in results[first]}
    rows = []
    for decoding in config.decodings:
        figures = {key: value for key, value in results[decoding.name].items() if key in METRICS and key not in LISTS}
        cost = costs[decoding.name]
        figures |= likelihood
        figures |= {
            "prefill_tokens": cost.prefill_tokens,
            "decode_tokens": cost.decode_tokens,
            "decode_time_s": round(cost.time_s, 3),
            "train_time_s": round(training["time_s"], 3),
            "trainable_parameters": training["trainable_parameters"],
        }
        rows.append(Row(method_label(config), figures, config.seed, row_settings(config, decoding)))
    used = {key for row in rows for key in row.figures}
    metrics = {key: _column(key) for key in (*METRICS.names(), *COSTS) if key in used}
    spent = training["time_s"] + sum(cost.time_s for cost in costs.values())
    return new_record(
        "e2e",
        "run",
        metrics,
        rows,
        config=dataclasses.asdict(config),
        inputs=_inputs(config),
        time_s=round(spent, 3),
        details={
            "quality_diversity": quality_diversity(rows),
            "training": dict(training),
            **{key: results[first][key] for key in LISTS if key in results[first]},
            "num_examples": results[first]["num_examples"],
            "num_references": results[first]["num_references"],
        },
        notes=NOTES,
    )


def method_label(config: E2eConfig) -> str:
    """As it stands in the table: method and rank."""
    return f"{config.method.label} r={config.adapter_rank}"


def row_settings(config: E2eConfig, decoding: Decoding) -> dict[str, Any]:
    """What tells rows of a method apart: K, the decoding, its budget."""
    return {"K": config.num_hypotheses, "decoding": decoding.name, "budget": config.num_hypotheses * decoding.beams}


def _column(key: str) -> Metric:
    if key in COSTS:
        return COSTS[key]
    entry = METRICS.get(key)
    better = entry.better if entry.better in ("higher", "lower") else None
    return Metric(entry.unit, better, key.replace("_", " "), ROLES.get(key, ""))  # type: ignore[arg-type]


def quality_diversity(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Points of the quality-diversity plots: oracle and best-scored BLEU against mBLEU-4, one for each row."""
    keys = ("mbleu_4", "div_1", "div_2", "pairwise_bleu", "oracle_bleu", "corpus_bleu", "best_scored_bleu")
    return [
        {
            "method": row.method,
            "seed": row.seed,
            **row.settings,
            **{k: row.figures[k] for k in keys if k in row.figures},
        }
        for row in rows
    ]


def _inputs(config: E2eConfig) -> list[Path]:
    """Files that the result depends on; a hub id or folder is left out."""
    files = [find_split(config.data.path, split) for split in (config.data.train, config.data.test)]
    return [*files, *(file for file in (config.model.checkpoint, config.model.tokenizer) if file is not None)]

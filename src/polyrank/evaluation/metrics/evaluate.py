"""All metrics of a predictions.jsonl; no model of the run is needed."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...core.errors import DataError, unknown_name
from ...core.files import atomic_write
from ._registry import METRICS, Metric, Value
from ._score_files import FOLDER
from ._session import session
from .data_to_text import E2E, WEBNLG
from .predictions import Prediction, Skipped, predictions_file, read_predictions

_log = logging.getLogger("polyrank")

CAPTION_SCORES = (
    *("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d", "spice", "spider", "spider_fl"),
    *("sbert", "fense", "fer", "bertscore_precision", "bertscore_recall", "bertscore_f1"),
)
DIVERSITY = ("mbleu_4", "div_1", "div_2", "vocabulary", "distinct_candidates", "pairwise_bleu")
LIKELIHOOD = ("oracle_nll", "mixture_nll", "hypothesis_nll", "win_shares", "effective_hypotheses")
TRANSLATION = (
    *("leave_one_out_bleu", "pairwise_bleu", "oracle_bleu", "mean_bleu", "references_covered", "corpus_bleu"),
    *("hypothesis_bleu", "distinct_candidates"),
)
PRESETS: dict[str, tuple[str, ...]] = {
    "caption": (
        *(f"{way}_{score}" for score in CAPTION_SCORES for way in ("oracle", "mean")),
        *DIVERSITY,
        *LIKELIHOOD,
    ),
    "translation": (*TRANSLATION, *LIKELIHOOD),
    "diversity": DIVERSITY,
    "likelihood": LIKELIHOOD,
    "e2e": E2E,
    "webnlg": WEBNLG,
}
"""Names for several metrics at once; those that the predictions or the machine lack something for are left out."""


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        figures: num_examples, num_candidates, num_references, and one entry for each metric.
        left_out: metric of a preset -> what it needs and how to get it.
        skipped: inputs that were incomplete.
    """

    figures: dict[str, Value]
    left_out: dict[str, str]
    skipped: list[Skipped]


def evaluate(
    source: str | Path | Iterable[Mapping[str, Any]],
    metrics: Sequence[str] | None = None,
    *,
    models: Mapping[str, str] | None = None,
    skipped: str | Path | None = None,
    ids: Collection[str] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Compute metrics of any predictions with K candidates and any number of references.

    Sentence scores that take long are kept beside the predictions, in sentence_scores/: the same call after an
    interruption, or with more metrics, computes none of them twice.

    Args:
        source: predictions.jsonl, a folder that holds it, or records in memory (nothing is then kept).
        metrics: names out of METRICS and PRESETS; None takes every one that the predictions have the fields for, save
            those that are computed on request only.
        models: kind -> folder or hub id, for the metrics that need one (see MODELS).
        skipped: file to list incomplete inputs in, one JSON object a line; they are left out. None: they are an error.
        ids: only these inputs, which must all be there; others may be incomplete.
        progress: show a bar on standard error for slow metrics.
    Raises: DataError for broken predictions, or where a metric that was asked for by its own name lacks a field, a
        package, a program or a model; UnknownNameError for an unknown metric or kind of model.
    """
    named, chosen = chosen_metrics(metrics)
    incomplete: list[Skipped] = []
    records = read_predictions(source, None if skipped is None and ids is None else incomplete)
    if skipped is not None:
        atomic_write(skipped, "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in incomplete))
    if ids is not None:
        records = _only(records, ids, source)
    result = _counts(records)
    folder = predictions_file(source).parent / FOLDER if isinstance(source, str | Path) else None
    with session(models, folder, progress):
        lacking = {entry.name: lacks for entry in chosen if (lacks := entry.lacking(records)) is not None}
        for name, lacks in lacking.items():
            if name in named:
                raise DataError(f"metric {name!r} needs {lacks}")
        result |= {entry.name: entry.compute(records) for entry in chosen if entry.name not in lacking}
    return Evaluation(result, {} if metrics is None else lacking, incomplete)


def _only(records: Sequence[Prediction], ids: Collection[str], source: object) -> list[Prediction]:
    kept = [record for record in records if record.id in ids]
    if not kept or len(kept) < len(ids):
        missing = sorted(set(ids) - {record.id for record in kept})
        name = source if isinstance(source, str | Path) else "records"
        raise DataError(f"{name}: {len(missing)} of {len(ids)} inputs are missing or incomplete (first: {missing[:1]})")
    return kept


def _counts(records: Sequence[Prediction]) -> dict[str, Value]:
    """How many inputs, candidates and references there are; empty candidates are told to the log."""
    count = len(records[0].candidates)
    empty = sum(not text.strip() for record in records for text in record.candidates)
    if empty:
        _log.warning("%d of %d candidates are empty", empty, len(records) * count)
    return {
        "num_examples": len(records),
        "num_candidates": count,
        "num_references": sum(len(record.references) for record in records),
    }


def evaluate_predictions(
    source: str | Path | Iterable[Mapping[str, Any]], metrics: Sequence[str] | None = None, **options: Any
) -> dict[str, Value]:
    """The figures of `evaluate`, whose arguments it takes: floats, and lists where a metric has one figure for each
    hypothesis."""
    return evaluate(source, metrics, **options).figures


def chosen_metrics(metrics: Sequence[str] | None) -> tuple[set[str], list[Metric]]:
    """The metrics asked for by their own names, and all metrics to compute, in order."""
    if metrics is None:
        return set(), [entry for _, entry in METRICS.items() if not entry.on_request]
    for name in metrics:
        if name not in PRESETS and name not in METRICS:
            raise unknown_name("metric", name, [*METRICS.names(), *PRESETS])
    names = dict.fromkeys(member for name in metrics for member in PRESETS.get(name, (name,)))
    return {name for name in metrics if name not in PRESETS}, [METRICS.get(name) for name in names]

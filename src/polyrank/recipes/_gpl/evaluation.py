"""Adapters of a sentence encoder on a judged collection: against zero-shot and BM25, over ranks and checkpoints.

Every system indexes the corpus and ranks `depth` documents for each judged query. A ranking is kept in `rankings/`
under a hash of encoder, corpus, queries and depth, so that a second run, or one with more checkpoints, encodes only
what is new. Latency is the median over single queries, one after the other: encoding and search. Written into the
folder: result.json (one row for each system), per_query.jsonl, and figures if there are several ranks or checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...analysis.adapter_files import open_adapter
from ...core.errors import CheckpointError, ConfigError
from ...core.files import atomic_write, parse_json, sha256
from ...core.records import Record, Row, new_record, record_to_json
from ...report.retrieval_figures import Series, save_figure, score_figure
from ...retrieval.corpus import document_text, read_corpus, read_qrels, read_queries
from ...retrieval.dense import encode_corpus, encodes_queries_only, load_encoder
from ...retrieval.evaluate import (
    COST_COLUMNS,
    MAIN,
    MEASURES,
    Comparison,
    Judgements,
    Scores,
    compare,
    evaluate,
    match_qrels,
    metric_columns,
    parse_measure,
    without_own,
)
from ...retrieval.index import adapter_hash, identify
from ...retrieval.lexical import Bm25Index
from ...retrieval.search import Searcher
from .search import encoder_parts, index_corpus, is_whole_model, run_settings

_log = logging.getLogger("polyrank")
TIMED_QUERIES = 50
RANKING = 2
"""Raised when rankings change for equal encoder, corpus, queries and depth."""
BM25_SETTINGS = "lucene k1 1.5 b 0.75 english"
BASE_INDEX = ".index-base"
BASELINES = {"zero-shot": "p_zero_shot", "BM25": "p_bm25"}


@dataclass(frozen=True)
class Collection:
    """Judged data in BEIR's layout: identifiers in the corpus' order, queries that are judged, judgements."""

    path: Path
    ids: list[str]
    queries: dict[str, str]
    judgements: Judgements
    digest: str


@dataclass(frozen=True)
class System:
    """One system's rankings and costs; `scores` follow from the rankings."""

    name: str
    scores: Scores
    figures: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """All systems (adapters last), and each against each baseline: comparisons[system][baseline]."""

    record: Record
    systems: list[System]
    comparisons: dict[str, dict[str, Comparison]]
    collection: Collection
    files: list[Path]


def read_collection(path: str | Path, split: str = "test") -> Collection:
    """Read corpus ids, queries and judgements; what names unknown ids is counted and left out. Raises DataError."""
    path = Path(path)
    digest, ids = hashlib.sha256(), []
    for document in read_corpus(path):
        ids.append(document.id)
        digest.update(json.dumps([document.id, document.title, document.text]).encode())
    queries = read_queries(path)
    judgements = match_qrels(read_qrels(path, split), queries, set(ids))
    for note in judgements.notes():
        _log.warning("%s: %s", path, note)
    judged = {query: queries[query] for query in judgements.qrels}
    digest.update(json.dumps(judged).encode())
    return Collection(path, ids, judged, judgements, digest.hexdigest())


def evaluate_adapters(
    adapters: Sequence[Path],
    model: str,
    data: str | Path,
    out: str | Path,
    *,
    split: str = "test",
    depth: int = 1000,
    measures: Sequence[str] = MEASURES,
    batch_size: int = 64,
    bm25: bool = True,
    quiet: bool = False,
) -> Evaluation:
    """Evaluate BM25, the encoder as it is, and each adapter. Raises as `read_collection`, and ConfigError."""
    if depth < 1:
        raise ConfigError(f"depth must be at least 1, got {depth}")
    measures = tuple(measures) if MAIN in measures else (MAIN, *measures)
    for name in measures:
        parse_measure(name)  # a misspelt one is found before anything is encoded
    start, out = time.perf_counter(), Path(out)
    collection = read_collection(data, split)
    named = [("zero-shot", None), *zip(adapter_names(adapters), adapters, strict=True)]
    ranked = {"BM25": _bm25(collection, out, depth)} if bm25 else {}
    for name, adapter in named:
        _log.info("%s: %s", collection.path, name)
        ranked[name] = _dense(name, adapter, model, collection, out, depth, batch_size, quiet)
    shutil.rmtree(out / BASE_INDEX, ignore_errors=True)
    systems = []
    for name, entry in ranked.items():
        scores = evaluate(entry["rankings"], collection.judgements.qrels, measures)
        adapter = dict(named).get(name)
        parameters, settings = describe(adapter) if adapter else (0, {})
        figures = {**scores.mean, **entry["costs"], **({"adapter_parameters": parameters} if name != "BM25" else {})}
        systems.append(System(name, scores, figures, settings))
    comparisons = {
        system.name: {
            other.name: compare(system.scores, other.scores)
            for other in systems
            if other.name in BASELINES and other is not system
        }
        for system in systems
    }
    record = _record(systems, comparisons, collection, measures, model, depth, time.perf_counter() - start)
    files = [atomic_write(out / "result.json", record_to_json(record)), _per_query(systems, collection, out)]
    files += _figures(systems, out)
    return Evaluation(record, systems, comparisons, collection, files)


def adapter_names(adapters: Sequence[Path]) -> list[str]:
    """A name for each folder, as short as tells them apart: "adapted" for one, else the path below what they share."""
    if len(adapters) == 1:
        return ["adapted"]
    import os

    shared = Path(os.path.commonpath([str(folder.resolve()) for folder in adapters])) if adapters else Path()
    names = [folder.resolve().relative_to(shared).as_posix() for folder in adapters]
    return ["adapted" if name == "." else name for name in names]


def find_adapters(source: str | Path) -> list[Path]:
    """Every adapter (and every run's whole model) in a folder, each once, checkpoints in the order of their steps.

    Raises: CheckpointError if there is none, or its files cannot be trusted.
    """
    source = Path(source)
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    files = [*source.rglob("adapter_config.json"), *source.rglob("model/modules.json")]
    found: dict[str, Path] = {}
    for folder in sorted({file.parent for file in files}, key=lambda folder: (len(folder.parts), folder)):
        if not is_whole_model(folder):
            open_adapter(folder)
        digest = sha256(folder) if is_whole_model(folder) else adapter_hash(folder)
        found.setdefault(digest, folder)  # a run keeps its adapter among its stages too
    if not found:
        raise CheckpointError(f"{source} holds no adapter (no adapter_config.json)")
    return sorted(found.values(), key=lambda folder: [_natural(part) for part in folder.parts])


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def describe(adapter: Path) -> tuple[int, dict[str, Any]]:
    """Number of parameters, and what is worth a column: rank and step (of a checkpoint's name, else of the run)."""
    files = open_adapter(adapter)
    parameters = sum(math.prod(shape) for shape in files.shapes.values())
    steps = [re.fullmatch(r"(?:checkpoint|step)-(\d+)", part) for part in adapter.parts]
    step = next((int(m[1]) for m in reversed(steps) if m), run_settings(adapter).get("steps"))
    settings = {"rank": files.config.get("r"), "step": step}
    return parameters, {key: value for key, value in settings.items() if isinstance(value, int)}


def _bm25(collection: Collection, out: Path, depth: int) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        index = Bm25Index.build([document_text(document) for document in read_corpus(collection.path)])
        queries, times = list(collection.queries.values()), []
        ids, scores = index.search(queries, depth + 1)
        for query in queries[:TIMED_QUERIES]:
            start = time.perf_counter()
            index.search([query], 10)
            times.append(time.perf_counter() - start)
        found = [row[values > 0] for row, values in zip(ids, scores, strict=True)]  # 0: no word in common
        return {"rankings": _named(collection, found, depth), "costs": {"latency_ms": _median(times) * 1e3}}

    return _kept(out, "BM25", [collection.digest, depth, BM25_SETTINGS], make)


def _dense(
    name: str, adapter: Path | None, model: str, collection: Collection, out: Path, depth: int, batch: int, quiet: bool
) -> dict[str, Any]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    named, part = encoder_parts(model, adapter)
    encoder = load_encoder(named, part)
    identity = identify(encoder, named, part)
    queries_only = encodes_queries_only(adapter)

    def make() -> dict[str, Any]:
        kept = adapter is None or queries_only  # the base's vectors serve all that adapt queries alone
        folder = out / (BASE_INDEX if kept else ".index")
        index = index_corpus(collection.path, folder, model, None if kept else adapter, batch_size=batch, quiet=quiet)
        queries = list(collection.queries.values())
        found, _ = index.search(encode_corpus(encoder, queries, batch), depth + 1)
        searcher = Searcher(index, encoder, index.manifest.encoder)
        costs = {"latency_ms": searcher.latency_ms(queries[:TIMED_QUERIES]), "index_bytes": index.size_bytes}
        if not kept:
            shutil.rmtree(folder)
        return {"rankings": _named(collection, found, depth), "costs": costs}

    sides = ["queries"] if queries_only else []
    return _kept(out, name, [collection.digest, depth, identity.weights, identity.adapter, *sides], make)


def _named(collection: Collection, found: Sequence[Any], depth: int) -> dict[str, list[str]]:
    """`depth` documents for each query, out of one more: its own is none of them."""
    return {
        query: without_own(query, [collection.ids[i] for i in row])[:depth]
        for query, row in zip(collection.queries, found, strict=True)
    }


def _kept(out: Path, name: str, key: Sequence[Any], make: Any) -> dict[str, Any]:
    """The entry of that key in rankings/, made and written if it is not there."""
    digest = hashlib.sha256(json.dumps([RANKING, *key]).encode()).hexdigest()[:16]
    file = out / "rankings" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{digest}.json"
    if file.is_file():
        try:
            value = parse_json(file.read_bytes())
            if value["rankings"].keys() and value["costs"] is not None:
                return value
        except (ValueError, KeyError, TypeError, AttributeError):
            _log.warning("%s cannot be read and is made again", file)
    value = make()
    atomic_write(file, json.dumps(value) + "\n")
    return value


def _record(
    systems: Sequence[System],
    comparisons: Mapping[str, Mapping[str, Comparison]],
    collection: Collection,
    measures: Sequence[str],
    model: str,
    depth: int,
    time_s: float,
) -> Record:
    rows = []
    for system in systems:
        p_values = {BASELINES[name]: comparison.p_value for name, comparison in comparisons[system.name].items()}
        rows.append(Row(system.name, {**system.figures, **p_values}, None, system.settings))
    used = {key for row in rows for key in row.figures}
    columns = {key: column for key, column in (metric_columns(measures) | COST_COLUMNS).items() if key in used}
    judgements = collection.judgements
    name = re.sub(r"[^a-z0-9_-]+", "-", collection.path.resolve().name.lower()).strip("-_") or "data"
    return new_record(
        f"gpl-{name}"[:100],
        "run",
        columns,
        rows,
        config={"model": model, "data": collection.path, "depth": depth, "measures": list(measures)},
        inputs=[collection.path],
        time_s=round(time_s, 3),
        details={
            "comparisons": {a: {b: comparison_json(c) for b, c in row.items()} for a, row in comparisons.items()},
            "num_queries": len(collection.queries),
            "num_documents": len(collection.ids),
            "unknown_queries": judgements.unknown_queries,
            "unknown_documents": judgements.unknown_documents,
            "unanswerable": judgements.unanswerable,
            "unjudged": judgements.unjudged,
        },
        notes=[
            f"{len(collection.queries)} judged queries, {len(collection.ids)} documents; p: two-sided sign-flip"
            f" permutation test of {MAIN} over queries, not corrected for several comparisons",
            *judgements.notes(),
        ],
    )


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON, every win and loss listed."""
    return {
        "measure": comparison.measure,
        "difference": comparison.difference,
        "p_value": comparison.p_value,
        "wins": [{"query": query, "difference": change} for query, change in comparison.wins],
        "losses": [{"query": query, "difference": change} for query, change in comparison.losses],
        "ties": comparison.ties,
    }


def _per_query(systems: Sequence[System], collection: Collection, out: Path) -> Path:
    lines = [
        {"query": query, "text": text, **{system.name: system.scores.per_query[MAIN][query] for system in systems}}
        for query, text in collection.queries.items()
    ]
    return atomic_write(out / "per_query.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _figures(systems: Sequence[System], out: Path) -> list[Path]:
    """Scores against steps (one line for each rank) and against ranks, where there are at least two."""
    levels = {system.name: system.figures[MAIN] for system in systems if system.name in BASELINES}
    adapters = [system for system in systems if system.name not in BASELINES]
    drawn = []
    stepped = [system for system in adapters if "step" in system.settings]
    if len({system.settings["step"] for system in stepped}) > 1:
        ranks = sorted({system.settings.get("rank", 0) for system in stepped})
        series = []
        for rank in ranks:
            of_rank = [system for system in stepped if system.settings.get("rank", 0) == rank]
            series.append(Series(f"rank {rank}", [(s.settings["step"], s.figures[MAIN]) for s in of_rank]))
        drawn.append(save_figure(score_figure(series, levels, "training step", MAIN), out / "steps.png"))
    ranked = [system for system in adapters if "rank" in system.settings]
    if len({system.settings["rank"] for system in ranked}) > 1:
        last: dict[int, System] = {}
        for system in sorted(ranked, key=lambda s: s.settings.get("step", 1 << 60)):
            last[system.settings["rank"]] = system
        series = [Series("last checkpoint", [(rank, system.figures[MAIN]) for rank, system in sorted(last.items())])]
        drawn.append(save_figure(score_figure(series, levels, "rank", MAIN, log=True), out / "ranks.png"))
    return drawn


def _median(values: Sequence[float]) -> float:
    import statistics

    return statistics.median(values)

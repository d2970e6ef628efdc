"""The stages of recipe `gpl` in their order: corpus, queries, vectors, negatives, labels, tuples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import DataError
from ...core.files import sha256
from ...retrieval.corpus import corpus_source
from ...retrieval.dense import MINILM, minilm_folder
from ...retrieval.generate import GivenWork, QueryWork
from ...retrieval.lists import ListLabelWork, ListWork, list_margin
from ...retrieval.mine import NegativeWork, VectorWork
from ...retrieval.sizing import CorpusWork, queries_per_document
from ...retrieval.store import Stage, Store
from ...retrieval.teachers import CrossEncoderTeacher, FunctionTeacher, FusionTeacher, Teacher, check_margins
from ...retrieval.teachers import describe as describe_teacher
from ...retrieval.tuples import LabelWork, TupleWork, check_reachable, margin_range, num_passes
from .config import GplConfig

Score = Callable[[list[tuple[str, str]]], Iterable[float]]
MARGINS = "margins"


@dataclass(frozen=True)
class Prepared:
    """What training needs, whole on disk.

    Attributes: lists: the tuples are lists (pairs=all). documents: vectors of the corpus that stay as they are, where
        queries alone are trained; else None. margin: the largest margin of all labels.
    """

    corpus: Stage
    queries: Stage
    labels: Stage
    tuples: Stage
    lists: bool
    documents: Stage | None
    margin: float


def prepare(config: GplConfig, store: Store, normalised: bool, scorer: Score | None = None) -> Prepared:
    """Make, or find, everything up to the tuples.

    Args:
        normalised: whether the student's scores are cosines; margins that they cannot reach are then refused.
        scorer: a teacher given as a function from (query, document) texts to numbers, instead of `teacher`.
    Raises: DataError for a corpus or a teacher that cannot be used; ConfigError for settings that do not go together.
    """
    pairs, frozen = config.resolved_pairs(scorer is not None), config.trains_queries_only(scorer is not None)
    corpus = corpus_stage(config, store)
    queries = query_stage(config, store, corpus)
    needed = [*needed_encoders(config, scorer), *([config.encoder] if frozen else [])]
    vectors = {name: vector_stages(config, store, corpus, queries, name) for name in dict.fromkeys(needed)}
    negatives = negative_stage(config, store, corpus, queries, vectors)
    labels = label_stage(config, store, (corpus, queries, negatives), vectors, scorer)
    largest = list_margin(labels.rows()) if pairs == "all" else 0.0
    smallest, largest = (-largest, largest) if pairs == "all" else margin_range(labels.rows())
    store.describe(MARGINS, {"labels": labels.key[:12], "smallest": smallest, "largest": largest})
    if config.teacher == "cross-encoder" and scorer is None:
        check_margins(largest, smallest, str(config.cross_encoder))
    if config.rescale is not None:
        smallest, largest = (-config.rescale if smallest < 0 else 0.0), (config.rescale if largest > 0 else 0.0)
    in_student_units = config.teacher == "fusion" and config.fusion_units == "student" and scorer is None
    if normalised and config.loss == "margin_mse":
        check_reachable(smallest, largest, in_student_units)
    documents = vectors[config.encoder][0] if frozen else None
    tuples = tuple_stage(config, store, labels, pairs == "all")
    return Prepared(corpus, queries, labels, tuples, pairs == "all", documents, largest)


def corpus_stage(config: GplConfig, store: Store) -> Stage:
    settings = {"sha256": sha256(corpus_source(config.corpus)), "sample_size": config.sample_size, "seed": config.seed}
    return store.make("corpus", settings, [], lambda: CorpusWork(str(config.corpus), config.sample_size, config.seed))


def query_stage(config: GplConfig, store: Store, corpus: Stage) -> Stage:
    if config.queries is not None:
        folder = config.queries
        settings: dict[str, Any] = {"given": sha256(folder)}
        return store.make("queries", settings, [corpus], lambda: GivenWork(corpus.rows(), str(folder)))
    drawn = -(-config.num_tuples // (corpus.counts["rows"] * len(config.query_kinds)))
    per_document = config.queries_per_document or min(queries_per_document(corpus.counts["rows"]), drawn)
    settings = {"kinds": config.query_kinds, "per_document": per_document, "seed": config.seed}
    if "t5" in config.query_kinds:
        settings["generator"] = model_identity(str(config.generator))
    stage = store.make(
        "queries",
        settings,
        [corpus],
        lambda: QueryWork(corpus.rows(), config.query_kinds, per_document, config.seed, generator=config.generator),
    )
    if not stage.counts["rows"]:
        raise DataError(f"no document of {config.corpus} gave a query of kinds {', '.join(config.query_kinds)}")
    return stage


def vector_stages(config: GplConfig, store: Store, corpus: Stage, queries: Stage, name: str) -> tuple[Stage, Stage]:
    """Vectors of the documents and of the queries."""
    settings = {"encoder": model_identity(name)}

    def make(label: str, rows: Stage) -> Stage:
        work = VectorWork(rows.rows(), name, batch_size=config.encode_batch_size)
        return store.make(label, settings, [rows], lambda: work, work.dimension)

    return make("doc_vectors", corpus), make("query_vectors", queries)


def negative_stage(
    config: GplConfig, store: Store, corpus: Stage, queries: Stage, vectors: dict[str, tuple[Stage, Stage]]
) -> Stage:
    dense = config.dense_retrievers
    settings: dict[str, Any] = {"dense": len(dense), "bm25": config.uses_bm25, "k": config.negatives}
    if config.uses_bm25:
        settings["language"] = config.language
    files = {name: vector_files(vectors[name]) for name in dense}
    needs = [corpus, queries, *(stage for name in dense for stage in vectors[name])]
    return store.make(
        "negatives",
        settings,
        needs,
        lambda: NegativeWork(corpus.rows(), queries.rows(), files, config.uses_bm25, config.negatives, config.language),
    )


def label_stage(
    config: GplConfig,
    store: Store,
    texts: tuple[Stage, Stage, Stage],
    vectors: dict[str, tuple[Stage, Stage]],
    scorer: Score | None,
) -> Stage:
    corpus, queries, negatives = texts
    teacher: Teacher
    needs = [*texts]
    if scorer is not None:
        teacher = FunctionTeacher(queries.rows(), corpus.rows(), scorer)
    elif config.teacher == "cross-encoder":
        teacher = CrossEncoderTeacher(queries.rows(), corpus.rows(), str(config.cross_encoder))
    else:
        needs += vectors[config.encoder]
        teacher = FusionTeacher(
            queries.rows(),
            corpus.rows(),
            vector_files(vectors[config.encoder]),
            config.fusion_weight,
            config.fusion_units == "student",
            config.language,
        )
    settings = dict(describe_teacher(teacher))
    if isinstance(teacher, CrossEncoderTeacher):
        settings["name"] = model_identity(teacher.name)
    pairs = config.resolved_pairs(scorer is not None)
    if pairs == "all":
        return store.make(
            "labels",
            {**settings, "pairs": "all"},
            needs,
            lambda: ListLabelWork(queries.rows(), negatives.rows(), corpus.rows(), teacher),
        )
    usable = queries.counts["rows"] - negatives.counts["queries_without_negative"]
    passes, source = num_passes(config.num_tuples, usable), pairs == "source"
    settings |= {"passes": passes, "source_is_positive": source, "seed": config.seed}
    return store.make(
        "labels",
        settings,
        needs,
        lambda: LabelWork(queries.rows(), negatives.rows(), corpus.rows(), teacher, passes, config.seed, source),
    )


def tuple_stage(config: GplConfig, store: Store, labels: Stage, lists: bool) -> Stage:
    settings: dict[str, Any] = {"total": config.num_tuples, "seed": config.seed}
    if lists:  # rescaling multiplies their scores when they are read
        settings["documents"] = config.documents_per_query
        return store.make(
            "tuples",
            settings,
            [labels],
            lambda: ListWork(labels.rows(), config.num_tuples, config.seed, config.documents_per_query),
        )
    settings["rescale"] = config.rescale

    def work() -> TupleWork:
        rows = labels.rows()
        rescale = (*margin_range(rows), config.rescale) if config.rescale is not None else None
        return TupleWork(rows, config.num_tuples, config.seed, rescale)

    return store.make("tuples", settings, [labels], work)


def needed_encoders(config: GplConfig, scorer: Score | None) -> list[str]:
    """Encoders whose vectors are made: the dense retrievers, and the student where the teacher fuses its scores."""
    fused = [config.encoder] if config.teacher == "fusion" and scorer is None else []
    return list(dict.fromkeys([*config.dense_retrievers, *fused]))


def vector_files(stages: tuple[Stage, Stage]) -> tuple[Path, Path]:
    return stages[0].folder / "vectors.npy", stages[1].folder / "vectors.npy"


def model_identity(name: str) -> str:
    """The content's hash for a folder, the name for a hub id."""
    path = Path(minilm_folder() if name == MINILM else name)
    return f"sha256:{sha256(path)}" if path.is_dir() else name

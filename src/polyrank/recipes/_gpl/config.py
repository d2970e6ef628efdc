"""What the YAML of recipe `gpl` may say, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...core.errors import ConfigError
from ...retrieval.dense import MINILM
from ...retrieval.engine import ENGINES
from ...retrieval.generate import KINDS
from ...retrieval.mine import BM25

FULL = "full"
"""Value of `adapter` that trains every weight of the encoder."""


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """The corpus and the queries made for it.

    Attributes:
        corpus: BEIR folder, folder of .txt/.md, .jsonl or .csv.
        sample_size: documents kept: -1 by GPL's rule, 0 all, n at most n.
        query_kinds: t5, title, cloze, crop; t5 needs `generator` (hub id or folder).
        queries_per_document: of each kind; None: by GPL's rule (about 250,000 in all), but no more than training
            draws (steps x batch_size).
        queries: a BEIR folder with queries and qrels/train.tsv to use instead of generated ones.
    """

    corpus: Path
    seed: int = 0
    sample_size: int = -1
    query_kinds: list[str] = field(default_factory=lambda: ["title", "cloze", "crop"])
    queries_per_document: int | None = None
    generator: str | None = None
    queries: Path | None = None


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """Negatives and their labels.

    Attributes:
        retrievers: encoders (hub ids, folders, "minilm") and "bm25"; None: the student before training, and bm25.
        negatives: of each retriever and query.
        pairs: source: the query's own document against a negative (GPL); retrieved: two negatives; all: every pair
            of the query's mined documents; None: all where all queries are cut out of their documents and the teacher
            is fusion, which counts words, else source.
        documents_per_query: with pairs=all, documents drawn from the mined ones each time a query comes; None: all.
        teacher: fusion (of the encoder's and BM25's standardised scores) or cross-encoder (named by `cross_encoder`).
        fusion_weight: share of the encoder's score in the fusion.
        fusion_units: "student" labels in the encoder's own score units, "standard" in standard deviations.
        rescale: largest absolute margin after piecewise linear rescaling; None: margins as the teacher gives them.
        language: of BM25's stop words and stemmer; None for neither.
    """

    retrievers: list[str] | None = None
    negatives: int = 50
    pairs: Literal["source", "retrieved", "all"] | None = None
    documents_per_query: int | None = None
    teacher: Literal["fusion", "cross-encoder"] = "fusion"
    cross_encoder: str | None = None
    fusion_weight: float = 0.7
    fusion_units: Literal["student", "standard"] = "student"
    rescale: float | None = None
    language: str | None = "english"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The student and how it is trained.

    Attributes:
        loss: margin_mse (GPL) or qgen (multiple negatives ranking on query and positive).
        side: both: queries and documents are encoded by what is trained (GPL); queries: documents keep the vectors of
            the encoder as it came, so that an index of them stays valid and a step encodes queries alone (pairs=all
            only); None: queries where pairs is all, else both.
        adapter: lora, or any method of PEFT's or polyrank's by name, or full (every weight).
        adapter_options: fields of its config, put over r, lora_alpha and lora_dropout for lora.
        target_modules: None: query, key and value projections, whatever the model calls them.
        similarity: of the student's score; with "cosine", or an encoder that normalises, margins lie in [-2, 2].
        learning_rate: None: 1e-3, and 2e-5 with adapter=full.
        max_length: tokens of a text in training; at most the encoder's own limit.
        tsdae_steps: steps of denoising auto-encoding on the corpus before (TSDAE); 0: none.
        warmup_steps: of `steps`, in which the learning rate rises.
        keep_checkpoints: keep the adapter as it was every `save_every` steps (`gpl evaluate RUN --checkpoints`).
    """

    encoder: str = MINILM
    loss: Literal["margin_mse", "qgen"] = "margin_mse"
    side: Literal["both", "queries"] | None = None
    adapter: str = "lora"
    adapter_options: dict[str, Any] = field(default_factory=dict)
    rank: int = 16
    lora_alpha: float = 64.0
    lora_dropout: float = 0.05
    target_modules: list[str] | str | None = None
    similarity: Literal["dot", "cosine"] = "dot"
    steps: int = 600
    batch_size: int = 32
    learning_rate: float | None = None
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_length: int = 350
    precision: Literal["fp32", "bf16"] = "fp32"
    tsdae_steps: int = 0
    tsdae_learning_rate: float = 3e-5
    save_every: int = 200
    keep_checkpoints: bool = False


@dataclass(frozen=True, kw_only=True)
class GplConfig(CorpusSettings, LabelSettings, TrainingSettings):
    """One run, from a corpus to an adapter. engine, workers: see retrieval.engine; they change no file."""

    engine: str = "local"
    workers: int = 2
    encode_batch_size: int = 64

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()

    def _check_numbers(self) -> None:
        at_least_one = ("negatives", "rank", "steps", "batch_size", "max_length", "save_every", "workers")
        for name in (*at_least_one, "encode_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lora_alpha", "learning_rate", "tsdae_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "tsdae_steps", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.sample_size < -1:
            raise ConfigError(f"sample_size must be -1 (automatic), 0 (all) or a number, got {self.sample_size}")
        if self.queries_per_document is not None and self.queries_per_document < 1:
            raise ConfigError(f"queries_per_document must be at least 1, got {self.queries_per_document}")
        if not 0 < self.fusion_weight <= 1:
            raise ConfigError(f"fusion_weight must be in (0, 1], got {self.fusion_weight}")
        if self.rescale is not None and not self.rescale > 0:
            raise ConfigError(f"rescale must be positive, got {self.rescale}")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.keep_checkpoints and self.adapter == FULL:
            raise ConfigError("keep_checkpoints keeps adapters; adapter 'full' trains none")
        if self.loss == "qgen" and self.pairs in ("retrieved", "all"):
            raise ConfigError("loss 'qgen' trains on a query and its own document: pairs must be 'source'")
        if self.documents_per_query is not None and self.documents_per_query < 2:
            raise ConfigError(f"documents_per_query must be at least 2, got {self.documents_per_query}")
        if self.batch_size < 2 and self.loss == "qgen":
            raise ConfigError("loss 'qgen' takes its negatives from the batch: batch_size must be at least 2")

    def _check_choices(self) -> None:
        from ...core.errors import check_choice

        check_choice("engine", self.engine, ENGINES)
        for kind in self.query_kinds:
            check_choice("query_kinds", kind, KINDS)
        if not self.query_kinds and self.queries is None:
            raise ConfigError(f"query_kinds must name at least one of {', '.join(KINDS)}")
        if "t5" in self.query_kinds and self.generator is None:
            raise ConfigError("query_kinds has 't5': give generator=..., a hub id or a folder of a T5")
        if self.teacher == "cross-encoder" and self.cross_encoder is None:
            raise ConfigError("teacher 'cross-encoder' needs cross_encoder=..., a hub id or a folder")
        if self.retrievers is not None and (not self.retrievers or len(set(self.retrievers)) != len(self.retrievers)):
            raise ConfigError(f"retrievers must name at least one, each once, got {self.retrievers}")

    def resolved_pairs(self, own_teacher: bool) -> Literal["source", "retrieved", "all"]:
        """`pairs`, or what it means where it is not given. `own_teacher`: a teacher was given as a function.

        Raises: ConfigError for a side that these pairs cannot be trained on.
        """
        cut_out = self.queries is None and "t5" not in self.query_kinds
        lexical = self.teacher == "fusion" and not own_teacher and self.loss == "margin_mse"
        pairs = self.pairs or ("all" if cut_out and lexical else "source")
        if self.side == "queries" and pairs != "all":
            raise ConfigError(f"side 'queries' trains on lists of documents: pairs must be 'all', here it is {pairs!r}")
        if self.documents_per_query is not None and pairs != "all":
            raise ConfigError(f"documents_per_query belongs to pairs 'all', here it is {pairs!r}")
        if pairs == "all" and self.side == "both" and self.documents_per_query is None:
            raise ConfigError("side 'both' encodes every document of a list: give documents_per_query=8 (or so)")
        return pairs

    def trains_queries_only(self, own_teacher: bool) -> bool:
        """Whether documents keep the vectors that the encoder gave them before."""
        return self.side == "queries" or (self.side is None and self.resolved_pairs(own_teacher) == "all")

    @property
    def rate(self) -> float:
        """The learning rate in force."""
        return self.learning_rate or (2e-5 if self.adapter == FULL else 1e-3)

    @property
    def dense_retrievers(self) -> list[str]:
        return [name for name in (self.retrievers or [self.encoder, BM25]) if name != BM25]

    @property
    def uses_bm25(self) -> bool:
        return self.retrievers is None or BM25 in self.retrievers

    @property
    def num_tuples(self) -> int:
        return self.steps * self.batch_size

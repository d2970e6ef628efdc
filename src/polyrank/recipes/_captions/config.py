"""What the YAML of recipes `translation`, `image_captioning` and `audio_captioning` share, checked before anything is
loaded: an adapter, how it is trained, how it writes K candidates; one run of it, and a table of runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ...core.errors import ConfigError, check_choice
from ...evaluation.metrics import METRICS
from ...training.steps import optimizer_steps
from .._e2e.config import METHODS, Decoding, Method
from .processes import num_processes


@dataclass(frozen=True)
class CaptionMethod(Method):
    """As recipe e2e's methods; decodings that do not go with a method are left out, since all methods share a list."""

    def __post_init__(self) -> None:
        check_choice("method.name", self.name, METHODS)
        if not 0 < self.annealed_to <= 1:
            raise ConfigError(f"method.annealed_to must be in (0, 1], got {self.annealed_to}")
        _named_once("method.decodings", self.decodings)


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """What every run of a table shares.

    Attributes:
        rank: r of one hypothesis; lora_alpha is for rank r (a wide adapter keeps alpha / rank).
        num_steps: optimiser steps; num_epochs: passes over the data instead.
        batch_size: rows of one forward pass; an optimiser step has batch_size * accumulation_steps in each process.
        schedule: of the learning rate after its rise; "cosine" ends at `last_rate` of the peak.
        initial_temperature: of annealed-wta, nats per token. The small recipes begin low: on a base that knows the task
            already, hypotheses differ by little at first (a guess from one short trial).
        warmup: share of the steps in which the learning rate rises.
        patience: validate and save after every epoch, keep the best, and stop after so many epochs without an
            improvement of 0.001; None: neither.
        max_length: longest training row in tokens; longer ones are dropped and counted.
        decodings: of every method, as far as it takes them; empty: the method's own. num_decodings: only the first so
            many of them.
        metrics: what is computed of the predictions, as far as it can be here.
        speakers: what makes the sentence vectors by which candidates are told apart by hypothesis: "auto" (MiniLM where
            its package is installed, else TF-IDF), "tfidf", "minilm", a folder or hub id; "none": left out.
        cache_dir: where built base models and packed data lie (default: cache/ in the run's folder).
    """

    rank: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    num_steps: int | None = 300
    num_epochs: int | None = None
    batch_size: int = 32
    accumulation_steps: int = 1
    learning_rate: float = 3e-3
    schedule: Literal["linear", "cosine", "inverse_sqrt"] = "cosine"
    last_rate: float = 0.0
    initial_temperature: float = 1.0
    warmup: float = 0.05
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    bf16: bool = False
    patience: int | None = None
    max_length: int = 512
    save_every: int = 50
    decode_batch_size: int = 32
    max_new_tokens: int = 128
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    decodings: list[Decoding] = field(default_factory=list)
    num_decodings: int | None = None
    metrics: list[str] = field(default_factory=list)
    speakers: str = "auto"
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ConfigError("give num_steps or num_epochs, and null for the other")
        counts = ("rank", "num_steps", "num_epochs", "batch_size", "accumulation_steps", "patience", "max_length",
                  "save_every", "decode_batch_size", "max_new_tokens", "num_decodings")  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("lora_alpha", "learning_rate", "repetition_penalty", "adam_epsilon", "initial_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "last_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.decodings:
            _named_once("decodings", self.decodings)
        for name in self.metrics:
            check_choice("metrics", name, METRICS.names())

    def total_steps(self, num_rows: int) -> int:
        """Optimiser steps for so many training rows; batch_size is that of one process."""
        return self.num_steps or optimizer_steps(
            num_rows,
            epochs=self.num_epochs or 1,
            batch_size=self.batch_size,
            accumulation=self.accumulation_steps,
            processes=num_processes(),
        )


@dataclass(frozen=True, kw_only=True)
class OneRun(CaptionSettings):
    """Train one adapter, decode the test inputs, score. num_hypotheses is K, candidates of every method."""

    method: CaptionMethod
    num_hypotheses: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_hypotheses < 1:
            raise ConfigError(f"num_hypotheses must be at least 1, got {self.num_hypotheses}")
        if not self.chosen_decodings:
            raise ConfigError(f"none of the decodings goes with method {self.method.name!r}")

    @property
    def chosen_decodings(self) -> list[Decoding]:
        fitting = [d for d in self.decodings or self.method.decodings if self.method.takes(d)]
        return fitting[: self.num_decodings]

    @property
    def several(self) -> int | None:
        """K where the model has K hypotheses, None where it is one model."""
        return self.num_hypotheses if self.method.name == "mcl" else None

    @property
    def adapter_rank(self) -> int:
        return self.rank * self.num_hypotheses if self.method.wide else self.rank

    @property
    def adapter_alpha(self) -> float:
        return self.lora_alpha * self.adapter_rank / self.rank

    @property
    def label(self) -> str:
        """As it stands in tables: method and rank."""
        return f"{self.method.label} r={self.adapter_rank}"


@dataclass(frozen=True, kw_only=True)
class ManyRuns(CaptionSettings):
    """Methods x K x seeds, one run after the other."""

    methods: dict[str, CaptionMethod]
    num_hypotheses: list[int] = field(default_factory=lambda: [3])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods:
            raise ConfigError("methods must hold at least one method")
        for name in ("num_hypotheses", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name} must hold at least one value, each once, got {values}")

    def runs(self, kind: type) -> list[tuple[str, Any]]:
        """Folder name and configuration (of class `kind`) of every run, seed by seed: a table cut short still compares
        the methods."""
        own = {"methods", "num_hypotheses", "seeds"}
        shared = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in own}
        return [
            (f"{name}-k{k}-seed{seed}", kind(**shared, method=method, num_hypotheses=k, seed=seed))
            for seed in self.seeds
            for k in self.num_hypotheses
            for name, method in self.methods.items()
        ]


def check_limits(section: str, limits: Mapping[str, int | None]) -> None:
    """Raise ConfigError for a limit below 1."""
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ConfigError(f"{section}.{name} must be at least 1, got {value}")


def _named_once(field_name: str, decodings: list[Decoding]) -> None:
    names = [decoding.name for decoding in decodings]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"{field_name} must name at least one decoding, each once, got {names}")

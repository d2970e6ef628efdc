"""What the YAML of recipes `data_to_text` and `maths` share: base model, optimisation, decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...core.errors import ConfigError
from ...training.steps import optimizer_steps
from .._e2e.config import ModelChoice
from .._methods.entry import MethodEntry


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """A GPT-2 built from its configuration, with a byte-level BPE of its own, and trained first on the plain training
    sentences (targets alone), so that an adapter has something to adapt.

    Attributes: width is n_embd; context in tokens; learning_rate rises over a tenth of the steps, then falls linearly.
    """

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 256
    vocabulary: int = 2048
    num_steps: int = 300
    batch_size: int = 32
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "context", "num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.scratch.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ConfigError(f"model.scratch.width {self.width} must be a multiple of its {self.heads} heads")
        if self.vocabulary < 258:
            raise ConfigError(f"model.scratch.vocabulary must be at least 258 (all bytes), got {self.vocabulary}")
        if not self.learning_rate > 0:
            raise ConfigError(f"model.scratch.learning_rate must be positive, got {self.learning_rate}")


@dataclass(frozen=True)
class TextModel(ModelChoice):
    """A base model as `ModelChoice` has it, or one built here (`scratch`)."""

    scratch: Scratch | None = None

    def __post_init__(self) -> None:
        if self.scratch is None:
            super().__post_init__()
        elif self.name_or_path is not None or self.checkpoint is not None:
            raise ConfigError("model.scratch builds the model: leave model.name_or_path and model.checkpoint empty")


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How a language model is trained on prompts and targets; AdamW.

    Attributes:
        num_steps: optimiser steps; num_epochs: passes over the data instead.
        batch_size: rows of one forward pass; an optimiser step has batch_size * accumulation_steps.
        learning_rate: None: the method's own.
        schedule: of the learning rate after `warmup_steps`, down to 0.
        label_smoothing: share of the target's probability that is spread over the vocabulary, in [0, 1).
        max_grad_norm: gradients are clipped to it; 0: never.
        bf16: autocast.
    """

    num_steps: int | None = 300
    num_epochs: int | None = None
    batch_size: int = 32
    accumulation_steps: int = 1
    learning_rate: float | None = None
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup_steps: int = 30
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    max_grad_norm: float = 1.0
    save_every: int = 100
    bf16: bool = False

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ConfigError("give num_steps or num_epochs, and null for the other")
        for name in ("num_steps", "num_epochs", "batch_size", "accumulation_steps", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")

    def total_steps(self, num_rows: int) -> int:
        """Optimiser steps for so many training rows."""
        return self.num_steps or optimizer_steps(
            num_rows, epochs=self.num_epochs or 1, batch_size=self.batch_size, accumulation=self.accumulation_steps
        )


@dataclass(frozen=True, kw_only=True)
class TextShared(Optimization):
    """Everything but the data, the method and the seed.

    Attributes:
        match_parameters, match_lora_rank: as in recipe glue: the method's size is changed to reach this number of
            parameters, or that of LoRA of this rank.
        max_length: tokens of prompt and target; longer training rows are dropped and counted.
        num_beams: 1 is greedy. length_penalty: exponent of the length that a beam's log-probability is divided by.
        no_repeat_ngram_size: no n-gram of this many tokens is written twice; 0: all may.
        cache_dir: where converted or built base models lie (default: base_model/ in the run's folder).
    """

    model: TextModel
    match_parameters: int | None = None
    match_lora_rank: int | None = None
    max_length: int = 512
    num_beams: int = 4
    length_penalty: float = 0.8
    no_repeat_ngram_size: int = 4
    max_new_tokens: int = 128
    decode_batch_size: int = 64
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("match_parameters", "match_lora_rank", "max_length", "num_beams", "max_new_tokens",
                     "decode_batch_size"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.no_repeat_ngram_size < 0:
            raise ConfigError(f"no_repeat_ngram_size must not be negative, got {self.no_repeat_ngram_size}")
        if self.match_parameters is not None and self.match_lora_rank is not None:
            raise ConfigError("give match_parameters or match_lora_rank, not both")


@dataclass(frozen=True, kw_only=True)
class TextSettings(TextShared):
    """Everything but the data."""

    method: MethodEntry
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method.adapter == "head":
            raise ConfigError("method 'head' trains a new classifier; a language model has none")

    @property
    def rate(self) -> float:
        return self.method.learning_rate if self.learning_rate is None else self.learning_rate

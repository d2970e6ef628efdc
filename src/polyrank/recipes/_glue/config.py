"""What the YAML of recipe `glue` may say, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ...core.errors import ConfigError, check_choice
from ...core.structure import from_dict
from ...data.glue import get_task
from ...evaluation.glue_metrics import TASK_SCORES
from .._methods.entry import MethodEntry, method_entry

_COUNTS = (
    *("num_steps", "num_epochs", "batch_size", "gradient_accumulation_steps", "eval_batch_size", "eval_steps"),
    *("match_parameters", "match_lora_rank"),
)


@dataclass(frozen=True)
class Encoder:
    """The base model.

    Attributes:
        name_or_path: hub id or folder.
        package: a Python package that carries the model in its folder `model`; taken instead where it is installed.
        target_modules: what adapters adapt: names (suffixes), or a regular expression.
        head_modules: modules that are new, or of no use as they are: trained whole, saved beside the adapter.
        head_learning_rate: of those modules; None: as the rest.
        texts: "together": both texts of a row in one input, with transformers' own head. "apart": each alone, the head
            on their vectors (see sentence_head.py), for encoders of sentences.
    """

    name_or_path: str
    package: str | None = None
    target_modules: str | list[str] = field(default_factory=lambda: ["query", "value"])
    head_modules: list[str] = field(default_factory=lambda: ["classifier"])
    head_learning_rate: float | None = None
    texts: str = "together"

    def __post_init__(self) -> None:
        check_choice("model.texts", self.texts, ("together", "apart"))
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise ConfigError(f"model.head_learning_rate must be positive, got {self.head_learning_rate}")


@dataclass(frozen=True)
class GlueData:
    """The task and where it comes from.

    Attributes:
        path: folder with the task's files (see data/glue.py); None: `hub_id`, through `datasets`.
        validation_share: held out of train to choose the checkpoint, where the task has no file for that.
        train_limit, validation_limit, test_limit: at most so many rows, the same random choice for every seed.
    """

    task: str
    path: Path | None = None
    hub_id: str | None = "nyu-mll/glue"
    validation_share: float = 0.1
    train_limit: int | None = None
    validation_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        get_task(self.task)
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"data.validation_share must be in (0, 1), got {self.validation_share}")
        for name in ("train_limit", "validation_limit", "test_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a table share.

    Attributes:
        num_steps: optimiser steps of batch_size * gradient_accumulation_steps rows, the same for all methods;
            num_epochs: passes over the data instead.
        eval_steps: steps between two validations (and checkpoints); None: an epoch, or all steps if that is less.
        learning_rate: None: each method's own.
        warmup: share of the steps in which the learning rate rises; it then falls linearly to 0.
        max_length: tokens; longer rows are cut and counted.
        bf16: "auto": autocast to bf16 where the processor has instructions for it (AMX, AVX512-BF16, or a GPU's).
        match_parameters: change `method.match` until the adapter has as nearly as can be so many parameters.
        match_lora_rank: the same, for the number that LoRA of this rank has on the same modules.
        keep_model: keep the weights of full fine-tuning and of a head trained alone once the run is scored.
    """

    model: Encoder
    num_steps: int = 200
    num_epochs: int | None = None
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    eval_batch_size: int = 64
    eval_steps: int | None = 50
    learning_rate: float | None = None
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_length: int = 128
    bf16: bool | Literal["auto"] = "auto"
    match_parameters: int | None = None
    match_lora_rank: int | None = None
    keep_model: bool = True

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.max_length < 4:
            raise ConfigError(f"max_length must be at least 4 (tokens of a row), got {self.max_length}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup must be in 0..1, got {self.warmup}")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.match_parameters is not None and self.match_lora_rank is not None:
            raise ConfigError("give match_parameters or match_lora_rank, not both")


@dataclass(frozen=True, kw_only=True)
class GlueConfig(Settings):
    """One run: train one model with one method, choose its best checkpoint, score it.

    `model` may also be an entry of the LSR project's (`roberta_lora`, `roberta_lsr`), and `training` its group: see
    `_glue_projects`.
    """

    model: Any
    data: GlueData
    method: Any
    seed: int = 0
    training: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        from .projects import translate

        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in translate(values).items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "model", _encoder(self.model))
        object.__setattr__(self, "method", method_entry(self.method))
        if self.method.adapter == "pat":
            raise ConfigError(
                "method 'pat' cuts the residual stream of decoders, an encoder's width is tied to its heads and norms: "
                "it runs in recipes data_to_text, maths and methods"
            )
        super().__post_init__()

    @property
    def rate(self) -> float:
        return self.method.learning_rate if self.learning_rate is None else self.learning_rate

    @property
    def main_score(self) -> str:
        return TASK_SCORES[self.data.task][0]


def _encoder(value: Any) -> Encoder:
    return value if isinstance(value, Encoder) else from_dict(Encoder, value, "model")


def _task_entry(name: str, value: Any) -> GlueData:
    """An entry of conf/data inside a table, where the name of its default recipe means nothing."""
    if isinstance(value, Mapping):
        value = {key: item for key, item in value.items() if key != "default_recipe"}
    return value if isinstance(value, GlueData) else from_dict(GlueData, value, f"tasks.{name}")


@dataclass(frozen=True, kw_only=True)
class GlueTableConfig(Settings):
    """Methods x parameter budgets x tasks x seeds, one run after the other.

    Attributes:
        methods, tasks: by name; tasks are entries of conf/data.
        sizes: "default": each method as its entry says; "equal": at the parameters of LoRA of rank `match_lora_rank`.
            Where both are the same adapter it is run once.
    """

    methods: dict[str, Any]
    tasks: dict[str, Any]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    sizes: list[str] = field(default_factory=lambda: ["equal", "default"])
    match_lora_rank: int | None = 8
    keep_model: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "methods", {name: method_entry(value) for name, value in self.methods.items()})
        object.__setattr__(self, "tasks", {name: _task_entry(name, value) for name, value in self.tasks.items()})
        if not self.methods or not self.tasks:
            raise ConfigError("a table needs at least one method and one task")
        for name in ("seeds", "sizes"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name} must hold at least one value, each once, got {values}")
        for size in self.sizes:
            check_choice("sizes", size, ("equal", "default"))
        if "equal" in self.sizes and (self.match_parameters or self.match_lora_rank) is None:
            raise ConfigError("sizes: 'equal' needs match_lora_rank or match_parameters")

    def runs(self, equal: Mapping[str, MethodEntry]) -> list[tuple[str, GlueConfig]]:
        """Folder's name and configuration of every run, seed by seed: a table cut short still compares the methods.

        Args:
            equal: each method at the budget that all share.
        """
        shared = {item.name: getattr(self, item.name) for item in fields(Settings)}
        shared |= {"match_parameters": None, "match_lora_rank": None}
        runs = {}
        for seed in self.seeds:
            for task, data in self.tasks.items():
                for name, entry in self.methods.items():
                    found: list[MethodEntry] = []
                    for size in self.sizes:
                        method = equal[name] if size == "equal" else entry
                        if method in found:
                            continue
                        found.append(method)
                        folder = f"{task}-{name}{'-equal' if method != entry else ''}-seed{seed}"
                        runs[folder] = GlueConfig(**shared, data=data, method=method, seed=seed)
        return list(runs.items())

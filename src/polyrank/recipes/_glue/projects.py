"""The LSR project's configuration, understood by recipe `glue`: its command lines work with only the program's name
changed.

    polyrank run model=roberta_lsr model.lsr.num_terms=8 model.lsr.r=4
    polyrank run model=roberta_lora model.lora.r=16 training.num_train_epochs=10 training.learning_rate=1e-4
    polyrank run --multirun model=roberta_lora,roberta_lsr training.learning_rate=1e-4,5e-4,1e-3

There the model's entry says how the model is adapted (`model.lora`, `model.lsr`), and `training` how it is trained.
Differs: the new head is trained (there it keeps its random values); a layer that the factors do not fit is refused,
never skipped; both adapters start as the base model; validation rows are held out of train instead of being the rows
that are reported; fp16 means bf16 where the processor has it.
Source: the repository of Li & Sarwate 2025 (arXiv 2502.13568), its conf/.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...core.errors import ConfigError, check_choice
from ...core.structure import from_dict
from .._methods.entry import MethodEntry
from .config import Encoder


@dataclass(frozen=True)
class LoraGroup:
    """`model.lora`."""

    r: int = 8
    alpha: float = 32
    target_modules: list[str] = field(default_factory=lambda: ["query", "value"])

    def method(self) -> MethodEntry:
        return MethodEntry("lora", "LoRA", "lora", {"r": self.r, "lora_alpha": self.alpha})


@dataclass(frozen=True)
class LsrGroup:
    """`model.lsr`. factor_a x factor_b is the size of every adapted layer, in and out; null: near-square, any size."""

    r: int = 2
    alpha: float = 8192
    target_modules: list[str] = field(default_factory=lambda: ["query", "value"])
    num_terms: int = 16
    factor_a: int | None = None
    factor_b: int | None = None

    def method(self) -> MethodEntry:
        options: dict[str, Any] = {"r": self.r, "num_terms": self.num_terms, "lora_alpha": self.alpha}
        if (self.factor_a is None) != (self.factor_b is None):
            raise ConfigError("give both model.lsr.factor_a and model.lsr.factor_b, or neither")
        if self.factor_a is not None:
            factors = [self.factor_a, self.factor_b] * 2
            options["factor_pattern"] = dict.fromkeys(self.target_modules, factors)
        return MethodEntry("lsr", "LSR", "lsr", options, match="num_terms")


@dataclass(frozen=True)
class ProjectModel:
    """An entry `model=roberta_lora` or `model=roberta_lsr`."""

    base_model: str
    adaptation_type: str
    name: str = ""
    lora: LoraGroup | None = None
    lsr: LsrGroup | None = None

    def group(self) -> LoraGroup | LsrGroup:
        check_choice("model.adaptation_type", self.adaptation_type, ("lora", "lsr"))
        group = getattr(self, self.adaptation_type)
        if group is None:
            raise ConfigError(f"model.adaptation_type is {self.adaptation_type!r}, but model has no such group")
        return group


@dataclass(frozen=True)
class Training:
    """The group `training`."""

    learning_rate: float = 5e-4
    num_train_epochs: int = 20
    per_device_train_batch_size: int = 256
    per_device_eval_batch_size: int = 256
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.01
    fp16: bool = True

    def settings(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "num_epochs": self.num_train_epochs,
            "batch_size": self.per_device_train_batch_size,
            "eval_batch_size": self.per_device_eval_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "weight_decay": self.weight_decay,
            "warmup": 0.0,
            "eval_steps": None,
            "bf16": "auto" if self.fp16 else False,
        }


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of GlueConfig that the project's groups change; none where there is no such group."""
    model, training = values["model"], values["training"]
    changed: dict[str, Any] = {}
    if isinstance(model, dict) and "adaptation_type" in model:
        project = from_dict(ProjectModel, model, "model")
        group = project.group()
        changed["method"] = group.method()
        changed["model"] = Encoder(project.base_model, target_modules=group.target_modules)
    if training is not None:
        changed |= from_dict(Training, training, "training").settings()
        changed["training"] = None
    return changed

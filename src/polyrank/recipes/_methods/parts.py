"""What an entry of conf/method may bring beside its adapter: an initialiser, an optimiser, additional losses.

    initialiser: {name: eva, num_batches: 8}        lora_ga, eva: values from the first training rows
    optimizer: {name: lora_pro, options: {moments: full}}
    losses: {name: ba_lora, options: {consistency: 0.05}}

All three may stand in one entry; what does not go together says so before the first step.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...core.errors import ConfigError, check_choice, name_message
from ...core.seeding import derive_seed, preserved_torch_rng

CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Starts of PEFT's LoRA that take the first s B A out of the base weights."""


@dataclass(frozen=True)
class Initialiser:
    """Values from data, see `polyrank.adapters.initialisers`. options: arguments of `initialise_<name>`."""

    name: Literal["lora_ga", "eva"]
    num_batches: int = 8
    batch_size: int = 8
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method.initialiser.{name} must be at least 1, got {getattr(self, name)}")
        allowed = {
            "lora_ga": ("direction", "scale", "gamma", "norm_clip"),
            "eva": ("center", "score", "maximum_batches"),
        }[self.name]
        for name in self.options:
            check_choice("method.initialiser.options", name, allowed)


@dataclass(frozen=True)
class OptimizerChoice:
    """lora_pro: `LoraProAdamW`; lora_pro_sgd: `LoraProSGD`. options: their arguments but params, lr, weight_decay."""

    name: Literal["lora_pro", "lora_pro_sgd"]
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        allowed = {"lora_pro": ("betas", "eps", "damping", "moments"), "lora_pro_sgd": ("damping",)}[self.name]
        for name in self.options:
            check_choice("method.optimizer.options", name, allowed)


@dataclass(frozen=True)
class LossChoice:
    """ba_lora: the paper's newer recipe; ba_lora_first: its first. options: fields of `BaLoraRecipe`, changed."""

    name: Literal["ba_lora", "ba_lora_first"]
    options: dict[str, Any] = field(default_factory=dict)


def initialise(
    choice: Initialiser | None, model: Any, rows: Sequence[dict[str, Any]], collator: Any, seed: int
) -> None:
    """Write the initialiser's values into a new adapter; without one, nothing. The random state is left as it was.

    The batches are the same for every method at a seed, and for every sitting of a run: a resumed run makes the same
    start again before it loads its checkpoint.
    """
    if choice is None:
        return
    import torch

    from ...adapters import initialisers

    count = min(choice.num_batches * choice.batch_size, len(rows))
    chosen = random.Random(derive_seed(seed, "initialiser")).sample(range(len(rows)), count)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    size = choice.batch_size
    batches = [
        {key: value.to(device) for key, value in collator([rows[i] for i in chosen[first : first + size]]).items()}
        for first in range(0, count, size)
    ]
    with preserved_torch_rng():
        if choice.name == "eva":
            initialisers.initialise_eva(model, batches, **choice.options)
        else:
            gradients = initialisers.base_gradients(model, batches)
            initialisers.initialise_lora_ga(model, gradients, **choice.options)


def trainer_class(losses: LossChoice | None, trainer: type, task: str) -> tuple[type, dict[str, Any]]:
    """The Trainer that adds the losses to `trainer`, and its further arguments.

    Args: task: "classification" or "generation"; for any other there are no such losses.
    """
    if losses is None:
        return trainer, {}
    if task not in ("classification", "generation"):
        raise ConfigError(f"method.losses: {losses.name} needs logits of classes or tokens; {task} has one score")
    from ...objectives.ba_lora import RECIPES
    from ...training.ba_lora import BaLoraMixin

    recipe = RECIPES[task if losses.name == "ba_lora" else f"{task}-first"]
    known = {item.name for item in dataclasses.fields(recipe)} - {"task"}
    for name in losses.options:
        if name not in known:
            raise ConfigError(name_message("field in method.losses.options", name, known))
    recipe = dataclasses.replace(recipe, **losses.options)
    return type(f"BaLora{trainer.__name__}", (BaLoraMixin, trainer), {}), {"recipe": recipe}


def optimizer_arguments(
    choice: OptimizerChoice | None, model: Any, learning_rate: float, weight_decay: float
) -> dict[str, Any]:
    """The Trainer's argument for the optimiser; empty where it is the Trainer's own AdamW."""
    if choice is None:
        return {}
    from ...training.lora_pro import LoraProAdamW, LoraProSGD, lora_pro_groups

    lora_pro_groups(model)  # says what does not fit before anything is trained
    kind = {"lora_pro": LoraProAdamW, "lora_pro_sgd": LoraProSGD}[choice.name]
    given = {"model": model, "lr": learning_rate, "weight_decay": weight_decay, **choice.options}
    return {"optimizer_cls_and_kwargs": (kind, given)}


def changes_base(initialiser: Initialiser | None, adapter: Any) -> bool:
    """Whether the start took something out of the base weights, so that the adapter alone would not fit the base."""
    start = getattr(adapter, "init_lora_weights", None)
    named = isinstance(start, str) and start.lower().startswith(CHANGED_BASE)
    return named or (initialiser is not None and initialiser.name == "lora_ga")


def save_adapter(model: Any, folder: Path, initial: Path | None) -> None:
    """Save for the untouched base. initial: the adapter as it was before training, where `changes_base`; what is
    written is then the difference of both, an ordinary LoRA of rank 2 r."""
    if initial is None:
        model.save_pretrained(str(folder))
        return
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(initial))
    file = folder / "adapter_model.safetensors"
    beside = {key: value.contiguous() for key, value in get_peft_model_state_dict(model).items() if "lora_" not in key}
    if beside:  # PEFT's conversion leaves new heads out
        save_file({**beside, **load_file(file)}, file, metadata={"format": "pt"})

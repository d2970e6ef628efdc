"""LoRAM: train LoRA on a pruned copy of a model, then use it with the weights of the whole one.

    W0P = prune(W0);   train s B_P A_P on W0P;   B_R, A_R = B_P, A_P with zeros at what was pruned;   W0 + s B_R A_R

Structured: whole key-value heads with their query heads, and feed-forward neurons, are cut out. With kept positions I,
layers that write a cut dimension (q, k, v, gate, up) get B_R (out, r) with B_R[I] = B_P, those that read it (o, down)
A_R (r, in) with A_R[:, I] = A_P; the other factor is as trained. Then, block by block and for the same input,

    whole model with the recovered adapter = trained small model + what the pruned heads and neurons add by themselves.

Unstructured and semi-structured: weights are set to zero, shapes stay, and so does the adapter.

Source: Zhang et al. 2025, Train Small, Infer Large (LoRAM, arXiv 2502.13533), and its released code (structured).
Differs: pruned positions get zeros only (an option of the release fills A with random values); head counts come from
the config; without structure B A is not masked, as a masked product is no LoRA of its rank. `align_pruned` is the
publisher's step between pruning and LoRA; after it the identity above no longer holds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import CheckpointError, ConfigError, check_choice
from . import _pruning_scores as scoring
from ._pruning_alignment import align_pruned
from ._pruning_folder import (
    PruningPlan,
    adapter_files,
    load_pruned,
    read_plan,
    save_pruned,
    weights_hash,
    write_adapter,
)
from ._pruning_layout import cut, fit_config, units

__all__ = ["LoramConfig", "align_pruned", "load_pruned", "prune_model", "recover_adapter", "recover_state",
           "save_pruned"]  # fmt: skip
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PATTERNS = ("structured", "semi_structured", "unstructured")


@dataclass(frozen=True)
class LoramConfig:
    """How to prune. Raises ConfigError for a value out of range."""

    ratio: float = field(default=0.5, metadata={"help": "Share of each layer that is removed, in (0, 1)."})
    pattern: str = field(default="structured", metadata={"help": "Heads and neurons, n of m weights, or any weights."})
    scores: str = field(default="magnitude", metadata={"help": "By what the largest stay: magnitude, taylor, random."})
    first_layer: int = field(default=0, metadata={"help": "First layer that is pruned; those before it stay whole."})
    last_layer: int | None = field(default=None, metadata={"help": "Last layer that is pruned; default: the last."})
    kinds: tuple[str, ...] = field(default=("attention", "ffn"), metadata={"help": "What structured pruning cuts."})
    group: int = field(default=4, metadata={"help": "semi_structured: m; round(m (1 - ratio)) of m weights stay."})
    seed: int = field(default=0, metadata={"help": "Of scores=random."})

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, (int, float)) or isinstance(self.ratio, bool) or not 0 < self.ratio < 1:
            raise ConfigError(f"ratio must lie in (0, 1), got {self.ratio!r}")
        check_choice("pattern", self.pattern, PATTERNS)
        check_choice("scores", self.scores, scoring.SCORES)
        object.__setattr__(self, "kinds", tuple([self.kinds] if isinstance(self.kinds, str) else self.kinds))
        for kind in self.kinds or ("",):
            check_choice("kinds", kind, ("attention", "ffn"))
        if self.pattern == "semi_structured" and not 0 < round(self.group * (1 - self.ratio)) < self.group:
            raise ConfigError(f"ratio {self.ratio} of groups of {self.group} weights keeps all or none of them")

    def prunes(self, layer: int) -> bool:
        return self.first_layer <= layer <= (layer if self.last_layer is None else self.last_layer)


def prune_model(
    model: nn.Module,
    config: LoramConfig,
    batches: Iterable[Mapping[str, Any]] | None = None,
    kept: Mapping[tuple[int, str], Iterable[int]] | None = None,
    in_place: bool = False,
) -> tuple[nn.Module, PruningPlan]:
    """The pruned model (a copy, or the model itself) and the plan that `recover_adapter` needs.

    Args:
        batches: inputs with labels, for scores="taylor".
        kept: structured: the groups to keep by (layer, kind), instead of scores; other units stay whole.
    Raises: ConfigError for a family whose heads are not known, indices out of order, layers that do not exist.
    """
    base = str(getattr(model, "name_or_path", "") or "")
    if not in_place:
        model = copy.deepcopy(model)
    if config.pattern == "structured":
        plan = _prune_structured(model, config, batches, kept, base)
    else:
        if kept is not None:
            raise ConfigError(f"`kept` names heads and neurons: it needs pattern='structured', not {config.pattern!r}")
        plan = _prune_weights(model, config, batches, base)
    model.name_or_path = plan.mark(base)  # PEFT writes it into the adapters trained on this model
    return model, plan


def _prune_structured(model: Any, config: LoramConfig, batches: Any, kept: Any, base: str) -> PruningPlan:
    every = units(model)
    if kept is not None:
        unknown = set(kept) - {(unit.layer, unit.kind) for unit in every}
        if unknown:
            raise ConfigError(f"kept: the model has no {sorted(unknown)[0]} (layer, kind)")
        chosen = [unit.keeping(kept.get((unit.layer, unit.kind), unit.kept)) for unit in every]
    else:
        pruned = [unit for unit in every if unit.kind in config.kinds and config.prunes(unit.layer)]
        _some(pruned, config)
        names = [name for unit in pruned for name in (*unit.writers, *unit.readers)]
        scores = scoring.weight_scores(model, names, config.scores, batches, config.seed)
        chosen = [scoring.best_groups(model, unit, scores, config.ratio) if unit in pruned else unit for unit in every]
    for unit in chosen:
        cut(model, unit)
    return PruningPlan("structured", base, tuple(chosen), plain=fit_config(model, chosen))


def _prune_weights(model: nn.Module, config: LoramConfig, batches: Any, base: str) -> PruningPlan:
    layers = {name: layer for name, number, layer in scoring.block_layers(model) if config.prunes(number)}
    _some(layers, config)
    scores = scoring.weight_scores(model, layers, config.scores, batches, config.seed)
    for name, layer in layers.items():
        trained = layer.weight.requires_grad
        if config.pattern == "unstructured":
            scoring.apply_unstructured(layer, scores[name], config.ratio)
        else:
            keep = round(config.group * (1 - config.ratio))
            scoring.apply_semi_structured(name, layer, scores[name], keep, config.group)
        layer.weight.requires_grad_(trained)
    masks = weights_hash({name: layer.weight != 0 for name, layer in layers.items()})
    return PruningPlan(config.pattern, base, (), plain=True, masks=masks)


def _some(found: Any, config: LoramConfig) -> None:
    if not found:
        raise ConfigError(f"no layer between first_layer={config.first_layer} and last_layer={config.last_layer}")


def recover_state(state: Mapping[str, Tensor], plan: PruningPlan) -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's names, from the shapes of the pruned model to those of the whole one.

    Raises: CheckpointError where a shape is not the one that the plan leaves: another pruned model's adapter.
    """
    writers = {name: unit for unit in plan.units for name in unit.writers}
    readers = {name: unit for unit in plan.units for name in unit.readers}
    recovered = {}
    for key, value in state.items():
        module, _, factor = key.removeprefix("base_model.model.").rpartition(".lora_")
        if factor.startswith("B.") and module in writers:
            unit, dim = writers[module], 0
            index, full = unit.rows(module), unit.groups * unit.writers[module][0] * unit.writers[module][1]
        elif factor == "A.weight" and module in readers:
            unit, dim = readers[module], 1
            index, full = unit.columns(module), unit.groups * unit.readers[module]
        else:
            recovered[key] = value
            continue
        if value.shape[dim] != len(index):
            raise CheckpointError(
                f"{key} has {value.shape[dim]} {('rows', 'columns')[dim]}, this pruning leaves {len(index)}: "
                "the adapter was trained on another pruned model"
            )
        shape = [*value.shape[:dim], full, *value.shape[dim + 1 :]]
        recovered[key] = value.new_zeros(shape).index_copy(dim, index.to(value.device), value)
    return recovered


def recover_adapter(
    adapter: str | Path, plan: PruningPlan | str | Path, folder: str | Path, base: str | None = None
) -> Path:
    """Write the adapter of the whole model: an ordinary PEFT LoRA folder, from one trained on the pruned model.

    Args:
        adapter: folder of a LoRA adapter that was trained on the pruned model.
        plan: what `prune_model` returned, or a folder of `save_pruned`.
        folder: new or empty; it appears whole or not at all.
        base: name or folder of the whole model, to be written into the adapter's config; default: the plan's.
    Raises: CheckpointError for an adapter of another pruned model or another kind, ConfigError for DoRA, whose
        magnitudes belong to whole rows, for starts that change the base (PiSSA), for a folder that is not empty.
    """
    plan = plan if isinstance(plan, PruningPlan) else read_plan(plan)
    config, state = adapter_files(adapter)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{adapter} holds a {config.get('peft_type')!r} adapter: only LoRA can be recovered")
    if config.get("use_dora"):
        raise ConfigError(f"{adapter} is DoRA: its magnitudes belong to whole rows, which pruning has cut")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGED_BASE):
        raise ConfigError(
            f"{adapter} started from {start!r}, which changed the pruned weights: convert it to LoRA first"
        )
    plan.check_mark(config.get("base_model_name_or_path"), adapter)
    config["base_model_name_or_path"] = base if base is not None else plan.base
    return write_adapter(Path(folder), json.dumps(config, indent=2, sort_keys=True), recover_state(state, plan))

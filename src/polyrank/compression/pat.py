"""PAT: which channels of the residual stream a model can do without is learnt while LoRA adapts it; then they are cut.

    z = scale * M * (I + L1 diag(v) L0) u     after the embedding, each attention and each feed-forward block
    M = sigma(tau(s) m) + beta(s)             one mask (d,) for all 2L + 1 places; 1 at step 0, 0 or 1 from step s0 on
    tau(s) = 1 / (1 - ln s / ln s0),   beta(s) = max(0, 1/2 - s / s0),   s0 a third of all optimiser steps

m, scale (d,), L0 (k, d), v (k,), L1 (d, k). To the loss are added active_weight |N - sum 1(m > 0)| / d, with a
straight-through step, and identity_weight sum over places (|L0 L0^T - I| + |L1^T L1 - I|). The rest is ordinary LoRA.
At the end writers are multiplied by their place's map and keep N rows, readers keep N columns, and norms are corrected:
the small model equals the masked one.

Source: PAT: Pruning-Aware Tuning for Large Language Models (arXiv 2408.14721), and its released code.
Differs: from step s0 on exactly the N channels with the largest m stay and M is 0 or 1 in training too (the release
rounds at inference only); both the paper's v and the release's scale exist, and the scale is merged; the identity loss
is the paper's, on both factors of all places; at the start, where no m is > 0, the loss is finite. The weights of the
two losses are ours.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import Trainer

from ..core.errors import CheckpointError, ConfigError
from ._pat_modules import NAME, SparsificationModules, active_loss, check_family, identity_loss, install
from ._pat_shrink import narrow_config, narrow_model

__all__ = ["PatConfig", "PatTrainer", "get_pat_model", "load_pat", "pat_loss", "shrink", "sparsification"]


@dataclass(frozen=True)
class PatConfig:
    """How much is cut, and how it is learnt.

    Raises (on construction): ConfigError for a value out of range.
    """

    total_steps: int = field(metadata={"help": "Optimiser steps of the run; the mask is final after a third of them."})
    sparsity: float = field(default=0.25, metadata={"help": "Share of the channels that is cut, in (0, 1)."})
    rank: int | None = field(default=None, metadata={"help": "k of each module; default: 5 % of the width."})
    multiple_of: int | None = field(
        default=None, metadata={"help": "The new width is a multiple of this; default: the number of heads."}
    )
    active_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on the number of channels."})
    identity_weight: float = field(default=1e-4, metadata={"help": "Weight of the identity loss."})

    def __post_init__(self) -> None:
        for name, low in (("total_steps", 6), ("rank", 1), ("multiple_of", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ConfigError(f"{name} must be an integer >= {low}, got {value!r}")
        if not isinstance(self.sparsity, (int, float)) or not 0 < self.sparsity < 1:
            raise ConfigError(f"sparsity must lie in (0, 1), got {self.sparsity!r}")
        for name in ("active_weight", "identity_weight"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be a number >= 0, got {value!r}")

    def width(self, model_config: Any) -> int:
        """N: how many channels stay. Raises ConfigError where no multiple lies between 0 and the present width."""
        d, multiple = model_config.hidden_size, self.multiple_of or model_config.num_attention_heads
        kept = round(d * (1 - self.sparsity) / multiple) * multiple
        if not 0 < kept < d:
            raise ConfigError(
                f"sparsity {self.sparsity} of {d} channels, in multiples of {multiple}, leaves {kept}: "
                "give another sparsity or a smaller multiple_of"
            )
        narrow_config(model_config, kept)
        return kept


@dataclass
class _LoraBesideModules(LoraConfig):
    """LoRA that is of no use alone: PEFT, loading it without the modules, warns of this field by its name."""

    load_with_polyrank_compression_pat: bool = True


def get_pat_model(model: Any, config: PatConfig, lora: LoraConfig | None = None) -> PeftModel:
    """A base model with LoRA and sparsification modules, ready for `PatTrainer`; equal to the base at the start.

    Args:
        lora: default: rank 20, lora_alpha 4, all linear layers.
    Raises: ConfigError for a family whose residual stream cannot be cut, and for LoRA on the embedding (or, where the
        head shares its weight, on the head).
    """
    modules = new_modules(model, config)
    lora = lora or LoraConfig(r=20, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    given = {item.name: getattr(lora, item.name) for item in fields(LoraConfig) if item.init}
    given["modules_to_save"] = [*(lora.modules_to_save or ()), NAME]
    install(model, modules.to(model.device))
    adapted = get_peft_model(model, _LoraBesideModules(**given))
    tied = ("embed_tokens", "lm_head") if model.config.tie_word_embeddings else ("embed_tokens",)
    for name, _ in adapted.named_modules():
        wrapper, _, leaf = name.rpartition(".")
        if leaf in ("lora_A", "modules_to_save") and wrapper.endswith(tied):
            raise ConfigError(f"PAT cannot train {wrapper.rpartition('.')[2]!r}: take it out of the LoRA config")
    return adapted


def new_modules(model: Any, config: PatConfig) -> SparsificationModules:
    """Untrained modules for a model. Raises ConfigError for a family whose residual stream cannot be cut."""
    check_family(model)
    width, places = model.config.hidden_size, 2 * model.config.num_hidden_layers + 1
    rank = config.rank or max(1, round(0.05 * width))
    if rank > width:
        raise ConfigError(f"rank {rank} exceeds the model's width {width}")
    weights = (config.active_weight, config.identity_weight)
    return SparsificationModules(width, places, rank, config.width(model.config), config.total_steps // 3, weights)


def load_pat(model: Any, folder: str | Path, **kwargs: Any) -> PeftModel:
    """A saved PAT model on its base; `kwargs` are `PeftModel.from_pretrained`'s.

    Raises: CheckpointError where the folder holds no PAT modules, or those of a base of other sizes.
    """
    check_family(model)
    try:
        with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
            places, rank, width = file.get_slice(f"base_model.model.{NAME}.down").get_shape()
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: a tensor of other dimensions
        raise CheckpointError(f"{folder} holds no PAT model: {str(error).splitlines()[0]}") from None
    expected = (2 * model.config.num_hidden_layers + 1, model.config.hidden_size)
    if (places, width) != expected:
        raise CheckpointError(
            f"{folder} has {places} modules of width {width}, the base needs {expected[0]} of width {expected[1]}"
        )
    install(model, SparsificationModules(width, places, rank, width, 2).to(model.device))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*load_with_polyrank_compression_pat.*")
        return PeftModel.from_pretrained(model, str(folder), **kwargs)


def sparsification(model: Any) -> SparsificationModules:
    """The modules in use. Raises ConfigError for a model without them."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == NAME:
            saved = getattr(module, "modules_to_save", None)
            return module if saved is None else saved[module.active_adapter]
    raise ConfigError("this model has no sparsification modules: make it with get_pat_model or load_pat")


def pat_loss(model: Any) -> torch.Tensor:
    """What PAT adds to the loss, weighted: () tensor."""
    modules = sparsification(model)
    active, identity = modules.weights.tolist()
    return active * active_loss(modules) + identity * identity_loss(modules)


def shrink(model: PeftModel) -> Any:
    """The small model: transformers' own class, LoRA merged, hidden size N; for `save_pretrained`. PAT's is unchanged.

    Raises: ConfigError before step s0, when the channels are not chosen yet.
    """
    modules = sparsification(model)
    if not modules.chosen:
        raise ConfigError(
            f"the channels are chosen at step {int(modules.mask_steps)}, this model was trained for "
            f"{int(modules.step)}: train on, or call sparsification(model).choose()"
        )
    return narrow_model(copy.deepcopy(model).merge_and_unload())


class PatTrainer(Trainer):
    """transformers' Trainer with PAT's losses and step counter, which is the optimiser's and survives a restart."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plain = self.accelerator.unwrap_model(model)
        modules = sparsification(plain)
        if self.state.max_steps <= int(modules.mask_steps):
            raise ConfigError(f"the run has {self.state.max_steps} steps, the mask alone {int(modules.mask_steps)}")
        modules.set_step(self.state.global_step)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        is_share = self.loss_is_scaled_for_ga  # whether the Trainer leaves the loss undivided by the micro-batches
        if is_share is None:
            is_share = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func
        share = 1.0 / max(1, self.current_gradient_accumulation_steps) if is_share else 1.0
        loss = loss + share * pat_loss(plain).to(loss)
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As the Trainer's, without mask, scale and gain: 0 is not where they rest."""
        own = tuple(f".{name}" for name in ("logits", "gain", "scale"))
        return [n for n in super().get_decay_parameter_names(model) if not (NAME in n and n.endswith(own))]

"""Cuts the residual stream of a decoder to the channels that its sparsification modules keep.

Norms: over d' channels instead of d, of which the others are 0, the same output needs eps' = eps d / d' and
gain' = gain sqrt(d / d'): sqrt(mean over d of x^2 + eps) = sqrt(d' / d) sqrt(mean over d' of x^2 + eps d / d').
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ..core.errors import ConfigError
from ._pat_modules import NAME, SparsificationModules


def narrow_config(config: Any, width: int) -> Any:
    """A model's config with another hidden size; heads and their size stay.

    Raises: ConfigError where the family does not allow this width, with what it says.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    changes = {
        "hidden_size": width,
        "head_dim": head_dim,
        "rms_norm_eps": config.rms_norm_eps * config.hidden_size / width,
        "tie_word_embeddings": False,
    }
    try:
        return type(config).from_dict({**config.to_dict(), **changes})
    except StrictDataclassError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"a {config.model_type} model cannot have {width} channels: {reason}") from error


@torch.no_grad()
def narrow_model(model: Any) -> nn.Module:
    """The small model of a base model with sparsification modules, LoRA merged already; the base is left as it is.

    The embedding gets its place's map, the head only loses columns, so a tied pair comes apart.
    """
    modules: SparsificationModules = getattr(model, NAME)
    weight = model.get_input_embeddings().weight
    small = type(model)._from_config(narrow_config(model.config, int(modules.target)), dtype=weight.dtype)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{NAME}.")}
    small.load_state_dict({key: _narrow(key, value, modules).to(value.dtype) for key, value in state.items()})
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(model.generation_config)
    return small.to(weight.device).eval()


def _narrow(key: str, value: Tensor, modules: SparsificationModules) -> Tensor:
    """One tensor of the base model in the small one's shape, fp64."""
    value, kept = value.double(), modules.kept
    layer = re.search(r"layers\.(\d+)\.(?:self_attn\.o_proj|mlp\.down_proj)\.", key)
    if layer:
        place = 1 + 2 * int(layer[1]) + ("mlp" in key)
        return modules.matrix(place) @ value
    if key.endswith("embed_tokens.weight"):
        return value @ modules.matrix(0).T
    if key.endswith(("layernorm.weight", "norm.weight")):
        return value[kept] * math.sqrt(len(kept) / int(kept.sum()))
    return value[:, kept] if value.ndim == 2 else value

"""Each hypothesis as an ordinary PEFT LoRA adapter, which plain PEFT loads without polyrank.

    lora_A.weight = A_k (r, in),  lora_B.weight = B_k (out, r),  lora_alpha and the patterns as configured,

so that logits are equal. Where a layer's scale was changed after training began (`set_scale`), the difference is folded
into B_k. `import_.py` is the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn

from ..adapters._folders import whole_folders, write_weights
from ..core.errors import CheckpointError, ConfigError, unknown_name
from .config import MclConfig
from .forward import check_hypothesis
from .layer import MclEmbedding, MclLayer
from .prepared import base_of, module_below

CARRIED = (
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "task_type",
    "base_model_name_or_path",
    "revision",
)
"""Fields that MclConfig and PEFT's LoraConfig share with the same meaning."""


def export_hypotheses(model: PeftModel, folder: str | Path, adapter_name: str | None = None) -> list[Path]:
    """Write K ordinary LoRA folders `lora0` ... `lora{K-1}` into a folder.

    The folders appear together, each whole, or none does; folders of an earlier export of as many hypotheses are
    replaced. `modules_to_save` are written into each of them.

    Args:
        adapter_name: default: the active adapter.
    Returns: the K paths.
    Raises: ConfigError for a model without a LoRA-MCL adapter or a folder with another K's export; CheckpointError for
        values that are not finite; RunError where writing fails, with what was there before intact.
    """
    folder = Path(folder)
    peft_model, name, config = _adapter(model, adapter_name)
    stale = sorted(p.name for p in folder.glob("lora*") if _number(p.name) >= config.num_hypotheses)
    if stale:
        raise ConfigError(
            f"{folder} holds {', '.join(stale)} of an export with more than {config.num_hypotheses} hypotheses; "
            "choose another folder, or remove them first"
        )
    names = [f"lora{k}" for k in range(config.num_hypotheses)]
    _write(peft_model, name, folder, dict(zip(names, range(config.num_hypotheses), strict=True)))
    return [folder / name for name in names]


def export_hypothesis(model: PeftModel, folder: str | Path, hypothesis: int, adapter_name: str | None = None) -> Path:
    """Write one hypothesis as an ordinary LoRA folder. Raises as `export_hypotheses`; ConfigError out of range."""
    folder = Path(folder)
    peft_model, name, _ = _adapter(model, adapter_name)
    _check_in_range(peft_model, name, hypothesis)
    _write(peft_model, name, folder.parent, {folder.name: hypothesis})
    return folder


def merge_hypothesis(model: PeftModel, hypothesis: int, safe_merge: bool = False) -> nn.Module:
    """The base model with one hypothesis of the active adapter merged into its weights, adapters taken off.

    As PEFT's `merge_and_unload`, this consumes the PeftModel: its base weights are changed in place. Export first, or
    merge into a copy, where the other hypotheses are still wanted.
    """
    peft_model, _, _ = _adapter(model, None)
    peft_model.base_model.set_hypothesis(check_hypothesis(base_of(peft_model), hypothesis))
    return peft_model.merge_and_unload(safe_merge=safe_merge)


def _adapter(model: nn.Module, adapter_name: str | None) -> tuple[PeftModel, str, MclConfig]:
    """The PeftModel, the adapter's name and its configuration."""
    model = module_below(model)
    if not isinstance(model, PeftModel):
        raise ConfigError(f"a PeftModel with a LoRA-MCL adapter is needed, got {type(model).__name__}")
    known = {name: config for name, config in model.peft_config.items() if isinstance(config, MclConfig)}
    if adapter_name is None:
        adapter_name = next((name for name in model.active_adapters if name in known), next(iter(known), None))
    if adapter_name is None:
        raise ConfigError("the model has no LoRA-MCL adapter")
    if adapter_name not in known:
        raise unknown_name("LoRA-MCL adapter", adapter_name, known)
    return model, adapter_name, known[adapter_name]


def _check_in_range(model: PeftModel, adapter: str, hypothesis: int) -> None:
    K = model.peft_config[adapter].num_hypotheses
    if isinstance(hypothesis, bool) or not isinstance(hypothesis, int) or not 0 <= hypothesis < K:
        raise ConfigError(f"hypothesis must be an integer in [0, {K}), got {hypothesis!r}")


def _number(name: str) -> int:
    digits = name.removeprefix("lora")
    return int(digits) if digits.isdecimal() else -1


def _write(model: PeftModel, adapter: str, parent: Path, hypotheses: Mapping[str, int]) -> None:
    """Write hypotheses into folders of a parent, by the folders' names."""
    config = _lora_config(model, adapter)
    states = [lora_state(model, adapter, hypothesis) for hypothesis in hypotheses.values()]
    for state, hypothesis in zip(states, hypotheses.values(), strict=True):
        bad = [key for key, value in state.items() if not value.isfinite().all()]
        if bad:
            raise CheckpointError(f"hypothesis {hypothesis} is not finite ({bad[0]}): nothing is exported")
    with whole_folders(parent, list(hypotheses)) as fresh:
        for path, state in zip(fresh, states, strict=True):
            config.save_pretrained(str(path))
            write_weights(path, state)


def _lora_config(model: PeftModel, adapter: str) -> LoraConfig:
    source = model.peft_config[adapter]
    layers = [m for m in model.modules() if isinstance(m, MclLayer) and m.has_adapter(adapter)]
    shared: dict[str, Any] = {name: getattr(source, name) for name in CARRIED}
    if shared["base_model_name_or_path"] is None:
        shared["base_model_name_or_path"] = getattr(base_of(model).config, "_name_or_path", None) or None
    stored_transposed = [m.transposed for m in layers if not isinstance(m, MclEmbedding)]
    return LoraConfig(**shared, inference_mode=True, fan_in_fan_out=bool(stored_transposed) and all(stored_transposed))


@torch.no_grad()
def lora_state(model: PeftModel, adapter: str, hypothesis: int) -> dict[str, torch.Tensor]:
    """One hypothesis as PEFT's LoRA names it in a saved file, on the CPU, with what `modules_to_save` names."""
    config = model.peft_config[adapter]
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    state = {key: value for key, value in saved.items() if model.base_model.prefix not in key}
    for name, layer in model.named_modules():
        if not isinstance(layer, MclLayer) or not layer.has_adapter(adapter):
            continue
        A, B = layer.factors(adapter, hypothesis)
        configured = config.scaling(layer.r[adapter], layer.lora_alpha[adapter])
        if (scale := layer.scaling[adapter]) != configured:
            B = B * (scale / configured)
        if isinstance(layer, MclEmbedding):
            state |= {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
        else:
            state |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}

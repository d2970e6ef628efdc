"""PEFT's LoRA layers of a model, and what the adapter that it has instead is called."""

from __future__ import annotations

from typing import Any

import torch

from ..core.errors import ConfigError

_OWN_STARTS = {
    "MCL": "hypotheses that start equal never part",
    "DYLORA": "an update taken out of the weights would differ from rank to rank",
    "ALLORA": "its gradients' factors are those of an update that starts at zero",
    "CODYRA": "its tasks start from an update of zero",
    "LORMA": "it multiplies the weight, and its factors do not meet the layer's input",
}
"""Methods with a start of their own: why values from data do not take its place."""


def method_name(model: torch.nn.Module, adapter: str) -> str:
    """As in PEFT's type: "LORA", "MCL", ...; "" for a model without that adapter."""
    kind = getattr(getattr(model, "peft_config", {}).get(adapter), "peft_type", "")
    return str(getattr(kind, "value", kind)).removeprefix("POLYRANK_")


def lora_layers(model: torch.nn.Module, adapter: str = "default", initialiser: str = "this start") -> dict[str, Any]:
    """PEFT's LoRA layers on linear modules by full name. Raises ConfigError if there are none, with the reason."""
    found = {
        name: layer
        for name, layer in model.named_modules()
        if adapter in getattr(layer, "lora_A", {}) and getattr(layer.get_base_layer(), "weight", None) is not None
    }
    linear = {name: layer for name, layer in found.items() if layer.lora_A[adapter].weight.ndim == 2}
    method = method_name(model, adapter)
    if not linear and method in _OWN_STARTS:
        raise ConfigError(f"{initialiser} does not combine with {method}: {_OWN_STARTS[method]}")
    if not linear:
        reason = f"does not combine with {method}" if method else "needs LoRA"
        raise ConfigError(f"{initialiser} {reason}: the model has no LoRA layer of PEFT's with adapter {adapter!r}")
    return linear

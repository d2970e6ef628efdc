"""Which experts tokens go through at inference, in the place of the gates that the adapter was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..core.errors import ConfigError, check_choice
from .layer import MoeLinear

ROUTERS = ("dense", "sparse", "stochastic")
DEFAULT_TOP_K = 2


def moe_layers(model: nn.Module) -> list[MoeLinear]:
    """The LoRA-MoE layers of a model. Raises ConfigError where it has none."""
    layers = [module for module in model.modules() if isinstance(module, MoeLinear)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no LoRA-MoE adapter; add one with MoeConfig")
    return layers


def num_experts(model: nn.Module) -> int:
    """K of the active adapter. Raises ConfigError where none is active, or several with different K."""
    counts = {layer.num_experts[name] for layer in moe_layers(model) for name in layer.present(layer.active_adapters)}
    if len(counts) != 1:
        raise ConfigError(f"the active adapters must be LoRA-MoE with one number of experts, found {sorted(counts)}")
    return counts.pop()


@contextmanager
def route_experts(model: nn.Module, router: str | int, top_k: int | None = None) -> Iterator[None]:
    """Run the model inside the block with another choice of experts; the former one is back afterwards.

    Args:
        router: "dense": all experts by their probabilities; "sparse": the `top_k` largest, their sum made 1;
            "stochastic": one expert for each token and layer, drawn by the adapter's own gates from torch's random
            numbers; an integer: that expert alone.
        top_k: of "sparse"; default: the adapter's own, 2 for a dense one.
    Raises: ConfigError for an unknown router, an expert or top_k out of range, a model without LoRA-MoE or with one
        merged into its weights.
    """
    layers, count = moe_layers(model), num_experts(model)
    if isinstance(router, bool) or not isinstance(router, (int, str)):
        raise ConfigError(f"router must be a name or the number of an expert, got {router!r}")
    if isinstance(router, str):
        check_choice("router", router, ROUTERS)
    elif not 0 <= router < count:
        raise ConfigError(f"expert {router} is out of range: the adapter has {count} experts (0..{count - 1})")
    if top_k is not None and router != "sparse":
        raise ConfigError(f"top_k {top_k} goes with the router 'sparse', not with {router!r}")
    if router == "sparse":
        own = max(layer.top_k[name] for layer in layers for name in layer.present(layer.active_adapters))
        top_k = (own or min(DEFAULT_TOP_K, count)) if top_k is None else top_k
        if not 1 <= top_k <= count:
            raise ConfigError(f"top_k must be in 1..{count}, got {top_k}")
    if any(layer.merged for layer in layers):
        raise ConfigError("an expert is merged into the base weights; unmerge it first")
    before = [layer.routed_by for layer in layers]
    for layer in layers:
        layer.routed_by = (router, top_k)
    try:
        yield
    finally:
        for layer, former in zip(layers, before, strict=True):
            layer.routed_by = former

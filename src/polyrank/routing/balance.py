"""The router's probabilities of a forward pass, recorded, and the loss that keeps all experts in use.

    with record_routing(model) as record:
        loss = model(**batch).loss
    (loss + 0.01 * record.load_balance_loss(batch["attention_mask"])).backward()

`MoeTrainer` does this for every training step. Differs from the released mixtures, which average over all layers
together: the loss is taken for each layer and then averaged, since layers that each collapse onto other experts look
balanced together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from .gates import load_balance

if TYPE_CHECKING:
    from .layer import MoeLinear


class RoutingRecord:
    """What the routers of a model said in the forward passes inside `record_routing`.

    Attributes: names (layer -> its name in the model); passes (layer, top_k of the adapter, probabilities (..., K)).
    """

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.names = names
        self.passes: list[tuple[MoeLinear, int, Tensor]] = []

    def add(self, layer: MoeLinear, top_k: int, probabilities: Tensor) -> None:
        self.passes.append((layer, top_k, probabilities))

    def load_balance_loss(self, attention_mask: Tensor | None = None, top_k: int | None = None) -> Tensor:
        """Mean over the layers of K sum_e f_e P_e (`gates.load_balance`): k where the experts are used alike.

        Args:
            attention_mask: (batch, length), 0 for padding; for layers that see as many positions.
            top_k: choices to count; default: the adapter's own.
        Raises: ConfigError where nothing was recorded, for a dense router without `top_k`, and for probabilities
            without a graph while gradients are asked for (reentrant gradient checkpointing).
        """
        if not self.passes:
            raise ConfigError("no router was run inside record_routing: the model needs an active MoeConfig adapter")
        losses = []
        for layer, own, probabilities in self.passes:
            if not (count := own if top_k is None else top_k):
                raise ConfigError("a dense router has no choices to balance: set top_k in MoeConfig, or pass it here")
            if torch.is_grad_enabled() and not probabilities.requires_grad and _trains(layer):
                raise ConfigError(
                    "the router's probabilities carry no gradient; gradient checkpointing must be non-reentrant: "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            losses.append(load_balance(probabilities.flatten(0, -2), count, _flat_mask(attention_mask, probabilities)))
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    @torch.no_grad()
    def expert_shares(self) -> dict[str, Tensor]:
        """Layer name -> mean router probability of each expert (K,), over all tokens of all passes."""
        sums: dict[str, tuple[Tensor, int]] = {}
        for layer, _, probabilities in self.passes:
            total, tokens = sums.get(self.names[layer], (0.0, 0))
            flat = probabilities.flatten(0, -2)
            sums[self.names[layer]] = total + flat.sum(0), tokens + len(flat)
        return {name: total / tokens for name, (total, tokens) in sums.items()}


def _trains(layer: MoeLinear) -> bool:
    return any(p.requires_grad for p in layer.parameters())


def _flat_mask(mask: Tensor | None, probabilities: Tensor) -> Tensor | None:
    """The mask of a layer's tokens, or None where it speaks of another number of them."""
    shape = probabilities.shape[:-1]
    if mask is None or (mask.shape != shape and (len(shape) > 1 or mask.numel() != shape[0])):
        return None
    return mask.reshape(-1).to(probabilities.device)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record the router probabilities of every LoRA-MoE layer of the model inside the block.

    What gradient checkpointing runs again in backward, after the block, is not recorded.
    """
    from .layer import MoeLinear

    layers = {module: name for name, module in model.named_modules() if isinstance(module, MoeLinear)}
    record = RoutingRecord(layers)
    for layer in layers:
        layer.record = record
    try:
        yield record
    finally:
        for layer in layers:
            layer.record = None

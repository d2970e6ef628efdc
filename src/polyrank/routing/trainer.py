"""transformers' Trainer with the load-balance loss of LoRA-MoE adapters added to whatever loss it has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from .balance import record_routing
from .layer import MoeLinear


def balance_weight(model: nn.Module) -> float:
    """The largest `load_balance_weight` of the active LoRA-MoE adapters; 0 where there is none."""
    layers = [module for module in model.modules() if isinstance(module, MoeLinear)]
    weights = [layer.balance_weight[name] for layer in layers for name in layer.present(layer.active_adapters)]
    return max(weights, default=0.0)


class LoadBalanceMixin:
    """For any subclass of transformers' Trainer: `class MyTrainer(LoadBalanceMixin, SomeTrainer)`.

    A training step's loss is L + w * load_balance_loss, w the config's; evaluation has L alone. Padding (the batch's
    `attention_mask`) does not count. Under gradient accumulation each micro-batch's balance has the same share,
    whether or not the Trainer divides L by the number of micro-batches. Logged as `load_balance_loss`.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **more: Any
    ) -> Tensor | tuple[Tensor, Any]:
        weight = balance_weight(model) if model.training else 0.0
        if not weight:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **more)
        mask = inputs.get("attention_mask")
        with record_routing(model) as record:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
        balance = record.load_balance_loss(mask)
        self._balances = [*getattr(self, "_balances", []), balance.detach()]
        loss = loss + weight * balance / self._share(more.get("num_items_in_batch"))
        return (loss, outputs) if return_outputs else loss

    def _share(self, num_items: Any) -> int:
        """What the balance has to be divided by here, since the Trainer will not: micro-batches of the step, or 1."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and getattr(self, "_balances", None):
            logs = {**logs, "load_balance_loss": torch.stack(self._balances).mean().item()}
            self._balances = []
        super().log(logs, *args, **kwargs)


class MoeTrainer(LoadBalanceMixin, Trainer):
    """transformers' Trainer for LoRA-MoE: nothing to learn; a dense router has no balance loss and trains as ever."""

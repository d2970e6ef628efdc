"""Adapted layers that act when an optimiser steps, whoever owns the loop: a plain one, or transformers' Trainer.

torch calls global hooks around the step of every optimiser, so nothing has to be passed to the Trainer. A layer acts
only on adapters whose parameters the stepping optimiser holds. Where parameters are flattened or sharded (FSDP without
original parameters, DeepSpeed ZeRO) the hooks find nothing; a step that GradScaler skips is no step.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ._base import AdapterConfig, AdapterLayer

_layers: weakref.WeakSet[SteppedLayer] = weakref.WeakSet()


class SteppedLayer(AdapterLayer):
    """A layer whose `before_step` and `after_step` are called around each step of the optimiser that trains it.

    Attributes: steps (per adapter name): optimiser steps taken so far. Adam and its kin keep that number with their
        state, and it is read from there, so that a resumed run goes on where it was; others count from 0.
    """

    other_param_names = (*AdapterLayer.other_param_names, "steps")

    def __init__(self, base_layer: torch.nn.Module, **quantization: Any) -> None:
        super().__init__(base_layer, **quantization)
        self.steps: dict[str, int] = {}
        _follow(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # copied or unpickled
        super().__setstate__(state)
        _follow(self)

    def update_layer(self, adapter_name: str, config: AdapterConfig, rank: int, alpha: float) -> None:
        self.steps[adapter_name] = 0
        super().update_layer(adapter_name, config, rank, alpha)

    @classmethod
    def before_steps(cls, layers: list[Any], adapter: str, optimizer: Optimizer) -> None:
        """Called once before the step with all layers of this class whose adapter it trains, in the optimiser's order.

        Gradients are complete; those of a fused optimiser under GradScaler are still scaled, by its `grad_scale`.
        """
        for layer in layers:
            layer.before_step(adapter, optimizer)

    def before_step(self, adapter: str, optimizer: Optimizer) -> None:
        """Called before the step for each layer."""

    def after_step(self, adapter: str, optimizer: Optimizer) -> None:
        """Called after the step, `steps` being already that of the step just taken (1 after the first)."""


def _follow(layer: SteppedLayer) -> None:
    _install()
    _layers.add(layer)


@functools.cache
def _install() -> None:
    """Register the two global hooks; further calls do nothing."""
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def _trained(optimizer: Optimizer) -> list[tuple[SteppedLayer, str, torch.Tensor]]:
    """(layer, adapter, one of its parameters) for what this optimiser trains, in the order in which it holds them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    place = {id(p): number for number, p in enumerate(parameters)}
    found = []
    for layer in list(_layers):
        for adapter in layer.r:
            owned = [getattr(layer, name).get(adapter) for name in layer.adapter_layer_names]
            found += [(layer, adapter, p) for p in owned if id(p) in place and p.requires_grad][:1]
    return sorted(found, key=lambda entry: place[id(entry[2])])


def _count(optimizer: Optimizer, parameter: torch.Tensor) -> int | None:
    counted = optimizer.state.get(parameter, {}).get("step")
    return None if counted is None else int(counted)


@torch.no_grad()
def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    together: dict[tuple[type[SteppedLayer], str], list[SteppedLayer]] = {}
    for layer, adapter, parameter in _trained(optimizer):
        layer.steps[adapter] = _count(optimizer, parameter) or layer.steps[adapter]  # a resumed run's, before its step
        together.setdefault((type(layer), adapter), []).append(layer)
    for (kind, adapter), layers in together.items():
        kind.before_steps(layers, adapter, optimizer)


@torch.no_grad()
def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for layer, adapter, parameter in _trained(optimizer):
        counted = _count(optimizer, parameter)
        layer.steps[adapter] = layer.steps[adapter] + 1 if counted is None else counted
        layer.after_step(adapter, optimizer)

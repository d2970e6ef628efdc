"""CoDyRA: gated LoRA whose gates are pruned by soft thresholds while it trains, merged task after task.

    W' = W + B diag(w) A = W + sum_q w_q b_q a_q,    after each optimiser step   w <- sign(w) max(|w| - kappa, 0)

A (r, in) Kaiming-uniform, B (out, r) zero, w (r) ~ N(0, 1), no scale. The threshold is the proximal step of
kappa |w|_1. It is 0 for the first `dense_ratio` of `total_steps`, then climbs in `levels` even steps from 0 to
`max_kappa` (and stays there). What is 0 after the last step is pruned; `merge_task` folds the rest into W and starts
afresh. For models that learn one task after another without replay, router or cost at inference.

Source: "Adaptive Rank, Reduced Forgetting", arXiv 2412.01004, and its released code.
Differs:
- a true proximal step. The released one tests values that it has shrunk already: |w| < 2 kappa becomes 0, the others
  shrink by kappa (`threshold="released"`).
- merging half-precision weights keeps an fp32 master of each over the tasks; every task is merged, the last one too.
- weight decay is kept off the adapter: on w it would be a second shrinkage, on A and B it would undo the balance below.

kappa is not multiplied by the learning rate, as in the release. Gates that were set to 0 may come back until the last
step. Shrinking w_q while |b_q| |a_q| grows evades the threshold: `component_sizes` gives |w_q| |b_q| |a_q|. B = 0 keeps
w and A from moving in the first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError, check_choice
from ._base import register_adapter
from ._optimizer_steps import SteppedLayer
from ._unscaled import UnscaledConfig
from ._weight_decay import teach_trainer

THRESHOLDS = ("soft", "released")


@dataclass
class CodyraConfig(UnscaledConfig):
    """CoDyRA. A layer has r (in + out + 1) parameters while it trains and none after merging.

    Raises (on construction): ConfigError for a value out of range.
    """

    r: int = field(default=16, metadata={"help": "Rank before pruning."})
    total_steps: int = field(default=500, metadata={"help": "Optimiser steps of one task."})
    dense_ratio: float = field(default=0.5, metadata={"help": "Share of the steps before any threshold, in [0, 1)."})
    max_kappa: float = field(default=5e-3, metadata={"help": "Threshold at the end; 0 prunes nothing."})
    levels: int = field(default=50, metadata={"help": "Steps of the threshold from 0 to max_kappa."})
    threshold: str = field(default="soft", metadata={"help": "soft: the proximal step. released: the released code's."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_int("total_steps", minimum=1)
        self.check_int("levels", minimum=2)
        self.check_number("dense_ratio", low=0.0, high=1.0)
        self.check_number("max_kappa", low=0.0)
        check_choice("threshold", self.threshold, THRESHOLDS)

    def kappa(self, step: int) -> float:
        """Threshold after optimiser step `step` (1 is the first); at most one level a step."""
        dense = math.floor(self.dense_ratio * self.total_steps)
        sparse = self.total_steps - dense
        if step <= dense:
            return 0.0
        levels = min(self.levels, sparse)
        level = min((step - dense - 1) * levels // sparse, levels - 1)
        return self.max_kappa * (level / (levels - 1) if levels > 1 else 1.0)


def shrink(w: Tensor, kappa: float, threshold: str = "soft") -> Tensor:
    """argmin_z (z - w)^2 / 2 + kappa |z|; "released": 0 where |w| < 2 kappa, else kappa nearer to 0."""
    shrunk = torch.sign(w) * (w.abs() - kappa).clamp(min=0.0)
    return torch.where(w.abs() < 2 * kappa, 0.0, shrunk) if threshold == "released" else shrunk


class CodyraLinear(SteppedLayer):
    parameter_names = ("A", "B", "w")

    def __init__(self, base_layer: nn.Module, **quantization: object) -> None:
        super().__init__(base_layer, **quantization)
        self.master: Tensor | None = None  # the base weight in fp32, once a task was merged into a half-precision one

    def update_layer(self, adapter_name: str, config: CodyraConfig, rank: int, alpha: float) -> None:
        super().update_layer(adapter_name, config, rank, alpha)
        teach_trainer()

    def make_parameters(self, config: CodyraConfig, rank: int) -> dict[str, Tensor]:
        return {**super().make_parameters(config, rank), "w": torch.randn(rank)}

    def decays(self, adapter: str) -> bool:
        return False

    def delta(self, x: Tensor, adapter: str) -> Tensor:
        A, B, w = (self.parameter(name, adapter) for name in self.parameter_names)
        return linear(linear(x, A) * (w * self.scaling[adapter]), B)

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (R, in), B (out, R) of the R components whose gate is open; R may be 0."""
        A, B, w = (self.parameter(name, adapter) for name in self.parameter_names)
        open_ = w != 0
        return A[open_], (B * (w * self.scaling[adapter]))[:, open_]

    def after_step(self, adapter: str, optimizer: Optimizer) -> None:
        config, w = self.configs[adapter], self.parameter("w", adapter)
        kappa = config.kappa(self.steps[adapter])
        if kappa > 0:
            w.copy_(shrink(w, kappa, config.threshold))

    @torch.no_grad()
    def merge_and_restart(self, adapter: str, config: CodyraConfig) -> None:
        weight, dtype = self.get_base_weight(), self.parameter("w", adapter).dtype
        master = weight if self.master is None else self.master
        master = self.merged_weight(master.to(weight.device, torch.promote_types(weight.dtype, torch.float32)), adapter)
        self.set_base_weight(master.to(weight.dtype))
        self.master = None if weight.dtype == master.dtype else master
        self.update_layer(adapter, config, config.r, config.lora_alpha)
        for name in self.parameter_names:  # as it was: PEFT keeps fp32 parameters on half-precision weights
            parameter = self.parameter(name, adapter)
            parameter.data = parameter.data.to(dtype)


def active_ranks(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """Open gates of each adapted layer, by the layer's name."""
    layers = CodyraLinear.find(model, adapter_name)
    return {name: int((layer.parameter("w", adapter_name) != 0).sum()) for name, layer in layers.items()}


@torch.no_grad()
def component_sizes(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """|w_q| |b_q| |a_q| of each layer, (r,): what a component adds, whichever of the three carries it."""
    sizes = {}
    for name, layer in CodyraLinear.find(model, adapter_name).items():
        A, B, w = (layer.parameter(p, adapter_name) for p in layer.parameter_names)
        sizes[name] = w.abs() * B.norm(dim=0) * A.norm(dim=1)
    return sizes


def merge_task(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """End a task: fold the adapter into the base weights and start afresh, with new parameters and an update of zero.

    The next task needs a new optimiser. `model.unload()` gives the base model with all tasks in it.

    Returns: the open gates of each layer before merging.
    Raises: ConfigError where no layer carries the adapter, or where adapters are merged already.
    """
    layers = CodyraLinear.find(model, adapter_name)
    if any(layer.merged for layer in layers.values()):
        raise ConfigError("unmerge the adapters before ending a task: the weights hold one of them already")
    ranks = active_ranks(model, adapter_name)
    for layer in layers.values():
        layer.merge_and_restart(adapter_name, layer.configs[adapter_name])
    return ranks


def masked_cross_entropy(logits: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Cross-entropy over the classes that earlier tasks did not have, nats.

    Args: logits (batch, classes); labels (batch,); seen (classes,) bool: classes of earlier tasks, left out.
    Raises: ConfigError where a label is of a class that is left out.
    """
    if seen[labels].any():
        raise ConfigError(f"label {int(labels[seen[labels]][0])} is of a class that is left out as seen")
    return cross_entropy(logits.masked_fill(seen, -math.inf), labels)


def continual_scores(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means over T >= 2 tasks from scores[t][k], that of task k after training on tasks 0 .. t (higher is better).

    transfer: tasks not yet trained on; average: all; last: after the last task; forgetting: best earlier score of a
    task minus its last one, without the last task.
    """
    tasks = range(len(scores))
    if len(scores) < 2 or any(len(row) != len(scores) for row in scores):
        raise ConfigError(f"scores must be a square table of 2 tasks or more, got rows of {[len(r) for r in scores]}")
    before = [sum(scores[t][k] for t in range(k)) / k for k in tasks if k]
    lost = [max(scores[t][k] for t in range(k, len(scores) - 1)) - scores[-1][k] for k in tasks[:-1]]
    return {
        "transfer": sum(before) / len(before),
        "average": sum(map(sum, scores)) / len(scores) ** 2,
        "last": sum(scores[-1]) / len(scores),
        "forgetting": sum(lost) / len(lost),
    }


CodyraModel = register_adapter(
    "codyra",
    CodyraConfig,
    {nn.Linear: CodyraLinear, Conv1D: CodyraLinear},
    tags={"identity_at_init", "mergeable", "additive", "mixed_batch", "conv1d"},
)

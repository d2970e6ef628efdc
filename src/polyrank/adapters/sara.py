"""SaRA: the smallest pretrained weights become the trainable ones, with a nuclear-norm penalty on them.

    W'[i, j] = v_ij where |W[i, j]| < threshold, else W[i, j];    loss + penalty * mean over layers |W' * M|_nuclear

v starts as W at the selected places M, sign included, so that the start is the base bit for bit. After `reselect_at`
(the middle of `total_steps`) only entries that are still below the threshold stay trainable; the others keep their
values, and the optimiser starts anew. Weight decay pulls the selected entries to 0. `r` has no meaning here.

Source: "SaRA", ICLR 2025, and its released code.
Differs:
- values keep their signs (the release writes |W|, at the start and at the new selection).
- the penalty acts (the release's packed one does not): its gradient U V^T is added where the optimiser steps, once a
  step whatever the loss, accumulation or loss scale, after any clipping.
- `density` and `lora_rank` (ours) select each layer's smallest weights by number: an absolute threshold hits layers of
  different scale very unevenly. Only Linear and Conv1D weights are selected from, never biases, norms, embeddings.
- a folder holds a checksum of the weight that its values belong to: another base, or another dtype of it, raises.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from ..core.errors import CheckpointError, ConfigError
from ..core.seeding import derive_seed
from ._base import BufferDict, register_adapter
from ._edited_weight import EditedLinear, checksum, put
from ._optimizer_steps import SteppedLayer
from ._unscaled import UnscaledConfig


@dataclass
class SaraConfig(UnscaledConfig):
    """SaRA: a layer has as many parameters as weights below the threshold. ConfigError for a value out of range."""

    threshold: float = field(default=2e-3, metadata={"help": "Weights of smaller magnitude are trained."})
    density: float | None = field(default=None, metadata={"help": "Ours, instead: share of each layer, in (0, 1)."})
    lora_rank: int | None = field(default=None, metadata={"help": "Ours, instead: as many as LoRA of this rank has."})
    penalty: float = field(default=5e-4, metadata={"help": "Weight of the nuclear norm, its mean over the layers."})
    penalty_layers: int = field(default=1, metadata={"help": "Layers drawn for the penalty each step; 0: all of them."})
    total_steps: int = field(default=5000, metadata={"help": "Optimiser steps of the run."})
    reselect_at: float = field(default=0.5, metadata={"help": "Share of the steps before a new selection; 0: none."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "penalty"):
            self.check_number(name, low=0.0)
        self.check_int("penalty_layers", minimum=0)
        self.check_int("total_steps", minimum=1)
        self.check_number("reselect_at", low=0.0, high=1.0)
        if self.lora_rank is not None:
            self.check_int("lora_rank", minimum=1)
        if self.density is not None:
            self.check_number("density")
            if not 0 < self.density < 1:
                raise ConfigError(f"density must lie in (0, 1), got {self.density!r}")
            if self.lora_rank is not None:
                raise ConfigError("give density or lora_rank, not both")

    def threshold_for(self, weight: Tensor) -> float:
        """Magnitude below which this layer's weights are selected."""
        if self.density is None and self.lora_rank is None:
            return self.threshold
        count = self.lora_rank * sum(weight.shape) if self.lora_rank else math.ceil(self.density * weight.numel())
        sizes = weight.abs().flatten().to(torch.promote_types(weight.dtype, torch.float32))
        largest = sizes.kthvalue(min(count, len(sizes))).values.to(weight.dtype)
        return torch.nextafter(largest, largest.new_tensor(math.inf)).item()


def suggested_learning_rate(threshold: float) -> float:
    """The released code's default for AdamW: 1e-3 exp(-350 threshold)."""
    return 1e-3 * math.exp(-350 * threshold)


class SaraLinear(SteppedLayer):
    """Per adapter: values (n,), the parameter; buffers: places (n,) into the flat weight as stored, start (n,), the
    weights there, kept (n,) bool, which are still trained, base (1,), the weight's checksum."""

    parameter_names = ("values",)
    buffer_names = ("kept", "places", "start", "base")
    other_param_names = (*SteppedLayer.other_param_names, *(f"polyrank_sara_{name}" for name in buffer_names))
    exact_unmerge = True

    def __init__(self, base_layer: nn.Module, **quantization: object) -> None:
        super().__init__(base_layer, **quantization)
        for name in self.buffer_names:
            setattr(self, self.prefix + name, BufferDict(persistent=name in ("kept", "base")))
        self._before: dict[str, Tensor] = {}

    def update_layer(self, adapter_name: str, config: SaraConfig, rank: int, alpha: float | None) -> None:
        weight = self._unmerged_weights[0] if self._unmerged_weights else self.get_base_weight()
        if weight.is_meta:
            raise ConfigError(f"layer {config.layer_key!r} has no weights yet: load the base before adapting it")
        config.threshold = config.threshold_for(weight)
        places = (weight.abs() < config.threshold).flatten().nonzero().squeeze(1)
        self._start = start = weight.flatten()[places]
        kept = torch.ones_like(places, dtype=torch.bool)
        for name, value in zip(self.buffer_names, (kept, places, start, checksum(weight)), strict=True):
            getattr(self, self.prefix + name)[adapter_name] = value
        super().update_layer(adapter_name, config, rank, alpha)
        del self._start

    def make_parameters(self, config: SaraConfig, rank: int) -> dict[str, Tensor]:
        noise = 0.0 if config.init_weights else self._start.float().std().item()
        return {"values": self._start + noise * torch.randn_like(self._start) if noise else self._start.clone()}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for adapter in self.r:
            saved = state_dict.get(f"{prefix}{self.prefix}base.{adapter}")
            if saved is not None and saved.item() != self.parameter("base", adapter).item():
                raise CheckpointError(
                    f"adapter {adapter!r} was trained on other weights of {prefix.rstrip('.')!r} than the base "
                    "has here (checksum): load the same base in the same dtype"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def values(self, adapter: str) -> Tensor:
        """The trained values; those no longer selected carry no gradient."""
        values = self.parameter("values", adapter)
        return torch.where(self.parameter("kept", adapter), values, values.detach())

    def scattered(self, values: Tensor, adapter: str) -> Tensor:
        """Zeros with these values at the selected places, in the shape of the stored weight."""
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return put(values.new_zeros(shape), self.parameter("places", adapter), values)

    def delta_weight(self, adapter: str) -> Tensor:
        values = self.values(adapter)
        changes = (values - self.parameter("start", adapter).to(values)) * self.scaling[adapter]
        return self.scattered(changes, adapter).T if self.transposed else self.scattered(changes, adapter)

    def selected(self, adapter: str) -> Tensor:
        """W' * M, (out, in) or (in, out) as stored: the values still trained, and zeros; fp32 or better."""
        values = torch.where(self.parameter("kept", adapter), self.parameter("values", adapter), 0.0)
        return self.scattered(values.to(torch.promote_types(values.dtype, torch.float32)), adapter)

    def penalty(self, adapter: str) -> Tensor:
        return self.configs[adapter].penalty * torch.linalg.matrix_norm(self.selected(adapter), "nuc")

    def adapted_forward(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        only = adapters[0] if len(adapters) == 1 and not args and not kwargs else None
        if only is not None and self.scaling[only] == 1.0 and self.is_plain(x, only):
            base, places = self.base_layer, self.parameter("places", only)
            return EditedLinear.apply(x, base.weight, base.bias, places, self.values(only), self.transposed)
        return super().adapted_forward(x, adapters, *args, **kwargs)

    def merged_weight(self, weight: Tensor, adapter: str) -> Tensor:
        merged, places = super().merged_weight(weight, adapter), self.parameter("places", adapter)
        values, start = (self.parameter(name, adapter).to(weight) for name in ("values", "start"))
        untouched = (weight.flatten()[places] == start) & (self.scaling[adapter] == 1.0)
        return put(merged, places, torch.where(untouched, values, merged.flatten()[places]))  # W + (v - W) rounds

    @classmethod
    def before_steps(cls, layers: list[SaraLinear], adapter: str, optimizer: Optimizer) -> None:
        """Add the penalty's gradient, from layers drawn by the step alone: data-parallel workers draw the same."""
        super().before_steps(layers, adapter, optimizer)
        config, step = layers[0].configs[adapter], layers[0].steps[adapter]
        layers = [layer for layer in layers if layer.parameter("values", adapter).grad is not None]  # those in use
        count = min(config.penalty_layers or len(layers), len(layers)) if config.penalty else 0
        for layer in random.Random(derive_seed(step, "sara")).sample(layers, count):
            values = layer.parameter("values", adapter)
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(layer.penalty(adapter), values)
            values.grad += gradient / count * (getattr(optimizer, "grad_scale", None) or 1.0)

    def before_step(self, adapter: str, optimizer: Optimizer) -> None:
        if not self.parameter("kept", adapter).all():
            self._before[adapter] = self.parameter("values", adapter).detach().clone()

    def after_step(self, adapter: str, optimizer: Optimizer) -> None:
        config, values, kept = self.configs[adapter], self.parameter("values", adapter), self.parameter("kept", adapter)
        before = self._before.pop(adapter, None)
        if before is not None:  # neither decay nor momentum moves what is no longer selected
            values.copy_(torch.where(kept, values, before))
        elif self.steps[adapter] == round(config.reselect_at * config.total_steps):
            kept &= values.abs() < config.threshold
            optimizer.state.pop(values, None)  # it makes moments of zero at the next step


def nuclear_penalty(model: nn.Module, adapter_name: str = "default") -> Tensor:
    """The penalty over all layers, to be logged: where the optimiser steps, its gradient is added already."""
    layers = SaraLinear.find(model, adapter_name).values()
    return torch.stack([layer.penalty(adapter_name) for layer in layers]).mean()


SaraModel = register_adapter(
    "sara",
    SaraConfig,
    {nn.Linear: SaraLinear, Conv1D: SaraLinear},
    tags={"identity_at_init", "mergeable", "additive", "exact_unmerge", "mixed_batch", "conv1d"},
)

"""SaRA: the smallest pretrained weights become the trainable ones, with a nuclear-norm penalty on them.

    W'[i, j] = v_ij where |W[i, j]| < threshold, else W[i, j];    loss + penalty * mean over layers |W' * M|_nuclear

v starts as W at the selected places M, sign included, so that the start is the base bit for bit. After `reselect_at`
(the middle of `total_steps`) only entries that are still below the threshold stay trainable; the others keep their
values, and the optimiser starts anew. `r` has no meaning here.

Source: "SaRA", ICLR 2025, and its released code.
Differs:
- values keep their signs (the release writes |W|, at the start and at the new selection).
- the penalty has a gradient in the packed form: that of |W' * M|_nuclear, U V^T at the selected places.
- the gradient of the dense weight exists within one layer's backward only; what stays is the packed one.
- `density` and `lora_rank` (ours) select each layer's smallest weights by number: an absolute threshold hits layers of
  different scale very unevenly. Only Linear and Conv1D weights are selected from, never biases, norms, embeddings.
- a folder holds values and a checksum of the weight that they belong to: loading onto another base, or the same one in
  another dtype, raises. Merge to be free of that.
- several adapters add up their changes; each replaces values only where it is alone.

Weight decay pulls the selected entries to 0, as in the paper. The penalty is added to `loss` in the output of a model
made by `get_peft_model` with a task type, while it trains; elsewhere add `nuclear_penalty(model)` to the loss.
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from ..core.errors import CheckpointError, ConfigError
from ._base import AdapterTuner, BufferDict, register_adapter
from ._optimizer_steps import SteppedLayer
from ._unscaled import UnscaledConfig

KEPT, PLACES, START, BASE = BUFFERS = tuple(f"polyrank_sara_{name}" for name in ("kept", "places", "start", "base"))

NO_LOSS = (
    "SaRA: the model gave no loss while training (label smoothing, or a loss of your own), so the penalty is not in it;"
    " add nuclear_penalty(model) to the loss, or set penalty=0"
)


@dataclass
class SaraConfig(UnscaledConfig):
    """SaRA. A layer has as many parameters as it has weights below the threshold.

    Raises (on construction): ConfigError for a value out of range.
    """

    threshold: float = field(default=2e-3, metadata={"help": "Weights of smaller magnitude are trained."})
    density: float | None = field(
        default=None, metadata={"help": "Ours, instead of a threshold: share of each layer's weights, in (0, 1)."}
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "Ours, instead of a threshold: as many a layer as LoRA of this rank has."}
    )
    penalty: float = field(default=5e-4, metadata={"help": "Weight of the nuclear norm, its mean over the layers."})
    penalty_layers: int = field(default=1, metadata={"help": "Layers drawn for the penalty each step; 0: all of them."})
    total_steps: int = field(default=5000, metadata={"help": "Optimiser steps of the run."})
    reselect_at: float = field(
        default=0.5, metadata={"help": "Share of the steps after which to select anew, in [0, 1); 0: never."}
    )

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
                raise ConfigError("give density or lora_rank, not both")
        if self.density is not None:
            self.check_number("density")
            if not 0 < self.density < 1:
                raise ConfigError(f"density must lie in (0, 1), got {self.density!r}")

    @property
    def reselect_step(self) -> int:
        return round(self.reselect_at * self.total_steps)

    def threshold_for(self, weight: Tensor) -> float:
        """Magnitude below which this layer's weights are selected."""
        if self.density is not None:
            count = math.ceil(self.density * weight.numel())
        elif self.lora_rank is not None:
            count = min(self.lora_rank * sum(weight.shape), weight.numel())
        else:
            return self.threshold
        dtype = torch.promote_types(weight.dtype, torch.float32)
        largest = weight.abs().flatten().to(dtype).kthvalue(count).values.to(weight.dtype)
        return torch.nextafter(largest, largest.new_tensor(math.inf)).item()


def suggested_learning_rate(threshold: float) -> float:
    """The released code's default for AdamW: 1e-3 exp(-350 threshold)."""
    return 1e-3 * math.exp(-350 * threshold)


def select(weight: Tensor, threshold: float) -> Tensor:
    """Flat places of the entries of smaller magnitude, (n,)."""
    return (weight.abs() < threshold).flatten().nonzero().squeeze(1)


def put(weight: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """A copy of the weight with other values at flat `places`."""
    return weight.flatten().index_put((places,), values).view_as(weight)


def checksum(weight: Tensor) -> Tensor:
    """First 8 bytes of the SHA-256 of the weight's bytes, as an integer (1,)."""
    content = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return torch.tensor([int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)])


class EditedLinear(torch.autograd.Function):
    """The layer's output with W' = `put(weight, places, values)`; nothing of W's size is kept for the backward but W.

    x (..., in), weight frozen, (out, in), or (in, out) if transposed (Conv1D), bias (out,) or None, values (n,).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor, values: Tensor, transposed: bool
    ):
        ctx.save_for_backward(x, weight, places, values)
        ctx.transposed, edited = transposed, put(weight, places, values)
        if not transposed:
            return linear(x, edited, bias)
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), edited).view(*x.shape[:-1], len(bias))  # as Conv1D does

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, places, values = ctx.saved_tensors
        g_x = g_values = None
        if ctx.needs_input_grad[0]:
            edited = put(weight, places, values)
            g_x = g @ (edited.T if ctx.transposed else edited)
        if ctx.needs_input_grad[4]:
            rows, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            g_values = (rows.T @ g if ctx.transposed else g.T @ rows).flatten()[places]
        return g_x, None, None, None, g_values, None


class SaraLinear(SteppedLayer):
    """Per adapter: values (n,), the parameter; buffers: places (n,) into the flat weight as stored, start (n,), the
    weights there, kept (n,) bool, which are still trained, base (1,), the weight's checksum; threshold."""

    parameter_names = ("values",)
    other_param_names = (*SteppedLayer.other_param_names, "configs", "threshold", *BUFFERS)
    exact_unmerge = True

    def __init__(self, base_layer: nn.Module, **quantization: object) -> None:
        super().__init__(base_layer, **quantization)
        self.configs: dict[str, SaraConfig] = {}
        self.threshold: dict[str, float] = {}
        for name in BUFFERS:
            setattr(self, name, BufferDict(persistent=name in (KEPT, BASE)))
        self._before: dict[str, Tensor] = {}

    def buffer(self, name: str, adapter: str) -> Tensor:
        return getattr(self, name)[adapter]

    def original(self) -> Tensor:
        """The base weight as stored, without what is merged into it."""
        return self._unmerged_weights[0] if self._unmerged_weights else self.get_base_weight()

    def update_layer(self, adapter_name: str, config: SaraConfig, rank: int, alpha: float | None) -> None:
        weight = self.original()
        if weight.is_meta:
            raise ConfigError(f"layer {config.layer_key!r} has no weights yet: load the base before adapting it")
        threshold = config.threshold_for(weight)
        places = select(weight, threshold)
        self._start = start = weight.flatten()[places]
        self.configs[adapter_name], self.threshold[adapter_name] = config, threshold
        kept = torch.ones_like(places, dtype=torch.bool)
        for name, value in zip(BUFFERS, (kept, places, start, checksum(weight)), strict=True):
            getattr(self, name)[adapter_name] = value
        super().update_layer(adapter_name, config, rank, alpha)
        del self._start

    def make_parameters(self, config: SaraConfig, rank: int) -> dict[str, Tensor]:
        noise = 0.0 if config.init_weights else self._start.float().std().item()
        return {"values": self._start + noise * torch.randn_like(self._start) if noise else self._start.clone()}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for adapter in self.r:
            saved = state_dict.get(f"{prefix}{BASE}.{adapter}")
            if saved is not None and saved.item() != self.buffer(BASE, adapter).item():
                raise CheckpointError(
                    f"adapter {adapter!r} was trained on other weights of {prefix.rstrip('.')!r} than the base "
                    "has here (checksum): load the same base in the same dtype"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def values(self, adapter: str) -> Tensor:
        """The trained values; those no longer selected carry no gradient."""
        values = self.parameter("values", adapter)
        return torch.where(self.buffer(KEPT, adapter), values, values.detach())

    def changes(self, adapter: str) -> Tensor:
        """s (v - W) at the selected places, (n,)."""
        values = self.values(adapter)
        return (values - self.buffer(START, adapter).to(values)) * self.scaling[adapter]

    def scattered(self, values: Tensor, adapter: str) -> Tensor:
        """Zeros with these values at the selected places, in the shape of the stored weight."""
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return put(values.new_zeros(shape), self.buffer(PLACES, adapter), values)

    def delta_weight(self, adapter: str) -> Tensor:
        delta = self.scattered(self.changes(adapter), adapter)
        return delta.T if self.transposed else delta

    def delta(self, x: Tensor, adapter: str) -> Tensor:
        return linear(x, self.delta_weight(adapter))

    def selected(self, adapter: str) -> Tensor:
        """W' * M, (out, in) or (in, out) as stored: the values still trained, and zeros; fp32 or better."""
        values, kept = self.parameter("values", adapter), self.buffer(KEPT, adapter)
        values = torch.where(kept, values, 0.0).to(torch.promote_types(values.dtype, torch.float32))
        return self.scattered(values, adapter)

    def replaces(self, x: Tensor, adapter: str) -> bool:
        """Whether the values can stand in the weight itself: alone, unscaled, on a plain layer of one dtype."""
        if type(self.base_layer) not in (nn.Linear, Conv1D) or self.quantization_backend is not None:
            return False
        if self.scaling[adapter] != 1.0 or (self.training and self.dropout_p[adapter]):
            return False
        weight = self.base_layer.weight
        plain = not weight.requires_grad and not torch.is_autocast_enabled(x.device.type)
        return plain and x.dtype == weight.dtype == self.parameter("values", adapter).dtype

    def adapted_forward(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(adapters) == 1 and not args and not kwargs and self.replaces(x, adapters[0]):
            base, places = self.base_layer, self.buffer(PLACES, adapters[0])
            return EditedLinear.apply(x, base.weight, base.bias, places, self.values(adapters[0]), self.transposed)
        return super().adapted_forward(x, adapters, *args, **kwargs)

    def merged_weight(self, weight: Tensor, adapter: str) -> Tensor:
        places = self.buffer(PLACES, adapter)
        now, start = weight.flatten()[places], self.buffer(START, adapter).to(weight)
        added = now.to(torch.promote_types(weight.dtype, torch.float32)) + self.changes(adapter)
        if self.scaling[adapter] == 1.0:  # not W + (v - W), which rounds
            added = torch.where(now == start, self.parameter("values", adapter).to(added), added)
        return put(weight, places, added.to(weight.dtype))

    def before_step(self, adapter: str, optimizer: Optimizer) -> None:
        if not self.buffer(KEPT, adapter).all():
            self._before[adapter] = self.parameter("values", adapter).detach().clone()

    def after_step(self, adapter: str, optimizer: Optimizer) -> None:
        values, kept, before = (
            self.parameter("values", adapter),
            self.buffer(KEPT, adapter),
            self._before.pop(adapter, None),
        )
        if before is not None:  # neither decay nor momentum moves what is no longer selected
            values.copy_(torch.where(kept, values, before))
        elif self.steps[adapter] == self.configs[adapter].reselect_step:
            kept &= values.abs() < self.threshold[adapter]
            for name, value in optimizer.state[values].items():
                optimizer.state[values][name] = value.zero_() if isinstance(value, Tensor) else type(value)()


@lru_cache
def warn_once(message: str) -> None:
    logging.getLogger("polyrank").warning(message)


def _layers(model: nn.Module, adapter: str) -> list[SaraLinear]:
    return [m for m in model.modules() if isinstance(m, SaraLinear) and m.has_adapter(adapter)]


@torch.compiler.disable
def nuclear_penalty(model: nn.Module, adapter_name: str = "default") -> Tensor:
    """penalty * mean over layers of |W' * M|_nuclear, or its unbiased estimate from `penalty_layers` drawn layers."""
    layers = _layers(model, adapter_name)
    if not layers:
        raise ConfigError(f"the model has no SaRA adapter {adapter_name!r}")
    config = layers[0].configs[adapter_name]
    count = min(config.penalty_layers or len(layers), len(layers))
    chosen = [layers[i] for i in torch.randperm(len(layers))[:count].tolist()]
    norms = [torch.linalg.matrix_norm(layer.selected(adapter_name), "nuc") for layer in chosen]
    return config.penalty * torch.stack(norms).mean()


class SaraTuner(AdapterTuner):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model.forward(*args, **kwargs)
        loss = getattr(output, "loss", None)
        if self.training and torch.is_grad_enabled():
            for adapter in self.active_adapters:
                config = self.peft_config[adapter]
                if not isinstance(config, SaraConfig) or not config.penalty or config.inference_mode:
                    continue
                if isinstance(loss, Tensor):
                    output.loss = output.loss + nuclear_penalty(self, adapter).to(loss)
                else:
                    warn_once(NO_LOSS)
        return output


SaraModel = register_adapter(
    "sara",
    SaraConfig,
    {nn.Linear: SaraLinear, Conv1D: SaraLinear},
    tags={"identity_at_init", "mergeable", "additive", "exact_unmerge", "mixed_batch", "conv1d"},
    model=SaraTuner,
)

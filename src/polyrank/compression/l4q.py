"""L4Q: the low-rank update goes into the weight, the sum is quantised, and all of it is trained through the quantiser.

    Wc = W + alpha B A,   w = (Wc - b) / S,   w~ = round(clamp(w, Qn, Qp)),   Wq = w~ S + b,   y = Wq x

W (out, in) frozen, A (r, in) Kaiming-uniform, B (out, r) zero; S, b (out, groups): step and offset of `group_size`
inputs each; Qn = -2^(n-1), Qp = 2^(n-1) - 1. Straight-through gradients, with G = dL/dWq and m = 1[Qn <= w <= Qp]:

    dA = alpha B^T (G m),   dB = alpha (G m) A^T,   dS = sum_group G (w~ - w m),   db = sum_group G (1 - m)

S starts at S0 = max(-min W / |Qn|, max W / Qp, 0) of its group, b at 0: nothing is clipped. The result is on the
integer grid: `to_integer` gives layers of packed integers and no adapter. Mathematics: `_quant_straight_through`.

Source: L4Q (ACL 2025), no code was released.
Differs:
- trained are `log_step` = log(S / S0) and `zero` = b / S, both 0 at the start: S cannot cross zero, nothing is lost in
  bf16, and one learning rate suits them and A, B, whatever the size of the weights (Adam's step is the learning rate
  itself). The gradients of S and b are the ones above. S0 is that of the weight that the adapter is applied to.
- minima that are positive, and maxima that are negative, do not widen S. A group of zeros takes its layer's mean S.
- LSQ's factor 1 / sqrt(group_size Qp) on dS is an option, off as in the paper.
- the activations kept are x alone: Wc, w, m are made again in the backward pass, which holds one layer's G at a time.

Weight decay is off for the adapter: it would pull S and b. Several active adapters apply one after another, each to the
weight that the one before has quantised. With dropout, the inputs of what quantising and adapting have changed are
dropped, not those of W. While training W stays in 16 bits, or what it is in: memory as in LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from transformers.pytorch_utils import Conv1D

from ..adapters._base import AdapterConfig, AdapterLayer, register_adapter
from ..adapters._weight_decay import teach_trainer
from ..core.errors import ConfigError, unknown_name
from ._quant_straight_through import QuantisedMergedLinear, in_steps, initial_step, integers, quantised
from ._quantised_linear import IntegerLinear, QuantisedLinear, load_quantised, put_layer, save_quantised

__all__ = ["L4qConfig", "L4qLinear", "L4qModel", "load_quantised", "save_quantised", "to_integer"]
LIMIT = 8.0  # of log(S / S0), so that no learning rate makes S zero or infinite


@dataclass
class L4qConfig(AdapterConfig):
    """L4Q. A layer has r (in + out) parameters, and 2 out in / group_size of the quantiser.

    Raises: ConfigError for bits outside 2..8; on adapting a layer, for a group size that does not divide its inputs.
    """

    r: int = field(default=4, metadata={"help": "Rank of the update."})
    lora_alpha: float = field(default=1.0, metadata={"help": "The update is alpha B A: not divided by r."})
    bits: int = field(default=4, metadata={"help": "n, 2 to 8."})
    group_size: int | None = field(
        default=128, metadata={"help": "Inputs that share step and offset; must divide them. None (or more): a row."}
    )
    group_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Name or regular expression to a group size that differs."}
    )
    lsq_gradient_scale: bool = field(default=False, metadata={"help": "Scale dS by 1 / sqrt(group_size Qp), as LSQ."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_int("bits", minimum=2, maximum=8)
        for size in (self.group_size, *(self.group_pattern or {}).values()):
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise ConfigError(f"group_size must be an integer >= 1, or None for a whole row, got {size!r}")
        if self.use_rslora:
            raise ConfigError("use_rslora has no meaning in L4Q: lora_alpha multiplies B A as it is")

    def scaling(self, rank: int, alpha: float) -> float:
        return alpha

    def groups(self, in_features: int) -> int:
        """Groups of a row. Raises ConfigError, with the nearest size that divides, where the group size does not."""
        size = min(self.layer_value(self.group_pattern, self.group_size) or in_features, in_features)
        if in_features % size:
            fits = [n for n in range(1, in_features + 1) if in_features % n == 0]
            near = min(fits, key=lambda n: abs(n - size))
            raise ConfigError(
                f"group_size {size} does not divide the {in_features} inputs of {self.layer_key or 'a layer'} (nearest "
                f"that does: {near}); set it, or group_pattern for this layer, or None for one group a row"
            )
        return in_features // size


class L4qLinear(AdapterLayer):
    parameter_names = ("A", "B", "log_step", "zero")
    additive = False
    exact_unmerge = True

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__(base_layer, **quantization)
        if self.quantization_backend is not None or isinstance(self.get_base_layer(), QuantisedLinear):
            raise ConfigError(f"L4Q quantises the weight itself: a {type(self.get_base_layer()).__name__} is already")

    def update_layer(self, adapter_name: str, config: L4qConfig, rank: int, alpha: float) -> None:
        super().update_layer(adapter_name, config, rank, alpha)
        teach_trainer()

    def make_parameters(self, config: L4qConfig, rank: int) -> dict[str, Tensor]:
        shape = (self.out_features, config.groups(self.in_features))
        values = {**super().make_parameters(config, rank), "log_step": torch.zeros(shape), "zero": torch.zeros(shape)}
        if not config.init_weights:  # for tests: something is clipped on both sides
            values["log_step"] += 0.02 * torch.randn(shape) - 0.1
            values["zero"] += 0.1 * torch.randn(shape)
        return values

    def decays(self, adapter: str) -> bool:
        return False

    def values(self, weight: Tensor, adapter: str) -> list[Tensor]:
        """A, B, S, b for a weight (out, in), in the parameters' dtype or fp32 if that is finer."""
        dtype = torch.promote_types(self.parameter("A", adapter).dtype, torch.float32)
        A, B, log_step, zero = (self.parameter(name, adapter).to(dtype) for name in self.parameter_names)
        log_step = log_step + (log_step.clamp(-LIMIT, LIMIT) - log_step).detach()  # it can come back by its gradient
        S = initial_step(weight.detach().to(dtype), zero.shape[1], self.configs[adapter].bits) * log_step.exp()
        return [A, B, S, zero * S]

    def combined(self, weight: Tensor, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        """Wc (out, in), S, b for a weight (out, in)."""
        A, B, S, b = self.values(weight, adapter)
        return weight.to(S.dtype) + self.scaling[adapter] * (B @ A), S, b

    def quantised(self, weight: Tensor, adapter: str) -> Tensor:
        """Wq (out, in) in the quantiser's dtype, for a weight (out, in)."""
        return quantised(*self.combined(weight, adapter), self.configs[adapter].bits)

    def base_weight(self) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias; where another tuner's layer lies below, those of it and its adapters together."""
        base = self.get_base_layer()
        if base is self.base_layer:
            return (base.weight.T if self.transposed else base.weight), base.bias
        rows = torch.eye(self.in_features + 1, self.in_features, dtype=base.weight.dtype, device=base.weight.device)
        outputs = self.base_layer(rows)
        return (outputs[:-1] - outputs[-1]).T, outputs[-1]

    def adapted_forward(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        device, last, dtype = x.device.type, adapters[-1], self.get_base_layer().weight.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        p = max(self.dropout_p[name] for name in adapters) if self.training else 0.0
        with torch.autocast(device, enabled=False):
            weight, bias = self.base_weight()
            x, bias, W = x.to(dtype), None if bias is None else bias.to(dtype), weight
            seen = dropout(x, p) if p else x
            for adapter in adapters[:-1]:
                W = self.quantised(W, adapter)
            options = self.scaling[last], self.configs[last].bits, self.configs[last].lsq_gradient_scale
            result = QuantisedMergedLinear.apply(seen, W, *self.values(W, last), bias, *options)
            return result + linear(x - seen, weight.to(dtype)) if p else result

    def merged_weight(self, weight: Tensor, adapter: str) -> Tensor:
        merged = self.quantised(weight.T if self.transposed else weight, adapter)
        return (merged.T if self.transposed else merged).to(weight.dtype)

    def delta_weight(self, adapter: str) -> Tensor:
        """Wq - W for the weight as it is now, (out, in)."""
        weight = self.get_base_weight().T if self.transposed else self.get_base_weight()
        return self.quantised(weight, adapter) - weight

    @torch.no_grad()
    def to_integer(self, adapter: str) -> IntegerLinear:
        """The same layer as packed integers with S and b in fp32."""
        bits, (combined, S, b) = self.configs[adapter].bits, self.combined(self.base_weight()[0], adapter)
        w = integers(in_steps(combined, S, b), bits).flatten(1).to(torch.int16)
        layer = IntegerLinear(self.in_features, self.out_features, bits, S.shape[1], self.transposed)
        return layer.fill(w, S, b).take_place_of(self.get_base_layer())


L4qModel = register_adapter(
    "l4q", L4qConfig, {nn.Linear: L4qLinear, Conv1D: L4qLinear}, {"mergeable", "exact_unmerge", "mixed_batch", "conv1d"}
)


def to_integer(model: Any, adapter_name: str = "default") -> nn.Module:
    """The base model with every adapted layer as packed integers, and no adapter. `model` itself is used up.

    Raises: UnknownNameError for an adapter that the model lacks; ConfigError where it is merged or of another method.
    """
    if adapter_name not in model.peft_config:
        raise unknown_name("adapter", adapter_name, model.peft_config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, L4qLinear) and m.has_adapter(adapter_name)}
    if not layers:
        raise ConfigError(f"adapter {adapter_name!r} is no adapter of L4Q")
    if any(layer.merged for layer in layers.values()):
        raise ConfigError("unmerge the adapters first: the integers are made from the base weight")
    found = {name: layer.to_integer(adapter_name) for name, layer in layers.items()}
    base = model.unload()
    for name, layer in found.items():
        put_layer(base, name.removeprefix("base_model.model."), layer)
    return base

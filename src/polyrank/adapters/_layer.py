"""An adapted layer as PEFT expects it: what every weight-level method shares, and the hooks that a method fills in."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError
from ._config import AdapterConfig
from ._peft_bridge import (
    BaseTunerLayer,
    check_adapters_to_merge,
    get_in_out_features,
    resolve_quantization_backend,
)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A base layer with any number of named adapters of one method.

    Class attributes that a method sets:
        parameter_names: what `make_parameters` returns; stored as `ParameterDict`s under prefix + name.
        additive: False for a method that is not y = W x + delta(x); it then overrides `adapted_forward`.
        exact_unmerge: True keeps a copy of the weight at each merge and puts it back, for updates that cannot be
            subtracted exactly.

    Attributes: in_features, out_features; transposed (the layer stores its weight as (in, out), as GPT-2's Conv1D);
        configs (the layer's own, `AdapterConfig.for_layer`), r, lora_alpha, scaling (the factor in force), unit_scaling
        (the configured factor): per adapter name.
    """

    method: ClassVar[str] = ""
    prefix: ClassVar[str] = ""
    parameter_names: ClassVar[tuple[str, ...]] = ("A", "B")
    additive: ClassVar[bool] = True
    exact_unmerge: ClassVar[bool] = False

    other_param_names = ("configs", "r", "lora_alpha", "scaling", "unit_scaling", "dropout_p")

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_weights: list[torch.Tensor] = []
        self.cast_input_dtype_enabled = True
        self.configs: dict[str, Any] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.unit_scaling: dict[str, float] = {}
        self.dropout_p: dict[str, float] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **quantization)
        self.in_features, self.out_features = get_in_out_features(base)
        self.transposed = isinstance(base, Conv1D)

    # -- hooks of a method ------------------------------------------------------------------------------------------

    def make_parameters(self, config: AdapterConfig, rank: int) -> dict[str, torch.Tensor]:
        """Initial values by short name ("A"), made with torch's default device and dtype.

        The names are from `parameter_names`; a method whose variants have different parameters returns those it needs.
        `config` is the layer's own (`AdapterConfig.for_layer`). Default: LoRA's A (r, in), Kaiming-uniform, and B
        (out, r), zero; without `init_weights` Kaiming-uniform too.
        """
        A, B = torch.empty(rank, self.in_features), torch.zeros(self.out_features, rank)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        return {"A": A, "B": B}

    def delta(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """What the adapter adds to the output: (..., in) -> (..., out), in the parameters' dtype, scale included.

        Default: the product with `delta_weight`, a dense matrix.
        """
        return nn.functional.linear(x, self.delta_weight(adapter))

    def delta_weight(self, adapter: str) -> torch.Tensor:
        """Change of the weight, (out, in), in the parameters' dtype, scale included. Default: B A of `lora_factors`."""
        A, B = self.lora_factors(adapter)
        return B @ A

    def lora_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (R, in) and B (out, R) with W' = W + B A, scale included: the ordinary LoRA that equals this adapter.

        Raises: ConfigError where the method has no such LoRA.
        """
        raise ConfigError(f"adapters of method {self.method!r} are no LoRA: only an approximation can be exported")

    def decays(self, adapter: str) -> bool:
        """Whether weight decay may act on the adapter's parameters (`_weight_decay`)."""
        return True

    def adapted_forward(self, x: torch.Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Output with these adapters (all present on this layer) applied, in the base output's dtype."""
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        for adapter in adapters:
            result = result + self.delta(self.adapter_input(x, adapter), adapter)
        return result.to(dtype)

    # -- what methods use -------------------------------------------------------------------------------------------

    def parameter(self, name: str, adapter: str) -> torch.Tensor:
        """A parameter, or a buffer, of one adapter by its short name ("A")."""
        return getattr(self, self.prefix + name)[adapter]

    def adapter_input(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """The input as the adapter sees it: in the dtype of its parameters, with dropout while training."""
        if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, self.parameter(self.parameter_names[0], adapter).dtype)
        p = self.dropout_p[adapter]
        return nn.functional.dropout(x, p, training=True) if p and self.training else x

    def is_plain(self, x: torch.Tensor, adapter: str) -> bool:
        """Whether a product with the weight may take the base layer's place: one dtype, and nothing else happens there.

        False for a quantised, trained or hooked layer, under autocast, and while the adapter's dropout acts.
        """
        base = self.base_layer
        if type(base) not in (nn.Linear, Conv1D) or self.quantization_backend is not None or base.weight.requires_grad:
            return False
        if base._forward_hooks or base._forward_pre_hooks or hasattr(base, "_hf_hook"):
            return False
        if (self.training and self.dropout_p[adapter]) or torch.is_autocast_enabled(x.device.type):
            return False
        return x.dtype == base.weight.dtype == self.parameter(self.parameter_names[0], adapter).dtype

    def has_adapter(self, adapter: str) -> bool:
        return adapter in self.r

    @classmethod
    def find(cls, model: nn.Module, adapter: str) -> dict[str, Any]:
        """The model's layers of this class that carry an adapter, by name. Raises ConfigError where there are none."""
        layers = {name: m for name, m in model.named_modules() if isinstance(m, cls) and m.has_adapter(adapter)}
        if not layers:
            raise ConfigError(f"the model has no adapter {adapter!r} of method {cls.method!r}")
        return layers

    def present(self, adapters: Collection[str]) -> list[str]:
        """Those of the given adapters that this layer carries."""
        return [adapter for adapter in adapters if adapter in self.r]

    # -- PEFT's side ------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: AdapterConfig, rank: int, alpha: float) -> None:
        """Add an adapter, or replace the one of that name."""
        self.configs[adapter_name] = config
        values = self.make_parameters(config, rank)
        if not values or not set(values) <= set(self.parameter_names):
            raise AssertionError(f"{type(self).__name__}.make_parameters returned {sorted(values)}")
        self.r[adapter_name] = rank
        self.lora_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = self.unit_scaling[adapter_name] = config.scaling(rank, alpha)
        self.dropout_p[adapter_name] = float(config.lora_dropout)
        for name, value in values.items():
            getattr(self, self.prefix + name)[adapter_name] = nn.Parameter(value)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        adapters = self.present(self.active_adapters)
        if self.merged or not adapters:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted_forward(x, adapters, *args, **kwargs)

    def _mixed_batch_forward(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any):
        """Each row of the batch with its own adapter; "__base__" means none."""
        if self.merged:
            raise ConfigError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(adapter_names) != len(x):
            raise ConfigError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        result: torch.Tensor | None = None
        for name in dict.fromkeys(adapter_names):
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            if self.has_adapter(name):
                part = self.adapted_forward(x[rows], [name], *args, **kwargs)
            else:
                part = self.base_layer(x[rows], *args, **kwargs)
            if result is None:
                result = part.new_empty(len(x), *part.shape[1:])
            result = result.index_copy(0, rows, part)
        return result

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Change of the weight as the base layer stores it: (out, in), or (in, out) for Conv1D."""
        delta = self.delta_weight(adapter)
        return delta.T if self.transposed else delta

    def merged_weight(self, weight: torch.Tensor, adapter: str) -> torch.Tensor:
        """The base weight (as stored) with one adapter folded in, computed in fp32 or better, cast back once."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(dtype) + self.get_delta_weight(adapter).to(weight.device, dtype)).to(weight.dtype)

    def unmerged_weight(self, weight: torch.Tensor, adapter: str) -> torch.Tensor:
        """The reverse of `merged_weight` for methods without `exact_unmerge`."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(dtype) - self.get_delta_weight(adapter).to(weight.device, dtype)).to(weight.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight.

        Args:
            safe_merge: check the result first and raise ValueError, the weight untouched, if it is not finite.
            adapter_names: which; default: the active ones.
        """
        for adapter in self.present(check_adapters_to_merge(self, adapter_names)):
            weight = self.get_base_weight()
            merged = self.merged_weight(weight, adapter)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            if self.exact_unmerge:
                self._unmerged_weights.append(weight)
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight, the last one first."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if self.exact_unmerge:
                weight = self._unmerged_weights.pop()
                self.set_base_weight(weight.to(self.get_base_weight()))  # the model may have moved meanwhile
            else:
                self.set_base_weight(self.unmerged_weight(self.get_base_weight(), adapter))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale one adapter's update by `scale` times its configured factor."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.unit_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the factor of the active adapters by `scale`."""
        for adapter in self.present(self.active_adapters):
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factor of the active adapters by `scale`; without it, go back to the configured factor."""
        for adapter in self.present(self.active_adapters):
            self.scaling[adapter] = self.unit_scaling[adapter] if scale is None else self.scaling[adapter] / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.additive

    def __repr__(self) -> str:
        return f"{self.method}.{super().__repr__()}"

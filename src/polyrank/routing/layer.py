"""LoRA-MoE on one layer: y = W x + s sum_e g_e(x) B_e A_e x; see `gates.py` for the symbols.

The experts of a layer live in one parameter each for A and B, so that all of them are two matrix products. The router
sees the layer's input without dropout; the experts' input is dropped out as LoRA's is. Experts start as LoRA does (A
Kaiming-uniform, drawn for each on its own, B zero).

Merging: the update depends on the input and has no weight, save where there is one expert, or one was chosen
(`with route_experts(model, e): model.merge_and_unload()`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from ..adapters import AdapterLayer, register_adapter
from ..core.errors import ConfigError
from .balance import RoutingRecord
from .config import MoeConfig
from .gates import drawn_gates, expert_sum, router_probabilities, sparse_gates


class MoeLinear(AdapterLayer):
    """nn.Linear and Conv1D, quantised ones too.

    Attributes (for each adapter): num_experts, top_k, balance_weight. `routed_by`: what `route_experts` put in the
    place of the adapter's own gates; `record`: where `record_routing` wants the router's probabilities.
    """

    parameter_names = ("A", "B", "router", "router_bias")
    other_param_names = (*AdapterLayer.other_param_names, "num_experts", "top_k", "balance_weight")
    additive = False
    exact_unmerge = True  # which expert was merged may not be the chosen one any more

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__(base_layer, **quantization)
        self.num_experts: dict[str, int] = {}
        self.top_k: dict[str, int] = {}
        self.balance_weight: dict[str, float] = {}
        self.routed_by: tuple[str | int, int | None] | None = None
        self.record: RoutingRecord | None = None

    def make_parameters(self, config: MoeConfig, rank: int) -> dict[str, Tensor]:
        experts = config.num_experts
        A, B = torch.empty(experts, rank, self.in_features), torch.zeros(experts, self.out_features, rank)
        for e in range(experts):
            nn.init.kaiming_uniform_(A[e], a=math.sqrt(5))
            if not config.init_weights:
                nn.init.kaiming_uniform_(B[e], a=math.sqrt(5))
        if experts == 1:
            return {"A": A, "B": B}
        std = config.router_scale if config.init_weights else self.in_features**-0.5
        bias = torch.zeros(experts) if config.init_weights else torch.randn(experts) * 0.1
        return {"A": A, "B": B, "router": torch.randn(experts, self.in_features) * std, "router_bias": bias}

    def update_layer(self, adapter_name: str, config: MoeConfig, rank: int, alpha: float) -> None:
        super().update_layer(adapter_name, config, rank, alpha)
        self.num_experts[adapter_name] = config.num_experts
        self.top_k[adapter_name] = config.top_k
        self.balance_weight[adapter_name] = config.balance_weight

    def gates(self, x: Tensor, adapter: str) -> Tensor:
        """Weights of the experts for each token, (..., in) -> (..., K), in fp32 or better, summing to 1."""
        router, bias = self.parameter("router", adapter), self.parameter("router_bias", adapter)
        probabilities = router_probabilities(x, router, bias)
        if self.record is not None:
            self.record.add(self, self.top_k[adapter], probabilities)
        kind, top_k = self.routed_by or (None, None)
        top_k = self.top_k[adapter] if kind in (None, "stochastic") else 0 if kind == "dense" else top_k
        gates = sparse_gates(probabilities, top_k) if top_k else probabilities
        return drawn_gates(gates) if kind == "stochastic" else gates

    def single_expert(self, adapter: str) -> int | None:
        """The expert that every token goes through: the only one, or the chosen one; None where the router decides."""
        if self.num_experts[adapter] == 1:
            return 0
        return self.routed_by[0] if self.routed_by is not None and isinstance(self.routed_by[0], int) else None

    def adapter_input(self, x: Tensor, adapter: str) -> Tensor:
        """The layer's own input: `delta` gives the router and the experts each what they should see."""
        return x

    def delta(self, x: Tensor, adapter: str) -> Tensor:
        A, B, scale = self.parameter("A", adapter), self.parameter("B", adapter), self.scaling[adapter]
        seen = super().adapter_input(x, adapter)
        if (expert := self.single_expert(adapter)) is not None:
            return linear(linear(seen, A[expert]), B[expert]) * scale
        return expert_sum(seen, A, B, self.gates(x, adapter), scale)

    def delta_weight(self, adapter: str) -> Tensor:
        """Change of the weight by the one expert. Raises ConfigError where the router chooses by the input."""
        expert = self.single_expert(adapter)
        if expert is None:
            raise ConfigError(
                f"adapter {adapter!r} cannot be merged: its router mixes {self.num_experts[adapter]} experts by the "
                "input, token by token; one expert can: with route_experts(model, 0): model.merge_and_unload()"
            )
        return self.parameter("B", adapter)[expert] @ self.parameter("A", adapter)[expert] * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for adapter in self.present(adapter_names or self.active_adapters):
            if self.single_expert(adapter) is None:
                self.delta_weight(adapter)  # raises before any other adapter is folded in
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


MoeModel = register_adapter(
    "moe",
    MoeConfig,
    {nn.Linear: MoeLinear, Conv1D: MoeLinear},
    tags={"identity_at_init", "exact_unmerge", "mixed_batch", "conv1d"},
)

"""Mixtures of adapters: LoRA-MoE, K low-rank experts on each layer, mixed by a router for each token."""

from .balance import RoutingRecord, record_routing
from .choices import num_experts, route_experts
from .config import MoeConfig
from .layer import MoeLinear, MoeModel
from .trainer import LoadBalanceMixin, MoeTrainer

__all__ = [
    "LoadBalanceMixin",
    "MoeConfig",
    "MoeLinear",
    "MoeModel",
    "MoeTrainer",
    "RoutingRecord",
    "num_experts",
    "record_routing",
    "route_experts",
]

"""Configuration of LoRA-MoE: K low-rank experts on each adapted layer, mixed by a router for each token."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..adapters import AdapterConfig
from ..core.errors import ConfigError

SPARSE_ROUTER_STD = 0.01
SPARSE_LOAD_BALANCE = 0.01


@dataclass
class MoeConfig(AdapterConfig):
    """LoRA-MoE. A layer has K r (in + out) + K (in + 1) parameters; K = 1 is plain LoRA, without a router.

    Source: the LoRA-MoE baseline of Letzelter et al. 2025 (LoRA-MCL): dense, or the 2 largest gates and a balance loss
    of weight 0.01. Differs: a sparse router starts at N(0, 0.01^2), since with zeros the same experts win every tie.

    Raises: ConfigError for num_experts < 1, top_k outside [0, num_experts], a balance loss for a dense router, beside
    what AdapterConfig checks.
    """

    num_experts: int = field(default=3, metadata={"help": "K, how many experts; 1 is plain LoRA."})
    top_k: int = field(default=0, metadata={"help": "Experts of a token, their gates summing to 1; 0: all (dense)."})
    load_balance_weight: float | None = field(
        default=None, metadata={"help": "Weight of the balance loss (MoeTrainer). Default: 0.01 if sparse, else 0."}
    )
    router_std: float | None = field(
        default=None, metadata={"help": "Standard deviation of the router at start. Default: 0.01 if sparse, else 0."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_int("num_experts", minimum=1)
        self.check_int("top_k", minimum=0, maximum=self.num_experts)
        for name in ("load_balance_weight", "router_std"):
            if getattr(self, name) is not None:
                self.check_number(name, low=0.0)
        if self.load_balance_weight and not self.top_k:
            raise ConfigError(
                f"load_balance_weight {self.load_balance_weight} goes with a sparse router: set top_k, or leave it out"
            )

    @property
    def balance_weight(self) -> float:
        """The balance loss' weight in force: 0 where there is nothing to choose."""
        if not self.top_k or self.num_experts == 1:
            return 0.0
        return SPARSE_LOAD_BALANCE if self.load_balance_weight is None else float(self.load_balance_weight)

    @property
    def router_scale(self) -> float:
        """Standard deviation with which the router starts."""
        return (SPARSE_ROUTER_STD if self.top_k else 0.0) if self.router_std is None else float(self.router_std)

"""DyLoRA: one training run gives a LoRA that can be cut to any rank afterwards.

    y = W x + (alpha / b) B[:, :b] A[:b] x,    b drawn once an optimiser step from {min_rank .. r}, for all layers

A (r, in) Kaiming-uniform, B (out, r) zero. mode "normal": all of the first b rows and columns are trained; "frozen":
row b of A and column b of B only, the ones before them take part but are held.

Source: Valipour et al. 2023, "DyLoRA", and its released code.
Differs:
- the rank is the number of rows, 1 .. r; the released index is one less, and asking it for rank r fails.
- b is a function of `seed` and the step alone: layers, data-parallel workers, accumulated batches and recomputed
  (checkpointed) forwards all see the same one. A layer whose rank differs (`rank_pattern`) takes the same quantile.
- in eval mode the rank is the one set (`set_rank`, default r), never the one drawn last; merging remembers its own.
- `mask_step`: a zero gradient is no rest for Adam, whose momentum and decay go on moving rows that were not drawn (the
  released behaviour, and the default); with True those rows and their moments are put back after each step.
- `constant_scale` (off): under alpha / b the first component would have to be a different one at each b; with one scale
  the best nested factors are those of the singular value decomposition at every b.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError, check_choice
from ..core.seeding import derive_seed
from ._base import AdapterConfig, register_adapter
from ._lora_export import export_lora
from ._optimizer_steps import SteppedLayer


@dataclass
class DyloraConfig(AdapterConfig):
    """DyLoRA. `r` is the largest rank; a layer has r (in + out) parameters.

    Raises (on construction): ConfigError for an unknown mode, a rank outside 1 .. r, or weights that do not fit.
    """

    mode: str = field(default="normal", metadata={"help": "normal: train rows 1..b. frozen: train row b only."})
    min_rank: int = field(default=1, metadata={"help": "Smallest rank that is drawn."})
    rank_weights: list[float] | None = field(default=None, metadata={"help": "Weights of min_rank .. r in the draw."})
    mask_step: bool = field(default=False, metadata={"help": "Hold rows not drawn against momentum and decay."})
    constant_scale: bool = field(default=False, metadata={"help": "Ours: scale alpha / r at every rank."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})
    inference_rank: int | None = field(default=None, metadata={"help": "Rank in eval mode and merged. Default: r."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, ("normal", "frozen"))
        self.check_int("min_rank", 1, self.r)
        self.check_int("seed", 0)
        if self.inference_rank is not None:
            self.check_int("inference_rank", 1, max([self.r, *(self.rank_pattern or {}).values()]))
        if self.rank_weights is not None:
            count = self.r - self.min_rank + 1
            if self.rank_pattern:
                raise ConfigError("rank_weights and rank_pattern exclude one another: the weights are for one r")
            if len(self.rank_weights) != count or min(self.rank_weights) < 0 or not sum(self.rank_weights) > 0:
                raise ConfigError(f"rank_weights must be {count} numbers >= 0, one a rank, got {self.rank_weights!r}")


def draw_rank(config: DyloraConfig, step: int) -> int:
    """The rank b of one optimiser step for a layer of rank `config.r`."""
    ranks = range(min(config.min_rank, config.r), config.r + 1)
    return random.Random(derive_seed(config.seed, "dylora", step)).choices(ranks, config.rank_weights)[0]


def cut(A: Tensor, B: Tensor, rank: int, hold: bool = False) -> tuple[Tensor, Tensor]:
    """A[:b] (b, in), B[:, :b] (out, b); with `hold`, only the last row and column carry a gradient."""
    if not hold or rank == 1:
        return A[:rank], B[:, :rank]
    A, B = (torch.cat([m[: rank - 1].detach(), m[rank - 1 : rank]]) for m in (A, B.T))
    return A, B.T


def mask(A: Tensor, B: Tensor, rank: Tensor, hold: bool = False) -> tuple[Tensor, Tensor]:
    """The same with zeros for what is cut off, so that one compiled graph serves every `rank` (a scalar)."""
    row = torch.arange(1, len(A) + 1, device=A.device)
    kept, trained = (row <= rank).to(A.dtype), (row == rank if hold else row <= rank)
    A = torch.where(trained[:, None], A, A.detach()) * kept[:, None]
    return A, torch.where(trained, B, B.detach()) * kept


class DyloraLinear(SteppedLayer):
    """Attributes, per adapter: drawn, drawn_tensor (the present step's b); rank (that of eval mode); merged_rank."""

    other_param_names = (*SteppedLayer.other_param_names, "drawn", "drawn_tensor", "rank", "merged_rank")

    def __init__(self, base_layer: nn.Module, **quantization: object) -> None:
        super().__init__(base_layer, **quantization)
        self.drawn: dict[str, int] = {}
        self.drawn_tensor: dict[str, Tensor] = {}
        self.rank: dict[str, int] = {}
        self.merged_rank: dict[str, int] = {}
        self._before: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def update_layer(self, adapter_name: str, config: DyloraConfig, rank: int, alpha: float) -> None:
        self.rank[adapter_name] = min(config.inference_rank or rank, rank)
        super().update_layer(adapter_name, config, rank, alpha)
        device = self.parameter("A", adapter_name).device
        self.drawn_tensor[adapter_name] = torch.tensor(1, device="cpu" if device.type == "meta" else device)
        self._draw(adapter_name)

    def _draw(self, adapter: str) -> None:
        self.drawn[adapter] = draw_rank(self.configs[adapter], self.steps[adapter])
        self.drawn_tensor[adapter].fill_(self.drawn[adapter])

    def scale(self, adapter: str, rank: int | Tensor) -> float | Tensor:
        """alpha / b (rank-stabilised: alpha / sqrt(b)); alpha / r with `constant_scale`."""
        config, ratio = self.configs[adapter], self.r[adapter] / rank
        return self.scaling[adapter] * (1.0 if config.constant_scale else ratio**0.5 if config.use_rslora else ratio)

    def delta(self, x: Tensor, adapter: str) -> Tensor:
        A, B, hold = self.parameter("A", adapter), self.parameter("B", adapter), self.configs[adapter].mode == "frozen"
        rank: int | Tensor = self.rank[adapter]
        if not (self.training and A.requires_grad):
            A, B = cut(A, B, self.rank[adapter])
        elif torch.compiler.is_compiling():
            rank = self.drawn_tensor[adapter].to(A.device)
            A, B = mask(A, B, rank, hold)
        else:
            rank = self.drawn[adapter]
            A, B = cut(A, B, rank, hold)
        return linear(linear(x, A), B) * self.scale(adapter, rank)

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (b, in), B (out, b) at the rank of eval mode, scale included."""
        A, B = cut(self.parameter("A", adapter), self.parameter("B", adapter), self.rank[adapter])
        return A, B * self.scale(adapter, self.rank[adapter])

    def merged_weight(self, weight: Tensor, adapter: str) -> Tensor:
        self.merged_rank[adapter] = self.rank[adapter]
        return super().merged_weight(weight, adapter)

    def unmerged_weight(self, weight: Tensor, adapter: str) -> Tensor:
        now, self.rank[adapter] = self.rank[adapter], self.merged_rank[adapter]  # it may have changed meanwhile
        weight = super().unmerged_weight(weight, adapter)
        self.rank[adapter] = now
        return weight

    def before_step(self, adapter: str, optimizer: Optimizer) -> None:
        if self.configs[adapter].mask_step:
            A, B = self.parameter("A", adapter), self.parameter("B", adapter)
            rows = [A, *_moments(optimizer, A), *(t.T for t in (B, *_moments(optimizer, B)))]
            self._before[adapter] = [(tensor, tensor.clone()) for tensor in rows]

    def after_step(self, adapter: str, optimizer: Optimizer) -> None:
        rank, hold = self.drawn[adapter], self.configs[adapter].mode == "frozen"
        others = [i for i in range(self.r[adapter]) if i >= rank or (hold and i != rank - 1)]
        for tensor, before in self._before.pop(adapter, ()):
            tensor[others] = before[others]
        self._draw(adapter)


def _moments(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    state = optimizer.state.get(parameter, {}).values()
    return [value for value in state if isinstance(value, Tensor) and value.shape == parameter.shape]


def set_rank(model: nn.Module, rank: int, adapter_name: str = "default") -> None:
    """Choose the rank of eval mode, merging, export and saving; a layer whose own r is smaller keeps its r.

    Raises: ConfigError where no layer carries the adapter or the rank is not in 1 .. r.
    """
    layers = DyloraLinear.find(model, adapter_name).values()
    largest = max(layer.r[adapter_name] for layer in layers)
    if not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ConfigError(f"rank must be an integer >= 1 and <= {largest}, got {rank!r}")
    for layer in layers:
        layer.rank[adapter_name] = min(rank, layer.r[adapter_name])
    if adapter_name in getattr(model, "peft_config", {}):
        model.peft_config[adapter_name].inference_rank = rank


def export_rank(model: PeftModel, folder: str | Path, rank: int, adapter_name: str = "default") -> Path:
    """Write the adapter cut to one rank as an ordinary PEFT LoRA folder (`export_lora`); the model stays as it is."""
    before = max(layer.rank[adapter_name] for layer in DyloraLinear.find(model, adapter_name).values())
    chosen = model.peft_config[adapter_name].inference_rank
    set_rank(model, rank, adapter_name)
    try:
        return export_lora(model, folder, adapter_name)
    finally:
        set_rank(model, before, adapter_name)
        model.peft_config[adapter_name].inference_rank = chosen


DyloraModel = register_adapter(
    "dylora",
    DyloraConfig,
    {nn.Linear: DyloraLinear, Conv1D: DyloraLinear},
    tags={"identity_at_init", "mergeable", "additive", "mixed_batch", "conv1d"},
)

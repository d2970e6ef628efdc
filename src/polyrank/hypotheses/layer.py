"""K low-rank updates on one layer: y = W x + s B_k A_k x, the hypothesis k chosen for each row.

W (out, in) frozen; A (K, r, in), B (K, out, r); s = lora_alpha / r (or / sqrt(r)). A is Kaiming-uniform, drawn for each
hypothesis on its own, B is zero, so that all hypotheses start as the base model. Embeddings: A starts at zero and B is
Gaussian, as in PEFT.

Source: Letzelter et al. 2025 (LoRA-MCL); Hu et al. 2022 (LoRA) for one hypothesis.
Differs: the scale is the same in training and at inference (the released grouped layer leaves it out in training), and
all hypotheses of a layer live in one parameter each for A and B.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..adapters import AdapterLayer
from ..core.errors import ConfigError
from .config import MclConfig
from .fused import fused_lora_linear
from .routing import Router, Routing


def routed_lora(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, routing: Routing) -> torch.Tensor:
    """s B_k A_k x for rows routed to hypotheses: x (rows, ..., in), A (K, r, in), B (K, out, r) -> (rows, ..., out)."""
    if routing.index is not None:
        index = routing.spread_index(x.shape[0])
        h = torch.matmul(x.reshape(x.shape[0], -1, x.shape[-1]), A[index].transpose(1, 2))
        return (torch.matmul(h, B[index].transpose(1, 2)) * scale).reshape(*x.shape[:-1], B.shape[1])
    parts = [F.linear(F.linear(x[start:stop], A[k]), B[k]) * scale for k, start, stop in routing.spread(x.shape[0])]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class MclLayer(AdapterLayer):
    """What Linear, Conv1D and Embedding share: stacked parameters, the router, merging of one hypothesis."""

    parameter_names = ("A", "B")
    other_param_names = (*AdapterLayer.other_param_names, "num_hypotheses")

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__(base_layer, **quantization)
        self.router = Router()
        self.unordered = False  # among experts, which see tokens in an order of their own (set by `route`)
        self.shared_product: Callable[[torch.Tensor], torch.Tensor] | None = None  # W x + b, remembered (`sharing`)
        self.num_hypotheses: dict[str, int] = {}

    @property
    def routing(self) -> Routing:
        """The routing in force. Raises ConfigError for rows of several hypotheses where rows cannot be told apart."""
        routing = self.router.current
        if self.training and torch.is_grad_enabled() and max(self.num_hypotheses.values(), default=1) > 1:
            self.router.warn_unasked()
        if self.unordered and not routing.is_single:
            raise ConfigError(
                "an adapted layer lies among experts, which see tokens in an order of their own: rows of several "
                "hypotheses cannot go through it together; run one hypothesis at a time"
            )
        return routing

    def update_layer(self, adapter_name: str, config: MclConfig, rank: int, alpha: float) -> None:
        super().update_layer(adapter_name, config, rank, alpha)
        self.num_hypotheses[adapter_name] = config.num_hypotheses

    def make_parameters(self, config: MclConfig, rank: int) -> dict[str, torch.Tensor]:
        A = torch.empty(config.num_hypotheses, rank, self.in_features)
        B = torch.zeros(config.num_hypotheses, self.out_features, rank)
        for k in range(config.num_hypotheses):
            nn.init.kaiming_uniform_(A[k], a=math.sqrt(5))
            if not config.init_weights:
                nn.init.kaiming_uniform_(B[k], a=math.sqrt(5))
        return {"A": A, "B": B}

    def factors(self, adapter: str, hypothesis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A_k (r, in) and B_k (out, r) of one hypothesis, views of the parameters."""
        return self.parameter("A", adapter)[hypothesis], self.parameter("B", adapter)[hypothesis]

    def delta_weight(self, adapter: str) -> torch.Tensor:
        """Change of the weight by the merged hypothesis, else by the router's default one."""
        hypothesis = self.router.hypothesis if self.router.merged is None else self.router.merged
        if hypothesis >= self.num_hypotheses[adapter]:
            raise ConfigError(f"hypothesis {hypothesis} of adapter {adapter!r} with {self.num_hypotheses[adapter]}")
        A, B = self.factors(adapter, hypothesis)
        return B @ A * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the router's default hypothesis (`set_hypothesis`) of the given or active adapters."""
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if self.merged:
            self.router.merged = self.router.hypothesis

    def unmerge(self) -> None:
        super().unmerge()
        self.router.merged = None


class MclLinear(MclLayer):
    """nn.Linear and Conv1D, quantised ones too."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kernel = self.router.current.kernels.get(self)
        if kernel is not None and not args and not kwargs and not torch.is_grad_enabled():
            return kernel(x)
        return super().forward(x, *args, **kwargs)

    def delta(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        A, B = self.parameter("A", adapter), self.parameter("B", adapter)
        return routed_lora(x, A, B, self.scaling[adapter], self.routing)

    def adapted_forward(self, x: torch.Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(adapters) == 1 and not args and not kwargs and self._fusible(x, adapters[0]):
            base, adapter = self.get_base_layer(), adapters[0]
            A, B = self.parameter("A", adapter), self.parameter("B", adapter)
            segments = self.routing.spread(x.shape[0])
            product = None if self.shared_product is None else self.shared_product(x.detach())
            scale, fold = self.scaling[adapter], self.router.folding
            return fused_lora_linear(x, base.weight, base.bias, A, B, scale, segments, self.transposed, product, fold)
        return super().adapted_forward(x, adapters, *args, **kwargs)

    def _fusible(self, x: torch.Tensor, adapter: str) -> bool:
        """Whether base and update may run as one function: plain frozen base of the adapter's dtype, no dropout."""
        if self.router.current.index is not None or (self.training and self.dropout_p[adapter]):
            return False
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or not self.is_plain(adapter):
            return False
        base = self.base_layer
        return (
            x.dtype == base.weight.dtype
            and not base.weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
        )

    def is_plain(self, adapter: str) -> bool:
        """Whether the base is an ordinary layer whose weight may be used directly, of the adapter's dtype."""
        base = self.base_layer
        return (
            self.quantization_backend is None
            and base is self.get_base_layer()  # no other adapter below
            and type(base.weight) is nn.Parameter
            and base.weight.dtype == self.parameter("A", adapter).dtype
            and not (base._forward_hooks or base._forward_pre_hooks)
        )


class MclEmbedding(MclLayer):
    """nn.Embedding: V x d table; A (K, r, V) starts at zero, B (K, d, r) Gaussian; adds s (A_k[:, ids])^T B_k^T."""

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__(base_layer, **quantization)
        self.transposed = True  # the table is (V, d) = (in, out)

    def make_parameters(self, config: MclConfig, rank: int) -> dict[str, torch.Tensor]:
        A = torch.zeros(config.num_hypotheses, rank, self.in_features)
        B = torch.randn(config.num_hypotheses, self.out_features, rank)
        if not config.init_weights:
            nn.init.normal_(A)
        return {"A": A, "B": B}

    def delta(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        A, B = self.parameter("A", adapter), self.parameter("B", adapter)
        scale, routing = self.scaling[adapter], self.routing
        if (embed_scale := self._get_embed_scale()) is not None:
            scale = scale * embed_scale.to(B.dtype)
        if routing.index is not None:
            index = routing.spread_index(x.shape[0])
            columns = torch.stack([F.embedding(ids, A[k].T) for ids, k in zip(x, index, strict=True)])
            h = columns.reshape(x.shape[0], -1, A.shape[1])
            return (torch.matmul(h, B[index].transpose(1, 2)) * scale).reshape(*x.shape, B.shape[1])
        parts = [
            F.linear(F.embedding(x[start:stop], A[k].T), B[k]) * scale for k, start, stop in routing.spread(x.shape[0])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

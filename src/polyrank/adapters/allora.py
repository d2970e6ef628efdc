"""ALLoRA: LoRA without dropout and scale, whose parameters' gradients are larger in rows where B A is still small.

    forward   y = W x + B A x
    backward  g_B = (c * g) (A x)^T,  g_A = B^T (c * g) x^T,  g_x = (W + B A)^T g
    c_i = 1 / sqrt(|M_i| + 1 / eta^2),  M = B A;  |M_i| the Euclidean norm of its row i (not squared);  c = eta at M = 0

x (in), g (out) the gradient of y, A (r, in) Kaiming-uniform, B (out, r) zero, c (out) constant for the gradient.
The row norms come from M_i M_i^T = B_i (A A^T) B_i^T: r^2 (in + out) multiply-adds a forward, r / tokens of LoRA's own.

Source: "ALLoRA", arXiv 2410.09692 (no code was released).
Differs: c must not reach g_x, where it would compound over the layers, and g_A mixes rows, so that it cannot be scaled
afterwards: both ask for an autograd function. `lora_dropout` and `lora_alpha` are for comparisons, off unless set.

Adam divides each element by its own recent size, and with it a factor that is constant along B's rows: under Adam c
acts on A's mixture of rows only; under SGD on both. Clipping the global norm takes back some of eta too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError
from ._base import AdapterLayer, register_adapter
from ._unscaled import UnscaledConfig


@dataclass
class AlloraConfig(UnscaledConfig):
    """ALLoRA. A layer has r (in + out) parameters.

    Raises (on construction): ConfigError unless eta_squared > 0.
    """

    eta_squared: float = field(
        default=1.0, metadata={"help": "eta^2: the gradient is multiplied by eta where B A = 0 (paper: 1, 2, 4)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("eta_squared", low=0.0)
        if self.eta_squared == 0:
            raise ConfigError("eta_squared must be > 0, got 0")


def row_norms(A: Tensor, B: Tensor) -> Tensor:
    """Euclidean norms of the rows of B A, (out,), without forming it; fp32 or better."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    A, B = A.to(dtype), B.to(dtype)
    return ((B @ (A @ A.T)) * B).sum(1).clamp(min=0.0).sqrt()


@torch.no_grad()
def row_factors(A: Tensor, B: Tensor, eta_squared: float, scale: float = 1.0) -> Tensor:
    """c of this file's docstring for M = scale B A, (out,)."""
    return (row_norms(A, B) * abs(scale) + 1.0 / eta_squared).rsqrt()


class RowScaled(torch.autograd.Function):
    """B A x, with c on the gradients of A and B and not on that of x. x (..., in), A (r, in), B (out, r), c (out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        h = linear(x, A)
        ctx.save_for_backward(x, A, B, c, h)
        return linear(h, B)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, c, h = ctx.saved_tensors
        need_x, need_A, need_B, _ = ctx.needs_input_grad
        scaled = (g * c).reshape(-1, len(c))
        g_x = g @ B @ A if need_x else None
        g_A = (scaled @ B).T @ x.reshape(-1, x.shape[-1]) if need_A else None
        g_B = scaled.T @ h.reshape(-1, h.shape[-1]) if need_B else None
        return g_x, g_A, g_B, None


class AlloraLinear(AdapterLayer):
    def delta(self, x: Tensor, adapter: str) -> Tensor:
        A, B, scale = self.parameter("A", adapter), self.parameter("B", adapter), self.scaling[adapter]
        if not (torch.is_grad_enabled() and (A.requires_grad or B.requires_grad)):
            return linear(linear(x, A), B) * scale
        c = row_factors(A, B, self.configs[adapter].eta_squared, scale)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else A.dtype
        with torch.autocast(device, enabled=False):  # the backward runs without autocast, and needs one dtype
            return RowScaled.apply(x.to(dtype), A.to(dtype), B.to(dtype), c.to(dtype)) * scale

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (r, in), B (out, r), scale included."""
        return self.parameter("A", adapter), self.parameter("B", adapter) * self.scaling[adapter]


AlloraModel = register_adapter(
    "allora",
    AlloraConfig,
    {nn.Linear: AlloraLinear, Conv1D: AlloraLinear},
    tags={"identity_at_init", "mergeable", "additive", "mixed_batch", "conv1d"},
)

"""Integer quantisation of a weight that holds a low-rank update, and its straight-through gradients (see `l4q`).

Shapes: weight (out, in), A (r, in), B (out, r), step S and offset b (out, groups), w (out, groups, inputs of a group).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def integer_range(bits: int) -> tuple[int, int]:
    """Qn, Qp."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def initial_step(weight: Tensor, groups: int, bits: int) -> Tensor:
    """S0 (out, groups) of a weight (out, in): the smallest step at which nothing is clipped."""
    low, high = integer_range(bits)
    least, largest = weight.unflatten(1, (groups, -1)).aminmax(dim=-1)
    step = torch.maximum(least / low, largest / high).clamp(min=0.0) * (1 + 4 * torch.finfo(weight.dtype).eps)
    return torch.where(step > 0, step, step.mean().clamp(min=torch.finfo(torch.float32).tiny * 2**20))


def in_steps(combined: Tensor, S: Tensor, b: Tensor) -> Tensor:
    """w (out, groups, size) of a weight (out, in)."""
    return (combined.unflatten(1, (S.shape[1], -1)) - b[..., None]) / S[..., None]


def integers(w: Tensor, bits: int) -> Tensor:
    """w~: clamped, then rounded, half to even."""
    return w.clamp(*integer_range(bits)).round()


def quantised(combined: Tensor, S: Tensor, b: Tensor, bits: int) -> Tensor:
    """Wq (out, in), with the straight-through gradients by autograd."""
    w = in_steps(combined, S, b)
    kept = w.clamp(*integer_range(bits))
    return ((kept + (kept.round() - kept).detach()) * S[..., None] + b[..., None]).flatten(1)


class QuantisedMergedLinear(torch.autograd.Function):
    """Wq x + bias, with the gradients of `l4q`; x (..., in) in the product's dtype, the rest in the parameters'."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, S: Tensor, b: Tensor, bias: Tensor | None,
        alpha: float, bits: int, scale_step: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, W, A, B, S, b)
        ctx.alpha, ctx.bits, ctx.scale_step = alpha, bits, scale_step
        w = integers(in_steps(W.to(A.dtype) + alpha * (B @ A), S, b), bits)
        return linear(x, (w * S[..., None] + b[..., None]).flatten(1).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, S, b = ctx.saved_tensors
        low, high = integer_range(ctx.bits)
        w = in_steps(W.to(A.dtype) + ctx.alpha * (B @ A), S, b)
        w_int, inside = integers(w, ctx.bits), (w >= low) & (w <= high)
        rows = g.reshape(-1, g.shape[-1])
        g_x = g @ (w_int * S[..., None] + b[..., None]).flatten(1).to(g.dtype) if ctx.needs_input_grad[0] else None
        G = (rows.T @ x.reshape(-1, x.shape[-1])).to(A.dtype).unflatten(1, (S.shape[1], -1))
        g_S = (G * (w_int - w * inside)).sum(-1)
        if ctx.scale_step:
            g_S = g_S / math.sqrt(w.shape[-1] * high)
        g_b, through = (G * ~inside).sum(-1), (G * inside).flatten(1)
        g_W = through.to(W.dtype) if ctx.needs_input_grad[1] else None
        g_bias = rows.sum(0) if ctx.needs_input_grad[6] else None
        return g_x, g_W, ctx.alpha * (B.T @ through), ctx.alpha * (through @ A.T), g_S, g_b, g_bias, None, None, None

"""A weight some of whose entries are replaced by trained values, which alone get a gradient that stays."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


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

"""A weight as a quantised matrix plus a low-rank one (see `lq_lora`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._quant_normal_float import NormalFloat, Quantised, dequantise, quantise


def weighted_svd(M: Tensor, rank: int, F: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """L1 (out, r), L2 (r, in) of `lq_lora` for M (out, in), fp32 or better; r at most min(out, in).

    Exact for small matrices; for large ones randomised with 10 more directions than r, from the seed.
    """
    rank = min(rank, *M.shape)
    if F is not None:
        left, right = (_roots(F.to(M.dtype).mean(axis)) for axis in (1, 0))
        L1, L2 = weighted_svd(left[:, None] * M * right, rank, None, seed)
        return L1 / left[:, None], L2 / right
    if 4 * (rank + 10) >= min(M.shape):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[M.device] if M.is_cuda else []):
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(M, q=rank + 10, niter=4)
        Vh = V.T
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def _roots(means: Tensor, floor: float = 1e-6) -> Tensor:
    """Square roots of means, those that are (nearly) zero raised to `floor` times their average; ones if all are."""
    average = means.mean()
    return means.clamp(min=floor * average).sqrt() if average > 0 else torch.ones_like(means)


class Split(NamedTuple):
    """The best iterate: what is stored of Q, Q (out, in), L1, L2, its error; the errors of all iterates."""

    parts: Quantised
    Q: Tensor
    L1: Tensor
    L2: Tensor
    error: float
    errors: list[float]


def decompose(
    W: Tensor, rank: int, form: NormalFloat, F: Tensor | None = None, iterations: int = 100, seed: int = 0,
    dtype: torch.dtype = torch.float32, start: tuple[Tensor, Tensor] | None = None,
) -> Split:  # fmt: skip
    """Split a weight (out, in). The error is |sqrt(F) (W - Q - L1 L2)|, F = 1 where none is given.

    Args: dtype: that Q is decoded to when it is used. start: L1, L2 of W itself, where they are known.
    """
    W, best, errors = W.detach().float(), None, []
    root, Q = None if F is None else F.float().sqrt(), torch.zeros_like(W)
    for _ in range(iterations):
        L1, L2 = start or weighted_svd(W - Q, rank, F, seed)
        start, low_rank = None, L1 @ L2
        parts = quantise(W - low_rank, form)
        Q = dequantise(parts, form, W.shape).to(dtype).float()
        rest = W - Q - low_rank
        errors.append(float((rest if root is None else root * rest).norm()))
        if best is not None and errors[-1] >= best.error:
            break
        best = Split(parts, Q, L1, L2, errors[-1], errors)
    assert best is not None
    return best

"""Margins of a teacher, taught to a student by all pairs of a query's documents at once.

    L = mean over pairs d != d' of ((s_d - s_d') - (t_d - t_d'))^2 = 2 var(s - t)        var: unbiased, over documents

s (student) and t (teacher) are scores of one query's D documents; a constant added to either changes nothing. For D = 2
it is MarginMSE. Source: Hofstätter et al. 2020 (MarginMSE), Eq. 3. Differs: all pairs of a list instead of one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def all_margins_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over queries of the squared margin errors of all pairs of documents.

    Args:
        student, teacher: (B, D) scores.
        mask: (B, D) bool, False where a list has no document; a list with fewer than two adds nothing.
    Returns: scalar. Raises: ValueError for shapes that differ.
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(f"scores must be (B, D), both; got {tuple(student.shape)} and {tuple(teacher.shape)}")
    keep = torch.ones_like(student) if mask is None else mask.to(student.dtype)
    error = (student - teacher) * keep
    number = keep.sum(1)
    centred = (error - error.sum(1, keepdim=True) / number.clamp_min(1)[:, None]) * keep
    variance = centred.square().sum(1) / (number - 1).clamp_min(1)
    usable = (number >= 2).to(student.dtype)
    return 2 * (variance * usable).sum() / usable.sum().clamp_min(1)

"""Which precision each matrix gets under a memory budget (an integer program); the Fisher information it weighs by."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError, DataError, RunError

_log = logging.getLogger("polyrank")
Batch = Mapping[str, Any]


def rows_out(layer: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as (out, in); Conv1D stores (in, out)."""
    return weight.T if isinstance(layer, Conv1D) else weight


def fisher_information(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Sum over examples of the squared gradient of each layer's weight, (out, in), fp32. Dropout is off.

    Batches are taken apart into their rows: squaring a batch's gradient would be another thing.

    Args: layers: by name, within the model. loss: of one row; default `model(**row).loss`.
    Raises: ConfigError where two layers share a weight; DataError without rows, or for a loss that is not finite.
    """
    weights = {name: layer.weight for name, layer in layers.items()}
    if len({id(weight) for weight in weights.values()}) < len(weights):
        raise ConfigError("two of the layers share one weight: it cannot be quantised in two ways")
    sums = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}

    def squared(name: str) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            sums[name] += weight.grad.float().square()
            weight.grad = None

        return add

    count = 0
    with _only_trainable(model, list(weights.values())):
        handles = [weight.register_post_accumulate_grad_hook(squared(name)) for name, weight in weights.items()]
        try:
            for row in single_rows(batches):
                value = loss(model, row) if loss else model(**row).loss
                if not torch.isfinite(value):
                    raise DataError(
                        f"the loss of row {count} is {value.item()}: no Fisher information can be had of it"
                    )
                value.backward()
                count += 1
        finally:
            for handle in handles:
                handle.remove()
    if not count:
        raise DataError("no rows to take the Fisher information from")
    return {name: rows_out(layers[name], total) for name, total in sums.items()}


def single_rows(batches: Iterable[Batch]) -> Iterator[dict[str, Any]]:
    """Each row of each batch as a batch of one. One with a single label is a row already, however many texts it has."""
    for batch in batches:
        if isinstance(batch.get("labels"), Tensor) and len(batch["labels"]) == 1:
            yield dict(batch)
            continue
        size = max(len(value) for value in batch.values() if isinstance(value, Tensor))
        for i in range(size):
            yield {name: value[i : i + 1] if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def _only_trainable(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Eval mode, gradients of these weights alone; afterwards all is as before."""
    training = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in training:
            module.training = mode


def allocate(errors: np.ndarray, storage: np.ndarray, budget_bytes: int, time_limit_s: float = 60.0) -> list[int]:
    """One choice c for each matrix i: the least sum of errors[i, c] with the sum of storage[i, c] within the budget.

    Args: errors (matrices, choices), not negative, finite; storage likewise, in bytes.
    Raises: ConfigError where the budget is below the least storage, which it names; RunError where the solver finds
        nothing in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    least = int(storage.min(axis=1).sum())
    if budget_bytes < least:
        raise ConfigError(f"a budget of {budget_bytes} bytes is too small for these matrices: the least is {least}")
    pairs = [(i, c) for i in range(len(errors)) for c in undominated(errors[i], storage[i])]
    cost = np.array([errors[pair] for pair in pairs])
    size = np.array([storage[pair] for pair in pairs], dtype=float)
    belongs = csr_array((np.ones(len(pairs)), ([i for i, _ in pairs], range(len(pairs)))), (len(errors), len(pairs)))
    rows = vstack([belongs, csr_array(size[None] / budget_bytes)])
    low = np.append(np.ones(len(errors)), 0.0)
    result = milp(
        cost * (1e3 / max(cost.mean(), np.finfo(float).tiny)),  # the solver's gaps are absolute numbers
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(rows, low, np.ones(len(errors) + 1)),
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RunError(f"the integer program was not solved within {time_limit_s:g} s: {result.message}")
    if result.status != 0:
        _log.warning("bit allocation: %s; the best found so far is taken", result.message)
    chosen = {i: c for (i, c), x in zip(pairs, result.x, strict=True) if x > 0.5}
    found = [chosen[i] for i in range(len(errors))]
    if sum(int(storage[i, c]) for i, c in enumerate(found)) > budget_bytes:  # by the solver's tolerance
        return allocate(errors, storage, budget_bytes - 1, time_limit_s)
    return found


def undominated(errors: np.ndarray, storage: np.ndarray) -> list[int]:
    """The choices of one matrix (choices,) to which no other is better in one thing and as good in the other."""
    best, kept = math.inf, []
    for c in np.lexsort((errors, storage)):
        if errors[c] < best:
            best = errors[c]
            kept.append(int(c))
    return kept

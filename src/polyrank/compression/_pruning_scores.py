"""What is worth keeping: scores of weights, of heads and of neurons, and masks made from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError
from ._pruning_layout import Unit

SCORES = ("magnitude", "taylor", "random")


def block_layers(model: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """(name, index of the transformer layer, layer) of every Linear and Conv1D within a numbered block."""
    for name, module in model.named_modules():
        number = re.search(r"\.(\d+)\.", f".{name}.")
        if isinstance(module, (nn.Linear, Conv1D)) and number:
            yield name, int(number[1]), module


def weight_scores(
    model: nn.Module, names: Iterable[str], scores: str, batches: Iterable[Mapping[str, Any]] | None, seed: int
) -> dict[str, Tensor]:
    """A score >= 0 for each weight, in fp32 or better and in the shape in which it is stored, by name of the layer.

    magnitude: w^2. taylor: |w dL/dw|, the first-order change of the loss over `batches` (inputs with labels) when the
    weight is set to 0. random: uniform.
    """
    weights = {name: model.get_submodule(name).weight for name in names}
    dtype = torch.promote_types(next(iter(weights.values())).dtype, torch.float32)
    if scores == "magnitude":
        return {name: weight.detach().to(dtype) ** 2 for name, weight in weights.items()}
    if scores == "random":
        generator = torch.Generator().manual_seed(seed)
        return {n: torch.rand(w.shape, generator=generator, dtype=dtype).to(w.device) for n, w in weights.items()}
    batches = list(batches or ())
    if not batches:
        raise ConfigError("scores='taylor' needs batches of inputs with labels")
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    was_training = model.training
    model.eval()
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        total = {name: torch.zeros_like(weight, dtype=dtype) for name, weight in weights.items()}
        for batch in batches:
            loss = model(**batch).loss
            if loss is None:
                raise ConfigError("scores='taylor' needs `labels` in its batches: the model returned no loss")
            for name, gradient in zip(total, torch.autograd.grad(loss, list(weights.values())), strict=True):
                total[name] += gradient.to(dtype)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        model.train(was_training)
    return {name: (weight.detach().to(dtype) * total[name]).abs() for name, weight in weights.items()}


def group_scores(model: nn.Module, unit: Unit, scores: Mapping[str, Tensor]) -> Tensor:
    """Sum of the scores of all weights that a group owns, (groups,): its rows in writers, its columns in readers."""
    total: Any = 0
    for name, (parts, size) in unit.writers.items():
        rows = _outputs_first(model, name, scores[name]).sum(1)
        total = total + rows.view(parts, unit.groups, size).sum((0, 2))
    for name, size in unit.readers.items():
        columns = _outputs_first(model, name, scores[name]).sum(0)
        total = total + columns.view(unit.groups, size).sum(1)
    return total


def best_groups(model: nn.Module, unit: Unit, scores: Mapping[str, Tensor], ratio: float) -> Unit:
    """The unit with the best (1 - ratio) of its groups, at least one."""
    count = max(1, round(unit.groups * (1 - ratio)))
    return unit.keeping(sorted(group_scores(model, unit, scores).topk(count).indices.tolist()))


def apply_unstructured(layer: nn.Module, scores: Tensor, ratio: float) -> None:
    """Set the `ratio` of a layer's weights with the smallest scores to zero, for good."""
    prune.l1_unstructured(layer, "weight", amount=ratio, importance_scores=scores)
    prune.remove(layer, "weight")


def apply_semi_structured(name: str, layer: nn.Module, scores: Tensor, keep: int, of: int) -> None:
    """In every `of` neighbouring inputs of an output, keep the `keep` weights with the largest scores."""
    by_output = scores.T if isinstance(layer, Conv1D) else scores
    outputs, inputs = by_output.shape
    if inputs % of:
        raise ConfigError(f"{name} has {inputs} inputs, which do not divide into groups of {of}")
    places = by_output.reshape(outputs, inputs // of, of).topk(keep, dim=-1).indices
    mask = torch.zeros(outputs, inputs // of, of, device=scores.device).scatter_(-1, places, 1.0).view(outputs, inputs)
    prune.custom_from_mask(layer, "weight", mask.T if isinstance(layer, Conv1D) else mask)
    prune.remove(layer, "weight")


def _outputs_first(model: nn.Module, name: str, scores: Tensor) -> Tensor:
    return scores.T if isinstance(model.get_submodule(name), Conv1D) else scores

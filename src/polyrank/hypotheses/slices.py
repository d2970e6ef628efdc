"""One hypothesis' slice of every stacked parameter, and of what the optimiser keeps for it.

A (K, r, in) and B (K, out, r) hold all hypotheses, so one hypothesis is an index into their first dimension; so it is
in every optimiser state of the same shape (Adam's moments). Reviving a hypothesis that wins nothing works on slices,
and so does leaving losers alone (`skip_losers.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.seeding import derive_seed
from .layer import MclLayer


@dataclass(frozen=True)
class Revival:
    """When a hypothesis counts as dead, and what becomes of it: a noisy copy of the one that wins most.

    Attributes:
        every: optimiser steps between looks.
        threshold: share of the wins since the last look at or below which a hypothesis is dead, in [0, 1).
        noise: standard deviation of the noise, relative to that of each copied tensor.
    Gives up: what the dead hypothesis had learnt; the copied one's region is shared again until they part.
    """

    every: int = 500
    threshold: float = 0.0
    noise: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ConfigError(f"every must be an integer >= 1, got {self.every!r}")
        if not 0.0 <= self.threshold < 1.0:
            raise ConfigError(f"threshold must lie in [0, 1), got {self.threshold!r}")
        if not self.noise > 0.0:
            raise ConfigError(f"noise must be positive (a copy alone would tie for ever), got {self.noise!r}")


def stacked_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Trainable parameters (K, ...) of the active MCL adapters, in the order of the model's modules."""
    for layer in model.modules():
        if isinstance(layer, MclLayer):
            for adapter in layer.present(layer.active_adapters):
                for name in layer.parameter_names:
                    if (parameter := layer.parameter(name, adapter)).requires_grad:
                        yield parameter


def _slices(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, k: int) -> list[Tensor]:
    """Views: the parameter's slice first, then the optimiser's."""
    state = optimizer.state.get(parameter, {})
    same = [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]
    return [parameter.data[k], *[value[k] for value in same]]


@torch.no_grad()
def revive(
    model: nn.Module, optimizer: torch.optim.Optimizer, dead: Collection[int], winner: int, noise: float, seed: int
) -> None:
    """Overwrite dead hypotheses by noisy copies of `winner`; their optimiser state starts anew.

    Args: noise: relative standard deviation; seed: of the noise, the same on every rank.
    """
    for index, parameter in enumerate(stacked_parameters(model)):
        source = parameter.data[winner]
        scale = float(source.float().std(unbiased=False)) * noise
        for k in dead:
            generator = torch.Generator().manual_seed(derive_seed(seed, index, k))
            drawn = torch.randn(source.shape, generator=generator) * scale
            value, *moments = _slices(optimizer, parameter, k)
            value.copy_(source + drawn.to(source.device, source.dtype))
            for moment in moments:
                moment.zero_()


def broken_hypotheses(model: nn.Module, num_hypotheses: int) -> list[int]:
    """Indices of the hypotheses that have a value which is not finite in any stacked parameter."""
    finite = [parameter.detach().isfinite().flatten(1).all(dim=1).cpu() for parameter in stacked_parameters(model)]
    fitting = [flags for flags in finite if len(flags) == num_hypotheses]  # another adapter may have another K
    return (~torch.stack(fitting).all(dim=0)).nonzero().flatten().tolist() if fitting else []

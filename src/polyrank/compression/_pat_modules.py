"""The sparsification modules of PAT, all in one module with one mask, and the hooks that apply them.

They are one entry of PEFT's `modules_to_save`, so that PEFT trains, saves, loads, resumes and disables them beside the
LoRA factors. The places are the outputs of the embedding, of each attention and of each feed-forward block: everything
that is ever written to the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, nearest
from ._pruning_layout import FAMILIES

NAME = "polyrank_pat"
DECODERS = ("llama", "mistral", "qwen2")


def temperature(step: int, mask_steps: int) -> float:
    """tau(s) = 1 / (1 - ln s / ln s0): 0 at s = 0, 1 at s = 1, infinite from s0 on."""
    if step <= 0:
        return 0.0
    if step >= mask_steps:
        return math.inf
    return 1.0 / (1.0 - math.log(step) / math.log(mask_steps))


def offset(step: int, mask_steps: int) -> float:
    """beta(s) = 0.5 - s / s0, and 0 from s0 / 2 on."""
    return max(0.0, 0.5 - step / mask_steps)


def soft_mask(logits: Tensor, step: int, mask_steps: int) -> Tensor:
    """M = sigma(tau(s) m) + beta(s), (d,); 1 everywhere at s = 0, and 1 where m > 0, else 0, from s0 on."""
    if step >= mask_steps:
        return (logits > 0).to(logits)
    return torch.sigmoid(temperature(step, mask_steps) * logits) + offset(step, mask_steps)


class SparsificationModules(nn.Module):
    """z = scale_i * M * (u + L1_i diag(v_i) L0_i u) at place i; M, (d,), is shared by all places.

    Parameters: logits (d,), m of the mask; down (n, k, d), L0; gain (n, k), v; up (n, d, k), L1; scale (n, d).
    Buffers, saved with them: step; mask_steps, s0; target, channels that stay in the end; weights (2,),
    of the two losses; kept (d,) bool, those that
    stay (all of them until step s0, when the `target` largest logits are chosen, once and for all; then `chosen`).
    """

    def __init__(
        self,
        width: int,
        places: int,
        rank: int,
        target: int,
        mask_steps: int,
        weights: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(width))
        self.down = nn.Parameter(torch.empty(places, rank, width))
        self.gain = nn.Parameter(torch.ones(places, rank))
        self.up = nn.Parameter(torch.zeros(places, width, rank))
        self.scale = nn.Parameter(torch.ones(places, width))
        for matrix in self.down.data:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        for name, value in (("step", 0), ("mask_steps", mask_steps), ("target", target)):
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("weights", torch.tensor(weights))
        self.register_buffer("kept", torch.ones(width, dtype=torch.bool))
        self._schedule, self.chosen = (0, mask_steps), False

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        # plain numbers: a forward pass does not wait for a GPU to say which step it is
        self._schedule = (int(self.step), int(self.mask_steps))
        self.chosen = int(self.kept.sum()) == int(self.target)

    def set_step(self, step: int) -> None:
        """Say how many optimiser steps were taken; at step s0 the channels are chosen."""
        self.step.fill_(step)
        self._schedule = (step, self._schedule[1])
        if step >= self._schedule[1] and not self.chosen:
            self.choose()

    @torch.no_grad()
    def choose(self) -> None:
        """Keep the `target` channels with the largest logits, the first of equal ones."""
        order = torch.sort(self.logits.float(), descending=True, stable=True).indices
        self.kept.fill_(False)
        self.kept[order[: int(self.target)]] = True
        self.chosen = True

    def mask(self) -> Tensor:
        """M (d,) at the present step; exactly 0 and 1 once the channels are chosen."""
        if self.chosen:
            return self.kept.to(self.logits) + 0.0 * self.logits  # no gradient, but one that DDP can count
        return soft_mask(self.logits, *self._schedule)

    def forward(self, u: Tensor, place: int) -> Tensor:
        x = u.to(torch.promote_types(u.dtype, self.down.dtype))
        low = torch.nn.functional.linear(x, self.down[place]) * self.gain[place]
        x = x + torch.nn.functional.linear(low, self.up[place])
        return (x * (self.scale[place] * self.mask())).to(u.dtype)

    def matrix(self, place: int) -> Tensor:
        """The map of one place with hard mask, kept rows only, (target, d), fp64."""
        down, gain, up, scale = (p[place].detach().double() for p in (self.down, self.gain, self.up, self.scale))
        full = torch.eye(len(scale), dtype=torch.float64, device=scale.device) + up @ (gain[:, None] * down)
        return (scale[:, None] * full)[self.kept]


def active_loss(modules: SparsificationModules) -> Tensor:
    """|N - sum 1(m > 0)| / d, with a straight-through step; 0 at equality and once the channels are chosen.

    Its gradient is sign(count - N) / d for every m: gradient descent raises all where too few are active.
    """
    logits = modules.logits
    if modules.chosen:
        return 0.0 * logits.sum()
    step = (logits > 0).to(logits) + logits - logits.detach()
    return (modules.target - step.sum()).abs() / len(logits)


def identity_loss(modules: SparsificationModules) -> Tensor:
    """Sum over all places of |L0 L0^T - I| + |L1^T L1 - I| (Frobenius); 0 for orthonormal factors."""
    down, up = modules.down, modules.up
    eye = torch.eye(down.shape[1], dtype=down.dtype, device=down.device)
    return sum(torch.linalg.matrix_norm(gram - eye).sum() for gram in (down @ down.mT, up.mT @ up))


class _Hook:
    """Applies one place's module to the output of a layer; found by name at call time, since PEFT wraps it later."""

    def __init__(self, owner: nn.Module, place: int) -> None:
        self.owner, self.place = owner, place

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        modules = getattr(self.owner, NAME)
        if isinstance(output, tuple):
            return (modules(output[0], self.place), *output[1:])
        return modules(output, self.place)


def writers(model: Any) -> Iterator[nn.Module]:
    """What writes to the residual stream, in the order of the places: embedding, attention, feed-forward, ..."""
    body = model.base_model
    yield body.embed_tokens
    for layer in body.layers:
        yield layer.self_attn
        yield layer.mlp


def install(model: Any, modules: SparsificationModules) -> None:
    """Put the modules into a base model. Raises ConfigError for a model that has them already."""
    if hasattr(model, NAME):
        raise ConfigError("this model has sparsification modules already: load the base anew")
    setattr(model, NAME, modules)
    for place, layer in enumerate(writers(model)):
        layer.register_forward_hook(_Hook(model, place))


def remove(model: Any) -> None:
    """Take modules and hooks out of a base model."""
    delattr(model, NAME)
    for layer in writers(model):
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, _Hook):
                del layer._forward_hooks[key]


def check_family(model: Any) -> None:
    """Raise ConfigError unless the residual stream of this kind of model can be cut."""
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family in DECODERS:
        return
    if family in FAMILIES:
        raise ConfigError(
            f"PAT cuts the residual stream of RMSNorm decoders whose head size is free ({', '.join(DECODERS)}); "
            f"the width of a {family!r} model is tied to its heads or its norms"
        )
    hint = nearest(str(family), DECODERS)
    raise ConfigError(
        f"PAT does not know model type {family!r}"
        + (f" (nearest: {hint!r})" if hint else "")
        + f"; known: {', '.join(DECODERS)}"
    )

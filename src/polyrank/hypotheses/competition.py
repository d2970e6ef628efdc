"""The loss of all hypotheses on one batch as one scalar that any training loop can call `backward` on.

    loss = (1 / N) sum_b sum_k sg(w_kb) L_kb       N sequences; or S_kb over N labelled tokens (`num_items_in_batch`)

The winner-only step runs inside the call and leaves the gradient of every parameter behind; the scalar's backward
multiplies it by what comes from above and hands it over. One graph is alive at a time, the caller sees one forward and
one backward (so DDP reduces once, and gradient scaling and accumulation work as ever), and nothing but the adapters'
gradients is held in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..objectives import sequence_losses, token_nll
from ..objectives.winners import annealing_losses, winner_weights
from .config import MclConfig
from .head import Targets, output_head, output_logits
from .options import unscored
from .prepared import prepared
from .routing import route
from .row_losses import row_losses
from .step import Scores, StepOptions, StepResult, score_hypotheses, winner_step


@dataclass
class StepRequest:
    """What a trainer adds to a competing call, and where it finds the result.

    Attributes: temperature (annealed-wta, nats); generator (ties and draws); options (StepOptions); label_smoothing;
        num_sequences: N of the loss, sequences of the global batch; loss_scale: of a gradient scaler, so that inner
        gradients do not underflow; keep_graphs: K graphs instead of the winner-only step (for wrappers that move
        parameters during backward, as FSDP does); logits: whether an evaluating call returns the winners' logits;
        result: filled by the call.
    """

    temperature: float | None = None
    generator: torch.Generator | None = None
    options: StepOptions = field(default_factory=StepOptions)
    label_smoothing: float = 0.0
    num_sequences: Tensor | float | None = None
    loss_scale: float = 1.0
    keep_graphs: bool = False
    logits: bool = True
    result: StepResult | None = None


@dataclass(frozen=True)
class Competition:
    """loss: scalar; losses: (K, B) nats, with a graph only where it was asked for; winners: (B,), -1 for none."""

    loss: Tensor
    losses: Tensor
    winners: Tensor


_Call = Callable[..., Any]


def compete(
    model: nn.Module,
    call: _Call,
    inputs: Mapping[str, Any],
    config: MclConfig,
    request: StepRequest | None = None,
    differentiable: bool = False,
) -> Competition:
    """All hypotheses on one batch.

    Args:
        model: the adapted model object. call: its plain forward, which obeys the routing in force.
        inputs: by name, with labels; `num_items_in_batch` is honoured.
        differentiable: losses (K, B) with a graph each, all alive.
    Returns: Competition. In evaluation mode without gradients the loss is the hard one whatever the mode.
    Raises: ConfigError for annealed-wta without a temperature; what `winner_step` raises.
    """
    request = request or StepRequest()
    inputs = dict(inputs)
    num_items = inputs.pop("num_items_in_batch", None)
    trains = torch.is_grad_enabled()
    hard = not trains and not model.training
    if config.mode == "annealed-wta" and config.num_hypotheses > 1 and request.temperature is None and not hard:
        raise ConfigError("mode 'annealed-wta' needs a clock for its temperature: train with MclTrainer")
    mode = "wta" if hard else config.mode
    if not is_language_batch(model, inputs):
        return _compete_by_rows(model, call, inputs, config, mode, request, num_items)
    keep_graphs = differentiable or request.keep_graphs or _checkpoints_reentrantly(model)
    if trains and not keep_graphs:
        return _step(model, inputs, config, request, num_items)
    if trains:
        losses, trained, counts = _all_graphs(model, call, inputs, config, request.label_smoothing)
    else:
        scores = score_hypotheses(model, inputs, config=config, options=request.options)
        losses, trained, counts = scores.losses, scores.losses, scores.token_counts
    weights = _weights(losses, counts, config, mode, request)
    loss = _combine(trained, weights, counts, config, num_items, request.num_sequences)
    request.result = _result(loss, losses, weights, counts, config)
    return Competition(loss, losses, request.result.winners)


def hypothesis_losses(model: nn.Module, call: _Call, inputs: Mapping[str, Any], config: MclConfig) -> Tensor:
    """(K, B) losses of a batch with labels, nats; with a graph where gradients are on."""
    inputs = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
    if not is_language_batch(model, inputs):
        return row_losses(model, call, inputs, config.num_hypotheses)
    if torch.is_grad_enabled():
        return _all_graphs(model, call, inputs, config, 0.0)[0]
    return score_hypotheses(model, inputs, config=config).losses


def is_language_batch(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the labels are tokens (B, T) that an output head predicts."""
    labels = inputs.get("labels")
    tokens = isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()
    return tokens and output_head(model) is not None


def _step(
    model: nn.Module, inputs: dict[str, Any], config: MclConfig, request: StepRequest, num_items: Any
) -> Competition:
    """The winner-only step now, its gradient on demand."""
    sources = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sources += [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
    gradients: list[Tensor | None] = [None] * len(sources)

    def collect(loss: Tensor) -> None:
        found = torch.autograd.grad(loss * request.loss_scale, sources, allow_unused=True)
        for i, gradient in enumerate(found):
            if gradient is not None:
                known = gradients[i]
                gradients[i] = gradient if known is None else known.add_(gradient)

    result = winner_step(
        model,
        inputs,
        config=config,
        temperature=request.temperature,
        num_items_in_batch=num_items,
        num_sequences_in_batch=request.num_sequences if num_items is None else None,
        label_smoothing=request.label_smoothing,
        options=request.options,
        generator=request.generator,
        backward=collect,
    )
    request.result = result
    gradients = [torch.zeros_like(s) if g is None else g for g, s in zip(gradients, sources, strict=True)]
    loss = _Ready.apply(result.loss.detach(), request.loss_scale, gradients, *sources)
    return Competition(loss, result.losses, result.winners)


def _checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether blocks are checkpointed in the way that only a full backward pass recomputes (`use_reentrant=True`)."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        function = getattr(function, "checkpoint", function)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            prepared(model).warn_once(
                "reentrant",
                "reentrant gradient checkpointing keeps the graphs of all hypotheses; with use_reentrant=False one is "
                "alive at a time. Logged once.",
            )
            return True
    return False


class _Ready(torch.autograd.Function):
    """A scalar whose gradients are known already, multiplied by `scale`."""

    @staticmethod
    def forward(ctx, loss, scale, gradients, *sources):
        ctx.scale, ctx.gradients = scale, gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        factor = upstream / ctx.scale
        if ctx.gradients is None:
            raise RuntimeError("a competing call's loss can be back-propagated once; call the model again")
        gradients, ctx.gradients = ctx.gradients, None
        if float(factor) != 1.0:
            gradients = [gradient * factor.to(gradient.dtype) for gradient in gradients]
        return None, None, None, *gradients


def _all_graphs(
    model: nn.Module, call: _Call, inputs: dict[str, Any], config: MclConfig, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (K, B), the same with label smoothing, and labelled tokens (B,); one graph a hypothesis, all alive."""
    facts = prepared(model)
    rest, labels = facts.model_inputs(inputs)
    targets = Targets.of(labels, facts.shift)
    shape = {"rows": targets.rows, "num_rows": len(targets.counts), "reduction": config.loss_reduction}
    plain, trained = [], []
    for k in range(config.num_hypotheses):
        with route(model, k):
            logits = output_logits(call(**rest))
        logits = logits.reshape(-1, logits.shape[-1])[targets.flat]
        plain.append(sequence_losses(token_nll(logits, targets.labels), **shape))
        smoothed = token_nll(logits, targets.labels, label_smoothing) if label_smoothing else None
        trained.append(plain[-1] if smoothed is None else sequence_losses(smoothed, **shape))
    return torch.stack(plain), torch.stack(trained), targets.counts


def _weights(losses: Tensor, counts: Tensor, config: MclConfig, mode: str, request: StepRequest) -> Tensor:
    compared = losses.detach()
    if mode == "annealed-wta":
        compared = annealing_losses(compared, counts, config.loss_reduction, config.annealing_on)
    weights = winner_weights(
        compared,
        mode,
        epsilon=config.epsilon,
        temperature=request.temperature,
        final_temperature=config.final_temperature,
        generator=request.generator,
    )
    return weights * (counts > 0)


def _combine(
    losses: Tensor, weights: Tensor, counts: Tensor, config: MclConfig, num_items: Any, num_sequences: Any
) -> Tensor:
    """(1 / N) sum w L; entries of weight 0 leave no trace, but a labelled row that nobody can score makes it NaN."""
    lost = unscored(losses.detach(), counts)
    if num_items is not None and config.loss_reduction == "token_mean":
        losses = losses * counts
    total = torch.where(weights > 0, weights * losses, 0.0).sum()
    total = total + torch.nan if lost else total
    if num_items is not None:
        return total / num_items
    return total / (num_sequences if num_sequences is not None else (counts > 0).sum().clamp_min(1))


def _result(loss: Tensor, losses: Tensor, weights: Tensor, counts: Tensor, config: MclConfig) -> StepResult:
    losses = losses.detach()
    sums = losses * counts if config.loss_reduction == "token_mean" else losses
    winners = torch.where(weights.sum(dim=0) > 0, weights.argmax(dim=0), -1)
    return StepResult(losses, sums, counts, loss.detach(), weights, winners)


def _compete_by_rows(
    model: nn.Module,
    call: _Call,
    inputs: dict[str, Any],
    config: MclConfig,
    mode: str,
    request: StepRequest,
    num_items: Any,
) -> Competition:
    """For models that are no language models: K graphs, each row's loss as the model itself defines it."""
    losses = row_losses(model, call, inputs, config.num_hypotheses)
    counts = torch.ones(losses.shape[1], dtype=torch.long, device=losses.device)
    weights = _weights(losses, counts, config, mode, request)
    loss = _combine(losses, weights, counts, config, num_items, request.num_sequences)
    request.result = _result(loss, losses, weights, counts, config)
    return Competition(loss, losses, request.result.winners)


__all__ = ["Competition", "Scores", "StepRequest", "compete", "hypothesis_losses", "is_language_batch"]

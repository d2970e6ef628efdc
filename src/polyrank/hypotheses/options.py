"""What a winner-only step is asked for and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.errors import ConfigError, check_choice

SCORING = ("exact", "bf16")


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed; the defaults are exact. What each option gives up stands beside it.

    Attributes:
        scoring: "exact", or "bf16": winners are chosen by a forward in bfloat16 with shadow copies of the frozen
            weights (half of the base's fp32 memory on top). Gives up: the reported losses are bf16's, and a winner may
            be another one than in fp32 where more than `rescore_margin` of error came in. Gradients stay fp32.
            Objectives that train all hypotheses need no scoring and ignore it.
        rescore_margin: with bf16 scoring, hypotheses within this many nats per token of a row's best are scored again
            in fp32.
        guess: (B,) int64, the hypothesis that each row is guessed to be won by (its winner of the last epoch), -1 for
            no guess; for hard winners. A right guess saves one forward of the row, a wrong one costs nothing but the
            graph that was kept while scoring.
        lean: go row by row and keep only the best graph so far (all K of the row where all carry weight). Gives up the
            speed of large batches, nothing else.
        sampled_loser: relaxed-wta: only a few rows (epsilon B of them, at least one) train one drawn loser each, with
            the weight of all. Unbiased. Gives up: noise in the losers' gradients.
        max_rows_per_pass: rows that go through the model together; None: all.
        mixed_rows: whether one pass may hold rows of several hypotheses. None: unless a routed layer lies among
            experts, which see tokens in an order of their own. False: one pass for each hypothesis.
        share_frozen: run what lies below the first adapted layer (embeddings, a frozen encoder, frozen lower blocks)
            once for all hypotheses. Gives up nothing; False is there for models with hidden state in such modules.
        fused_activations: run the composed tanh-GELU of GPT-2 and T5 as one operation: less time and half of
            the graph's memory. Gives up bit-equality with the model's own rounding (1e-7 in fp32).
    """

    scoring: str = "exact"
    rescore_margin: float = 0.005
    guess: torch.Tensor | None = None
    lean: bool = False
    sampled_loser: bool = False
    max_rows_per_pass: int | None = None
    mixed_rows: bool | None = None
    share_frozen: bool = True
    fused_activations: bool = True

    def __post_init__(self) -> None:
        check_choice("scoring", self.scoring, SCORING)
        if self.max_rows_per_pass is not None and self.max_rows_per_pass < 1:
            raise ConfigError(f"max_rows_per_pass must be at least 1, got {self.max_rows_per_pass!r}")
        if not self.rescore_margin >= 0:
            raise ConfigError(f"rescore_margin must be >= 0 nats, got {self.rescore_margin!r}")


@dataclass(frozen=True)
class Scores:
    """Losses of all hypotheses on a batch, without a graph.

    Attributes:
        losses: (K, B) nats, as config.loss_reduction says; rows without labels have 0.
        sequence_nll: (K, B) nats, summed over the labelled tokens.
        token_counts: (B,) int64, labelled tokens of each row.
    """

    losses: torch.Tensor
    sequence_nll: torch.Tensor
    token_counts: torch.Tensor


@dataclass(frozen=True)
class StepResult(Scores):
    """What a step did. Losses are unsmoothed; nothing carries a graph.

    Attributes:
        loss: scalar, what was back-propagated (smoothed, weighted, normalised), as a Trainer logs it.
        weights: (K, B) winner weights w (of the exact objective; with sampled losers too).
        winners: (B,) int64, the hypothesis of the largest weight, of equal ones the one of least loss; -1 for a row
            that trains nothing.
        guess_hits: (B,) bool, rows whose guess was right; None where no guess was used.
    """

    loss: torch.Tensor
    weights: torch.Tensor
    winners: torch.Tensor
    guess_hits: torch.Tensor | None = None


def unscored(losses: torch.Tensor, counts: torch.Tensor) -> bool:
    """Whether a row with labels has no finite loss under any hypothesis: losses (K, B), counts (B,)."""
    return bool((~losses.isfinite().any(dim=0) & (counts > 0)).any())

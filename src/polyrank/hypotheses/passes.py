"""The training passes of the winner-only step: who goes through the model with a graph, and when it is released."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.errors import RunError
from .head import TokenLosses
from .options import StepResult, unscored
from .routing import Routing
from .sampling import LoserDraw, draw_losers
from .scoring import Block, ScoringStep, row_routing

DISAGREEMENT = {"full": 1e-3, "half": 0.05}
"""Relative gap of a row's training loss to its score from which the routing is taken to be broken, by precision."""


@dataclass(frozen=True)
class Assignment:
    """One training pass over rows of a block, each through its own hypothesis.

    Attributes: rows (m,) int64, places in the block; hypotheses (m,) int64; weights (m,) of the row's summed NLL in
        the loss, normalisation included (0 trains nothing).
    """

    rows: torch.Tensor
    hypotheses: torch.Tensor
    weights: torch.Tensor

    def only(self, keep: torch.Tensor) -> Assignment:
        return Assignment(self.rows[keep], self.hypotheses[keep], self.weights[keep])

    def with_losers(self, draw: LoserDraw, scale: torch.Tensor) -> Assignment:
        return Assignment(
            torch.cat([self.rows, draw.rows]),
            torch.cat([self.hypotheses, draw.hypotheses]),
            torch.cat([self.weights, draw.weights * scale[draw.rows]]),
        )


class TrainingStep(ScoringStep):
    """One batch of one model, with backward passes."""

    def train(
        self,
        *,
        temperature: float | None,
        num_items: Any,
        num_sequences: Any,
        label_smoothing: float,
        backward: Callable[[torch.Tensor], Any],
        no_sync: Callable[[], AbstractContextManager[Any]],
        distributed: bool,
    ) -> StepResult:
        """Run the step; see `winner_step`."""
        self.temperature, self.smoothing = temperature, label_smoothing
        self.backward, self.no_sync, self.distributed = backward, no_sync, distributed
        self.scale = self._normaliser(num_items, num_sequences)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.hits: torch.Tensor | None = None
        with self._in_place_of_modules():
            train_block, size = self._strategy()
            blocks = self._blocks(size)
            done = []
            for i, block in enumerate(blocks):
                self._remember_random_state()
                done.append(train_block(block, i + 1 == len(blocks)))
        nll = torch.cat([scores for scores, _ in done], dim=1)
        weights = torch.cat([w for _, w in done], dim=1)
        scores = self._scores(nll)
        leading = torch.where(weights == weights.amax(dim=0), nll, torch.inf).argmin(dim=0)
        winners = torch.where(weights.sum(dim=0) > 0, leading, -1)
        return StepResult(
            losses=scores.losses,
            sequence_nll=nll,
            token_counts=scores.token_counts,
            loss=(self.loss + torch.nan if unscored(scores.losses, scores.token_counts) else self.loss).to(nll.dtype),
            weights=weights,
            winners=winners,
            guess_hits=self.hits,
        )

    def _strategy(self) -> tuple[Callable[[Block, bool], tuple[torch.Tensor, torch.Tensor]], int | None]:
        """How a block is trained, and the rows of a block."""
        options, size = self.options, self.options.max_rows_per_pass
        config, lean = self.config, self.options.lean and self.separable
        if self.K == 1:
            return self._joint, 1 if lean else size
        annealed_to_hard = (
            config.mode == "annealed-wta"
            and self.temperature is not None
            and self.temperature <= config.final_temperature
        )
        one_hot = config.mode in ("wta", "random-wta") or annealed_to_hard or options.sampled_loser
        if not one_hot and self.separable:
            together = max(1, -(-self.batch // self.K))
            return self._joint, 1 if lean else min(size or together, together)
        if lean:
            return (self._streaming if config.mode == "wta" or annealed_to_hard else self._two_pass), 1
        if options.guess is not None and self.mixed and config.mode != "random-wta" and one_hot:
            self.hits = torch.zeros(self.batch, dtype=torch.bool, device=self.device)
            return self._speculative, size
        return self._two_pass, size

    @property
    def mixed(self) -> bool:
        """Whether a pass may hold rows of several hypotheses."""
        return not self.facts.unordered if self.options.mixed_rows is None else self.options.mixed_rows

    # -- strategies: each trains one block and returns its (K, n) summed NLLs and winner weights ----------------------

    def _two_pass(self, block: Block, last: bool, nll: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Score without a graph, then train what carries weight."""
        if nll is None:
            nll = self._score_block(block)
        weights = self._weights(nll, block.targets.counts, self.temperature)
        self._train_passes(block, self._plan(block, weights), nll, last)
        return nll, weights

    def _joint(self, block: Block, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """All K graphs of the block at once, one backward: nothing is computed twice."""
        with self._context(last):
            kept = [self._run(self.model, block, Routing.single(k), self.smoothing) for k in range(self.K)]
            nll = torch.stack([block.targets.row_sums(losses.nll) for losses in kept])
            if bool(nll.isfinite().all()):
                weights = self._weights(nll, block.targets.counts, self.temperature)
                self._backward(
                    [
                        self._value(block, losses, w)
                        for losses, w in zip(kept, weights * self._scale(block), strict=True)
                    ]
                )
                return nll, weights
        del kept  # a graph with NaN in it would spread it: train without those rows
        return self._two_pass(block, last, nll)

    def _streaming(self, block: Block, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """One row: the graph of the best hypothesis so far is kept, the others are dropped."""
        if last and self.distributed:  # which forward is the last one has to be known before
            return self._two_pass(block, last)
        with self._context(last=False):
            sums: list[torch.Tensor] = []
            best: tuple[float, int, TokenLosses] | None = None
            ties = 1
            for k in range(self.K):
                losses = self._run(self.model, block, Routing.single(k), self.smoothing)
                sums.append(block.targets.row_sums(losses.nll))
                value = float(sums[-1])
                if value != value or value == float("inf"):
                    continue
                ties = ties + 1 if best is not None and value == best[0] else 1
                if best is None or value < best[0] or (value == best[0] and self._one_in(ties)):
                    best = (value, k, losses)
                del losses
            nll = torch.stack(sums)
            weights = torch.zeros_like(nll)
            if best is not None and int(block.targets.counts) > 0:
                weights[best[1]] = 1.0
                self._backward([self._value(block, best[2], weights[best[1]] * self._scale(block))])
            self._warn_not_finite(nll)
        if last and not weights.any():
            self._nothing(block, last)
        return nll, weights

    def _speculative(self, block: Block, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep a graph of the guessed winners, score the others, train the misses."""
        assert self.options.guess is not None
        assert self.hits is not None
        guess = self.options.guess.to(self.device)[block.rows]
        if bool((guess < 0).all()):
            return self._two_pass(block, last)
        guess = torch.where(guess < 0, torch.arange(len(guess), device=guess.device) % self.K, guess)
        with self._context(last):
            guessed = self._run(self.model, block, row_routing(guess, self.compiled), self.smoothing)
        columns = torch.arange(len(guess), device=guess.device)
        nll = torch.zeros(self.K, len(guess), dtype=guessed.nll.dtype, device=guess.device)
        nll[guess, columns] = block.targets.row_sums(guessed.nll)
        for j in range(1, self.K):
            other = (guess + j) % self.K
            nll[other, columns] = self._score(block, row_routing(other, self.compiled))
        if not bool(nll[guess, columns].isfinite().all()):
            del guessed
            return self._two_pass(block, last, nll)
        weights = self._weights(nll, block.targets.counts, self.temperature)
        winners = weights.argmax(dim=0)
        trained = weights.sum(dim=0) > 0
        hit = (winners == guess) & trained
        self.hits[block.rows] = hit
        plan = self._plan(block, weights, done=hit)
        value = self._value(block, guessed, torch.where(hit, weights[guess, columns], 0.0) * self._scale(block))
        del guessed
        if self.distributed:  # the wrapper was entered for one backward: it has to be all of it
            values = [self._pass_value(self.base, block, assignment, nll) for assignment in plan]
            with self._context(last):
                self._backward([value, *values])
            return nll, weights
        if bool(hit.any()):
            self._backward([value])
        del value
        if plan or not bool(hit.any()):
            self._train_passes(block, plan, nll, last)
        return nll, weights

    # -- passes -----------------------------------------------------------------------------------------------------

    def _plan(self, block: Block, weights: torch.Tensor, done: torch.Tensor | None = None) -> list[Assignment]:
        """The passes that train weights (K, n), but for the winners of rows that are `done`."""
        scale, winners = self._scale(block), weights.argmax(dim=0)
        rows = torch.arange(len(winners), device=winners.device)
        if self.options.sampled_loser:
            draw = draw_losers(weights, winners, self.config.epsilon, self.generator)
            chosen = weights[winners, rows] * scale
            plan = [Assignment(rows, winners, chosen if done is None else torch.where(done, 0.0, chosen))]
            if self._free:
                plan = [plan[0].with_losers(draw, scale)]
            else:
                plan.append(Assignment(draw.rows, draw.hypotheses, draw.weights * scale[draw.rows]))
        else:
            ranked = weights.sort(dim=0, descending=True, stable=True)
            plan = []
            for rank in range(int((weights > 0).sum(dim=0).max())):
                w = ranked.values[rank] * scale
                if rank == 0 and done is not None:
                    w = torch.where(done, 0.0, w)
                plan.append(Assignment(rows, ranked.indices[rank], w))
            if len(plan) == self.K:
                plan = [Assignment(rows, torch.full_like(rows, k), weights[k] * scale) for k in range(self.K)]
        if not self.mixed:
            plan = [a.only(a.hypotheses == k) for a in plan for k in range(self.K)]
        plan = [a.only(a.weights > 0) for a in plan]
        return [a for a in plan if len(a.rows)]

    @property
    def _free(self) -> bool:
        """Whether rows may leave their places: they can be told apart, and no dropout mask hangs on their order."""
        return self.separable and not self.draws

    def _train_passes(self, block: Block, plan: list[Assignment], nll: torch.Tensor, last: bool) -> None:
        if not plan:
            self._nothing(block, last)
        for i, assignment in enumerate(plan):
            with self._context(last and i + 1 == len(plan)):
                self._backward([self._pass_value(self.model, block, assignment, nll)])

    def _pass_value(self, module: nn.Module, block: Block, plan: Assignment, nll: torch.Tensor) -> torch.Tensor:
        """The weighted loss of one pass, with its graph."""
        if self._free:
            segments = int((plan.hypotheses[1:] != plan.hypotheses[:-1]).sum()) + 1
            if segments > 2 * self.K:
                plan = plan.only(plan.hypotheses.argsort(stable=True))
            part = self._select(block, plan.rows)
        else:
            part, plan = self._in_place(block, plan, nll)
        losses = self._run(module, part, row_routing(plan.hypotheses, self.compiled), self.smoothing)
        if part is block or not self.draws:  # rows that were left out have moved the others' dropout masks
            self._check_routing(part, losses, plan, nll)
        return self._value(part, losses, plan.weights)

    def _in_place(self, block: Block, plan: Assignment, nll: torch.Tensor) -> tuple[Block, Assignment]:
        """The pass over all rows of the block in their order; rows that it does not train get weight 0."""
        best = torch.where(nll.isfinite(), nll, torch.inf).argmin(dim=0)
        hypotheses, weights = best.clone(), torch.zeros_like(nll[0])
        hypotheses[plan.rows], weights[plan.rows] = plan.hypotheses, plan.weights.to(weights.dtype)
        rows = torch.arange(len(best), device=best.device)
        if not self.mixed:
            hypotheses[:] = plan.hypotheses[0]
        spread = ~nll[hypotheses, rows].isfinite()  # NaN that a weight of 0 would not stop
        if bool(spread.any()):
            if not self.separable:
                raise RunError(
                    "a row's loss is not finite under any hypothesis, and rows cannot be taken out of this batch"
                )
            rows = rows[~spread]
            return self._select(block, rows), Assignment(rows, hypotheses[rows], weights[rows])
        return block, Assignment(rows, hypotheses, weights)

    def _value(self, block: Block, losses: TokenLosses, weights: torch.Tensor) -> torch.Tensor:
        """sum over tokens of the trained loss, each with its row's weight (n,)."""
        each = weights.to(losses.trained.dtype)[block.targets.rows]
        return (torch.where(each == 0, 0.0, losses.trained) * each).sum()

    def _backward(self, values: list[torch.Tensor]) -> None:
        value = values[0] if len(values) == 1 else torch.stack(values).sum()
        self.loss += value.detach()
        self.backward(value)

    def _nothing(self, block: Block, last: bool) -> None:
        """A backward pass of zeros, so that parameters get a gradient and other ranks do not wait."""
        if not last:
            return
        if self.distributed:
            self._run(self.model, block, Routing.single(0), self.smoothing)
        trained = [p for p in self.base.parameters() if p.requires_grad]
        zeros = [torch.where(torch.zeros_like(p, dtype=torch.bool), p, 0.0).sum() for p in trained]
        if zeros:
            self._backward([torch.stack(zeros).sum()])

    # -- small things -----------------------------------------------------------------------------------------------

    def _context(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.no_sync()

    def _scale(self, block: Block) -> torch.Tensor:
        return self.scale[block.rows]

    def _one_in(self, n: int) -> bool:
        return int(torch.randint(n, (), generator=self.generator, device=self.generator.device)) == 0

    def _check_routing(self, block: Block, losses: TokenLosses, plan: Assignment, nll: torch.Tensor) -> None:
        """Raise RunError where rows trained in company do not have the loss that they had alone."""
        if self.options.scoring != "exact" or bool((plan.hypotheses == plan.hypotheses[0]).all()):
            return
        alone = nll[plan.hypotheses, plan.rows]
        counts = block.targets.counts.clamp_min(1)
        gap = ((block.targets.row_sums(losses.nll) - alone).abs() / counts)[plan.weights > 0].max()
        precision = next(self.base.parameters()).dtype
        half = torch.finfo(precision).bits < 32 or torch.is_autocast_enabled(self.device.type)
        if float(gap) > DISAGREEMENT["half" if half else "full"] * (1.0 + float((alone / counts).abs().max())):
            raise RunError(
                f"rows of several hypotheses in one pass have other losses than alone (by {float(gap):.3g} nats per "
                "token): some adapted layer sees tokens out of the rows' order (experts of a mixture?); use "
                "StepOptions(mixed_rows=False)"
            )

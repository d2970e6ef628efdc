"""Running sums of what the hypotheses do: who wins, by how much, and what each of them, the best and the mixture lose.

For sequences b with n_b labelled tokens and S (K, B) in nats, L = S or S / n_b ("token_mean"):

    nll_k     mean_b L_kb
    oracle    mean_b min_k L_kb                   knows the answer: no likelihood
    mixture   mean_b -log((1/K) sum_k e^{-S_kb}), divided by n_b for token means: a likelihood

A NaN stays NaN: nll_k where hypothesis k has one, oracle and mixture where no hypothesis is finite on a row.
Else oracle <= mixture <= oracle + log K (E[1/n] log K for token means). All state is sums in one vector: batches
and ranks are combined by adding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..objectives import AssignmentStatistics, mixture_nll


class LossMonitor:
    """Adds up batches of sequence losses.

    Args: num_hypotheses: K; reduction: "token_mean" or "sequence_sum", the scale of the reported losses.
    """

    def __init__(self, num_hypotheses: int, reduction: str) -> None:
        self.num_hypotheses, self.reduction = num_hypotheses, reduction
        self.reset()

    def reset(self) -> None:
        K = self.num_hypotheses
        self.statistics: AssignmentStatistics | None = None
        self.nll = torch.zeros(K, dtype=torch.float64)  # sums over all rows: one NaN stays NaN
        self.nll_rows = torch.zeros(K, dtype=torch.float64)
        self.best = torch.zeros(3, dtype=torch.float64)  # sums of oracle and mixture, rows

    def add(self, losses: Tensor, counts: Tensor) -> None:
        """Add a batch.

        Args:
            losses: (K, B), nats, in this monitor's reduction.
            counts: (B,) labelled tokens; rows without any are left out.
        """
        losses, counts = losses.detach().double().cpu(), counts.detach().double().cpu()
        losses, counts = losses[:, counts > 0], counts[counts > 0]
        if not losses.shape[1]:
            return
        statistics = AssignmentStatistics.of(losses)
        self.statistics = statistics if self.statistics is None else self.statistics + statistics
        finite = losses.isfinite()
        self.nll += losses.sum(dim=1)
        self.nll_rows += losses.shape[1]
        losses = torch.where(finite, losses, torch.inf)
        scale = counts if self.reduction == "token_mean" else torch.ones_like(counts)
        mixture = mixture_nll(losses * scale) / scale
        lost = ~finite.any(dim=0)  # rows that no hypothesis can score: neither the best nor the mixture has a value
        oracle, mixture = (values.masked_fill(lost, torch.nan).sum() for values in (losses.amin(dim=0), mixture))
        self.best += torch.stack([oracle, mixture, torch.tensor(float(len(counts)), dtype=torch.float64)])

    @property
    def num_rows(self) -> int:
        return 0 if self.statistics is None else self.statistics.rows

    def as_vector(self) -> Tensor:
        """(4 K + 8,) float64, additive over batches and ranks."""
        K = self.num_hypotheses
        statistics = torch.zeros(2 * K + 5, dtype=torch.float64)
        if self.statistics is not None:
            statistics = self.statistics.as_vector()
        return torch.cat([self.nll, self.nll_rows, self.best, statistics])

    def load_vector(self, vector: Tensor) -> None:
        """Take over the sums of `as_vector`. Raises CheckpointError for a vector of another K."""
        K = self.num_hypotheses
        if vector.shape != (4 * K + 8,):
            raise CheckpointError(f"running sums of shape {tuple(vector.shape)} do not fit {K} hypotheses")
        vector = vector.double().cpu()
        self.nll, self.nll_rows, self.best, rest = (part.clone() for part in vector.split([K, K, 3, 2 * K + 5]))
        statistics = AssignmentStatistics.from_vector(rest)
        self.statistics = statistics if statistics.rows else None

    def figures(self, dead_threshold: float = 0.0) -> dict[str, float]:
        """oracle_nll, mixture_nll, nll_k, win_k (counts) and what AssignmentStatistics reports; empty without rows."""
        if self.statistics is None:
            return {}
        oracle, mixture, rows = self.best.tolist()
        figures = {"oracle_nll": oracle / rows, "mixture_nll": mixture / rows} if rows else {}
        for k, (total, seen) in enumerate(zip(self.nll.tolist(), self.nll_rows.tolist(), strict=True)):
            if seen:
                figures[f"nll_{k}"] = total / seen
        figures |= {f"wins_{k}": wins for k, wins in enumerate(self.statistics.wins.tolist())}
        shared = self.statistics.figures(dead_threshold)
        return figures | {name: value for name, value in shared.items() if value == value}  # no NaN margin for K = 1

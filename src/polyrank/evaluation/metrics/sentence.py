"""Sentence scores over the K candidates of an input: the oracle's (best of K) and the mean.

With s_ik the score of candidate k of input i against all references of i:
    oracle = mean_i max_k s_ik        (min_k where lower is better)
    mean   = mean_i mean_k s_ik       what a candidate picked at random is worth
Each score takes its own best candidate. With K = 1 both are the ordinary mean of sentence scores.

Source: LoRA-MCL (Letzelter et al. 2025), evaluation of captioning. `sentence_score` registers a score's two metrics.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...core.registry import Registry
from ._registry import metric
from ._session import once
from .predictions import Prediction

Rows = list[list[float]]
"""A score for each candidate of each input, shape (N, K)."""


@dataclass(frozen=True)
class SentenceScore:
    """A score of single candidates; the fields mean what they do in `Metric`."""

    name: str
    compute: Callable[[Sequence[Prediction]], Rows]
    better: str
    unit: str
    needs: frozenset[str]


SENTENCE_SCORES: Registry[SentenceScore] = Registry("sentence score")


def sentence_scores(name: str, records: Sequence[Prediction]) -> Rows:
    """The scores of all candidates, shape (N, K); computed once in an evaluation. Raises UnknownNameError."""
    entry = SENTENCE_SCORES.get(name)
    return once(f"sentence/{name}", records, lambda: entry.compute(records))


def sentence_score(
    name: str, *, better: str = "higher", unit: str = "0..1", needs: Sequence[str] = ()
) -> Callable[[Callable[[Sequence[Prediction]], Rows]], Callable[[Sequence[Prediction]], Rows]]:
    """Register a function as the sentence score of that name, and its metrics oracle_<name> and mean_<name>."""

    def add(compute: Callable[[Sequence[Prediction]], Rows]) -> Callable[[Sequence[Prediction]], Rows]:
        SENTENCE_SCORES.register(name, SentenceScore(name, compute, better, unit, frozenset(needs)))
        best = min if better == "lower" else max
        what = (inspect.getdoc(compute) or name).split("\n\n")[0]

        def oracle(records: Sequence[Prediction]) -> float:
            return sum(best(row) for row in sentence_scores(name, records)) / len(records)

        def mean(records: Sequence[Prediction]) -> float:
            return sum(sum(row) / len(row) for row in sentence_scores(name, records)) / len(records)

        oracle.__doc__ = f"Best of the K candidates, mean over inputs: {what}"
        mean.__doc__ = f"Mean over candidates and inputs: {what}"
        options = {"better": better, "unit": unit, "needs": needs, "on_request": True}
        metric(f"oracle_{name}", **options)(oracle)  # type: ignore[arg-type]
        metric(f"mean_{name}", **options)(mean)  # type: ignore[arg-type]
        return compute

    return add

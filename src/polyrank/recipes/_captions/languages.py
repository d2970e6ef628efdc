"""Which language a short text is written in, told by its words; and figures by language."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...core.errors import DataError
from ...evaluation.metrics.diversity import words


class LanguageGuess:
    """Naive Bayes on words, with one count added to each: argmax_l sum_w log (n_lw + 1) / (N_l + V), uniform prior.

    Args: texts: for each language, sentences that are known to be in it.
    Raises: DataError for fewer than two languages, or one without words.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]]) -> None:
        self.counts = {lang: Counter(w for text in given for w in words(text)) for lang, given in texts.items()}
        if len(self.counts) < 2 or not all(self.counts.values()):
            raise DataError("at least two languages, each with sentences, are needed to tell languages apart")
        size = len(set().union(*self.counts.values()))
        self.totals = {lang: sum(counts.values()) + size for lang, counts in self.counts.items()}

    def __call__(self, text: str) -> str | None:
        """The language; None for a text without a word that any of them knows."""
        known = [word for word in words(text) if any(word in counts for counts in self.counts.values())]
        if not known:
            return None
        return max(self.counts, key=lambda lang: sum(self._log(lang, word) for word in known))

    def _log(self, language: str, word: str) -> float:
        return math.log((self.counts[language][word] + 1) / self.totals[language])


def win_shares_by_language(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """For each language the share of its references that each hypothesis gives the lowest NLL; equals share.

    Args: records: lines of predictions.jsonl with "nll" and "meta.languages" (one for each reference).
    """
    wins: dict[str, list[float]] = {}
    for record in records:
        for language, row in zip(record["meta"]["languages"], record["nll"], strict=True):
            shares = wins.setdefault(language, [0.0] * len(row))
            best = [k for k, value in enumerate(row) if value == min(row)]
            for k in best:
                shares[k] += 1 / len(best)
    return {language: [value / sum(row) for value in row] for language, row in wins.items()}


def written_shares(records: Sequence[Mapping[str, Any]], guess: LanguageGuess) -> dict[str, list[float]]:
    """For each language the share of the k-th candidates written in it."""
    count, total = len(records[0]["candidates"]), len(records)
    told = [[guess(text) for text in record["candidates"]] for record in records]
    return {lang: [sum(row[k] == lang for row in told) / total for k in range(count)] for lang in guess.counts}


def of_language(records: Sequence[Mapping[str, Any]], language: str) -> list[dict[str, Any]]:
    """The records with the references in that language alone, all candidates kept: an oracle over them asks whether
    any says it in that language.

    Raises: DataError where an image has none.
    """
    chosen = []
    for record in records:
        tags = record["meta"]["languages"]
        references = [text for text, tag in zip(record["references"], tags, strict=True) if tag == language]
        if not references:
            raise DataError(f"id {record['id']!r} has no reference in language {language!r}")
        chosen.append({"id": record["id"], "candidates": record["candidates"], "references": references})
    return chosen

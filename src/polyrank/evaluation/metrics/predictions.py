"""predictions.jsonl: what a run wrote for every input, checked before anything is computed from it.

One JSON object a line:
    id: str, unique.  input: str.
    candidates: K strings, K the same on every line.
    references: at least one string.
    scores (optional): K floats, higher is better: the model's own opinion of its candidates, known without references.
    nll (optional): for each reference K floats, nats summed over the reference's tokens, one for each hypothesis.
    meta (optional): any object; meta.nll_tokens (one int for each reference) is how many tokens those sums run over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import DataError
from ...core.files import parse_json, read_bytes


@dataclass(frozen=True)
class Prediction:
    """One line of predictions.jsonl."""

    id: str
    input: str
    candidates: tuple[str, ...]
    references: tuple[str, ...]
    scores: tuple[float, ...] | None = None
    nll: tuple[tuple[float, ...], ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def incomplete(self) -> str | None:
        """What is missing of this input, in words, or None."""
        if not self.references:
            return "no references"
        if not any(text.strip() for text in self.references):
            return "every reference is empty"
        return None if self.candidates else "no candidates"

    @property
    def nll_tokens(self) -> tuple[int, ...] | None:
        """Tokens of each reference, where the run stored them."""
        return self.meta.get("nll_tokens")

    @property
    def best(self) -> int:
        """Index of the candidate with the highest score (the first of equals)."""
        assert self.scores is not None
        return max(range(len(self.scores)), key=self.scores.__getitem__)


@dataclass(frozen=True)
class Skipped:
    """An input that was left out: its id, where it stands, and why."""

    id: str
    where: str
    reason: str


def parse_prediction(value: object, where: str, *, incomplete: bool = False) -> Prediction:
    """Check one record. Raises DataError that begins with `where` ("file, line 3").

    Args:
        incomplete: let references be missing; `Prediction.incomplete` then tells.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: a record must be a JSON object, not {type(value).__name__}")
    if not isinstance(value.get("id"), str) or not value["id"]:
        raise DataError(f"{where}: 'id' must be a string that is not empty, got {value.get('id')!r}")
    where = f"{where} (id {value['id']!r})"
    given = value.get("references") is not None or not incomplete
    references = _strings(value, "references", where) if given else ()
    if not references and not incomplete:
        raise DataError(f"{where}: 'references' is empty; at least one is needed")
    candidates = _strings(value, "candidates", where) if value.get("candidates") is not None else ()
    count = len(candidates)
    scores = value.get("scores") if candidates or not incomplete else None
    if scores is not None:
        scores = _numbers(scores, count, "scores", "candidate", where)
    nll = value.get("nll") if references else None
    if nll is not None:
        if not isinstance(nll, Sequence) or len(nll) != len(references):
            raise DataError(f"{where}: 'nll' must have one list for each of the {len(references)} references")
        hypotheses = len(nll[0]) if isinstance(nll[0], Sequence) and nll[0] else 1
        nll = tuple(_numbers(row, hypotheses, "nll", "hypothesis", where) for row in nll)
    meta = value.get("meta") or {}
    if not isinstance(meta, Mapping):
        raise DataError(f"{where}: 'meta' must be a JSON object")
    tokens = meta.get("nll_tokens")
    if tokens is not None and (
        not isinstance(tokens, Sequence)
        or len(tokens) != len(references)
        or not all(isinstance(n, int) and n > 0 for n in tokens)
    ):
        raise DataError(f"{where}: 'meta.nll_tokens' must be one positive whole number for each reference")
    text = value.get("input", "")
    return Prediction(value["id"], text if isinstance(text, str) else "", candidates, references, scores, nll, meta)


def _strings(value: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    given = value.get(key)
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
        raise DataError(f"{where}: {key!r} must be a list of strings, got {given!r:.80}")
    return tuple(given)


def _numbers(given: object, count: int, key: str, per: str, where: str) -> tuple[float, ...]:
    if not isinstance(given, list | tuple) or len(given) != count:
        raise DataError(f"{where}: {key!r} must hold {count} numbers, one for each {per}")
    for number in given:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise DataError(f"{where}: {key!r} holds {number!r}, which is no finite number")
    return tuple(float(number) for number in given)


def read_predictions(
    source: str | Path | Iterable[Mapping[str, Any]], skipped: list[Skipped] | None = None
) -> list[Prediction]:
    """Read predictions.jsonl (or a folder that holds it, or records already in memory) and check them together.

    Args:
        skipped: where given, inputs without references or candidates, or with fewer candidates than the others, are
            left out and told there; where None they are an error.
    Raises: DataError for a missing or empty file, a broken line (its number is named), an id seen twice, an input that
        is incomplete, or a number of candidates or hypotheses that is not the same everywhere.
    """
    if isinstance(source, str | Path):
        path = predictions_file(source)
        name, values = str(path), _lines(path)
    else:
        name, values = "records", ((f"record {i}", value) for i, value in enumerate(source))
    records = {where: parse_prediction(value, where, incomplete=skipped is not None) for where, value in values}
    if not records:
        raise DataError(f"{name}: no predictions")
    seen: set[str] = set()
    for record in records.values():
        if record.id in seen:
            raise DataError(f"{name}: the id {record.id!r} appears twice")
        seen.add(record.id)
    kept = list(records.values()) if skipped is None else _complete(name, records, skipped)
    missing = [record.id for record in kept if not record.candidates]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{name}: candidates are missing for {len(missing)} of {len(kept)} ids ({shown})")
    _same(name, "candidates", {record.id: len(record.candidates) for record in kept})
    _same(name, "hypotheses in 'nll'", {record.id: len(record.nll[0]) for record in kept if record.nll is not None})
    return kept


def predictions_file(source: str | Path) -> Path:
    """The file that a path names: itself, or predictions.jsonl in a folder."""
    path = Path(source)
    return path / "predictions.jsonl" if path.is_dir() else path


def _complete(name: str, records: Mapping[str, Prediction], skipped: list[Skipped]) -> list[Prediction]:
    """The inputs that have everything, with as many candidates as the input that has most."""
    most = max(len(record.candidates) for record in records.values())
    kept = []
    for where, record in records.items():
        short = f"{len(record.candidates)} candidates of {most}" if len(record.candidates) < most else None
        reason = record.incomplete or short
        if reason is None:
            kept.append(record)
        else:
            skipped.append(Skipped(record.id, where, reason))
    if not kept:
        raise DataError(f"{name}: all of {len(records)} inputs are incomplete (first: {skipped[0].reason})")
    return kept


def _lines(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", parse_json(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from None


def _same(name: str, what: str, counts: Mapping[str, int]) -> None:
    if len(set(counts.values())) > 1:
        first, expected = next(iter(counts.items()))
        other, got = next((key, count) for key, count in counts.items() if count != expected)
        raise DataError(f"{name}: the number of {what} differs: {expected} for id {first!r}, {got} for id {other!r}")

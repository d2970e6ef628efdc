"""Scores of (candidate, references) pairs, kept in a file as they are computed: an evaluation that was cut off goes on.

One JSON object a line, key -> score; a key is a hash of the pair's words, so the file serves any predictions. Its name
bears the score and what computed it (version, model): another model is another file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ...core.errors import DataError, RunError
from ...core.files import append_json_line, read_json_lines
from ._session import current

_log = logging.getLogger("polyrank")
FOLDER = "sentence_scores"

Pair = tuple[str, tuple[str, ...]]
"""A candidate and its references, words joined by single spaces."""
Batches = Sequence[Sequence[Pair]]
Scorer = Callable[[Batches], Generator[Sequence[Any], None, None]]
"""Batches of pairs -> for each batch one score (a number, or a list of numbers) a pair."""


class ScoreFile:
    """Known scores by key. Raises DataError for a file that holds anything else."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        for value in read_json_lines(path) if path is not None and path.exists() else []:
            if not isinstance(value, Mapping):
                raise DataError(f"{path} is no file of sentence scores; delete it, it will be made anew")
            self.known.update(value)

    def add(self, scores: Mapping[str, Any]) -> None:
        """Remember scores, and append them as one line. A folder that cannot be written to is said once."""
        self.known.update(scores)
        if self.path is None:
            return
        try:
            append_json_line(self.path, dict(scores))
        except RunError as error:
            _log.warning("sentence scores are not kept: %s", error)
            self.path = None


def pair_key(pair: Pair) -> str:
    return hashlib.sha256(json.dumps(pair, ensure_ascii=False).encode()).hexdigest()[:24]


def score_pairs(
    name: str, pairs: Sequence[Pair], score: Scorer, *, kept: str | None = None, batch: int = 64
) -> list[Any]:
    """One score for each pair; equal pairs are scored once, and those in the session's score file not at all.

    Args:
        name: of the score; with `kept` the name of its file.
        kept: what the score depends on beside the pair (a version, a model's hash); None keeps no file.
        batch: pairs to a batch; what is lost when the evaluation is killed.
    """
    folder = current().folder
    file = ScoreFile(folder / f"{name}-{kept}.jsonl" if folder is not None and kept is not None else None)
    keys = [pair_key(pair) for pair in pairs]
    missing = [pair for key, pair in dict(zip(keys, pairs, strict=True)).items() if key not in file.known]
    batches = [missing[i : i + batch] for i in range(0, len(missing), batch)]
    if batches:
        with closing(score(batches)) as scores:
            for part in _shown(batches, name):
                file.add(dict(zip(map(pair_key, part), next(scores), strict=True)))
    return [file.known[key] for key in keys]


def _shown(batches: Batches, name: str) -> Iterator[Sequence[Pair]]:
    if not current().progress:
        return iter(batches)
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    shown = track(batches, f"scoring {name}", console=console, disable=not console.is_terminal, transient=True)
    return iter(shown)

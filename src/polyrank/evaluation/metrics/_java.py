"""The METEOR program that pycocoevalcap carries, as a context that ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from ...core.errors import RunError

MeteorScorer = Callable[[Sequence[tuple[str, list[str]]]], tuple[float, list[float]]]


@contextmanager
def meteor_program() -> Iterator[MeteorScorer]:
    """(candidate, references) pairs -> METEOR 1.5 of the whole, and of each pair. Java starts once.

    Texts are words joined by single spaces. Raises: RunError if the program ends or answers with anything but numbers.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()

    def score(pairs: Sequence[tuple[str, list[str]]]) -> tuple[float, list[float]]:
        references = {i: group for i, (_, group) in enumerate(pairs)}
        try:
            whole, each = scorer.compute_score(references, {i: [text] for i, (text, _) in enumerate(pairs)})
        except (ValueError, OSError) as error:
            scorer.lock.release()
            with suppress(OSError):
                scorer.meteor_p.stdin.close()
            scorer.meteor_p.kill()
            said = scorer.meteor_p.stderr.read().decode(errors="replace").strip().splitlines()
            raise RunError(f"METEOR's Java program failed: {said[0] if said else error}") from None
        return float(whole), [float(value) for value in each]

    try:
        yield score
    finally:
        for pipe in (scorer.meteor_p.stdout, scorer.meteor_p.stderr):
            pipe.close()

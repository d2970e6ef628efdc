"""Sentence scores of captioning: BLEU-1..4, ROUGE-L, CIDEr-D, METEOR, SPICE and SPIDEr.

The base scores are the COCO caption scripts' (package pycocoevalcap), on words by `caption_words`: lower case, no
punctuation. A candidate without words scores 0 and is shown to no script; references without words are left out.

Source: LoRA-MCL (Letzelter et al. 2025), whose evaluation uses aac-metrics on words by Stanford's PTBTokenizer; equal
to aac-metrics where the words are the same (tests). What differs stands with each score.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from itertools import chain

from ...core.errors import DataError
from ._java import meteor_program
from ._score_files import Batches, Pair, score_pairs
from ._session import once
from ._words import caption_words
from .predictions import Prediction
from .sentence import Rows, sentence_score, sentence_scores
from .spice import SPICE_VERSION, score_spice

COCO = ("pycocoevalcap",)
SPICE = (*COCO, "java", "spice", "spice_java")


@lru_cache(maxsize=1 << 16)
def caption_text(text: str) -> str:
    """The words of a caption joined by single spaces."""
    return " ".join(caption_words(text))


def caption_pairs(records: Sequence[Prediction]) -> list[Pair]:
    """(candidate, references) of every candidate in turn, N·K of them. Raises DataError if no reference has a word."""

    def pairs() -> list[Pair]:
        made = []
        for record in records:
            references = tuple(filter(None, map(caption_text, record.references)))
            if not references:
                raise DataError(f"id {record.id!r}: no reference holds a word")
            made += [(caption_text(candidate), references) for candidate in record.candidates]
        return made

    return once("caption/pairs", records, pairs)


def rows_of(records: Sequence[Prediction], values: Sequence[float]) -> Rows:
    """N·K values in turn as N rows of K."""
    count = len(records[0].candidates)
    return [list(values[i : i + count]) for i in range(0, len(values), count)]


def nonempty(pairs: Sequence[Pair], score: Callable[[Sequence[Pair]], Sequence[float]]) -> list[float]:
    """`score` of the pairs whose candidate has words, 0 for the others."""
    scores = iter(score([pair for pair in pairs if pair[0]]))
    return [float(next(scores)) if pair[0] else 0.0 for pair in pairs]


def _bleu(records: Sequence[Prediction], order: int) -> Rows:
    def all_orders() -> list[list[float]]:
        from pycocoevalcap.bleu.bleu import Bleu

        pairs = list(dict.fromkeys(pair for pair in caption_pairs(records) if pair[0]))
        references = {i: list(pair[1]) for i, pair in enumerate(pairs)}
        scores = Bleu(4).compute_score(references, {i: [pair[0]] for i, pair in enumerate(pairs)}, verbose=0)[1]
        known = dict(zip(pairs, zip(*scores, strict=True), strict=True))
        return [[float(known[pair][n]) if pair[0] else 0.0 for pair in caption_pairs(records)] for n in range(4)]

    return rows_of(records, once("caption/bleu", records, all_orders)[order - 1])


@sentence_score("bleu_1", needs=COCO)
def bleu_1(records: Sequence[Prediction]) -> Rows:
    """Sentence BLEU-1 of the COCO scripts (nearest reference length), 0 to 1."""
    return _bleu(records, 1)


@sentence_score("bleu_2", needs=COCO)
def bleu_2(records: Sequence[Prediction]) -> Rows:
    """Sentence BLEU-2 of the COCO scripts, 0 to 1."""
    return _bleu(records, 2)


@sentence_score("bleu_3", needs=COCO)
def bleu_3(records: Sequence[Prediction]) -> Rows:
    """Sentence BLEU-3 of the COCO scripts, 0 to 1."""
    return _bleu(records, 3)


@sentence_score("bleu_4", needs=COCO)
def bleu_4(records: Sequence[Prediction]) -> Rows:
    """Sentence BLEU-4 of the COCO scripts, 0 to 1; next to 0 where an order has no match (nothing is smoothed)."""
    return _bleu(records, 4)


@sentence_score("rouge_l", needs=COCO)
def rouge_l(records: Sequence[Prediction]) -> Rows:
    """ROUGE-L of the COCO scripts (F with beta = 1.2, best precision and best recall over the references), 0 to 1."""
    from pycocoevalcap.rouge.rouge import Rouge

    score = Rouge().calc_score
    return rows_of(records, nonempty(caption_pairs(records), lambda pairs: [score([c], list(r)) for c, r in pairs]))


@sentence_score("cider_d", unit="0..10", needs=COCO)
def cider_d(records: Sequence[Prediction]) -> Rows:
    """CIDEr-D of the COCO scripts, 0 to 10; n-grams weighed by the references of all inputs, alike for every k.

    0 everywhere for a single input; not comparable between test sets.
    """
    from pycocoevalcap.cider.cider import Cider

    pairs, count = caption_pairs(records), len(records[0].candidates)
    columns = []
    for k in range(count):
        mine = pairs[k::count]
        references = {i: list(pair[1]) for i, pair in enumerate(mine)}
        columns.append(Cider().compute_score(references, {i: [pair[0]] for i, pair in enumerate(mine)})[1])
    return [[float(score) for score in row] for row in zip(*columns, strict=True)]


@sentence_score("meteor", needs=[*COCO, "java"])
def meteor(records: Sequence[Prediction]) -> Rows:
    """METEOR 1.5 for English, by the Java program that pycocoevalcap carries, 0 to 1; scores are kept as they come."""

    def score(batches: Batches) -> Generator[list[float], None, None]:
        with meteor_program() as scorer:
            for batch in batches:
                yield scorer([(candidate, list(references)) for candidate, references in batch])[1]

    return rows_of(
        records,
        nonempty(caption_pairs(records), lambda pairs: score_pairs("meteor", pairs, score, kept="1.5-en")),
    )


@sentence_score("spice", needs=SPICE)
def spice(records: Sequence[Prediction]) -> Rows:
    """SPICE: F1 of scene-graph tuples (Anderson et al. 2016), by its Java program, 0 to 1; kept as they come."""

    def score(batches: Batches) -> Generator[list[float], None, None]:
        for batch in batches:
            yield score_spice(batch)

    return rows_of(
        records,
        nonempty(
            caption_pairs(records), lambda pairs: score_pairs("spice", pairs, score, kept=SPICE_VERSION, batch=512)
        ),
    )


@sentence_score("spider", unit="0..5.5", needs=SPICE)
def spider(records: Sequence[Prediction]) -> Rows:
    """SPIDEr: mean of CIDEr-D and SPICE (Liu et al. 2017), 0 to 5.5; each candidate's own two scores."""
    both = zip(chain(*sentence_scores("cider_d", records)), chain(*sentence_scores("spice", records)), strict=True)
    return rows_of(records, [(first + second) / 2 for first, second in both])

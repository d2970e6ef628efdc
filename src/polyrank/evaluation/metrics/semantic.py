"""Sentence scores by language models: SBERT similarity, fluency errors, FENSE, SPIDEr-FL, BERTScore.

    SBERT       mean over references of the cosine of sentence vectors
    FER         1 where the fluency detector's probability of an error is above 0.9, else 0
    FENSE       SBERT * (1 - 0.9 FER)
    SPIDEr-FL   SPIDEr * (1 - 0.9 FER)
    BERTScore   precision: mean over the candidate's tokens of the best cosine with a token of the reference; recall:
                the same the other way round; F1: their harmonic mean; each the best over the references

On the words of `caption_words`, as aac-metrics gives them after its tokenizer (tests: equal to aac-metrics on the same
words). The models are given as folders (`--model sbert=FOLDER`), or those of the published figures are taken from the
hub cache. Scores are kept as they come.

Source: FENSE (Zhou et al. 2022), Eq. 1; SPIDEr-FL (DCASE 2023); BERTScore (Zhang et al. 2020), Eq. 1 to 3, without idf.
Differs: BERTScore takes the last layer, as aac-metrics does; the package bert-score takes layer 17 of roberta-large.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import chain

import numpy as np

from ._encoders import encoder, sentence_vectors, token_vectors
from ._score_files import Batches, score_pairs
from ._session import identity
from .caption import SPICE, caption_pairs, caption_text, nonempty, rows_of
from .fluency import error_probabilities
from .predictions import Prediction
from .sentence import Rows, sentence_score, sentence_scores

PENALTY = 0.9
THRESHOLD = 0.9


@sentence_score("sbert", unit="-1..1", needs=["sentence_transformers", "sbert"])
def sbert(records: Sequence[Prediction]) -> Rows:
    """SBERT similarity: cosine of sentence vectors, mean over the references, -1 to 1."""

    def score(batches: Batches) -> Generator[list[float], None, None]:
        model = encoder("sbert")
        for batch in batches:
            texts = [text for candidate, references in batch for text in (candidate, *references)]
            vectors = sentence_vectors(model, texts, normalize_embeddings=True)
            yield [float(np.mean([vectors[c] @ vectors[r] for r in references])) for c, references in batch]

    kept = identity("sbert")
    return rows_of(
        records,
        nonempty(caption_pairs(records), lambda pairs: score_pairs("sbert", pairs, score, kept=kept, batch=256)),
    )


@sentence_score("fer", better="lower", unit="share", needs=["sentence_transformers", "fluency"])
def fer(records: Sequence[Prediction]) -> Rows:
    """Fluency error: 1 where the detector is surer than 0.9 that there is one, else 0; a text without words is one."""

    def score(batches: Batches) -> Generator[list[float], None, None]:
        model = encoder("fluency")
        for batch in batches:
            yield error_probabilities(model, [candidate for candidate, _ in batch])

    texts = [(caption_text(candidate), ()) for record in records for candidate in record.candidates]
    written = [pair for pair in texts if pair[0]]
    known = iter(score_pairs("fluency", written, score, kept=identity("fluency"), batch=256))
    return rows_of(records, [float(next(known) > THRESHOLD) if pair[0] else 1.0 for pair in texts])


def _penalised(records: Sequence[Prediction], name: str) -> Rows:
    both = zip(chain(*sentence_scores(name, records)), chain(*sentence_scores("fer", records)), strict=True)
    return rows_of(records, [value * (1 - PENALTY * error) for value, error in both])


@sentence_score("fense", unit="-1..1", needs=["sentence_transformers", "sbert", "fluency"])
def fense(records: Sequence[Prediction]) -> Rows:
    """FENSE: SBERT similarity, a tenth of it where the fluency detector finds an error, -1 to 1."""
    return _penalised(records, "sbert")


@sentence_score("spider_fl", unit="0..5.5", needs=[*SPICE, "sentence_transformers", "fluency"])
def spider_fl(records: Sequence[Prediction]) -> Rows:
    """SPIDEr-FL: SPIDEr, a tenth of it where the fluency detector finds an error, 0 to 5.5."""
    return _penalised(records, "spider")


def bert_score(candidate: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Precision, recall and F1 of two texts' unit token vectors, shapes (m, d) and (n, d)."""
    cosine = candidate @ reference.T
    precision, recall = float(cosine.max(1).mean()), float(cosine.max(0).mean())
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0


def _bert_scores(records: Sequence[Prediction], part: int) -> Rows:
    def score(batches: Batches) -> Generator[list[list[float]], None, None]:
        model = encoder("bertscore")
        for batch in batches:
            vectors = token_vectors(model, [text for c, references in batch for text in (c, *references)])
            found = [[bert_score(vectors[c], vectors[r]) for r in references] for c, references in batch]
            yield [[max(values) for values in zip(*triples, strict=True)] for triples in found]

    kept = identity("bertscore")

    def score_part(pairs: Sequence[tuple[str, tuple[str, ...]]]) -> list[float]:
        return [triple[part] for triple in score_pairs("bertscore", pairs, score, kept=kept, batch=256)]

    return rows_of(records, nonempty(caption_pairs(records), score_part))


@sentence_score("bertscore_precision", unit="-1..1", needs=["sentence_transformers", "bertscore"])
def bertscore_precision(records: Sequence[Prediction]) -> Rows:
    """BERTScore's precision, best over the references, -1 to 1."""
    return _bert_scores(records, 0)


@sentence_score("bertscore_recall", unit="-1..1", needs=["sentence_transformers", "bertscore"])
def bertscore_recall(records: Sequence[Prediction]) -> Rows:
    """BERTScore's recall, best over the references, -1 to 1."""
    return _bert_scores(records, 1)


@sentence_score("bertscore_f1", unit="-1..1", needs=["sentence_transformers", "bertscore"])
def bertscore_f1(records: Sequence[Prediction]) -> Rows:
    """BERTScore's F1, best over the references, -1 to 1."""
    return _bert_scores(records, 2)

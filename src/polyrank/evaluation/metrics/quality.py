"""Quality against references, by sacreBLEU (0 to 100, tokenizer 13a, case kept): corpus, oracle, leave-one-out,
coverage.

Source: section "Metrics" of the specification in docs/methods/e2e.md; BLEU itself is sacrebleu's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from sacrebleu.metrics.bleu import BLEU

from ._registry import metric
from .predictions import Prediction

ORDER = 4


def corpus_bleu_score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """sacreBLEU's corpus BLEU of one candidate an input against any number of references, which may differ by input."""
    most = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return float(BLEU().corpus_score(list(candidates), streams).score)  # type: ignore[arg-type]


def sentence_bleu_scorer(references: Sequence[str]) -> Callable[[str], float]:
    """sacreBLEU's sentence BLEU (effective order, exponential smoothing) against fixed references, counted once."""
    bleu = BLEU(effective_order=True, references=[[reference] for reference in references])
    return lambda candidate: float(bleu.corpus_score([candidate], None).score)


def oracle_score(
    records: Sequence[Prediction],
    scorer: Callable[[Sequence[str]], Callable[[str], float]] = sentence_bleu_scorer,
    lower_is_better: bool = False,
) -> float:
    """Mean over inputs of the best sentence score among the K candidates.

    O = mean_i max_k score(candidate_ik, references_i)      (min_k where lower is better)

    Args:
        records: predictions.
        scorer: references -> (candidate -> score); made once an input.
        lower_is_better: take the minimum (error rates, NLL).
    Relations: with K = 1 the ordinary mean of sentence scores. Each metric picks its own best candidate.
    """
    best = min if lower_is_better else max
    total = 0.0
    for record in records:
        score = scorer(record.references)
        total += best(score(candidate) for candidate in record.candidates)
    return total / len(records)


@metric("oracle_bleu", better="higher", unit="BLEU")
def oracle_bleu(records: Sequence[Prediction]) -> float:
    """Mean over inputs of the best multi-reference sentence BLEU among the K candidates."""
    return oracle_score(records)


@metric("mean_bleu", better="higher", unit="BLEU")
def mean_bleu(records: Sequence[Prediction]) -> float:
    """Mean sentence BLEU over inputs and candidates: what a candidate picked at random is worth."""
    total = 0.0
    for record in records:
        score = sentence_bleu_scorer(record.references)
        total += sum(map(score, record.candidates)) / len(record.candidates)
    return total / len(records)


@metric("corpus_bleu", better="higher", unit="BLEU")
def corpus_bleu(records: Sequence[Prediction]) -> float:
    """Corpus BLEU of the k-th candidates of all inputs, mean over k; with K = 1 the ordinary corpus BLEU."""
    references = [record.references for record in records]
    count = len(records[0].candidates)
    return sum(corpus_bleu_score([r.candidates[k] for r in records], references) for k in range(count)) / count


@metric("hypothesis_bleu", better="higher", unit="BLEU", on_request=True)
def hypothesis_bleu(records: Sequence[Prediction]) -> list[float]:
    """For each hypothesis the corpus BLEU of its candidates against the first reference of each input."""
    first = [record.references[:1] for record in records]
    count = len(records[0].candidates)
    return [corpus_bleu_score([r.candidates[k] for r in records], first) for k in range(count)]


@metric("best_scored_bleu", better="higher", unit="BLEU", needs=["scores"])
def best_scored_bleu(records: Sequence[Prediction]) -> float:
    """Corpus BLEU of the candidate that the model itself scores highest: one output an input, no oracle."""
    return corpus_bleu_score([r.candidates[r.best] for r in records], [r.references for r in records])


@metric("leave_one_out_bleu", better="higher", unit="BLEU", needs=["several_references"])
def leave_one_out_bleu(records: Sequence[Prediction]) -> float:
    """Corpus BLEU of all N·K candidates against all references but one, mean over the reference left out.

    For m = 0..M-1 reference m of every input is dropped. Where inputs have different numbers of references, M is the
    largest and an input with M_i drops number m mod M_i; inputs with a single reference have nothing to drop and are
    left out.

    Relations: equals sacreBLEU's corpus score for every m (tests). N-gram counts are kept once for an input: the clip
        without reference m is the second largest count of an n-gram where m holds the largest.
    """
    usable = [record for record in records if len(record.references) > 1]
    bleu = BLEU()
    most = max(len(record.references) for record in usable)
    correct = [[0] * ORDER for _ in range(most)]
    total = [0] * ORDER
    candidate_length, reference_length = 0, [0] * most
    for record in usable:
        candidates = [_ngrams(bleu, text) for text in record.candidates]
        references = [_ngrams(bleu, text) for text in record.references]
        clips = _largest_two(references)
        lengths = [sum(count for gram, count in grams.items() if len(gram) == 1) for grams in references]
        for grams in candidates:
            length = sum(count for gram, count in grams.items() if len(gram) == 1)
            candidate_length += length
            full = [0] * ORDER
            less = [[0] * ORDER for _ in references]
            for gram, count in grams.items():
                total[len(gram) - 1] += count
                if gram in clips:
                    first, holder, second = clips[gram]
                    full[len(gram) - 1] += min(count, first)
                    less[holder][len(gram) - 1] += min(count, first) - min(count, second)
            closest = [
                min((abs(length - other), other) for j, other in enumerate(lengths) if j != out)[1]
                for out in range(len(references))
            ]
            for m in range(most):
                out = m % len(references)
                reference_length[m] += closest[out]
                for n in range(ORDER):
                    correct[m][n] += full[n] - less[out][n]
    scores = [
        BLEU.compute_bleu(correct[m], total, candidate_length, reference_length[m], smooth_method="exp").score
        for m in range(most)
    ]
    return float(sum(scores) / most)


def _ngrams(bleu: BLEU, text: str) -> Counter[tuple[str, ...]]:
    tokens = bleu.tokenizer(text.rstrip()).split()
    return Counter(tuple(tokens[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(tokens) - n + 1))


def _largest_two(references: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """For each n-gram its largest count in one reference, that reference, and the largest count in the others."""
    clips: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for index, grams in enumerate(references):
        for gram, count in grams.items():
            first, holder, second = clips.get(gram, (0, -1, 0))
            clips[gram] = (count, index, first) if count > first else (first, holder, max(second, count))
    return clips


@metric("references_covered", better="higher", unit="references", needs=["several_references"])
def references_covered(records: Sequence[Prediction]) -> float:
    """Mean over inputs of how many different references are the best match of some candidate.

    The best match of a candidate is the reference of highest sentence BLEU, the first of equals; a reference that is
    written twice counts once. Between 1 and min(K, M).
    """
    total = 0
    for record in records:
        scorers = [sentence_bleu_scorer([reference]) for reference in dict.fromkeys(record.references)]
        best = set()
        for candidate in dict.fromkeys(record.candidates):
            scores = [score(candidate) for score in scorers]
            best.add(max(range(len(scores)), key=scores.__getitem__))
        total += len(best)
    return total / len(records)

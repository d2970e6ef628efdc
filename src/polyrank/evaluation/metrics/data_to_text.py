"""Metrics of data-to-text: one output an input against all its references, over the whole corpus.

    E2E      bleu, nist, meteor, rouge_l, cider
    WebNLG   bleu, meteor, ter                (DART: the same)

The output of an input with several candidates is the one with the highest score. All are computed on request only, and
ignore case, as both challenges' scripts do. What differs from those scripts stands with each metric.

Source: E2E NLG Challenge (Dusek et al. 2020), its script measure_scores.py: NIST's mteval-v13a.pl for BLEU and NIST,
the COCO caption scripts for the others. WebNLG Challenge (2020 scripts, which LoRA and LoRMA use).
"""

from __future__ import annotations

from collections.abc import Sequence

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.ter import TER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from ._java import meteor_program
from ._registry import metric
from ._words import caption_words
from .nist import nist_score
from .predictions import Prediction

E2E = ("bleu", "nist", "meteor", "rouge_l", "cider")
WEBNLG = ("bleu", "meteor", "ter")


def outputs(records: Sequence[Prediction]) -> list[str]:
    """The one output of each input: the candidate that the model scores highest, or the only one."""
    return [r.candidates[r.best if r.scores is not None else 0] for r in records]


@metric("bleu", better="higher", unit="BLEU", needs=["one_output"], on_request=True)
def bleu(records: Sequence[Prediction]) -> float:
    """Corpus BLEU-4 by sacreBLEU, lower case, tokenizer 13a: the number of mteval-v13a.pl.

    0 to 100. Differs: WebNLG's multi-bleu-detok.perl does not smooth an order without a match; this gives it half a
    match, a quarter, ... as mteval does.
    """
    return float(BLEU(lowercase=True).corpus_score(outputs(records), _streams(records)).score)


@metric("nist", better="higher", unit="NIST", needs=["one_output"], on_request=True)
def nist(records: Sequence[Prediction]) -> float:
    """Corpus NIST-5, lower case, tokenizer 13a: about 0 to 10 on such data. See `nist.py`."""
    tokenize = Tokenizer13a()  # type: ignore[no-untyped-call]
    references = [[tokenize(text.lower()).split() for text in r.references] for r in records]
    return nist_score([tokenize(text.lower()).split() for text in outputs(records)], references)


@metric("ter", better="lower", unit="TER", needs=["one_output"], on_request=True)
def ter(records: Sequence[Prediction]) -> float:
    """Corpus translation edit rate by sacreBLEU (Tercom's algorithm), lower case, punctuation split off.

    Edits to the nearest reference over the mean reference length, summed over the corpus; 0 or more, in percent.
    Differs: WebNLG's script takes the mean of sentence rates by pyter, as a share of 1, which weighs short texts more.
    """
    return float(TER(normalized=True).corpus_score(outputs(records), _streams(records)).score)


@metric("rouge_l", better="higher", unit="ROUGE-L", needs=["one_output", "pycocoevalcap"], on_request=True)
def rouge_l(records: Sequence[Prediction]) -> float:
    """Mean ROUGE-L (F with beta = 1.2; best precision and best recall over the references), by pycocoevalcap; 0 to 1.

    Differs: words by `caption_words` and not by Stanford's PTBTokenizer.
    """
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().compute_score(*_captions(records))[0])


@metric("cider", better="higher", unit="CIDEr", needs=["one_output", "pycocoevalcap"], on_request=True)
def cider(records: Sequence[Prediction]) -> float:
    """CIDEr of the COCO scripts (clipped counts, Gaussian length penalty), by pycocoevalcap; 0 to 10.

    The weights of n-grams come from the references of these records: 0 for a single input, and not comparable between
    test sets. Differs: words by `caption_words` and not by Stanford's PTBTokenizer.
    """
    from pycocoevalcap.cider.cider import Cider

    return float(Cider().compute_score(*_captions(records))[0])


@metric("meteor", better="higher", unit="METEOR", needs=["one_output", "pycocoevalcap", "java"], on_request=True)
def meteor(records: Sequence[Prediction]) -> float:
    """METEOR 1.5 for English, the Java program that pycocoevalcap carries with its paraphrase table; 0 to 1.

    Differs: words by `caption_words` (no punctuation, as in the E2E scripts); WebNLG's script leaves punctuation in.
    """
    references, candidates = _captions(records)
    with meteor_program() as score:
        return score([(candidates[key][0], references[key]) for key in references])[0]


def _streams(records: Sequence[Prediction]) -> list[list[str]]:
    """References as sacreBLEU takes them: the i-th of every input, None where an input has fewer."""
    most = max(len(r.references) for r in records)
    return [[r.references[i] if i < len(r.references) else None for r in records] for i in range(most)]  # type: ignore[misc]


def _captions(records: Sequence[Prediction]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """References and outputs as pycocoevalcap takes them: id -> texts of words joined by single spaces."""
    references = {r.id: [" ".join(caption_words(text)) for text in r.references] for r in records}
    written = {r.id: [" ".join(caption_words(text))] for r, text in zip(records, outputs(records), strict=True)}
    return references, written

"""How good rankings are, and whether one system is better than another: pure functions on rankings and judgements.

Measures come from ir-measures (which asks trec_eval): nDCG with linear gain, MAP, Recall, MRR. A query that a system
gives no ranking for counts as 0. A document with the query's own identifier is left out of its ranking, as BEIR does:
where queries are documents of the corpus, each would find itself. Systems are compared query by query with a sign-flip
permutation test: under the null hypothesis the difference of a query has either sign with equal chance; exact for up to
13 differing queries, 9,999 random flips above that. (Source: Smucker, Allan & Carterette 2007, who find it and the
t-test in agreement.)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import ConfigError, DataError
from ..core.records import Metric

MEASURES = ("nDCG@10", "MAP", "Recall@10", "Recall@100", "MRR")
MAIN = "nDCG@10"
RESAMPLES = 9999
_IR_NAMES = {"nDCG": "nDCG", "MAP": "AP", "Recall": "R", "MRR": "RR", "P": "P"}

Qrels = Mapping[str, Mapping[str, int]]
Rankings = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Judgements:
    """Judgements that can be used, and what was left out.

    Attributes:
        qrels: query -> document -> grade; every query has a relevant document (grade > 0) in the corpus.
        unknown_queries, unknown_documents: id -> number of qrels lines that name it though it is not there.
        unanswerable: queries with judgements but no relevant document in the corpus; no ranking could score.
        unjudged: number of queries without any judgement.
        own: queries whose judgements name the document with their own identifier relevant, which no ranking holds.
    """

    qrels: dict[str, dict[str, int]]
    unknown_queries: dict[str, int] = field(default_factory=dict)
    unknown_documents: dict[str, int] = field(default_factory=dict)
    unanswerable: tuple[str, ...] = ()
    unjudged: int = 0
    own: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """One sentence for everything that was left out."""
        counts = [
            (sum(self.unknown_queries.values()), "qrels lines name a query that is not there", self.unknown_queries),
            (sum(self.unknown_documents.values()), "qrels lines name an unknown document", self.unknown_documents),
            (len(self.unanswerable), "judged queries have no relevant document in the corpus", self.unanswerable),
        ]
        notes = [f"left out: {number} {text}, such as {min(ids)!r}" for number, text, ids in counts if number]
        if self.own:
            notes.append(
                f"{len(self.own)} queries, as {min(self.own)!r}, have a relevant document with their own identifier,"
                " which is in no ranking (as in BEIR); give them other identifiers if they are not those documents"
            )
        return notes


def match_qrels(qrels: Qrels, queries: Collection[str], documents: Collection[str]) -> Judgements:
    """Keep the judgements of known queries and documents; count the others.

    An unknown document leaves the ideal ranking too: no system could have found it.

    Raises: DataError if no query is left.
    """
    kept: dict[str, dict[str, int]] = {}
    no_query: dict[str, int] = {}
    no_document: dict[str, int] = {}
    unanswerable = []
    for query, grades in qrels.items():
        if query not in queries:
            no_query[query] = len(grades)
            continue
        for document in grades:
            if document not in documents:
                no_document[document] = no_document.get(document, 0) + 1
        known = {document: grade for document, grade in grades.items() if document in documents}
        if any(grade > 0 for grade in known.values()):
            kept[query] = known
        else:
            unanswerable.append(query)
    if not kept:
        raise DataError(
            f"no query has a relevant document in the corpus: {len(qrels)} judged queries, {len(no_query)} of them"
            f" unknown, {sum(no_document.values())} judgements of unknown documents"
        )
    unjudged = sum(query not in qrels for query in queries)
    own = tuple(query for query, grades in kept.items() if grades.get(query, 0) > 0)
    return Judgements(kept, no_query, no_document, tuple(unanswerable), unjudged, own)


@dataclass(frozen=True)
class Scores:
    """Figures of one system: per_query[measure][query], and their means over queries."""

    per_query: dict[str, dict[str, float]]

    @property
    def mean(self) -> dict[str, float]:
        return {name: sum(values.values()) / len(values) for name, values in self.per_query.items()}


def evaluate(rankings: Rankings, qrels: Qrels, measures: Sequence[str] = MEASURES) -> Scores:
    """Score rankings (best document first) of every query in `qrels`.

    Args: measures: nDCG, MAP, Recall, MRR or P, with a cutoff (`Recall@20`) or, where it makes sense, without.
    Raises: ConfigError for another measure; DataError if a ranking holds a document twice.
    """
    import ir_measures

    parsed = {parse_measure(name): name for name in measures}
    run = {}
    for query in qrels:
        ranking = without_own(query, rankings.get(query, ()))
        if len(set(ranking)) != len(ranking):
            raise DataError(f"the ranking of query {query!r} holds a document twice")
        run[query] = {document: float(-place) for place, document in enumerate(ranking)}  # no ties are left to break
    per_query: dict[str, dict[str, float]] = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    plain = {query: dict(grades) for query, grades in qrels.items()}
    for value in ir_measures.iter_calc(list(parsed), plain, run):
        per_query[parsed[value.measure]][value.query_id] = float(value.value)
    return Scores(per_query)


def without_own(query: str, ranking: Sequence[str]) -> list[str]:
    """The ranking without the document that has the query's own identifier."""
    return [document for document in ranking if document != query]


def parse_measure(name: str) -> Any:
    """The ir-measures object of a name. Raises ConfigError."""
    import ir_measures

    match = re.fullmatch(r"(nDCG|MAP|Recall|MRR|P)(?:@([1-9][0-9]{0,5}))?", name)
    if match is None or (match[2] is None and match[1] in ("Recall", "P")):
        raise ConfigError(f"measure {name!r} is none of nDCG@k, MAP, MRR, Recall@k, P@k")
    measure = ir_measures.parse_measure(_IR_NAMES[match[1]])
    return measure @ int(match[2]) if match[2] else measure


@dataclass(frozen=True)
class Comparison:
    """A system against a baseline, on the queries of both.

    Attributes:
        difference: mean over queries of (system - baseline). p_value: two-sided.
        wins, losses: (query, difference), the largest first. ties: number of queries without a difference.
    """

    measure: str
    difference: float
    p_value: float
    wins: tuple[tuple[str, float], ...]
    losses: tuple[tuple[str, float], ...]
    ties: int


def compare(system: Scores, baseline: Scores, measure: str = MAIN, seed: int = 0) -> Comparison:
    """Paired comparison over queries. Raises DataError unless both were scored on the same queries."""
    ours, theirs = system.per_query[measure], baseline.per_query[measure]
    if ours.keys() != theirs.keys():
        raise DataError("the systems were not scored on the same queries")
    changes = sorted(((query, ours[query] - theirs[query]) for query in ours), key=lambda item: (-item[1], item[0]))
    differences = [change for _, change in changes]
    return Comparison(
        measure,
        sum(differences) / len(differences),
        permutation_p(differences, seed),
        tuple((query, change) for query, change in changes if change > 0),
        tuple((query, change) for query, change in reversed(changes) if change < 0),
        sum(change == 0 for change in differences),
    )


def permutation_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of the mean under random signs; the same for a against b as for b against a.

    Differences of 0 change nothing under a flip and are left out.
    """
    import numpy as np
    from scipy.stats import permutation_test

    sign = -1 if sum(differences) < 0 else 1
    values = np.array(sorted((sign * value for value in differences if value != 0), key=lambda x: (abs(x), x)))
    if len(values) < 2:
        return 1.0  # both signs are as extreme
    result = permutation_test(
        (values,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def metric_columns(measures: Sequence[str] = MEASURES) -> dict[str, Metric]:
    """The measures as columns of a result file."""
    return {name: Metric("", "higher", name, "quality" if name == MAIN else "") for name in measures}


COST_COLUMNS = {
    "p_zero_shot": Metric("", None, "p against zero-shot"),
    "p_bm25": Metric("", None, "p against BM25"),
    "latency_ms": Metric("ms", "lower", "median time of a query"),
    "index_bytes": Metric("bytes", "lower", "index"),
    "adapter_parameters": Metric("", None, "adapter's parameters", "cost"),
}

"""Measures against hand-worked rankings and slow loops, the test of significance against all flips, bad judgements."""

import itertools
import math
import random

import pytest

from polyrank.core.errors import ConfigError, DataError
from polyrank.retrieval.evaluate import Scores, compare, evaluate, match_qrels, permutation_p

pytest.importorskip("ir_measures")


def test_a_ranking_worked_by_hand():
    qrels = {"q": {"a": 2, "b": 1, "c": 1, "x": 0}}
    mean = evaluate({"q": ["b", "x", "a"]}, qrels, ["nDCG@10", "MAP", "Recall@2", "Recall@3", "MRR", "P@2"]).mean
    ideal = 2 + 1 / math.log2(3) + 1 / 2
    assert mean["nDCG@10"] == pytest.approx((1 + 2 / 2) / ideal)
    assert mean["MAP"] == pytest.approx((1 + 2 / 3) / 3)
    assert mean["Recall@2"] == pytest.approx(1 / 3)
    assert mean["Recall@3"] == pytest.approx(2 / 3)
    assert mean["MRR"] == 1
    assert mean["P@2"] == 0.5


def test_a_document_with_the_querys_own_identifier_is_in_no_ranking():
    """Worked by hand: with itself at rank 1 the query would have 1 / log2(3) = .63."""
    mean = evaluate({"a": ["a", "b"]}, {"a": {"b": 1}}, ["nDCG@10", "MRR", "P@1"]).mean
    assert mean == {"nDCG@10": 1.0, "MRR": 1.0, "P@1": 1.0}
    judged = match_qrels({"a": {"a": 1, "b": 1}, "q": {"b": 1}}, {"a", "q"}, {"a", "b"})
    assert judged.own == ("a",)
    assert "1 queries, as 'a', have a relevant document with their own identifier" in judged.notes()[0]


def slow_measures(ranking, grades, k):
    gains = [max(grades.get(document, 0), 0) for document in ranking]
    best = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
    total = len(best)
    dcg = sum(gain / math.log2(place + 2) for place, gain in enumerate(gains[:10]))
    ideal = sum(gain / math.log2(place + 2) for place, gain in enumerate(best[:10]))
    hits = [place for place, gain in enumerate(gains, 1) if gain]
    precisions = [number / place for number, place in enumerate(hits, 1)]
    return {
        "nDCG@10": dcg / ideal,
        "MAP": sum(precisions) / total,
        f"Recall@{k}": sum(place <= k for place in hits) / total,
        "MRR": 1 / hits[0] if hits else 0.0,
    }


def test_random_rankings_equal_a_slow_loop():
    draw = random.Random(0)
    documents = [f"d{i}" for i in range(60)]
    qrels, rankings = {}, {}
    for query in map(str, range(30)):
        qrels[query] = {d: draw.choice([-1, 0, 1, 2, 3]) for d in draw.sample(documents, 12)} | {"d0": 1}
        rankings[query] = draw.sample(documents, 40)
    scores = evaluate(rankings, qrels, ["nDCG@10", "MAP", "Recall@7", "MRR"])
    for query, grades in qrels.items():
        for name, value in slow_measures(rankings[query], grades, 7).items():
            assert scores.per_query[name][query] == pytest.approx(value, abs=1e-9), (query, name)


def test_a_query_without_a_ranking_counts_as_nothing():
    scores = evaluate({"q1": ["a"]}, {"q1": {"a": 1}, "q2": {"a": 1}}, ["nDCG@10", "MRR"])
    assert scores.mean == {"nDCG@10": 0.5, "MRR": 0.5}
    assert scores.per_query["MRR"] == {"q1": 1.0, "q2": 0.0}


def test_a_document_twice_in_a_ranking_is_an_error():
    with pytest.raises(DataError, match="'q' holds a document twice"):
        evaluate({"q": ["a", "b", "a"]}, {"q": {"a": 1}})


@pytest.mark.parametrize("name", ["ndcg", "Recall", "MAP@0", "nDCG@-1", "MRR@x", ""])
def test_an_unknown_measure_is_an_error(name):
    with pytest.raises(ConfigError, match="is none of nDCG@k"):
        evaluate({}, {"q": {"a": 1}}, [name])


def test_judgements_of_what_is_not_there_are_counted():
    qrels = {"q1": {"a": 1, "gone": 2}, "q2": {"gone": 1}, "q9": {"a": 1, "b": 0}, "q3": {"b": 0, "c": -1}}
    seen = match_qrels(qrels, ["q1", "q2", "q3", "q4"], {"a", "b", "c"})
    assert seen.qrels == {"q1": {"a": 1}}
    assert seen.unknown_queries == {"q9": 2}
    assert seen.unknown_documents == {"gone": 2}
    assert seen.unanswerable == ("q2", "q3")
    assert seen.unjudged == 1
    assert seen.notes() == [
        "left out: 2 qrels lines name a query that is not there, such as 'q9'",
        "left out: 2 qrels lines name an unknown document, such as 'gone'",
        "left out: 2 judged queries have no relevant document in the corpus, such as 'q2'",
    ]
    assert match_qrels({"q1": {"a": 1}}, ["q1"], ["a"]).notes() == []


def test_no_judgement_that_can_be_used_is_an_error():
    with pytest.raises(DataError, match="no query has a relevant document in the corpus: 1 judged queries, 1 of them"):
        match_qrels({"q9": {"a": 1}}, ["q1"], ["a"])


def all_flips(differences):
    """p by going through every choice of signs."""
    observed = abs(sum(differences)) - 1e-12
    signs = list(itertools.product([-1, 1], repeat=len(differences)))
    return sum(abs(sum(s * d for s, d in zip(row, differences, strict=True))) >= observed for row in signs) / len(signs)


@pytest.mark.parametrize(
    "differences", [[0.1, 0.3], [0.5] * 8, [0.2, -0.1, 0.4, 0.3, 0.05, 0.6, -0.02, 0.1, 0.3, 0.2], [0.0, 0.3, 0.0, 0.1]]
)
def test_p_equals_going_through_every_flip(differences):
    assert permutation_p(differences) == pytest.approx(all_flips(differences))


def test_p_of_many_queries():
    draw = random.Random(1)
    none = [draw.gauss(0, 1) for _ in range(200)]
    some = [value + 0.3 for value in none]
    from scipy.stats import ttest_1samp

    for values in (none, some):
        assert permutation_p(values) == pytest.approx(ttest_1samp(values, 0).pvalue, abs=0.015)
    assert permutation_p(some) == permutation_p(some[::-1]) == permutation_p([-value for value in some])  # seeded
    assert permutation_p([0.0] * 5) == permutation_p([]) == permutation_p([0.7]) == 1.0


def test_wins_and_losses_are_listed():
    ours = Scores({"nDCG@10": {"a": 0.9, "b": 0.2, "c": 0.5, "d": 0.6}})
    base = Scores({"nDCG@10": {"a": 0.1, "b": 0.6, "c": 0.5, "d": 0.5}})
    seen = compare(ours, base)
    assert [query for query, _ in seen.wins] == ["a", "d"]
    assert [query for query, _ in seen.losses] == ["b"]
    assert seen.ties == 1
    assert seen.difference == pytest.approx(0.125)
    assert seen.p_value == pytest.approx(all_flips([0.8, -0.4, 0.1]))
    assert compare(ours, ours).p_value == 1.0
    with pytest.raises(DataError, match="same queries"):
        compare(ours, Scores({"nDCG@10": {"a": 1.0}}))

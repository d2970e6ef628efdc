"""Captioning's sentence scores on cases worked by hand, against aac-metrics, and METEOR after an interruption."""

import json
import math
import shutil
from contextlib import contextmanager

import pytest

from polyrank.core.errors import DataError, RunError
from polyrank.evaluation.metrics import METRICS, SENTENCE_SCORES, caption, evaluate_predictions, read_predictions
from polyrank.evaluation.metrics._java import meteor_program
from polyrank.evaluation.metrics.sentence import sentence_scores

pytest.importorskip("pycocoevalcap")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")
HUMAN = [  # five people on each of three sounds
    ["A dog barks twice.", "Two barks of a dog", "A dog is barking", "the dog barked", "Barking, loud and near"],
    ["Rain falls on a roof", "It's raining on the roof", "Heavy rain", "water hits a tin roof", "rain falling"],
    ["A man talks, then a door closes", "A man speaks and shuts a door", "man talking", "Someone speaks", "A door"],
]


def records(*rows):
    """Rows: (candidates, references)."""
    return read_predictions([{"id": str(i), "candidates": c, "references": r} for i, (c, r) in enumerate(rows)])


def scores(name, *rows):
    """All candidates' scores in turn."""
    return [score for row in sentence_scores(name, records(*rows)) for score in row]


def figure(name, *rows):
    return METRICS.get(name).compute(records(*rows))


def test_oracle_is_the_best_of_k_and_mean_their_mean():
    # BLEU-1 of the first input: 1/2, 1, 0 (no words); of the second: 0, 1/3, 1/3
    rows = (["a x", "b a", "..."], ["a b"]), (["x y z", "a y z", "x b z"], ["a b c"])
    assert scores("bleu_1", *rows) == pytest.approx([1 / 2, 1, 0, 0, 1 / 3, 1 / 3], abs=1e-6)
    assert figure("oracle_bleu_1", *rows) == pytest.approx((1 + 1 / 3) / 2, abs=1e-6)
    assert figure("mean_bleu_1", *rows) == pytest.approx((1.5 / 3 + 2 / 9) / 2, abs=1e-6)


def test_bleu_by_hand():
    # precisions 4/5, 3/4, 2/3, 1/2, lengths equal
    row = (["A b c d, x!"], ["a b c d e"])
    for order, product in enumerate([4 / 5, 3 / 5, 2 / 5, 1 / 5], start=1):
        assert figure(f"oracle_bleu_{order}", row) == pytest.approx(product ** (1 / order), abs=1e-6)
    # the nearest reference has 3 words (4 words is as near for 3.5, not for 2): penalty exp(1 - 3/2)
    assert figure("oracle_bleu_1", (["a b"], ["a b c d", "a b c"])) == pytest.approx(math.exp(-0.5), abs=1e-6)
    # no match of order 4: the scripts give 1e-15 for it, so the fourth root is next to 0
    assert figure("oracle_bleu_4", (["a b c x"], ["a b c d"])) < 1e-3


def test_rouge_l_by_hand():
    # longest common subsequence a c e: 3 of 4 and 3 of 5 words
    precision, recall = 3 / 4, 3 / 5
    expected = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert figure("oracle_rouge_l", (["a x c e"], ["a b c d e"])) == pytest.approx(expected)
    assert figure("mean_rouge_l", (["a b", "x"], ["a b"])) == pytest.approx((1 + 0) / 2)


def test_cider_d_by_hand():
    # Every n-gram stands in one of two inputs, so all weigh log 2 and cancel in the cosine. "a b c" against "a b c d":
    # unigrams 3 / sqrt(3 * 4), pairs 2 / sqrt(2 * 3), triples 1 / sqrt(1 * 2), quadruples 0; one word less: exp(-1/72).
    cosines = 3 / math.sqrt(12) + 2 / math.sqrt(6) + 1 / math.sqrt(2)
    expected = 10 * cosines / 4 * math.exp(-1 / 72)
    rows = (["a b c", "a b c d"], ["a b c d"]), (["q", ""], ["r s"])
    assert scores("cider_d", *rows) == pytest.approx([expected, 10, 0, 0])
    # the same n-grams clipped: "a a" has one a too many, and 2 / (2 * 1) becomes 1 * 1 / (2 * 1)
    clipped = scores("cider_d", (["a a"], ["a"]), (["q"], ["r"]))[0]
    assert clipped == pytest.approx(10 / 4 * (1 / 2) * math.exp(-1 / 72))


def test_cider_d_weighs_by_the_references_of_all_inputs_alike_for_every_candidate():
    # "a" stands in both inputs' references: it weighs log(2/2) = 0, so only b counts, whatever the other candidates are
    rows = (["a b", "a"], ["a b"]), (["a c", "z"], ["a c"])
    alone = scores("cider_d", (["a b"], ["a b"]), (["z"], ["a c"]))[0]
    assert scores("cider_d", *rows)[:2] == pytest.approx([alone, 0])


@needs_java
def test_meteor_by_hand():
    # Words that no dictionary has. 2 of 2 and 2 of 3 words match: Fmean = P R / (0.85 P + 0.15 R). One chunk over two
    # matches: penalty 0.6 * 0.5^0.2. (Equal texts have no penalty.)
    fmean = 1 * (2 / 3) / (0.85 * 1 + 0.15 * 2 / 3)
    expected = fmean * (1 - 0.6 * 0.5**0.2)
    rows = (["Zork blip!", "", "zork blip flum"], ["zork, blip flum", "."]), (["qq", "ww", "zork"], ["vrr tii"])
    assert scores("meteor", *rows) == pytest.approx([expected, 0, 1, 0, 0, 0], abs=1e-9)


def test_spider_is_the_mean_of_cider_d_and_spice(monkeypatch):
    rows = records((["a b", "x"], ["a b"]), (["q", "r s"], ["r s"]))
    given = {"cider_d": [[4.0, 0.0], [0.0, 5.0]], "spice": [[0.5, 0.25], [0.0, 1.0]]}
    monkeypatch.setattr(caption, "sentence_scores", lambda name, _: given[name])
    assert SENTENCE_SCORES.get("spider").compute(rows) == [[2.25, 0.125], [0.0, 3.0]]
    # the best SPIDEr is that of one candidate, not the mean of the two best scores
    given["cider_d"][0], given["spice"][0] = [2.0, 0.0], [0.0, 1.0]
    assert METRICS.get("oracle_spider").compute(rows) == (1.0 + 3.0) / 2


def test_equal_to_aac_metrics_where_the_words_are_the_same():
    functional = pytest.importorskip("aac_metrics.functional")
    rows = [{"id": str(i), "candidates": group[:2], "references": group[2:]} for i, group in enumerate(HUMAN)]
    checked = read_predictions(rows)
    for name, compute in {
        "bleu_1": lambda c, r: functional.bleu_1(c, r)[1]["bleu_1"],
        "bleu_4": lambda c, r: functional.bleu_4(c, r)[1]["bleu_4"],
        "rouge_l": lambda c, r: functional.rouge_l(c, r)[1]["rouge_l"],
        "cider_d": lambda c, r: functional.cider_d(c, r)[1]["cider_d"],
    }.items():
        ours = sentence_scores(name, checked)
        for k in range(2):
            pairs = caption.caption_pairs(checked)[k::2]
            theirs = compute([c for c, _ in pairs], [list(r) for _, r in pairs])
            assert [row[k] for row in ours] == pytest.approx(theirs.tolist(), abs=1e-9), name


def test_references_without_a_word():
    with pytest.raises(DataError, match="id '1': no reference holds a word"):
        evaluate_predictions(
            [{"id": str(i), "candidates": ["a"], "references": [text]} for i, text in enumerate(["a", "?!"])],
            ["oracle_bleu_1"],
        )


# --- METEOR, cut off ------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_meteor(monkeypatch):
    """METEOR that counts what it is asked, is interrupted at the n-th call, and scores by length."""
    asked = []

    @contextmanager
    def program():
        def score(pairs):
            if len(asked) == program.interrupt_at:
                program.interrupt_at = -1
                raise KeyboardInterrupt
            asked.append([text for text, _ in pairs])
            return 0.0, [len(text) / 100 for text, _ in pairs]

        yield score

    program.interrupt_at = -1
    monkeypatch.setattr(caption, "meteor_program", program)
    monkeypatch.setattr("polyrank.evaluation.metrics._registry.shutil.which", lambda name: name)
    return program, asked


def test_an_evaluation_that_was_cut_off_goes_on(tmp_path, fake_meteor):
    program, asked = fake_meteor
    rows = [{"id": str(i), "candidates": [f"w{i}", f"w{i} x", "same"], "references": ["same"]} for i in range(60)]
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    program.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        evaluate_predictions(file, ["oracle_meteor"])
    kept = tmp_path / "sentence_scores" / "meteor-1.5-en.jsonl"
    assert len(kept.read_text().splitlines()) == 1
    kept.write_bytes(kept.read_bytes() + b'{"torn": 0.')
    first = evaluate_predictions(tmp_path, ["oracle_meteor", "mean_meteor"])
    assert first["oracle_meteor"] == pytest.approx(sum(max(len(f"w{i} x"), 4) for i in range(60)) / 6000)
    texts = [text for batch in asked for text in batch]
    assert len(texts) == len(set(texts)) == 121  # nothing twice, equal pairs once
    assert evaluate_predictions(file, ["oracle_meteor", "mean_meteor"]) == first
    assert len(asked) == 2  # 64 and 57: all scores were known


def test_scores_are_kept_by_what_was_scored(tmp_path, fake_meteor):
    _, asked = fake_meteor
    file = tmp_path / "predictions.jsonl"
    row = {"id": "a", "candidates": ["a b"], "references": ["a b"]}
    file.write_text(json.dumps(row))
    evaluate_predictions(file, ["mean_meteor"])
    file.write_text(json.dumps(row | {"id": "z", "references": ["a c"]}))
    evaluate_predictions(file, ["mean_meteor"])
    assert len(asked) == 2  # another reference is another score; another id is not
    file.write_text(json.dumps(row | {"id": "y"}))
    evaluate_predictions(file, ["mean_meteor"])
    assert len(asked) == 2


def test_a_file_of_scores_that_is_something_else(tmp_path, fake_meteor):
    file = tmp_path / "predictions.jsonl"
    file.write_text(json.dumps({"id": "a", "candidates": ["a"], "references": ["a"]}))
    kept = tmp_path / "sentence_scores" / "meteor-1.5-en.jsonl"
    kept.parent.mkdir()
    kept.write_text("[1]\n")
    with pytest.raises(DataError, match=r"meteor-1.5-en.jsonl is no file of sentence scores; delete it"):
        evaluate_predictions(file, ["mean_meteor"])


@needs_java
def test_a_meteor_program_that_dies(monkeypatch):
    from pycocoevalcap.meteor.meteor import Meteor

    programs = []
    start = Meteor.__init__
    monkeypatch.setattr(Meteor, "__init__", lambda self: (start(self), programs.append(self.meteor_p))[0])
    with meteor_program() as score:
        programs[0].kill()
        programs[0].wait()
        with pytest.raises(RunError, match="METEOR's Java program failed"):
            score([("a", ["a"])])

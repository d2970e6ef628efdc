"""`evaluate` on files as they come: presets, what the machine lacks, incomplete inputs, the command line."""

import json
import logging
from argparse import Namespace

import pytest

from polyrank.core.errors import ConfigError, DataError, UnknownNameError
from polyrank.evaluation.metrics import METRICS, PRESETS, _registry, evaluate, evaluate_predictions, quality
from polyrank.recipes.commands import evaluate_command

CAPTIONS = [
    {"id": "a", "candidates": ["a dog barks", "rain"], "references": ["a dog is barking", "the dog barks"]},
    {"id": "b", "candidates": ["a man", "a door shuts"], "references": ["a door shuts"]},
]
BROKEN = [
    {"id": "none", "candidates": ["x", "y"], "references": []},
    {"id": "absent", "candidates": ["x", "y"], "nll": [[1.0, 2.0]]},
    {"id": "blank", "candidates": ["x", "y"], "references": [" ", ""]},
    {"id": "short", "candidates": ["x"], "references": ["z"], "scores": [1.0]},
    {"id": "silent", "references": ["z"], "scores": [1.0, 2.0]},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run" / "predictions.jsonl"
    path.parent.mkdir()

    def write(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    return write


def command(source, metrics=None, model=None, skipped=None, as_json=True):
    evaluate_command(
        Namespace(source=str(source), out=None, metrics=metrics, model=model, skipped=skipped, json=as_json, quiet=True)
    )


def test_presets_name_metrics_that_exist():
    assert {"caption", "translation"} <= set(PRESETS)
    for name, members in PRESETS.items():
        assert name not in METRICS
        assert len(members) == len(set(members))
        for member in members:
            METRICS.get(member)
    scores = {name.split("_", 1)[1] for name in PRESETS["caption"] if name.startswith("oracle_")} - {"nll"}
    assert {"bleu_4", "meteor", "rouge_l", "cider_d", "spice", "spider", "spider_fl", "sbert", "fense"} <= scores
    for score in scores:
        oracle = METRICS.get(f"oracle_{score}")
        assert oracle.better == ("lower" if score == "fer" else "higher")


def test_a_preset_leaves_out_what_the_machine_lacks_and_says_so(monkeypatch):
    for need in _registry.INSTALLED:
        monkeypatch.setitem(_registry.INSTALLED, need, (f"the thing {need}", lambda need=need: need == "pycocoevalcap"))
    found = evaluate(CAPTIONS, ["caption", "mean_bleu"])
    assert found.left_out["oracle_meteor"] == "the thing java"
    assert found.left_out["mean_sbert"] == "the thing sentence_transformers"
    assert found.left_out["oracle_nll"].startswith("'nll' (absent for 2 of 2")
    assert set(found.figures) | set(found.left_out) >= set(PRESETS["caption"]) | {"mean_bleu"}
    assert not set(found.figures) & set(found.left_out)
    with pytest.raises(DataError, match="metric 'oracle_meteor' needs the thing java"):
        evaluate(CAPTIONS, ["caption", "oracle_meteor"])  # asked for by its own name
    with pytest.raises(UnknownNameError, match="unknown metric 'captions'; did you mean 'caption'"):
        evaluate(CAPTIONS, ["captions"])


def test_the_translation_preset():
    found = evaluate(CAPTIONS, ["translation"])
    assert set(PRESETS["translation"]) - set(found.figures) == set(found.left_out)
    assert (
        found.figures["leave_one_out_bleu"]
        == evaluate_predictions(CAPTIONS, ["leave_one_out_bleu"])["leave_one_out_bleu"]
    )
    assert set(found.left_out) == {name for name in PRESETS["translation"] if METRICS.get(name).needs & {"nll"}}


def test_hypothesis_bleu_by_hand():
    # hypothesis 0: 4 of 4, 3 of 3, 2 of 2, 1 of 1 and 4 of 5, 3 of 4, 2 of 3, 1 of 2; hypothesis 1: nothing matches
    rows = [
        {"id": "a", "candidates": ["a b c d", "z"], "references": ["a b c d", "z"]},
        {"id": "b", "candidates": ["e f g h x", "z"], "references": ["e f g h y"]},
    ]
    found = evaluate_predictions(rows, ["hypothesis_bleu"])["hypothesis_bleu"]
    assert found == pytest.approx([100 * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25, 0])
    assert found[0] == pytest.approx(quality.corpus_bleu_score(["a b c d", "e f g h x"], [["a b c d"], ["e f g h y"]]))


# --- incomplete inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", BROKEN, ids=lambda row: row["id"])
def test_an_incomplete_input_is_an_error_unless_it_may_be_skipped(broken, tmp_path):
    rows = [*CAPTIONS, broken]
    if broken["id"] != "blank":  # an empty reference is a reference
        with pytest.raises(DataError, match=rf"{broken['id']}"):
            evaluate(rows, ["div_1"])
    found = evaluate(rows, ["div_1", "mean_bleu"], skipped=tmp_path / "skipped.jsonl")
    assert found.figures == evaluate(CAPTIONS, ["div_1", "mean_bleu"]).figures
    (item,) = found.skipped
    assert item.id == broken["id"]


def test_skipped_inputs_are_listed(file, tmp_path):
    path = file([CAPTIONS[0], *BROKEN, CAPTIONS[1]])
    listed = tmp_path / "skipped.jsonl"
    evaluate(path, ["div_1"], skipped=listed)
    reasons = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(item["id"], item["reason"]) for item in reasons] == [
        ("none", "no references"),
        ("absent", "no references"),
        ("blank", "every reference is empty"),
        ("short", "1 candidates of 2"),
        ("silent", "no candidates"),
    ]
    assert reasons[0]["where"] == f"{path}, line 2"
    evaluate(file(CAPTIONS), ["div_1"], skipped=listed)
    assert listed.read_text() == ""


def test_damage_is_an_error_even_where_inputs_may_be_skipped(file, tmp_path):
    for rows, words in {
        "candidates must be": [*CAPTIONS, {"id": "c", "candidates": "abc", "references": ["x"]}],
        "appears twice": [*CAPTIONS, CAPTIONS[0]],
        "all of 5 inputs are incomplete": BROKEN,
    }.items():
        with pytest.raises(DataError, match=rows.replace("candidates must", "'candidates' must")):
            evaluate(words, ["div_1"], skipped=tmp_path / "skipped.jsonl")


def test_empty_candidates_count_and_are_told(caplog):
    pytest.importorskip("pycocoevalcap")
    rows = [{"id": "a", "candidates": ["a b", ""], "references": ["a b"]}]
    with caplog.at_level(logging.WARNING, logger="polyrank"):
        found = evaluate_predictions(
            rows, ["mean_bleu_1", "oracle_bleu_1", "mean_rouge_l", "mean_cider_d", "mean_bleu"]
        )
    assert "1 of 2 candidates are empty" in caplog.text
    assert found["mean_bleu_1"] == pytest.approx(0.5, abs=1e-6)
    assert found["oracle_bleu_1"] == pytest.approx(1, abs=1e-6)
    assert (found["mean_rouge_l"], found["mean_bleu"]) == pytest.approx((0.5, 50))


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(file, monkeypatch, caplog):
    pytest.importorskip("pycocoevalcap")
    path = file(CAPTIONS)
    (path.parent / "sentence_scores").write_text("a file where the folder would be")
    from polyrank.evaluation.metrics._score_files import score_pairs
    from polyrank.evaluation.metrics._session import session

    def score(batches):
        for batch in batches:
            yield [1.0] * len(batch)

    with session(folder=path.parent / "sentence_scores"), caplog.at_level(logging.WARNING, logger="polyrank"):
        assert score_pairs("x", [("a", ("b",)), ("c", ("d",))], score, kept="1", batch=1) == [1, 1]
    assert caplog.text.count("sentence scores are not kept") == 1


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_line(file, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setitem(_registry.INSTALLED, "java", ("Java", lambda: False))
    path = file([*CAPTIONS, BROKEN[0]])
    with caplog.at_level(logging.WARNING, logger="polyrank"):
        command(path, "caption, mean_bleu", skipped=str(tmp_path / "s.jsonl"))
    shown = json.loads(capsys.readouterr().out)
    assert shown["num_examples"] == 2
    assert shown["num_skipped"] == 1
    assert shown["left_out"]["mean_meteor"] == "Java"
    assert shown["mean_bleu"] == evaluate_predictions(CAPTIONS, ["mean_bleu"])["mean_bleu"]
    assert "left out oracle_meteor, mean_meteor" in caplog.text
    assert f"skipped 1 incomplete inputs; they are listed in {tmp_path / 's.jsonl'}" in caplog.text
    command(path.parent, "div_1", skipped=str(tmp_path / "s.jsonl"), as_json=False)
    assert "div_1" in capsys.readouterr().out
    for given, words in {
        "sbert": "write KIND=FOLDER",
        "sbret=x": "did you mean 'sbert'",
        "sbert=": "give a folder",
    }.items():
        with pytest.raises(ConfigError, match=words):
            command(file(CAPTIONS), "div_1", model=[given])

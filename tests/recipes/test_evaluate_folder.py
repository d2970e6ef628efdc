"""`polyrank evaluate FOLDER` on runs written by hand: names, figures, what is missing, what is not computed twice."""

import csv
import json
import logging
from argparse import Namespace

import pytest

from polyrank.core.errors import DataError
from polyrank.core.records import Metric, Row, new_record, read_record, record_to_json
from polyrank.evaluation.metrics import evaluate_predictions
from polyrank.recipes._commands import evaluate_folder as _evaluate_folder
from polyrank.recipes._commands.evaluate_folder import evaluate_folder, evaluate_folder_command, is_folder_of_runs
from polyrank.recipes._commands.run_folders import written_below

REFERENCES = {"a": ["a dog barks loudly", "the dog barks"], "b": ["rain falls on a roof"], "c": ["two men talk"]}
GOOD = {"a": ["a dog barks loudly", "the dog barks"], "b": ["rain falls on a roof", "rain"], "c": ["two men talk"] * 2}
FAIR = {"a": ["a dog barks", "the dog barks"], "b": ["rain falls on a roof", "roof"], "c": ["two men", "men talk"]}
OTHER = {"a": ["a dog barks", "dog"], "b": ["rain falls on", "a roof"], "c": ["men", "two"]}
POOR = {"a": ["a dog barks", "a cat"], "b": ["rain falls on a", "a roof"], "c": ["men", "two men"]}
NAMES = ["oracle_bleu", "mbleu_4"]


def write(path, candidates, references=REFERENCES):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": i, "candidates": c, "references": references[i]}) for i, c in candidates.items()]
    path.write_text("".join(f"{line}\n" for line in lines))


def run_folder(folder, method, seed, written):
    """A finished run as the recipes leave one: `written` is {decoding: candidates}, the first the run's own."""
    rows = []
    for i, (decoding, candidates) in enumerate(written.items()):
        write((folder / "decodings" / f"test-{decoding}" if i else folder) / "predictions.jsonl", candidates)
        settings = {"K": 2, "decoding": decoding, "budget": 2}
        rows.append(Row(method, {"oracle_bleu": 1.0, "decode_tokens": 10.0 + i}, seed, settings))
    columns = {"oracle_bleu": Metric("BLEU", "higher"), "decode_tokens": Metric("tokens", role="cost")}
    details = {"decodings": {f"test-{name}": {} for name in written}}
    (folder / "result.json").write_text(record_to_json(new_record("x", "run", columns, rows, details=details)))
    (folder / "adapter").mkdir()


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    run_folder(folder / "table" / "mle-seed0", "LoRA-MLE r=2", 0, {"beam": POOR, "beam-x2": FAIR})
    run_folder(folder / "table" / "mcl-seed0", "LoRA-MCL r=2", 0, {"mcl": GOOD})
    (folder / "table" / "config.yaml").write_text("recipe: audio_captioning/table\n")
    write(folder / "theirs" / "predictions.jsonl", OTHER)  # of another program: no result.json
    return folder


def test_each_file_has_the_name_that_its_run_gave_it(runs):
    found = {item.path.relative_to(runs).as_posix(): item for item in written_below(runs)}
    own, other = found["table/mle-seed0/predictions.jsonl"], found["theirs/predictions.jsonl"]
    second = found["table/mle-seed0/decodings/test-beam-x2/predictions.jsonl"]
    assert (own.method, own.seed, own.settings["decoding"]) == ("LoRA-MLE r=2", 0, "beam")
    assert (second.settings["decoding"], second.costs) == ("beam-x2", {"decode_tokens": 11.0})
    assert (other.method, other.seed, other.settings) == ("theirs", None, {})
    assert len(found) == 4
    run_folder(runs / "again", "LoRA-MCL r=2", 0, {"mcl": POOR})  # a second run called the same
    same = [item.settings["run"] for item in written_below(runs) if item.method == "LoRA-MCL r=2"]
    assert same == ["again", "table/mcl-seed0"]


def test_the_figures_are_those_of_each_file_and_the_tables_hold_them(runs):
    done = evaluate_folder(runs, metrics=NAMES)
    out = runs / "evaluation"
    record = read_record(out / "result.json")
    assert len(record.rows) == done.new == 4
    by_name = {(row.method, row.settings.get("decoding")): row.figures for row in record.rows}
    alone = evaluate_predictions(runs / "table" / "mle-seed0" / "decodings" / "test-beam-x2", NAMES)
    assert {name: by_name["LoRA-MLE r=2", "beam-x2"][name] for name in NAMES} == {name: alone[name] for name in NAMES}
    assert by_name["LoRA-MCL r=2", "mcl"]["oracle_bleu"] == pytest.approx(100)
    assert by_name["LoRA-MCL r=2", "mcl"]["decode_tokens"] == 10
    assert record.metrics["oracle_bleu"].role == "quality"
    assert record.metrics["mbleu_4"].role == "diversity"
    with (out / "table.csv").open() as file:
        lines = {(line["method"], line["decoding"]): line for line in csv.DictReader(file)}
    assert float(lines["LoRA-MLE r=2", "beam-x2"]["oracle_bleu"]) == alone["oracle_bleu"]
    tex = (out / "table.tex").read_text().splitlines()
    assert any(line.startswith("LoRA-MCL") and r"\textbf{100" in line for line in tex)
    assert any(r" beam-x2 " in line and r"\underline{" in line for line in tex)
    assert (out / "quality-diversity.png").read_bytes().startswith(b"\x89PNG")
    listed = json.loads((out / "checkpoints.json").read_text())
    assert [entry["adapter"] for entry in listed] == ["table/mcl-seed0/adapter", "table/mle-seed0/adapter"]
    assert listed[0]["recipe"] == "audio_captioning/table"


def test_nothing_is_scored_twice(runs, monkeypatch):
    first = evaluate_folder(runs, metrics=NAMES).record
    run_folder(runs / "more", "LoRA-MCL r=4", 1, {"mcl": {**GOOD, "a": ["x", "y"]}})
    calls, evaluate = [], _evaluate_folder.evaluate
    monkeypatch.setattr(
        _evaluate_folder, "evaluate", lambda path, *a, **k: calls.append(path) or evaluate(path, *a, **k)
    )
    done = evaluate_folder(runs, metrics=NAMES)
    assert calls == [runs / "more" / "predictions.jsonl"]
    assert [row for row in done.record.rows if row.method != "LoRA-MCL r=4"] == list(first.rows)
    write(
        runs / "theirs" / "predictions.jsonl", {**GOOD, "b": ["x", "y"]}
    )  # other predictions, another metric: scored anew
    assert evaluate_folder(runs, metrics=NAMES).new == 1
    assert evaluate_folder(runs, metrics=["div_1"]).new == 5
    assert evaluate_folder(runs, metrics=NAMES).new == 0


def test_an_interrupted_evaluation_goes_on(runs, monkeypatch):
    evaluate, calls = _evaluate_folder.evaluate, []

    def dying(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(path, *args, **kwargs)

    monkeypatch.setattr(_evaluate_folder, "evaluate", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate_folder(runs, metrics=NAMES)
    with (runs / "evaluation" / "scored.jsonl").open("a") as file:
        file.write('{"key": "torn')
    assert evaluate_folder(runs, metrics=NAMES).new == 2
    assert len(calls) == 5


def test_predictions_that_lack_inputs(runs, tmp_path):
    write(runs / "cut" / "predictions.jsonl", {"a": POOR["a"], "b": POOR["b"]})
    with pytest.raises(DataError, match=r"cut/predictions.jsonl lacks 1 of 3 inputs .* \(first: id 'c'\): finish"):
        evaluate_folder(runs, metrics=NAMES)
    done = evaluate_folder(runs, metrics=NAMES, skipped=tmp_path / "skipped.jsonl")
    assert [(item.id, item.reason) for item in done.skipped] == [("c", "no such input here, but in other runs")]
    assert "cut/predictions.jsonl" in json.loads((tmp_path / "skipped.jsonl").read_text())["where"]
    by_name = {(row.method, row.settings.get("decoding")): row.figures for row in done.record.rows}
    two = [{"id": i, "candidates": POOR[i], "references": REFERENCES[i]} for i in "ab"]
    assert by_name["cut", None]["oracle_bleu"] == evaluate_predictions(two, NAMES)["oracle_bleu"]
    assert by_name["LoRA-MLE r=2", "beam"]["oracle_bleu"] == by_name["cut", None]["oracle_bleu"]


def test_candidates_missing_for_one_input_of_one_run(runs, tmp_path):
    write(runs / "short" / "predictions.jsonl", {**POOR, "b": ["rain"]})
    with pytest.raises(DataError, match="number of candidates differs: 2 for id 'a', 1 for id 'b'"):
        evaluate_folder(runs, metrics=NAMES)
    done = evaluate_folder(runs, metrics=NAMES, skipped=tmp_path / "skipped.jsonl")
    assert [(item.id, item.reason) for item in done.skipped] == [("b", "1 candidates of 2")]
    two = [{"id": i, "candidates": POOR[i], "references": REFERENCES[i]} for i in "ac"]
    wanted = evaluate_predictions(two, NAMES)
    same = [row for row in done.record.rows if row.method == "short" or row.settings.get("decoding") == "beam"]
    assert len(same) == 2
    for row in same:
        assert {name: row.figures[name] for name in NAMES} == {name: wanted[name] for name in NAMES}


def test_another_test_set_is_no_reason_to_leave_inputs_out(runs):
    other = {"a": ["zwei Hunde"], "z": ["ein Auto"]}  # an id alike, other references
    write(runs / "german" / "predictions.jsonl", {"a": ["zwei", "x"], "z": ["Auto", "y"]}, other)
    rows = evaluate_folder(runs, metrics=["div_1"]).record.rows
    assert len(rows) == 5
    for item in (runs / "elsewhere", runs / "table" / "mcl-seed0" / "adapter"):
        with pytest.raises(DataError, match=r"no such folder|holds no predictions\.jsonl"):
            evaluate_folder(item)


def test_a_metric_that_some_file_has_no_fields_for(runs):
    write(runs / "single" / "predictions.jsonl", {i: [c[0]] for i, c in GOOD.items()})
    done = evaluate_folder(runs, metrics=NAMES)
    rows = {row.method: row.figures for row in done.record.rows}
    assert rows["single"].keys() & set(NAMES) == {"oracle_bleu"}
    assert rows["theirs"].keys() >= set(NAMES)
    assert done.left_out["mbleu_4"].startswith("at least two candidates (absent for 3 of 3 ids")
    with pytest.raises(DataError, match="metric 'mbleu_4' needs at least two candidates"):
        evaluate_folder(runs / "single", metrics=["mbleu_4"])
    with pytest.raises(DataError, match="metric 'oracle_nll' needs 'nll'"):
        evaluate_folder(runs, metrics=["oracle_nll"])


def test_the_command(runs, capsys, caplog, tmp_path):
    assert is_folder_of_runs(str(runs))
    assert not is_folder_of_runs(str(runs / "theirs"))
    args = Namespace(source=str(runs), out=str(tmp_path / "out"), metrics="oracle_bleu,mbleu_4,diversity", model=None,
                     skipped=None, json=True, quiet=True)  # fmt: skip
    with caplog.at_level(logging.INFO, logger="polyrank"):
        evaluate_folder_command(args)
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["rows"]) == 4
    assert f"{tmp_path}/out/table.tex" in shown["files"]
    assert "4 files, 4 of them scored now" in caplog.text
    args.json = False
    evaluate_folder_command(args)
    text = capsys.readouterr().out
    assert "LoRA-MCL r=2" in text
    assert "quality-diversity.png" in text

"""Corpora, judgements, predictions and results that were damaged on the way or made to do damage."""

import csv
import gzip
import json
import random

import hostile_files as hostile
import pytest

from polyrank.core.errors import ConfigError, DataError
from polyrank.core.records import Metric, Row, new_record, read_record, write_record
from polyrank.evaluation.metrics.predictions import read_predictions
from polyrank.retrieval import corpus
from polyrank.retrieval.corpus import read_corpus, read_qrels, read_queries

polyrank = hostile.polyrank
LINES = "".join(json.dumps({"_id": f"d{i}", "title": f"t {i}", "text": f"words of {i}"}) + "\n" for i in range(6))
TABLE = "_id,title,text\n" + "".join(f'd{i},t {i},"words, of {i}"\n' for i in range(6))
QRELS = "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(6))
FILES = {
    "corpus.jsonl": LINES.encode(),
    "corpus.csv": TABLE.encode(),
    "corpus.jsonl.gz": gzip.compress(LINES.encode(), mtime=0),
    "corpus.csv.gz": gzip.compress(TABLE.encode(), mtime=0),
    "test.tsv": QRELS.encode(),
}


def damaged(content, seed):
    """Cut, flipped in one to three bits, a piece doubled or replaced by noise: by seed."""
    chance = random.Random(seed)
    content = bytearray(content)
    place = chance.randrange(len(content))
    match seed % 4:
        case 0:
            return bytes(content[:place])
        case 1:
            for _ in range(chance.randint(1, 3)):
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        case 2:
            content[place:place] = content[: chance.randrange(1, 40)]
        case 3:
            content[place : place + 10] = chance.randbytes(10)
    return bytes(content)


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("name", FILES)
def test_damaged_documents_and_judgements(tmp_path, name, seed):
    path = tmp_path / name
    path.write_bytes(damaged(FILES[name], seed))
    if name == "test.tsv":
        hostile.either(read_qrels, path, DataError)
        return
    hostile.either(lambda path: list(read_corpus(path)), path, DataError)
    hostile.either(read_queries, path, DataError)


QUERY_FILES = {
    "lone-bracket": b"[",
    "nested": b'{"_id": "a", "text": "x", "more": ' + b"[" * 100_000 + b"}\n",
    "repeated-key": b'{"_id": "a", "_id": "b", "text": "x"}\n',
    "not-a-number": b'{"_id": "a", "text": NaN}\n',
    "digits": b'{"_id": ' + b"9" * 5000 + b', "text": "x"}\n',
    "infinity": b'{"_id": "a", "text": "x", "score": 1e999}\n',
    "boolean": b'{"_id": true, "text": "x"}\n',
    "object": b'{"_id": {"a": 1}, "text": "x"}\n',
    "list": b'{"_id": "a", "text": ["x"]}\n',
    "nul": b'{"_id": "a\x00", "text": "x"}\n',
    "pickle": b"\x80\x04\x95" + bytes(100),
    "zip": b"PK\x03\x04" + bytes(100),
    "html": hostile.HTML.encode(),
    "utf-16": LINES.encode("utf-16"),
}


@pytest.mark.parametrize("name", QUERY_FILES)
def test_corpora_that_are_none(polyrank, tmp_path, name):
    pytest.importorskip("faiss")
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(QUERY_FILES[name])
    for reader in (lambda path: list(read_corpus(path)), read_queries):
        with pytest.raises(DataError, match=r"corpus\.jsonl"):
            reader(path)
    if name in ("nested", "pickle"):  # the encoder is loaded before the corpus is read
        done = polyrank(["gpl", "run", f"corpus={path}", f"runs_dir={tmp_path / 'runs'}", "run_name=x", "--quiet"])
        hostile.check_one_line(done, (2,))


@pytest.mark.parametrize(
    "grade", ["²", "--5", "9" * 5000, "1e3", "nan", "0x10", "٣", "1 1", "", "+", hostile.CONTROL, "9" * 19]
)
def test_grades_that_are_no_whole_numbers(tmp_path, grade):
    (tmp_path / "q.tsv").write_text(f"q\td\t1\nq\td2\t{grade}\n")
    with pytest.raises(DataError, match=r"line 2: expected query-id"):
        read_qrels(tmp_path / "q.tsv")


@pytest.mark.parametrize("name", ["big.jsonl.gz", "big.csv.gz", "big.jsonl", "folder"])
def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpus, "LONGEST_LINE", 100_000)
    text = b'{"_id": "a", "text": "' + bytes(10_000_000).replace(b"\0", b"x")
    if name == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / name / "big.txt").write_bytes(text)
    else:
        (tmp_path / name).write_bytes(gzip.compress(text, 1) if name.endswith("gz") else text)
    with pytest.raises(DataError, match=r"longer than 100000 characters|field larger"):
        list(read_corpus(tmp_path / name))
    csv.field_size_limit(131072)


@pytest.mark.parametrize("name", ["../outside.tsv", "/etc/passwd", "..", "a\0b", hostile.CONTROL])
def test_splits_and_kinds_from_elsewhere(tmp_path, name):
    (tmp_path / "qrels").mkdir()
    with pytest.raises((DataError, ConfigError)):
        read_qrels(tmp_path, name)
    with pytest.raises((DataError, ConfigError)):
        list(read_corpus(tmp_path / "qrels" / name))


GOOD = {"id": "a", "input": "x", "candidates": ["b c", "d"], "references": ["b c"], "scores": [0.5, 0.1]}
PREDICTIONS = {
    "nll-of-text": {"nll": "a"},
    "nll-nested": {"nll": [[[1, 2]]]},
    "nll-huge": {"nll": [[10**400, 1]]},
    "scores-text": {"scores": ["a", "b"]},
    "scores-huge": {"scores": [10**400, 1]},
    "scores-object": {"scores": {"a": 1}},
    "scores-booleans": {"scores": [True, False]},
    "no-candidates": {"candidates": []},
    "candidates-text": {"candidates": "ab"},
    "candidates-numbers": {"candidates": [1, 2]},
    "references-null": {"references": None},
    "references-object": {"references": {}},
    "id-number": {"id": 5},
    "id-list": {"id": ["a"]},
    "id-empty": {"id": ""},
    "meta-list": {"meta": [1]},
    "tokens-negative": {"meta": {"nll_tokens": [-1]}},
    "tokens-text": {"meta": {"nll_tokens": "5"}},
    "not-a-number": {"scores": [hostile.NAN, 1.0]},
    "infinite": {"scores": [hostile.INFINITY, 1.0]},
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_of_another_form(polyrank, tmp_path, name):
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({**GOOD, **PREDICTIONS[name]}) + "\n")
    hostile.check_one_line(polyrank(["evaluate", str(path), "--metrics", "oracle_bleu"]), (2,))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_predictions(polyrank, tmp_path, seed):
    lines = "".join(json.dumps({**GOOD, "id": f"a{i}"}) + "\n" for i in range(3))
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(damaged(lines.encode(), seed))
    hostile.either(read_predictions, path, DataError)
    hostile.check_one_line(
        polyrank(["evaluate", str(path), "--metrics", "pairwise_bleu", "--skipped", str(tmp_path / "skipped")])
    )


@pytest.mark.parametrize(
    "text",
    [hostile.HTML, hostile.CONTROL, "\0", "\ud800", "", " ", "a" * 100_000, "\u202e" * 10, "%s %(x)s {0}"],
    ids=["html", "control", "nul", "surrogate", "empty", "space", "long", "turned", "format"],
)
def test_captions_of_any_text_are_scored(polyrank, tmp_path, text):
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({**GOOD, "candidates": [text, "b c"], "references": ["b c", text]}) + "\n")
    done = polyrank(["evaluate", str(path), "--metrics", "oracle_bleu,pairwise_bleu,div_1", "--json"])
    hostile.check_one_line(done, (0,))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    rows = [Row("LoRA", {"bleu": 30.0}, 0, {"rank": 4}), Row("MCL", {"bleu": 31.0}, 0, {"rank": 4})]
    record = new_record("x", "run", {"bleu": Metric("%", "higher", role="quality")}, rows, config={"a": 1}, time_s=1.0)
    return json.loads(write_record(record, tmp_path_factory.mktemp("result") / "x.json").read_text())


RESULTS = {
    "schema-2": {"schema": 2},
    "schema-0": {"schema": 0},
    "schema-text": {"schema": "1"},
    "schema-none": {"schema": None},
    "schema-half": {"schema": 1.5},
    "schema-huge": {"schema": 10**200},
    "schema-true": {"schema": True},
    "name-path": {"name": "../../x"},
    "name-absolute": {"name": "/etc/passwd"},
    "name-html": {"name": hostile.HTML},
    "name-control": {"name": hostile.CONTROL},
    "kind": {"kind": "other"},
    "unknown-field": {"surprise": 1},
    "rows-object": {"rows": {}},
    "rows-numbers": {"rows": [1]},
    "metrics-list": {"metrics": []},
    "metric-name": {"metrics": {hostile.HTML: {}}},
    "created": {"created": "yesterday"},
    "created-number": {"created": 5},
    "time-text": {"time_s": "1"},
    "inputs-numbers": {"inputs": {"a": 1}},
    "notes-text": {"notes": "x"},
    "notes-control": {"notes": [hostile.CONTROL]},
    "notes-long": {"notes": ["x" * 5000]},
    "device-list": {"device": []},
    "method-control": {"rows": [{"method": "a\x1b[31m", "figures": {}}]},
    "method-empty": {"rows": [{"method": " ", "figures": {}}]},
    "figure-text": {"rows": [{"method": "a", "figures": {"bleu": "x"}}]},
    "figure-list": {"rows": [{"method": "a", "figures": {"bleu": [1]}}]},
    "figure-unknown": {"rows": [{"method": "a", "figures": {"blue": 1}}]},
    "seed-half": {"rows": [{"method": "a", "figures": {}, "seed": 0.5}]},
    "setting-name": {"rows": [{"method": "a", "figures": {}, "settings": {"__class__ x": 1}}]},
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_another_form_or_version(polyrank, tmp_path, result, name):
    path = tmp_path / "results" / "x.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**result, **RESULTS[name]}))
    before = hostile.tree(tmp_path)
    done = polyrank(["report", str(path.parent), "-o", str(tmp_path / "r.html")])
    hostile.check_one_line(done, (2,))
    assert "x.json" in done.err
    assert hostile.tree(tmp_path) == before


STRANGE = {
    "figures-not-finite": {
        "rows": [{"method": m, "figures": {"bleu": v}} for m, v in (("a", "NaN"), ("b", "Infinity"))]
    },
    "figures-at-the-ends": {
        "rows": [{"method": m, "figures": {"bleu": v}} for m, v in (("a", 1e308), ("b", -1e308), ("c", 5e-324))]
    },
    "time-negative": {"time_s": -5},
    "time-huge": {"time_s": 1e300},
    "no-rows": {"rows": []},
    "no-metrics": {"rows": [], "metrics": {}},
    "created-long-ago": {"created": "0001-01-01T00:00:00"},
    "seed-huge": {"rows": [{"method": "a", "figures": {"bleu": 1}, "seed": 10**250}]},
    "config-deep": {"config": {"a": [[[[[[[[[[1]]]]]]]]]]}},
    "config-html": {"config": {hostile.HTML: hostile.HTML}},
    "device-odd": {"device": {"memory_bytes": "many", "gpus": 5, "cores": [1], "cpu": None}},
    "code-odd": {"code": {"commit": 5, "dirty": "perhaps", "version": None}},
    "versions-html": {"versions": {"torch": hostile.HTML}},
    "setting-huge": {"rows": [{"method": "a", "figures": {"bleu": 1}, "settings": {"rank": 10**250}}]},
    "methods-1000": {"rows": [{"method": f"m{i}", "figures": {"bleu": i}} for i in range(1000)]},
}


SHOWN = [(name, end) for name in STRANGE for end in ("html", "md", "tex", "csv")]
SHOWN = [(name, end) for name, end in SHOWN if name != "methods-1000" or end in ("tex", "csv")]  # no plot of so many


@pytest.mark.parametrize(("name", "end"), SHOWN)
def test_strange_results_are_shown_or_refused(polyrank, tmp_path, result, name, end):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**result, **STRANGE[name]}))
    hostile.check_one_line(polyrank(["report", str(path), "-o", str(tmp_path / f"r.{end}")]))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_results(polyrank, tmp_path, result, seed):
    path = tmp_path / "x.json"
    path.write_bytes(damaged(json.dumps(result).encode(), seed))
    hostile.either(read_record, path, DataError)
    if seed % 4 == 1:
        hostile.check_one_line(polyrank(["report", str(path), "-o", str(tmp_path / "r.csv")]))

"""The result format: what is written is read back, and everything else is refused by name."""

import json
import math
import os
import subprocess
import sys

import pytest

from polyrank.core import provenance, records
from polyrank.core.errors import DataError
from polyrank.core.records import Metric, Row, find_records, merge_records, new_record, read_record, write_record


@pytest.fixture(autouse=True)
def clean_tree(monkeypatch):
    monkeypatch.setattr(records, "code_state", lambda: {"version": "1", "commit": "c" * 40, "dirty": False})


METRICS = {"bleu": Metric("%", "higher", "BLEU"), "parameters": Metric(role="cost")}


def a_record(method="LoRA r=8", seed=0, bleu=30.0, **more):
    rows = [Row(method, {"bleu": bleu, "parameters": 1000}, seed, {"rank": 8})]
    return new_record("e2e", "run", METRICS, rows, config={"lr": 1e-3}, **more)


def test_round_trip_keeps_every_field(tmp_path):
    (tmp_path / "data.csv").write_bytes(b"abc")
    record = a_record(inputs=[tmp_path / "data.csv"], time_s=1.5, details={"rounds": [1.0, 2.0]}, notes=["quick"])
    path = write_record(record, root=tmp_path / "results")
    assert path == tmp_path / "results" / "e2e.json"
    assert read_record(path) == record
    # sha256 of b"abc", FIPS 180-2 appendix B.1
    assert list(record.inputs.values()) == ["sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"]
    assert record.versions["python"].count(".") == 2
    assert record.versions["torch"]
    assert record.device["cores"] >= 1


def test_nan_and_infinity_survive_and_the_file_is_strict_json(tmp_path):
    rows = [Row("a", {"bleu": math.nan}, 0), Row("b", {"bleu": math.inf}, 0), Row("c", {"bleu": -math.inf}, 0)]
    path = write_record(new_record("x", "run", METRICS, rows, config={"limit": math.inf}), root=tmp_path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    values = [row.figures["bleu"] for row in read_record(path).rows]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf]


def test_a_dirty_tree_goes_to_scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "code_state", lambda: {"version": "1", "commit": "c" * 40, "dirty": True})
    assert write_record(a_record(), "table/a.json", root=tmp_path) == tmp_path / "scratch" / "table" / "a.json"


def test_dirtiness_is_gits_own_word_without_results(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(provenance, "checkout", lambda: tmp_path)
    state = provenance.code_state.__wrapped__
    assert state()["commit"] == git("rev-parse", "HEAD").stdout.strip()
    assert state()["dirty"] is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text("{}")
    assert state()["dirty"] is False
    (tmp_path / "code.py").write_text("2")
    assert state()["dirty"] is True


def test_no_checkout_says_so(monkeypatch):
    monkeypatch.setattr(provenance, "checkout", lambda: None)
    state = provenance.code_state.__wrapped__()
    assert state["commit"] is None
    assert state["dirty"] is None


def test_paths_of_this_machine_are_shortened(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYRANK_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    config = {"a": str(tmp_path / "data" / "x"), "b": [str(tmp_path / "y")], "c": tmp_path / "z", "d": "plain"}
    assert provenance.portable(config) == {"a": "$POLYRANK_DATA/x", "b": ["./y"], "c": "./z", "d": "plain"}
    assert provenance.portable({"a": str(tmp_path) + "er"})["a"] == str(tmp_path) + "er"


def test_format_needs_no_torch():
    code = (
        "import sys, types\n"
        "package = types.ModuleType('polyrank'); package.__path__ = [sys.argv[1]]; sys.modules['polyrank'] = package\n"
        "import polyrank.core.records\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    source = os.path.dirname(os.path.dirname(records.__file__))
    subprocess.run([sys.executable, "-c", code, source], check=True)


VALID = json.loads(records.record_to_json(a_record()))


def changed(**fields):
    return {**VALID, **fields}


def row(**fields):
    return changed(rows=[{**VALID["rows"][0], **fields}])


BAD = [
    ([], "must be a JSON object, got a list"),
    ({}, "field 'schema' is missing"),
    (changed(schema=2), "schema 2 is not known; this version reads 1 .made by a newer polyrank"),
    (changed(schema=0), "schema 0 is not known; this version reads 1$"),
    (changed(schema="1"), "schema must be a whole number, got text"),
    (changed(schema=True), "schema must be a whole number, got true or false"),
    (changed(nmae="x"), "unknown field 'nmae'; did you mean 'name'"),
    (changed(kind="runn"), "unknown kind 'runn'; did you mean 'run'"),
    (changed(name="../../etc/x"), "name '../../etc/x' must be lower-case"),
    (changed(name="<script>"), "name '<script>' must be"),
    (changed(metrics=[]), "metrics must be an object, got a list"),
    (changed(metrics={"<b>": {}}), "'<b>' cannot be a column"),
    (changed(metrics={"bleu": {"better": "up"}}), "metrics.bleu: better must be 'higher', 'lower' or null, got 'up'"),
    (changed(metrics={"bleu": {"role": "costs"}}), "unknown role 'costs'; did you mean 'cost'"),
    (changed(metrics={"bleu": {"unit": 3}}), "unit must be text, got a whole number"),
    (changed(rows={}), "rows must be a list, got an object"),
    (changed(rows=["x"]), r"rows\[0\]: must be a JSON object, got text"),
    (row(method="  "), "method is empty"),
    (row(method="a\x1b[31m"), "control characters"),
    (row(method="x" * 3000), "3000 characters; at most 2000"),
    (row(seed=1.5), "seed must be a whole number or null, got a number"),
    (row(figures={"bluе": 1}), "unknown metric"),
    (row(figures={"bleu": "nan"}), "figures.bleu must be a number or one of 'NaN'"),
    (row(figures={"bleu": True}), "figures.bleu must be a number"),
    (row(figures={"bleu": None}), "figures.bleu must be a number"),
    (row(figures={"bleu": 10**400}), "a number of 401 digits is too large"),
    (row(settings={"rank": [8]}), "settings.rank must be text, a number, true, false or null"),
    (row(settings={"a b": 8}), "'a b' cannot be a column"),
    (changed(created="yesterday"), "created must be an ISO 8601 time, got 'yesterday'"),
    (changed(time_s="1"), "time_s must be a whole number or a number or null"),
    (changed(inputs={"a": 1}), "inputs.a: must be text"),
    (changed(notes="x"), "notes must be a list"),
]


@pytest.mark.parametrize(("value", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_records_are_refused_by_name(value, message, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=message) as caught:
        read_record(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"schema": 1', "not valid JSON"),
        (b'{"schema": NaN}', "NaN is not valid JSON"),
        (b'{"schema": 1, "schema": 1}', "the key 'schema' appears twice"),
        (b"\xff\xfe", "not UTF-8|not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_bad_json_is_refused(text, message, tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(text)
    with pytest.raises(DataError, match=message):
        read_record(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_record(tmp_path / "absent.json")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_record(tmp_path)


def test_writing_checks_what_it_writes():
    with pytest.raises(DataError, match="unknown metric 'blue'; did you mean 'bleu'"):
        new_record("e2e", "run", METRICS, [Row("a", {"blue": 1.0})])


def test_merge_puts_seeds_together_and_the_later_measurement_wins():
    first = records.replace(a_record(seed=0, bleu=30.0), created="2026-01-01T00:00:00+00:00")
    again = records.replace(a_record(seed=0, bleu=31.0), created="2026-01-03T00:00:00+00:00")
    other = records.replace(a_record(seed=1, bleu=32.0), created="2026-01-02T00:00:00+00:00")
    (merged,) = merge_records([again, other, first])
    assert {(row.seed, row.figures["bleu"]) for row in merged.rows} == {(0, 31.0), (1, 32.0)}
    assert any("measured more than once" in note for note in merged.notes)
    assert len(merge_records([first, records.replace(other, name="other")])) == 2


def test_merge_refuses_units_that_differ():
    other = new_record("e2e", "run", {"bleu": Metric("", "higher")}, [Row("a", {"bleu": 0.3})])
    with pytest.raises(DataError, match=r"do not agree on 'bleu': unit '%'.*unit ''"):
        merge_records([a_record(), other])


def test_find_records_in_folders(tmp_path):
    files = ("b.json", "a.json", "scratch/c.json", "sub/d.json", "run/result.json", "run/trainer_state.json")
    for name in (*files, "begun/config.yaml", "begun/adapter/adapter_config.json", ".hidden/e.json", "text.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("{}")
    found = [str(path.relative_to(tmp_path)) for path in find_records([tmp_path, tmp_path / "a.json"])]
    assert found == ["a.json", "b.json", "run/result.json", "sub/d.json"]
    with pytest.raises(DataError, match="begun holds no result yet: the run is not finished"):
        find_records([tmp_path / "begun"])
    assert find_records([tmp_path / "scratch"]) == [tmp_path / "scratch" / "c.json"]
    assert find_records([tmp_path / "run"]) == [tmp_path / "run" / "result.json"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no result"):
        find_records([tmp_path / "empty"])

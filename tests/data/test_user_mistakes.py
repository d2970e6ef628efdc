"""Every mistake in a user's own file, in the arguments and in the choice of a validation part, by its message."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyrank.core.errors import ConfigError, DataError
from polyrank.data.user_files import read_user_data, split_validation

PAIRS = [{"prompt": "2+2?", "completion": "4"}, {"prompt": "a;b", "completion": "c, d"}]
LABELS = [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]
TEXTS = [{"text": "one"}, {"text": "two"}]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turn(role, content="x"):
    return {"role": role, "content": content}


OK = {"prompt": "p", "completion": "c"}
MISTAKES = {
    "ending": ("a.xlsx", b"x", r"unknown file ending '\.xlsx'.*allowed: .*\.parquet"),
    "ending nearest": ("a.jsnol", b"x", r"did you mean '\.json"),
    "missing": ("no.jsonl", None, r"no\.jsonl': no such file"),
    "empty": ("a.jsonl", b" \n", r"a\.jsonl' is empty"),
    "empty parquet": ("a.parquet", b"", r"a\.parquet' is empty"),
    "empty array": ("a.json", b"[]", "holds no rows"),
    "header only": ("a.csv", b"prompt,completion\n", "holds no rows"),
    "rows empty": ("a.csv", b"prompt,completion\n,\n", "all 1 rows are empty"),
    "broken line": ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2: not valid JSON \(.* at column \d+\)"),
    "broken array": ("a.json", b'[{"text": "a"},\n{"text" 1}]', "not valid JSON .*column 9 of line 2"),
    "no object": ("a.jsonl", b'{"text": "a"}\n3\n', "line 2: a record must be a JSON object, not int"),
    "string file": ("a.json", b'"text"', "must hold an array of objects"),
    "nan": ("a.jsonl", b'{"text": "a", "score": NaN}', "line 1: NaN is not valid JSON"),
    "twice": ("a.jsonl", b'{"text": "a", "text": "b"}', "line 1: the key 'text' appears twice"),
    "latin": ("a.csv", "text\na\né\n".encode("latin-1"), r"line 3: not UTF-8 \(byte 7\); save the file as UTF-8"),
    "utf-16": ("a.csv", "text\na\n".encode("utf-16-le"), "looks like UTF-16 or UTF-32 without its mark"),
    "half utf-16": ("a.csv", b"\xff\xfea", "not whole UTF-16"),
    "gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99)[:-12], "is a damaged gzip file"),
    "hidden gzip": ("a.jsonl", gzip.compress(b"x"), r"is a gzip file; its name must end in \.gz"),
    "parquet": ("a.parquet", b"PAR1 no", "is no Parquet file that can be read"),
    "fields": ("a.csv", b"prompt,completion\na,b\na,b,c\n", "line 3: 3 fields, and the header names 2"),
    "line of quoted": ("a.csv", b'prompt,completion\n"a\nb",c\na\n', "line 4: 1 fields, and the header names 2"),
    "quote": ("a.csv", b'prompt,completion\na,"b\n', "line 2: unexpected end of data"),
    "header twice": ("a.csv", b"text,text\na,b\n", "line 1: the header names 'text' twice"),
    "no name": ("a.csv", b"text,\na,b\n", "line 1: column 2 of the header has no name"),
    "line break in header": ("a.csv", b'text,"a\nb"\na,b\n', r"line 1: the header's name 'a\\nb' holds a line break"),
    "far from all": ("a.csv", b"question,answer\na,b\n", r"question, answer are no known kind of record \(allowed: "),
    "no kind": (
        "a.csv",
        b"promt,answer\na,b\n",
        "columns promt, answer are no known kind.*did you mean 'prompt' by 'promt'",
    ),
    "lacks": (
        "a.csv",
        b"prompt,id\na,b\n",
        "line 2 has 'prompt' and no column 'completion'; its columns are prompt, id",
    ),
    "label alone": ("a.csv", b"label,id\na,b\n", "has 'label' and no column 'text'"),
}
ROWS = {
    "two kinds": ([{**OK, "messages": [turn("user")]}], "the columns fit chat and prompt-completion"),
    "mixed": ([OK, {"messages": [turn("user"), turn("assistant")]}], "line 2: a row of kind 'chat' in a file of kind"),
    "text then label": (
        [{"text": "a"}, {"text": "a", "label": 1}],
        "line 2: a row of kind 'label' in a file of kind 'text'",
    ),
    "row lacks": ([OK, {"prompt": "p"}], "line 2 has no column 'completion'; its columns are prompt"),
    "no label": ([{"text": "a", "label": 1}, {"text": "b"}], "line 2 has no column 'label'"),
    "null label": ([{"text": "a", "label": 1}, {"text": "b", "label": None}], "line 2: the label is missing"),
    "blank label": ([{"text": "a", "label": " "}], "line 1: the label is missing"),
    "half label": ([{"text": "a", "label": 0.5}], "a label must be text or a whole number, got 0.5"),
    "two label types": ([{"text": "a", "label": "x"}, {"text": "b", "label": 1}], "line 2: the label 1 is no str"),
    "one label": ([{"text": "a", "label": 1}], "every row has the label 1"),
    "score": ([{"text": "a", "score": "high"}], "line 1: 'score' must be a number, got 'high'"),
    "bool score": ([{"text": "a", "score": True}], "'score' must be a number, got True"),
    "inf score": ([{"text": "a", "score": "inf"}], "'score' must be a finite number"),
    "null score": ([{"text": "a", "score": None}], "the score is missing"),
    "some pairs": (
        [{"text": "a", "text_pair": "b", "score": 1}, {"text": "a", "score": 1}],
        "line 2: some rows have a",
    ),
    "empty completion": ([OK, {"prompt": "p", "completion": " "}], "line 2: 'completion' is empty"),
    "no completions": ([{"prompt": "p", "completions": []}], "line 1: 'completions' is empty"),
    "completions text": ([{"prompt": "p", "completions": "c"}], "'completions' must be a list of completions, got 'c'"),
    "both": ([{**OK, "completions": ["c"]}], "line 1 has both 'completion' and 'completions'"),
    "empty in list": ([{"prompt": "p", "completion": ["c", ""]}], "line 1: 'completion' is empty"),
    "number": ([{"prompt": 3, "completion": "c"}], "line 1: 'prompt' must be text, got int 3"),
    "null prompt": ([{"prompt": None, "completion": "c"}], "line 1: 'prompt' is empty"),
    "surrogate": ([{"text": "\ud800"}], "'text' holds half a character"),
    "prompt shapes": ([OK, {"prompt": [turn("user")], "completion": "c"}], "line 2: some prompts are text and others"),
    "first role": (
        [{"prompt": [turn("user")], "completion": [turn("user")]}],
        "must begin with an assistant message, got",
    ),
    "empty output": ([{"instruction": "i", "output": ""}], "line 1: 'output' is empty"),
    "input": ([{"instruction": "i", "input": 3, "output": "o"}], "'input' must be text, got int 3"),
    "wrong role": (
        [{"messages": [turn("user"), turn("asistant")]}],
        "message 2 of 'messages': unknown role 'asistant'; did",
    ),
    "role type": ([{"messages": [turn(["user"])]}], "message 1 of 'messages': unknown role"),
    "no role": ([{"messages": [{"from": "user", "value": "x"}]}], "has no 'role'; its keys are from, value"),
    "no content": ([{"messages": [{"role": "user"}]}], "has no 'content'; its keys are role"),
    "null content": ([{"messages": [turn("user", None)]}], "message 1 of 'messages': 'content' is empty"),
    "parts": ([{"messages": [turn("user", [{"type": "text"}])]}], "'content' must be text, got list"),
    "messages text": ([{"messages": "hello"}], "'messages' must be a list of messages that is not empty, got 'hello'"),
    "messages empty": ([{"messages": []}], "'messages' must be a list of messages that is not empty"),
    "messages broken": ([{"messages": "[{"}], "line 1: 'messages': not valid JSON"),
    "message text": ([{"messages": ["hello"]}], "a message must have role and content, got 'hello'"),
    "no answer": ([{"messages": [turn("user")]}], "'messages' holds no assistant message"),
    "answer alone": ([{"messages": [turn("assistant")]}], "nothing comes before the assistant's message"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_file(tmp_path, mistake):
    name, content, message = MISTAKES[mistake]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_user_data(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mistake", ROWS)
def test_mistakes_in_a_row(tmp_path, mistake):
    rows, message = ROWS[mistake]
    with pytest.raises(DataError, match=message) as caught:
        read_user_data(jsonl(tmp_path / "a.jsonl", *rows))
    assert "\n" not in str(caught.value)


def test_a_missing_number_of_a_parquet_file(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1.0, float("nan")]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: the label is missing"):
        read_user_data(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", "b"], "score": [1.0, float("nan")]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: 'score' must be a finite number, got nan"):
        read_user_data(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"columns": {"promt": "prompt"}}, ConfigError, "unknown field in columns 'promt'; did you mean 'prompt'"),
        ({"columns": {"prompt": "promtp"}}, DataError, r"a\.jsonl': unknown column 'promtp'; did you mean 'prompt'"),
        ({"columns": {"prompt": "prompt", "text": "prompt"}}, ConfigError, "gives the column 'prompt' to two fields"),
        ({"columns": {"prompt": 3}}, ConfigError, "columns must map a field to a column's name"),
        ({"split": "trian"}, ConfigError, "unknown split 'trian'; did you mean 'train'"),
        ({"split": 3}, ConfigError, "split must be a name, got 3"),
        ({"data_files": "b.jsonl"}, ConfigError, "data_files goes with a folder or a hub id"),
    ],
)
def test_mistakes_in_the_arguments(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        read_user_data(jsonl(tmp_path / "a.jsonl", *PAIRS), **options)


def test_mistakes_with_a_folder(tmp_path):
    with pytest.raises(DataError, match="holds no data file"):
        read_user_data(tmp_path)
    jsonl(tmp_path / "train.jsonl", *PAIRS)
    with pytest.raises(DataError, match=r"no file named for 'test' \(splits by name: train\)"):
        read_user_data(tmp_path, split="test")
    with pytest.raises(DataError, match=r"other\.jsonl': no such file"):
        read_user_data(tmp_path, data_files=["other.jsonl"])
    with pytest.raises(ConfigError, match="data_files must name files"):
        read_user_data(tmp_path, data_files=3)
    with pytest.raises(ConfigError, match="data must be a file, a folder or a hub id, got 3"):
        read_user_data(3)


def test_mistakes_with_a_validation_part(tmp_path):
    data = read_user_data(jsonl(tmp_path / "a.jsonl", *PAIRS))
    for options, message in (
        ({}, "give one of share, file and split"),
        ({"share": 0.1, "file": "x"}, "give one of share, file and split"),
        ({"share": 1.0}, "share must lie between 0 and 1, got 1.0"),
        ({"share": float("nan")}, "share must lie between 0 and 1, got nan"),
        ({"split": "validation"}, "is one file and has no splits"),
    ):
        with pytest.raises(ConfigError, match=message):
            split_validation(data, **options)
    with pytest.raises(DataError, match="nothing is left to train on"):
        split_validation(data, file=tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is of kind 'text', not 'prompt-completion'"):
        split_validation(data, file=jsonl(tmp_path / "t.jsonl", *TEXTS))
    with pytest.raises(DataError, match="has one prompt"):
        split_validation(read_user_data(jsonl(tmp_path / "o.jsonl", OK, OK)), share=0.5)
    labels = read_user_data(jsonl(tmp_path / "l.jsonl", *LABELS))
    with pytest.raises(DataError, match=r"has the label 'odd', which training lacks \(labels: 'neg', 'pos'\)"):
        split_validation(labels, file=jsonl(tmp_path / "v.jsonl", {"text": "x", "label": "odd"}))
    with pytest.raises(ConfigError, match="rows of kind 'label' have no prompts"):
        labels.references()

"""A user's own file: every format and kind against rows worked by hand, every mistake by its message, splits, SFT."""

import csv
import gzip
import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyrank.core.errors import ConfigError, DataError
from polyrank.data.user_files import read_user_data, split_validation

USER, ANSWER = {"role": "user", "content": "Hi, you"}, {"role": "assistant", "content": 'Say "hé"'}
CHAT = [{"messages": [USER, ANSWER]}, {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}]
PAIRS = [{"prompt": "2+2?\n", "completion": "4"}, {"prompt": "a;b", "completion": "c, d"}]
ALPACA = [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Greet", "input": "", "output": "hi"}]
LABELS = [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]
SCORES = [{"text": "a", "text_pair": "b", "score": 1.5}, {"text": "c", "text_pair": "d", "score": -2.0}]
TEXTS = [{"text": "one\nline"}, {"text": "two"}]
KINDS = {
    "chat": (CHAT, CHAT),
    "prompt-completion": (PAIRS, PAIRS),
    "instruction": (
        ALPACA,
        [{"prompt": "Add\n\n1 2", "completion": "3"}, {"prompt": "Greet", "completion": "hi"}],
    ),
    "label": (LABELS, LABELS),
    "score": (SCORES, SCORES),
    "text": (TEXTS, TEXTS),
}


def as_table(rows, sign):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=sign)
    writer.writeheader()
    writer.writerows(
        {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
    )
    return text.getvalue()


WRITERS = {
    "x.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "x.json": lambda rows: json.dumps(rows, indent=1),
    "data.json": lambda rows: json.dumps({"version": 1, "data": rows}),
    "lines.json": lambda rows: "\n".join(json.dumps(row) for row in rows),
    "x.csv": lambda rows: as_table(rows, ","),
    "semicolon.csv": lambda rows: as_table(rows, ";"),
    "tab.csv": lambda rows: as_table(rows, "\t"),
    "x.tsv": lambda rows: as_table(rows, "\t"),
}


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    text = WRITERS[path.name.removesuffix(".gz")](rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*WRITERS, "x.jsonl.gz", "x.json.gz", "x.csv.gz", "x.tsv.gz", "x.parquet"])
def test_every_format_gives_the_rows_worked_by_hand(tmp_path, name, kind):
    given, expected = KINDS[kind]
    data = read_user_data(write(tmp_path / name, given))
    assert (data.kind, data.rows, data.number_read, data.dropped) == (kind, expected, 2, {})
    assert data.labels == (("neg", "pos") if kind == "label" else ())
    assert data.fingerprint == read_user_data(write(tmp_path / "x.jsonl", given)).fingerprint
    assert ("separated by" in " ".join(data.notes)) == (name in ("semicolon.csv", "tab.csv") and len(given[0]) > 1)


def test_the_fingerprint_follows_the_content(tmp_path):
    first = read_user_data(jsonl(tmp_path / "a.jsonl", *PAIRS)).fingerprint
    changed = [PAIRS[0], {"prompt": "a;b", "completion": "c, e"}]
    assert read_user_data(jsonl(tmp_path / "a.jsonl", *changed)).fingerprint != first
    assert read_user_data(jsonl(tmp_path / "a.jsonl", *PAIRS[::-1])).fingerprint != first


def test_several_completions_are_rows_in_training_and_references_in_evaluation(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "p", "completion": ["1", "2"]},
        {"prompt": "q", "completion": "3"},
        {"prompt": "p", "completions": ["4"]},
    )
    data = read_user_data(path)
    assert [(row["prompt"], row["completion"]) for row in data.rows] == [("p", "1"), ("p", "2"), ("q", "3"), ("p", "4")]
    assert data.references() == [
        {"prompt": "p", "references": ["1", "2", "4"]},
        {"prompt": "q", "references": ["3"]},
    ]
    assert data.number_read == 3
    assert "3 records hold 4 completions" in data.notes[0]


def test_completions_in_a_cell_of_a_table(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completions\np,"[""1"", ""2""]"\n')
    assert [row["completion"] for row in read_user_data(tmp_path / "a.csv").rows] == ["1", "2"]


def test_messages_as_prompt_and_completion(tmp_path):
    say = {"role": "assistant", "content": "a"}
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "a"},
        {"prompt": "Hi, you", "completion": [say]},
        {"prompt": [USER], "completion": [[ANSWER], [say]]},
    )
    data = read_user_data(path)
    assert [row["completion"] for row in data.rows] == [[ANSWER], [say], [say], [ANSWER], [say]]
    assert all(row["prompt"] == [USER] for row in data.rows)
    assert len(data.references()) == 1


def test_tools_are_left_untouched_and_a_call_needs_no_content(tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": None}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "7", "name": "f"}
    path = jsonl(tmp_path / "a.jsonl", {"messages": [USER, call, result, ANSWER], "tools": tools}, CHAT[0])
    data = read_user_data(path)
    assert data.rows[0] == {"messages": [USER, call | {"content": ""}, result, ANSWER], "tools": tools}
    assert data.rows[1] == CHAT[0] | {"tools": None}
    prompt = [USER, call | {"content": ""}, result]
    assert data.references()[0] == {"prompt": prompt, "references": [[ANSWER]], "tools": tools}


def test_columns_rename_and_choose_the_kind(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "a", "prompt": "old", "id": 7})
    data = read_user_data(path, columns={"prompt": "question", "completion": "answer"})
    assert data.rows == [{"prompt": "q", "completion": "a"}]
    assert data.notes == ("columns not used: id",)
    both = jsonl(
        tmp_path / "b.jsonl", {"messages": CHAT[0]["messages"], "prompt": "q", "completion": "a", "story": "s"}
    )
    assert read_user_data(both, columns={"text": "story"}).rows == [{"text": "s"}]


def test_labels_and_scores_of_a_table_are_numbers_where_all_are(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,0\n")
    (tmp_path / "b.csv").write_text("text,label\na,1\nb,x\n")
    (tmp_path / "c.csv").write_text("text,score\na,1e-1\n")
    assert read_user_data(tmp_path / "a.csv").labels == (0, 1)
    assert read_user_data(tmp_path / "b.csv").labels == ("1", "x")
    assert read_user_data(tmp_path / "c.csv").rows == [{"text": "a", "score": 0.1}]
    (tmp_path / "v.csv").write_text("text,label\nc,1\n")
    _, validation = split_validation(read_user_data(tmp_path / "b.csv"), file=tmp_path / "v.csv")
    assert validation.rows == [{"text": "c", "label": "1"}]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.json"])
def test_files_with_a_byte_order_mark(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(WRITERS[name](CHAT).encode(encoding))
    assert read_user_data(tmp_path / name).rows == CHAT


def test_empty_rows_are_dropped_and_counted(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\np,c\n,\n\n , \n")
    data = read_user_data(tmp_path / "a.csv")
    assert (len(data), data.number_read, data.dropped) == (1, 3, {"empty row": 2})


def test_folders(tmp_path):
    jsonl(tmp_path / "a.jsonl", PAIRS[0])
    write(tmp_path / "b.parquet", PAIRS[1:])
    (tmp_path / "notes.md").write_text("x")
    assert read_user_data(tmp_path).rows == PAIRS
    assert read_user_data(tmp_path, data_files="b.parquet").rows == PAIRS[1:]
    jsonl(tmp_path / "train-00.jsonl", {"prompt": "t", "completion": "1"})
    jsonl(tmp_path / "dev.jsonl", {"prompt": "v", "completion": "2"})
    data = read_user_data(tmp_path)
    assert [row["prompt"] for row in data.rows] == ["t"]
    assert data.notes == ("read train-00.jsonl", "not read, named for no split: a.jsonl, b.parquet")
    assert [row["prompt"] for row in split_validation(data, split="validation")[1].rows] == ["v"]


def test_a_share_never_cuts_a_prompt_and_depends_on_the_seed_alone(tmp_path):
    rows = [{"prompt": f"p{i % 20}", "completion": f"c{i}"} for i in range(100)]
    data = read_user_data(jsonl(tmp_path / "a.jsonl", *rows))
    train, validation = split_validation(data, share=0.2, seed=3)
    assert (len(train), len(validation)) == (80, 20)
    assert not {row["prompt"] for row in train.rows} & {row["prompt"] for row in validation.rows}
    assert sorted(map(str, train.rows + validation.rows)) == sorted(map(str, rows))
    again = split_validation(read_user_data(jsonl(tmp_path / "b.jsonl", *rows[::-1])), share=0.2, seed=3)[1]
    assert {row["prompt"] for row in again.rows} == {row["prompt"] for row in validation.rows}
    other = split_validation(data, share=0.2, seed=4)[1]
    assert other.fingerprint != validation.fingerprint
    assert len({train.fingerprint, validation.fingerprint, data.fingerprint}) == 3


def test_a_share_leaves_both_parts_something(tmp_path):
    data = read_user_data(jsonl(tmp_path / "a.jsonl", *TEXTS))
    for share in (0.001, 0.999):
        assert [len(part) for part in split_validation(data, share=share)] == [1, 1]


def test_chats_that_begin_alike_stay_together(tmp_path):
    follow = [*CHAT[0]["messages"], {"role": "user", "content": "more"}, ANSWER]
    rows = [CHAT[0], {"messages": follow}, *({"messages": [USER | {"content": str(i)}, ANSWER]} for i in range(2))]
    data = read_user_data(jsonl(tmp_path / "a.jsonl", *rows))
    for seed in range(8):
        parts = split_validation(data, share=0.5, seed=seed)
        assert any(CHAT[0] in part.rows and {"messages": follow} in part.rows for part in parts)


def test_training_rows_with_a_prompt_of_the_validation_file_are_left_out(tmp_path):
    data = read_user_data(jsonl(tmp_path / "a.jsonl", *PAIRS))
    held = jsonl(tmp_path / "v.jsonl", {"prompt": "a;b", "completion": "other"})
    train, validation = split_validation(data, file=held)
    assert train.rows == PAIRS[:1]
    assert train.dropped == {"prompt also in the validation part": 1}
    assert len(validation) == 1
    assert data.dropped == {}


def test_a_hub_id_goes_through_datasets_without_code_of_others(tmp_path, monkeypatch):
    asked = {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_user_data("someone/pairs", split="train[:2]", data_files="a.json").rows == PAIRS
    assert asked == {"name": "someone/pairs", "split": "train[:2]", "data_files": "a.json"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: 1 / 0)
    with pytest.raises(
        DataError, match=r"'someone/pairs' is no file or folder here, and the hub does not give it: div"
    ):
        read_user_data("someone/pairs")


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


@pytest.mark.parametrize("kind", ["chat", "prompt-completion", "instruction", "text"])
def test_sft_trainer_takes_the_rows(tmp_path, kind):
    trl = pytest.importorskip("trl")
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    signs = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    plain = Tokenizer(BPE(vocab={sign: i for i, sign in enumerate(signs)}, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes))
    before = model.lm_head.weight.detach().clone()
    args = trl.SFTConfig(
        str(tmp_path / "run"), max_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False,
        per_device_train_batch_size=2, logging_steps=1, learning_rate=0.1,
    )  # fmt: skip
    data = read_user_data(jsonl(tmp_path / "a.jsonl", *KINDS[kind][0]))
    trainer = trl.SFTTrainer(
        model, args=args, train_dataset=datasets.Dataset.from_list(data.rows), processing_class=tokenizer
    )
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    assert loss == pytest.approx(5.55, abs=0.2)  # ln 257: a model that knows nothing
    assert not torch.equal(before, model.lm_head.weight)

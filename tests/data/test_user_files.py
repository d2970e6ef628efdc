"""A user's own file: every format and kind against rows worked by hand, splits, TRL's trainer."""

import csv
import gzip
import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyrank.core.errors import DataError
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


def test_quotes_of_a_file_with_tabs(tmp_path):
    (tmp_path / "plain.tsv").write_text('text\tlabel\n"Go" she said\t1\n"x\t2\ny"\t1\n')
    data = read_user_data(tmp_path / "plain.tsv")
    assert [row["text"] for row in data.rows] == ['"Go" she said', '"x', 'y"']
    assert data.notes == ("plain.tsv: quotes are a part of the text",)
    (tmp_path / "even.tsv").write_text('label\ttext\n1\t"b\n2\td"\n')  # two whole lines, or one field of two lines
    assert [row["text"] for row in read_user_data(tmp_path / "even.tsv").rows] == ['"b', 'd"']
    (tmp_path / "quoted.tsv").write_text('text\tlabel\n"a\tb"\t1\n"c ""d""\ne"\t2\n')
    assert [row["text"] for row in read_user_data(tmp_path / "quoted.tsv").rows] == ["a\tb", 'c "d"\ne']


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_line_ends_of_a_table(tmp_path, end):
    (tmp_path / "a.csv").write_bytes(end.join(["prompt;completion", "a,b;c", '"d;";e', ""]).encode())
    rows = [{"prompt": "a,b", "completion": "c"}, {"prompt": "d;", "completion": "e"}]
    assert read_user_data(tmp_path / "a.csv").rows == rows


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

"""Recipe translation on a handful of sentences: base model, every method, interruptions, bad settings."""

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file

from polyrank.core.errors import ConfigError, DataError
from polyrank.core.records import read_record
from polyrank.evaluation.metrics import read_predictions
from polyrank.recipes._captions import run as _caption_run
from polyrank.recipes._captions import training as _caption_training
from polyrank.recipes.run import run_recipe

WORDS = {"dog": "Hund", "cat": "Katze", "boy": "Junge", "runs": "rennt", "sleeps": "schläft", "eats": "isst"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Multi30k's layout with 60 pairs, five test sentences, and three of WMT's with two references each; a cache for
    the base model, which all runs share."""
    folder = tmp_path_factory.mktemp("mt")
    (folder / "task1").mkdir()
    nouns, verbs = list(WORDS)[:3], list(WORDS)[3:]
    sentences = [f"a {n} {v} {i}" for i in range(7) for n in nouns for v in verbs][:60]
    german = [" ".join(["ein", *(WORDS.get(w, w) for w in s.split()[1:])]) for s in sentences]
    for name, part in (("train", slice(0, 60)), ("val", slice(0, 5))):
        for lang, lines in (("en", sentences), ("de", german)):
            text = "".join(f"{line}\n" for line in lines[part])
            (folder / "task1" / f"{name}.{lang}.gz").write_bytes(gzip.compress(text.encode()))
    lines = [f"S-{i}\t{s}\nT-{i}\t{g}\nR1-{i}\t{g}\nR2-{i}\tder {g}\n" for i, (s, g) in
             enumerate(zip(sentences[:3], german[:3], strict=True))]  # fmt: skip
    (folder / "wmt.gz").write_bytes(gzip.compress("".join(lines).encode()))
    return folder


def overrides(files, runs_dir, *more):
    return [
        *("recipe=translation/small", f"runs_dir={runs_dir}", "run_name=run", f"cache_dir={files}/cache"),
        *(f"data.path={files}", f"data.wmt={files}/wmt.gz", "data.test=val", "data.test_limit=null"),
        *("model.small.layers=1", "model.small.width=16", "model.small.heads=2", "model.small.feed_forward=24"),
        *(
            "model.small.vocabulary=300",
            "model.small.num_steps=4",
            "model.small.batch_size=8",
            "model.small.bf16=false",
        ),
        *("num_hypotheses=2", "rank=2", "num_steps=6", "batch_size=4", "save_every=2", "decode_batch_size=2"),
        *("max_new_tokens=6", "speakers=tfidf", *more),
    ]


def figures(record):
    """Everything but times."""
    return [{k: v for k, v in row.figures.items() if not k.endswith("time_s")} for row in record.rows]


@pytest.mark.slow
@pytest.mark.parametrize("method, decodings", [("mle_wide", 6), ("mcl", 3)])
def test_a_run_from_files_to_result(files, tmp_path, method, decodings):
    done = run_recipe(overrides(files, tmp_path, f"method={method}"))
    record = read_record(done.run_dir / "result.json")
    assert len(record.rows) == 2 * decodings  # two test sets
    assert {row.settings["budget"] for row in record.rows} == {2, 4, 6}
    assert {row.settings["test"] for row in record.rows} == {"wmt14", "multi30k"}
    wmt, own = record.rows[0].figures, record.rows[decodings].figures
    assert {"leave_one_out_bleu", "oracle_bleu", "pairwise_bleu", "references_covered"} <= wmt.keys()
    assert "leave_one_out_bleu" not in own  # one reference only
    assert len(read_predictions(done.run_dir)) == 3
    first = read_predictions(done.run_dir / "decodings" / f"multi30k-{record.rows[decodings].settings['decoding']}")
    assert [row.id for row in first] == [f"val-{i:05d}" for i in range(5)]
    assert first[0].input == "a dog runs 0\nGerman:"
    assert {len(row.candidates) for row in first} == {2}
    assert {len(reference) for row in first for reference in row.nll} == {2 if method == "mcl" else 1}
    if method == "mcl":
        assert own["oracle_nll"] <= own["mixture_nll"]


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_run_killed_in_training_and_in_decoding_ends_as_if_it_had_not_been(files, tmp_path, monkeypatch):
    from transformers import Trainer

    whole = run_recipe(overrides(files, tmp_path / "whole")).run_dir
    cut = overrides(files, tmp_path / "cut")
    original, calls = Trainer.training_step, {"n": 0}

    def dying_step(self, *args, **kwargs):
        calls["n"] += 1
        if calls["n"] == 4:
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dying_step)
        with pytest.raises(Killed):
            run_recipe(cut)
    compute, scored = _caption_run.compute, {"n": 0}

    def dying_score(*args, **kwargs):
        scored["n"] += 1
        if scored["n"] == 2:
            raise Killed
        return compute(*args, **kwargs)

    calls["n"] = -100
    from polyrank.recipes import translation

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dying_step)
        patch.setattr(translation, "compute", dying_score)
        with pytest.raises(Killed):
            run_recipe(cut)
    assert calls["n"] == -96  # the four steps after the checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(_caption_training, "train", lambda *a, **k: pytest.fail("trained again"))
        again = run_recipe(cut).run_dir
    tensors = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, again)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert (whole / "predictions.jsonl").read_bytes() == (again / "predictions.jsonl").read_bytes()
    assert figures(read_record(whole / "result.json")) == figures(read_record(again / "result.json"))


@pytest.mark.slow
def test_a_table_runs_everything_once(files, tmp_path, monkeypatch):
    table = [
        "recipe=translation/table" if text.startswith("recipe=") else text
        for text in overrides(files, tmp_path, "num_hypotheses=[2]", "seeds=[0]", "num_decodings=1", "data.test=null")
        if text != "num_hypotheses=2"
    ]
    done = run_recipe(table)
    record = read_record(done.run_dir / "result.json")
    assert [row.method for row in record.rows] == ["LoRA-MLE r=2", "LoRA-MLE r=4", "LoRA-MCL r=2"]
    wide, mcl = (record.rows[i].figures["trainable_parameters"] for i in (1, 2))
    assert wide == mcl
    (done.run_dir / "finished").unlink()
    (done.run_dir / "result.json").unlink()
    monkeypatch.setattr(_caption_run, "run_one", lambda *a: pytest.fail("a finished run was made again"))
    assert figures(read_record(run_recipe(table).run_dir / "result.json")) == figures(record)


def test_alma_files_and_a_prompt_that_does_not_fit(files, tmp_path):
    pairs = [{"translation": {"en": f"a dog runs {i}", "de": f"ein Hund rennt {i}"}} for i in range(20)]
    (tmp_path / "train.json").write_text(json.dumps(pairs), encoding="utf-8")
    alma = ["data.format=alma", f"data.path={tmp_path}", "data.train=train.json", "data.test=null", "num_decodings=1"]
    record = read_record(run_recipe(overrides(files, tmp_path, *alma)).run_dir / "result.json")
    assert "leave_one_out_bleu" in record.rows[0].figures
    with pytest.raises(DataError, match="exceed the model's context of 256"):
        run_recipe(overrides(files, tmp_path, *alma, "max_new_tokens=250", "run_name=long"))


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.template='{sorce}'", "prompt template"),
        ("data.base_share=0.0", "give both or neither"),
        ("data.target=dd", "language"),
        ("num_epochs=1", "num_steps or num_epochs"),
        ("metrics=[oracle_blue]", "oracle_bleu"),
        ("decodings=[{name: a, method: beam}]", "none of the decodings goes with method 'mcl'"),
        ("data.train_limit=0", r"data\.train_limit must be at least 1"),
    ],
)
def test_bad_settings_are_named(files, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        run_recipe(overrides(files, tmp_path, override))

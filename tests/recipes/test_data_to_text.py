"""Recipe data_to_text on a tiny random GPT-2: whole runs, every method, interruptions, the loss, mistakes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from polyrank.core.errors import ConfigError, DataError
from polyrank.core.records import read_record
from polyrank.data.causal_lm import EncodedPairs, TextPair, encode_pairs
from polyrank.evaluation.metrics import read_predictions
from polyrank.recipes import data_to_text
from polyrank.recipes._frame.compose import check_overrides, compose
from polyrank.recipes._text import training as _text_training
from polyrank.recipes._text.config import Optimization, Scratch
from polyrank.recipes._text.scratch_model import build_model, build_tokenizer
from polyrank.recipes.run import run_recipe

SMALL = Scratch(layers=1, heads=2, width=16, context=96, vocabulary=300, num_steps=2, batch_size=4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A GPT-2 of width 16 with its tokenizer, and data of each format: 8 inputs to learn from, 5 to write."""
    folder = tmp_path_factory.mktemp("files")
    names = ["Aromi", "Blue Spice", "The Mill", "Zizzi"]
    rows = [(names[i % 4], ["pub", "cafe"][i % 2], str(i)) for i in range(8)]
    sentences = [f"{name} is a {kind} with number {i}." for name, kind, i in rows]
    tokenizer = build_tokenizer(sentences, 300)
    torch.manual_seed(0)
    build_model(SMALL, tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split, count in (("train", 8), ("test", 5)):
        chosen = list(zip(rows, sentences, strict=True))[:count]
        file = folder / "e2e" / f"{split}.csv"
        file.parent.mkdir(exist_ok=True)
        lines = [f'"name[{n}], eatType[{k}], near[{i}]","{text}"' for (n, k, i), text in chosen for _ in range(2)]
        file.write_text("mr,ref\n" + "\n".join(lines) + "\n")
        file = folder / "webnlg" / f"{split}.json"
        file.parent.mkdir(exist_ok=True)
        entries = [
            {
                "category": "Food",
                "modifiedtripleset": [{"subject": n, "property": "kind", "object": k}],
                "lexicalisations": [{"comment": "good", "lex": text}],
            }
            for (n, k, _), text in chosen
        ]
        file.write_text(json.dumps({"entries": [{str(j): entry} for j, entry in enumerate(entries)]}))
        file = folder / "dart" / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        lines = [
            json.dumps({"tripleset": [[n, "KIND", k]], "annotations": [{"text": text}]}) for (n, k, _), text in chosen
        ]
        file.write_text("\n".join(lines))
    return folder


def overrides(files, runs_dir, *more, data="e2e_d2t"):
    folder = {"e2e_d2t": "e2e", "dart_dev": "dart"}.get(data, data)
    return [
        *("recipe=data_to_text", f"runs_dir={runs_dir}", f"data={data}", f"data.path={files}/{folder}", "run_name=run"),
        *("model=hub", f"model.name_or_path={files}/model", "num_steps=4", "batch_size=4", "save_every=2"),
        *("warmup_steps=1", "max_length=96", "max_new_tokens=8", "decode_batch_size=2", "num_beams=2"),
        *("no_repeat_ngram_size=3", "metrics=[bleu,nist]"),
        *more,
    ]


@pytest.mark.parametrize("method", ["lora", "lsr", "lorma_pi", "lorma_plus", "full"])
def test_a_run_from_files_to_result(files, tmp_path, method):
    more = ("method.options.side=post",) if method.startswith("lorma") else ()
    done = run_recipe(overrides(files, tmp_path, f"method={method}", "learning_rate=1e-2", *more))
    record = read_record(done.run_dir / "result.json")
    (row,) = record.rows
    assert row.settings == {"data": "e2e", "model": "model"}
    assert {"bleu", "nist", "nll", "train_time_s", "decode_time_s", "trainable_parameters"} == row.figures.keys()
    predictions = read_predictions(done.run_dir)
    assert [p.id for p in predictions] == [f"test-{i:05d}" for i in range(5)]
    assert predictions[1].input == "name : Blue Spice | eatType : cafe | near : 1\n"
    assert len(predictions[0].references) == 2
    assert (done.run_dir / ("model" if method == "full" else "adapter") / "training.json").is_file()
    assert not (done.run_dir / "training").exists()
    assert record.details["training"]["rows"] == 16
    assert record.details["num_references"] == 10


@pytest.mark.parametrize("data", ["webnlg", "dart", "dart_dev"])
def test_other_formats(files, tmp_path, data):
    more = ("data.train=train",) if data == "dart_dev" else ()
    done = run_recipe(overrides(files, tmp_path, "num_steps=1", *more, data=data))
    predictions = read_predictions(done.run_dir)
    assert len(predictions) == (2 if data == "dart_dev" else 5)
    facts = json.loads((done.run_dir / "adapter" / "training.json").read_text())
    assert facts["rows"] == (6 if data == "dart_dev" else 8)
    if data != "dart_dev":
        assert predictions[0].input == "Aromi : kind : pub\n"


class Killed(Exception):
    pass


def test_a_run_killed_in_training_and_in_decoding_ends_as_if_it_had_not_been(files, tmp_path, monkeypatch):
    from transformers import Trainer

    whole = run_recipe(overrides(files, tmp_path / "whole")).run_dir
    original, calls = Trainer.training_step, {"n": 0}

    def dying_step(self, *args, **kwargs):
        calls["n"] += 1
        if calls["n"] == 4:  # two steps, a checkpoint, one more step, and death
            raise Killed
        return original(self, *args, **kwargs)

    cut = overrides(files, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dying_step)
        with pytest.raises(Killed):
            run_recipe(cut)
    assert (tmp_path / "cut" / "data_to_text" / "run" / "training" / "checkpoint-2").is_dir()

    from polyrank.evaluation import predict as predicting

    decode, batches = predicting.decode, {"n": 0}

    def dying_decode(*args, **kwargs):
        batches["n"] += 1
        if batches["n"] == 2:
            raise Killed
        return decode(*args, **kwargs)

    calls["n"] = -100
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dying_step)
        patch.setattr(predicting, "decode", dying_decode)
        with pytest.raises(Killed):
            run_recipe(cut)
    assert calls["n"] == -98  # only the steps after the checkpoint were made again
    with monkeypatch.context() as patch:
        patch.setattr(_text_training, "train", lambda *a, **k: pytest.fail("trained again"))
        again = run_recipe(cut).run_dir
    tensors = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, again)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert (whole / "predictions.jsonl").read_bytes() == (again / "predictions.jsonl").read_bytes()
    rows = [read_record(folder / "result.json").rows[0].figures for folder in (whole, again)]
    assert all(rows[0][key] == rows[1][key] for key in ("bleu", "nist", "nll"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_cross_entropy_with_label_smoothing_on_the_target_alone(files, tmp_path, accumulation):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(files / "model")
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    row = encode_pairs(tokenizer, [TextPair("a", "name : Zizzi\n", "Zizzi is a pub.")], 96)[0]
    labels = torch.tensor(row["labels"])
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, label_smoothing=0.1)
    expected.backward()
    expected = expected.detach()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    model.zero_grad()
    plan = Optimization(
        num_steps=10, batch_size=2, accumulation_steps=accumulation, label_smoothing=0.1, warmup_steps=0
    )
    rows = EncodedPairs([row] * 40, 0, 96)
    _text_training.train(plan, 1e-12, model, tokenizer, rows, tmp_path, seed=0)
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-3)


def test_a_model_built_here_is_trained_first_and_built_once(files, tmp_path):
    given = [text for text in overrides(files, tmp_path) if not text.startswith("model")]
    small = [f"model.scratch.{key}={value}" for key, value in vars(SMALL).items()]
    more = ("model=gpt2_small_scratch", *small, f"cache_dir={tmp_path}/bases")
    first = run_recipe([*given, *more]).run_dir
    (base,) = (tmp_path / "bases").iterdir()
    written = (base / "model.safetensors").stat().st_mtime_ns
    second = run_recipe([*given, *more, "run_name=other", "seed=1"]).run_dir
    assert (base / "model.safetensors").stat().st_mtime_ns == written
    third = run_recipe([*given, *more, "run_name=third", f"cache_dir={tmp_path}/again"]).run_dir
    (other,) = (tmp_path / "again").iterdir()
    assert (base / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert (first / "predictions.jsonl").read_bytes() == (third / "predictions.jsonl").read_bytes()
    assert read_record(second / "result.json").rows[0].settings["model"] == "gpt2 1x16"


def test_long_rows_are_counted(files, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    pairs = [TextPair("a", "x\n", "a pub"), TextPair("b", "x\n", "qzx " * 60)]
    rows = encode_pairs(tokenizer, pairs, 96)
    assert (len(rows), rows.dropped) == (1, 1)


@pytest.mark.parametrize(
    "more, error, match",
    [
        (["num_epochs=1"], ConfigError, "give num_steps or num_epochs"),
        (["label_smoothing=1"], ConfigError, r"label_smoothing must be in \[0, 1\)"),
        (["schedule=linaer"], ConfigError, "did you mean 'linear'"),
        (["metrics=[blue]"], ConfigError, "did you mean 'bleu'"),
        (["method=head"], ConfigError, "a language model has none"),
        (["data.test=tset"], ConfigError, "did you mean 'test'"),
        (["data.test=null"], ConfigError, "data.test=null and data.test_share"),
        (["data.template=x"], ConfigError, r"must hold \{input\} once"),
        (["++method.options.rr=3"], ConfigError, "did you mean 'r'"),
        (["model.target_modules=[c_atn]"], ConfigError, "did you mean 'c_attn'"),
        (["data.path=/nowhere"], DataError, "holds no train set"),
        (["max_new_tokens=90"], DataError, "exceed the model's context of 96"),
        (["max_length=8"], DataError, "all 16 pairs are longer"),
        (["model=gpt2_small_scratch", "model.scratch.width=6"], ConfigError, "must be a multiple of its 4 heads"),
    ],
)
def test_mistakes(files, tmp_path, more, error, match):
    given = overrides(files, tmp_path)
    if "model=gpt2_small_scratch" in more:
        given = [text for text in given if not text.startswith("model")]
    with pytest.raises(error, match=match):
        run_recipe([*given, *more])


def test_a_metric_that_cannot_be_computed_here_is_noted_or_refused(files, tmp_path, monkeypatch):
    from polyrank.evaluation.metrics import _registry

    monkeypatch.setattr(_registry.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="metric 'meteor' needs Java"):
        data_to_text.available(["bleu", "meteor"], required=True)
    names, notes = data_to_text.available(["bleu", "meteor"], required=False)
    assert names == ["bleu"]
    assert notes[0].startswith("meteor was not computed: it needs Java on the PATH")


@pytest.mark.parametrize("name", ["e2e", "webnlg", "dart", "maths"])
@pytest.mark.parametrize("method", ["lorma_pi", "lorma_plus"])
def test_the_recipes_of_lorma_have_its_settings(name, method):
    composed = compose(check_overrides([f"recipe=lorma/{name}", f"method={method}"]))
    config = composed.settings
    assert config.method.options["variant"] == method.removeprefix("lorma_")
    if name == "maths":
        assert (config.rate, config.num_epochs, config.batch_size * config.accumulation_steps) == (5e-4, 2, 64)
        assert (config.method.alpha_per_rank, config.num_beams) == (2.0, 1)
    else:
        assert (config.rate, config.num_epochs, config.batch_size, config.warmup_steps) == (2e-4, 5, 8, 500)
        assert (config.method.options["r"], config.method.options["lora_alpha"]) == (4, 32)
        assert (config.num_beams, config.length_penalty, config.no_repeat_ngram_size) == (10, 0.8, 4)
        assert (config.label_smoothing, config.weight_decay, config.max_grad_norm) == (0.1, 0.01, 0.0)

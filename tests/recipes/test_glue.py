"""Recipe glue on tiny random encoders and a handful of rows: whole runs, budgets, interruptions, mistakes."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    Trainer,
)

import polyrank.hypotheses  # noqa: F401
from polyrank.cli import main
from polyrank.compression.lq_lora import load_lq_lora
from polyrank.core.errors import ConfigError, DataError, UserError
from polyrank.core.records import read_record
from polyrank.data.glue import LabelledText, get_task, read_parts
from polyrank.recipes import glue
from polyrank.recipes._frame.compose import check_overrides, compose, options
from polyrank.recipes._glue.sentence_head import ApartCollator
from polyrank.recipes._glue.training import encode, load_encoder, load_tokenizer, num_steps, positions, use_bf16
from polyrank.recipes._methods.budget import adapter_parameters, matched_method
from polyrank.recipes.run import run_recipe, run_sweep
from polyrank.report import load_results

WORDS = [f"w{i}" for i in range(20)]
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save_tokenizer(folder):
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A BERT and a RoBERTa of two layers, and a folder for each of MRPC, STS-B and SST-2."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    shared = {**SIZES, "vocab_size": len(WORDS) + 4, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    BertModel(BertConfig(**shared, max_position_embeddings=32)).save_pretrained(folder / "bert")
    RobertaModel(RobertaConfig(**shared, max_position_embeddings=34)).save_pretrained(folder / "roberta")
    for name in ("bert", "roberta"):
        save_tokenizer(folder / name)
    rng = np.random.default_rng(0)
    heads = {
        "mrpc": ("label\tsentence1\tsentence2", ("train", "test")),
        "stsb": ("score\tsentence1\tsentence2", ("train", "dev")),
        "sst2": ("label\tsentence", ("train", "dev", "test")),
    }
    for name, (header, parts) in heads.items():
        (folder / name).mkdir()
        for part in parts:
            lines = [header]
            for i in range(40 if part == "train" else 9):
                first, second = (" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(2))
                label = i % 2
                second = first if label else second
                lines.append(
                    "\t".join([str(label * 5 if name == "stsb" else label), first, second][: 3 - (name == "sst2")])
                )
            (folder / name / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def overrides(files, runs_dir, *more, task="mrpc", model="bert"):
    return [
        *("recipe=glue", f"data={task}", f"data.path={files}/{task}", f"runs_dir={runs_dir}", "run_name=run"),
        *("model=encoder", f"model.name_or_path={files}/{model}", "max_length=20"),
        *("num_steps=4", "eval_steps=2", "batch_size=4", "bf16=false"),
        *more,
    ]


def predictions(run_dir):
    return [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]


def small(method):
    return {"lsr": ("method.options.num_terms=2",), "lora": ("method.options.r=2",)}.get(method, ())


SIZE = {"lora": 4 * 2 * 48, "lsr": 4 * 2 * 2 * (6 + 4) * 2, "lorma_pi": 4 * 8 * 48, "lorma_plus": 4 * 8 * 48, "head": 0}
HEAD = 2 * 24 + 2


@pytest.mark.parametrize("method", ["lora", "lsr", "lorma_pi", "lorma_plus", "full", "head"])
def test_a_run_from_files_to_result(files, tmp_path, method):
    done = run_recipe(overrides(files, tmp_path, f"method={method}", *small(method)))
    record = read_record(done.run_dir / "result.json")
    (row,) = record.rows
    written = predictions(done.run_dir)
    assert [line["id"] for line in written] == [f"test-{i:05d}" for i in range(9)]
    assert [line["prediction"] for line in written] == [int(np.argmax(line["outputs"])) for line in written]
    right = [line["prediction"] == line["label"] for line in written]
    assert row.figures["mrpc_accuracy"] == pytest.approx(sum(right) / 9)
    validations = dict(record.details["validations"])
    assert set(validations) == {2, 4}
    assert row.figures["mrpc_validation"] == max(validations.values())
    assert validations[row.figures["best_step"]] == max(validations.values())
    base = load_file(files / "bert" / "model.safetensors")
    if method in SIZE:
        assert row.figures["adapter_parameters"] == SIZE[method]
        assert row.figures["head_parameters"] == HEAD
    else:
        assert row.figures["trainable_parameters"] == sum(t.numel() for t in base.values()) + HEAD
    assert row.settings["learning_rate"] > 0
    assert record.details["rows"] == {"train": 36, "validation": 4, "test": 9}
    assert not (done.run_dir / "training").exists()
    steps = [json.loads(line)["step"] for line in (done.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    if method in ("full", "head"):
        saved = load_file(done.run_dir / "model" / "model.safetensors")
        same = [
            torch.equal(saved[f"bert.{name}"], tensor) for name, tensor in base.items() if "position_ids" not in name
        ]
        assert all(same) == (method == "head")


def test_the_adapter_folder_gives_the_predictions_through_peft_alone(files, tmp_path):
    done = run_recipe(overrides(files, tmp_path, "method=lsr", task="stsb"))
    config = compose_settings(overrides(files, tmp_path, "method=lsr", task="stsb"))
    base = load_encoder(config.model, config.data, seed=7)  # another head: the saved one must replace it
    model = PeftModel.from_pretrained(base, str(done.run_dir / "adapter")).eval()
    tokenizer = load_tokenizer(config.model)
    rows = [line.split("\t")[1:] for line in (files / "stsb" / "dev.tsv").read_text().splitlines()[1:]]
    for line, (first, second) in zip(predictions(done.run_dir), rows, strict=True):
        with torch.no_grad():
            score = model(**tokenizer(first, second, return_tensors="pt")).logits.item()
        assert line["prediction"] == pytest.approx(score, abs=1e-5)
    (row,) = read_record(done.run_dir / "result.json").rows
    labels, scores = ([line[key] for line in predictions(done.run_dir)] for key in ("label", "prediction"))
    assert row.figures["stsb_pearson"] == pytest.approx(np.corrcoef(labels, scores)[0, 1], abs=1e-5)


class Killed(Exception):
    pass


PROCEDURES = {
    "loram": ("method.options.r=2",),
    "lq_lora": ("method.options.r=2", "method.options.budget_bits=4.5", "method.options.fisher_rows=8"),
}


@pytest.mark.parametrize("texts", ["together", "apart"])
@pytest.mark.parametrize("method", list(PROCEDURES))
def test_methods_that_change_the_base(files, tmp_path, monkeypatch, method, texts):
    """What is scored is what the adapter folder gives: LoRAM's on the whole encoder, LQ-LoRA's with its quantised
    weights. A sitting that dies before the scores goes on to the same ones."""
    given = overrides(files, tmp_path, f"method={method}", *PROCEDURES[method], f"+model.texts={texts}")

    def dying(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(glue, "predict", dying)
        with pytest.raises(Killed):
            run_recipe(given)
    done = run_recipe(given)
    config, folder = compose_settings(given), done.run_dir / "adapter"
    base = load_encoder(config.model, config.data, seed=7)
    whole = sum(p.numel() for p in base.parameters())
    model = PeftModel.from_pretrained(base, str(folder)) if method == "loram" else load_lq_lora(base, folder)
    tokenizer = load_tokenizer(config.model)
    test = read_parts(get_task("mrpc"), files / "mrpc", None, 0.1)["test"]
    rows = encode(test, tokenizer, 20, sort=False, apart=texts == "apart")
    collate = ApartCollator(tokenizer) if texts == "apart" else DataCollatorWithPadding(tokenizer)
    with torch.no_grad():
        batch = {key: value for key, value in collate([rows[i] for i in range(len(rows))]).items() if key != "labels"}
        expected = model.eval()(**batch).logits
    outputs = torch.tensor([line["outputs"] for line in predictions(done.run_dir)])
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    (row,) = read_record(done.run_dir / "result.json").rows
    assert row.figures["head_parameters"] == (2 if texts == "apart" else 1) * 2 * 24 + 2
    if method == "loram":  # query and value of 24 x 24, of which pruning leaves one head of two
        assert row.figures["adapter_parameters"] == 4 * 2 * (24 + 12)
        pruned = load_file(done.run_dir / "pruned" / "model.safetensors")
        assert sum(value.numel() for value in pruned.values()) < whole
    else:
        assert row.figures["adapter_parameters"] == 4 * 2 * 48
        assert (folder / "quantised.safetensors").is_file()


def test_what_an_encoder_cannot_do(files, tmp_path):
    with pytest.raises(ConfigError, match=r"'pat' cuts the residual stream of decoders.*data_to_text, maths and"):
        run_recipe(overrides(files, tmp_path, "method=pat"))
    with pytest.raises(ConfigError, match="alignment trains a language model on text; BertForSequenceClass"):
        run_recipe(overrides(files, tmp_path, "method=loram", "method.options.align_steps=1"))


def test_a_match_counts_what_is_trained(files, tmp_path):
    """LoRAM's adapter is that of the pruned encoder, 4 (24 + 12) parameters a rank: rank 5 is nearest to LoRA's 768 of
    rank 4. A method without a match keeps its size."""
    found = [
        matched_method(config, load_encoder(config.model, config.data)).options["r"]
        for config in (
            compose_settings(overrides(files, tmp_path, f"method={name}", "match_lora_rank=4", *more))
            for name, *more in (("loram",), ("lora",), ("lora", "method.match=null"))
        )
    ]
    assert found == [5, 4, 8]


def test_a_run_killed_twice_ends_as_if_it_had_not_been(files, tmp_path, monkeypatch):
    more = ("method=lora", "num_steps=6")
    whole = run_recipe(overrides(files, tmp_path / "whole", *more)).run_dir
    step, calls = Trainer.training_step, {"n": 0}

    def dying_step(self, *args, **kwargs):
        calls["n"] += 1
        if calls["n"] == 4:  # steps 1, 2 (checkpoint), 3, and death in the fourth
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", dying_step)
    given = overrides(files, tmp_path / "again", *more)
    with pytest.raises(Killed):
        run_recipe(given)

    def dying(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(glue, "predict", dying)
        with pytest.raises(Killed):
            run_recipe(given)
    assert calls["n"] == 4 + 4  # steps 3 to 6 again, none before the checkpoint
    again = run_recipe(given).run_dir
    assert calls["n"] == 8
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (whole / "predictions.jsonl").read_bytes() == (again / "predictions.jsonl").read_bytes()


def compose_settings(given):
    return compose(check_overrides(given)).settings


def test_every_method_starts_from_the_same_head_and_another_seed_from_another(files, tmp_path):
    config = compose_settings(overrides(files, tmp_path))
    heads = [load_encoder(config.model, config.data, seed).classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("budget", [1, 100, 641, 1000])
def test_the_matched_option_is_the_nearest_of_all(files, tmp_path, budget):
    given = overrides(files, tmp_path, "method=lsr", f"match_parameters={budget}")
    config = compose_settings(given)
    base = load_encoder(config.model, config.data)
    before = set(base.state_dict())
    state = torch.get_rng_state()
    if budget == 1:
        with pytest.raises(ConfigError, match=r"method 'lsr' has 160 parameters at num_terms=1: more than 1"):
            matched_method(config, base)
        return
    found = matched_method(config, base).options["num_terms"]
    sizes = {t: 4 * t * 2 * (6 + 4 + 6 + 4) for t in range(1, 60)}  # 4 layers of 24 = 6 * 4 in and out, r = 2
    assert found == min(sizes, key=lambda t: (abs(sizes[t] - budget), t))
    assert adapter_parameters(base, matched_method(config, base), config.model) == sizes[found]
    assert set(base.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rank_of_lora_as_the_budget(files, tmp_path):
    base = None
    for method, option, value in (("lorma_plus", "r", 4), ("lora", "r", 4), ("lsr", "num_terms", 5)):
        config = compose_settings(overrides(files, tmp_path, f"method={method}", "match_lora_rank=4"))
        base = base or load_encoder(config.model, config.data)
        assert matched_method(config, base).options[option] == value  # 4 * 4 * 48 = 768; 5 * 160 = 800, 4 * 160 = 640


@pytest.mark.slow
def test_table_runs_everything_once_and_goes_on(files, tmp_path, monkeypatch):
    given = [
        *("recipe=glue/table", f"runs_dir={tmp_path}", "run_name=run", "model=encoder"),
        *(f"model.name_or_path={files}/bert", f"tasks.mrpc.path={files}/mrpc", f"tasks.stsb.path={files}/stsb"),
        *("~methods.lorma_pi", "~methods.lorma_plus", "~methods.full", "seeds=[0]", "num_steps=1", "eval_steps=1"),
        *("max_length=20", "batch_size=4", "bf16=false", "match_lora_rank=8", "methods.lora.learning_rate=0.02"),
    ]
    run_one, started = glue.run_one, []

    def dying(config, folder):
        started.append(folder.name)
        if len(started) == 3:
            raise Killed
        return run_one(config, folder)

    with monkeypatch.context() as patch:
        patch.setattr(glue, "run_one", dying)
        with pytest.raises(Killed):
            run_recipe(given)
        patch.setattr(glue, "run_one", lambda config, folder: (started.append(folder.name), run_one(config, folder))[1])
        done = run_recipe(given)
    names = ["lora", "lsr-equal", "lsr", "head"]  # LoRA of rank 8 is what it is by default: once
    expected = [f"{task}-{name}-seed0" for task in ("mrpc", "stsb") for name in names]
    assert started == [*expected[:3], *expected[2:]]
    record = read_record(done.run_dir / "result.json")
    assert [row.method for row in record.rows[:4]] == ["LoRA", "LSR", "LSR", "head alone"]
    assert [row.settings.get("num_terms") for row in record.rows[:3]] == [None, 10, 16]  # 8 * 48 * 4 = 1,536; 1,600
    assert record.rows[0].settings["learning_rate"] == 0.02
    assert record.rows[1].settings["learning_rate"] == compose_settings(overrides(files, tmp_path, "method=lsr")).rate
    assert (
        "Equal budget: 1,536 adapter parameters (LoRA of rank 8), as near as can be: LSR num_terms=10." in record.notes
    )
    assert not list(done.run_dir.rglob("model/model.safetensors"))
    (merged,) = load_results([tmp_path])
    assert len(merged.rows) == 8


def test_multirun_over_methods_and_rates(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [text for text in overrides(files, tmp_path / "runs") if not text.startswith(("run_name", "num_steps"))]
    given.append("eval_steps=1")
    done = run_sweep([*given, "num_steps=1", "method=lora,lsr", "learning_rate=1e-3,1e-2"])
    assert len({item.run_dir for item in done}) == 4
    (record,) = load_results([tmp_path / "runs" / "glue"])
    keys = {(row.method, row.settings["learning_rate"]) for row in record.rows}
    assert keys == {(method, rate) for method in ("LoRA", "LSR") for rate in (1e-3, 1e-2)}


@pytest.mark.slow
def test_the_lsr_projects_command_lines(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = [
        *(f"model.base_model={files}/roberta", f"data.path={files}/mrpc", "max_length=20"),
        *("training.num_train_epochs=1", "training.per_device_train_batch_size=32"),
    ]
    assert main(["run", "model=roberta_lsr", "model.lsr.num_terms=8", "model.lsr.r=4", *own]) == 0
    assert main(["run", "--multirun", "model.lora.r=1,2", *own]) == 0
    line = ["--multirun", "model=roberta_lora,roberta_lsr", "training.learning_rate=1e-4,5e-4"]
    assert main(["run", *line, *own]) == 0
    assert len(capsys.readouterr().out.split()) == 7
    (record,) = load_results([tmp_path / "runs" / "glue"])
    seen = {
        (row.method, row.settings["r"], row.settings.get("num_terms"), row.settings["learning_rate"])
        for row in record.rows
    }
    assert seen == {
        ("LSR", 4, 8, 5e-4),
        *(("LoRA", r, None, 5e-4) for r in (1, 2)),
        *(("LoRA", 8, None, rate) for rate in (1e-4, 5e-4)),
        *(("LSR", 2, 16, rate) for rate in (1e-4, 5e-4)),
    }
    assert record.config["num_epochs"] == 1
    lsr = next(row for row in record.rows if row.method == "LSR" and row.settings["r"] == 4)
    assert lsr.figures["adapter_parameters"] == 4 * 8 * 4 * 20
    assert lsr.figures["head_parameters"] == 24 * 24 + 24 + 2 * 24 + 2  # RoBERTa's head has a layer of its own
    wrong = ["run", "model=roberta_lsr", "model.lsr.factor_a=32", "model.lsr.factor_b=24", *own]
    assert main(wrong) == 2
    assert "32 x 24 = 768 inputs" in capsys.readouterr().err


def test_lormas_scripts(files):
    names = [name for name in options("recipe") if name.startswith("lorma/roberta_")]
    assert len(names) == 31
    values = {name: compose_settings([f"recipe={name}", "data.path=null"]) for name in names[::6]}
    for name, config in values.items():
        size, variant, task = name.removeprefix("lorma/roberta_").split("_")
        assert (config.model.name_or_path, config.data.task) == (f"roberta-{size}", task)
        assert config.method.options == {"r": 8, "variant": variant, "side": "pre"}
        assert config.warmup in (0.0, 0.06)
        assert num_steps(config, 100)[0] == config.num_epochs * -(-100 // config.batch_size)
    half = compose_settings(["recipe=lorma/roberta_base_plus_cola", "method.options.r=16", "method.options.side=post"])
    assert (half.method.alpha_per_rank, half.weight_decay, half.num_epochs) == (0.5, 0.2, 100)
    assert half.method.options == {"r": 16, "variant": "plus", "side": "post"}


def test_long_rows_are_cut_and_counted(files, tmp_path):
    done = run_recipe(overrides(files, tmp_path, "max_length=8", "num_steps=1"))
    lengths = []
    for part in ("train", "test"):
        rows = [line.split("\t") for line in (files / "mrpc" / f"{part}.tsv").read_text().splitlines()[1:]]
        lengths.append(sum(len(f"{a} {b}".split()) + 3 > 8 for _, a, b in rows))
    cut = read_record(done.run_dir / "result.json").details["cut_rows"]
    assert cut["train"] + cut["validation"] == lengths[0] > 0
    assert cut["test"] == lengths[1] > 0


def test_rows_for_validation_and_test_are_sorted_by_length(files, tmp_path):
    config = compose_settings(overrides(files, tmp_path))
    tokenizer = load_tokenizer(config.model)
    rows = [LabelledText("a", ("w1 w2 w3", "w1"), 1), LabelledText("b", ("w1", "w2"), 0)]
    encoded = encode(rows, tokenizer, 20, sort=True)
    assert (encoded.ids, encoded.labels) == (["b", "a"], [0, 1])
    assert encoded[0]["input_ids"] == [0, 5, 2, 6, 2]


def test_positions(files):
    for model in ("bert", "roberta"):
        assert positions(AutoModelForSequenceClassification.from_pretrained(files / model)) == 32


def test_bf16(files, tmp_path, monkeypatch):
    assert (use_bf16(True), use_bf16(False)) == (True, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has, expected in ({}, False), ({"amx_bf16": True}, True), ({"avx512_bf16": True}, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert use_bf16("auto") is expected
    for method in ("lsr", "lorma_pi"):
        done = run_recipe(overrides(files, tmp_path / method, f"method={method}", "bf16=true", "num_steps=2"))
        record = read_record(done.run_dir / "result.json")
        assert record.details["bf16"] is True
        tensors = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_an_adapter_of_pefts_needs_no_more_than_an_entry(files, tmp_path):
    entry = tmp_path / "conf" / "method" / "loha.yaml"
    entry.parent.mkdir(parents=True)
    entry.write_text("name: loha\nlabel: LoHa\nadapter: loha\noptions: {r: 2, alpha: 4}\nlearning_rate: 1.0e-3\n")
    given = overrides(files, tmp_path, "method=loha", "num_steps=1", "eval_steps=1", "match_lora_rank=4")
    done = run_recipe(given, config_dir=tmp_path / "conf")
    (row,) = read_record(done.run_dir / "result.json").rows
    assert row.settings["r"] == 2  # LoHa has twice LoRA's parameters at a rank
    assert row.figures["adapter_parameters"] == 4 * 4 * 48


BAD = [
    (["method=lro"], "unknown method 'lro'"),
    (["method=mle"], "method 'mle' is no entry for recipe glue: unknown field in method 'wide'"),
    (["method=lora", "method.adapter=loar"], "unknown adapter 'loar'; did you mean 'lora'"),
    (["method=lsr", "method.options.mode=sum"], "unknown mode 'sum'"),
    (["method=lsr", "method.options.r=0"], "r must be an integer >= 1, got 0"),
    (["method=lsr", "method.options.num_terms=0"], "num_terms must be an integer >= 1, got 0"),
    (["method=lora", "method.options.r=0"], "method 'lora': .*r.* should be a positive integer"),
    (["method=lsr", "++method.options.factor_pattern={query:[5,5,6,4]}"], "5 x 5 = 25 inputs"),
    (["method=lsr", "++method.options.num_term=3"], "unknown field of LsrConfig 'num_term'; did you mean 'num_terms'"),
    (["method=lorma_pi", "method.options.side=before"], "unknown side 'before'"),
    (["method=head", "++method.options.r=1"], r"method 'head' \(head\) has no adapter, so it takes no options"),
    (["model.target_modules=[query,valeu]"], "unknown module in model.target_modules 'valeu'; did you mean 'value'"),
    (["method=lsr", "model.target_modules=[query,valeu]"], "unknown module in model.target_modules 'valeu'"),
    (["model.target_modules=nothing.*"], "method 'lora'"),
    (["model.head_modules=[clasifier]"], "unknown module in model.head_modules 'clasifier'; did you mean 'classifier'"),
    (["model.name_or_path=/nowhere/at/all"], "cannot load a tokenizer from '/nowhere/at/all'"),
    (["data.task=mrcp"], "did you mean 'mrpc'"),
    (["data.path=/nowhere"], "'/nowhere' is no folder"),
    (["data.validation_share=1.5"], r"data.validation_share must be in \(0, 1\)"),
    (["data.train_limit=0"], "data.train_limit must be at least 1"),
    (["data.train_limit=1"], "training needs at least 2 rows, got 1"),
    (["num_steps=0"], "num_steps must be at least 1"),
    (["learning_rate=-1"], "learning_rate must be positive"),
    (["max_length=33"], "max_length 33 exceeds the model's 32 positions"),
    (["bf16=maybe"], "bf16 must be"),
    (["match_parameters=5", "match_lora_rank=1"], "give match_parameters or match_lora_rank, not both"),
    (["method.match=num_terms", "match_parameters=5"], "unknown field of LoraConfig 'num_terms'"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_mistakes(files, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as caught:
        run_recipe(overrides(files, tmp_path, *more))
    assert "\n" not in str(caught.value)


def test_a_mistake_is_one_line_and_status_2(files, tmp_path, capsys):
    bad = files / "mrpc_bad"
    bad.mkdir(exist_ok=True)
    (bad / "train.tsv").write_text("label\tsentence1\tsentence2\n7\ta\tb\n")
    (bad / "test.tsv").write_text("label\tsentence1\tsentence2\n1\ta\tb\n")
    given = [text for text in overrides(files, tmp_path) if not text.startswith("data.path")]
    assert main(["run", *given, f"data.path={bad}", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "line 2: label '7' is none of mrpc's labels (0, 1)" in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
    with pytest.raises(DataError):
        run_recipe([*given, f"data.path={bad}"])

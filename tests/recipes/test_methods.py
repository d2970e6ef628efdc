"""Recipe methods on a tiny GPT-2: what is measured, budgets, saved adapters, interrupted tables, mistakes."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Trainer,
)

from polyrank.core.errors import ConfigError, DataError
from polyrank.core.records import read_record
from polyrank.data.causal_lm import encode_prompts, encode_targets
from polyrank.recipes import glue, methods
from polyrank.recipes._frame.compose import check_overrides, compose
from polyrank.recipes._methods.parts import Initialiser, LossChoice, OptimizerChoice
from polyrank.recipes._text.config import Scratch
from polyrank.recipes._text.scratch_model import build_model, build_tokenizer
from polyrank.recipes.run import run_recipe
from polyrank.report import write_report

SMALL = Scratch(layers=1, heads=2, width=16, context=96, vocabulary=300, num_steps=2, batch_size=4)
NAMES = ["Aromi", "Zizzi"] * 4
SENTENCES = [f"{name} is a {'pub' if i < 4 else 'cafe'} with number {i}." for i, name in enumerate(NAMES)]
PROMPTS = [f"name[{name}], near[{i}]" for i, name in enumerate(NAMES)]
STORY = "Aromi has a pub. <|endoftext|>\nZizzi is a cafe with a number.\n<|endoftext|>"
NEW = ["lora_pro", "ba_lora", "lora_ga", "eva", "dora", "rslora", "pissa", "lokr"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A GPT-2 of width 16 with its tokenizer, restaurants to learn and to score, stories to forget."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = build_tokenizer(SENTENCES, 300)
    torch.manual_seed(0)
    build_model(SMALL, tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split, count in (("train", 8), ("test", 3)):
        lines = [f'"{p}","{s}"' for p, s in list(zip(PROMPTS, SENTENCES, strict=True))[:count]]
        (folder / f"{split}.csv").write_text("mr,ref\n" + "\n".join(lines) + "\n")
    (folder / "stories.txt").write_text(STORY)
    return folder


def overrides(files, runs_dir, *more, recipe="methods"):
    return [
        *(f"recipe={recipe}", f"runs_dir={runs_dir}", f"data.path={files}", "run_name=run"),
        *("model=hub", f"model.name_or_path={files}/model", f"retention={files}/stories.txt"),
        *("num_steps=4", "batch_size=4", "save_every=2", "warmup_steps=1", "max_length=96", "match_lora_rank=2"),
        *more,
    ]


def small(method):
    """What of an entry does not fit Conv1D layers of width 16."""
    return {"lokr": ("model.target_modules=[lm_head]",)}.get(method, ())


def loop_nll(model, tokenizer, prompts, targets):
    """Nats per token of targets after their prompts, one row at a time."""
    total = count = 0
    for prompt, target in zip(encode_prompts(tokenizer, prompts), encode_targets(tokenizer, targets), strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        total -= sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(target))
        count += len(target)
    return total / count


def loop_story_nll(model, tokenizer):
    total = count = 0
    for story in ("Aromi has a pub.", "Zizzi is a cafe with a number."):
        ids = tokenizer(story, return_tensors="pt").input_ids
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize("method", NEW)
def test_the_saved_adapter_on_the_untouched_base_has_the_figures(files, tmp_path, method):
    done = run_recipe(overrides(files, tmp_path, f"method={method}", "learning_rate=1e-2", *small(method)))
    (row,) = read_record(done.run_dir / "result.json").rows
    base = AutoModelForCausalLM.from_pretrained(files / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    before = loop_story_nll(base, tokenizer)
    untrained = loop_nll(base, tokenizer, *inputs())
    model = PeftModel.from_pretrained(base, done.run_dir / "adapter").eval()
    assert row.figures["nll"] == pytest.approx(loop_nll(model, tokenizer, *inputs()), abs=1e-4)
    assert row.figures["nll"] < untrained - 1e-3
    assert row.figures["forgetting"] == pytest.approx(loop_story_nll(model, tokenizer) - before, abs=1e-4)
    assert row.figures["step_time_s"] > 0
    assert row.figures["peak_memory_bytes"] > sum(p.numel() * p.element_size() for p in base.parameters())
    facts = json.loads((done.run_dir / "adapter" / "training.json").read_text())
    assert facts["trainable_parameters"] == row.figures["trainable_parameters"]
    assert not (done.run_dir / "training").exists()


def inputs():
    return [f"name : {name} | near : {i}\n" for i, name in enumerate(NAMES[:3])], SENTENCES[:3]


def test_sizes_are_counted_against_lora_of_the_rank_asked_for(files, tmp_path):
    lora = run_recipe(overrides(files, tmp_path, "num_steps=1", "model.target_modules=[c_attn]")).run_dir
    (row,) = read_record(lora / "result.json").rows
    assert row.figures["trainable_parameters"] == 2 * (16 + 48)
    assert row.figures["over_budget"] == 0
    assert row.settings == {"size": "r=2", "learning_rate": 3e-3}
    dora = overrides(files, tmp_path / "dora", "num_steps=1", "model.target_modules=[c_attn]", "method=dora")
    (row,) = read_record(run_recipe(dora).run_dir / "result.json").rows
    assert row.figures["trainable_parameters"] == 1 * (16 + 48) + 48  # 112 is nearer to 128 than 176
    assert row.figures["over_budget"] == pytest.approx(-12.5)


class Killed(Exception):
    pass


@pytest.fixture
def dying(monkeypatch):
    """`dying(n)`: the n-th training step from now raises."""

    def die(at):
        calls, original = {"n": 0}, Trainer.training_step

        def step(self, *args, **kwargs):
            calls["n"] += 1
            if calls["n"] == at:
                raise Killed
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", step)
        return lambda: monkeypatch.setattr(Trainer, "training_step", original)

    return die


@pytest.mark.parametrize("method", ["lora_ga", "eva", "lora_pro"])
def test_a_run_killed_in_training_ends_as_if_it_had_not_been(files, tmp_path, dying, method):
    whole = run_recipe(overrides(files, tmp_path / "whole", f"method={method}")).run_dir
    cut = overrides(files, tmp_path / "cut", f"method={method}")
    revive = dying(4)
    with pytest.raises(Killed):
        run_recipe(cut)
    revive()
    again = run_recipe(cut).run_dir
    tensors = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, again)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, atol=1e-6, rtol=1e-5)


def table(files, runs_dir, *more):
    names = compose(check_overrides(["recipe=methods/table"])).settings.methods
    left_out = [f"~methods.{name}" for name in names if name not in ("lora", "pissa", "allora")]
    given = ("num_steps=3", "seeds=[0,1]", "methods.pissa.learning_rate=0.001", "decode_inputs=1", "max_new_tokens=4")
    return overrides(files, runs_dir, *left_out, *given, *more, recipe="methods/table")


@pytest.mark.slow
def test_a_table_goes_on_where_it_stopped_and_becomes_a_report(files, tmp_path, dying):
    revive = dying(8)  # three steps a run: in the third
    with pytest.raises(Killed):
        run_recipe(table(files, tmp_path))
    revive()
    folder = tmp_path / "methods" / "table" / "run"
    written = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    assert set(written) == {"lora-seed0", "pissa-seed0"}
    run_recipe(table(files, tmp_path))
    assert all((folder / name / "result.json").stat().st_mtime_ns == when for name, when in written.items())
    record = read_record(folder / "result.json")
    labels = ["LoRA", "PiSSA", "ALLoRA"]
    assert [(row.method, row.seed) for row in record.rows] == [(label, seed) for seed in (0, 1) for label in labels]
    assert [row.settings["learning_rate"] for row in record.rows[:3]] == [3e-3, 1e-3, 3e-3]
    assert all("bleu" in row.figures for row in record.rows)
    for ending in ("html", "md"):
        text = write_report([folder], tmp_path / f"report.{ending}")[0].read_text()
        assert all(f"NLL against {cost}" in text for cost in ("forgetting", "step time", "peak memory"))
        assert "PiSSA" in text


@pytest.mark.parametrize(
    "more, error, match",
    [
        (["retention=/nowhere"], DataError, "cannot read '/nowhere'"),
        (["decode_inputs=-1"], ConfigError, "decode_inputs must not be negative"),
        (["method=eva", "method.initialiser.name=evo"], ConfigError, "method.initialiser.name"),
        (["method=eva", "method.initialiser.num_batches=0"], ConfigError, "num_batches must be at least 1"),
        (["method=lora_ga", "+method.initialiser.options.scal=unit"], ConfigError, "did you mean 'scale'"),
        (["method=lora_pro", "+method.optimizer.options.momentss=full"], ConfigError, "did you mean 'moments'"),
        (["method=ba_lora", "+method.losses.options.spectra=1"], ConfigError, "did you mean 'spectral'"),
        (["method=full", "+method.optimizer.name=lora_pro"], ConfigError, "has no adapter, so it takes no optimizer"),
        (["method=lora_pro", "method.options.use_rslora=false", "+method.options.use_dora=true"], ConfigError,
         "does not combine with DoRA"),
        (["method=allora", "+method.optimizer.name=lora_pro"], ConfigError, "does not combine with ALLORA"),
        (["method=lora_ga", "method.options.r=9", "match_lora_rank=null"], ConfigError, "LoRA-GA needs 2 r <= min"),
    ],
)  # fmt: skip
def test_mistakes(files, tmp_path, more, error, match):
    with pytest.raises(error, match=match):
        run_recipe([*overrides(files, tmp_path), *more])


def test_a_table_needs_seeds(files, tmp_path):
    with pytest.raises(ConfigError, match="seeds must hold at least one value"):
        run_recipe(table(files, tmp_path, "seeds=[]"))


def test_the_entries_say_what_the_pages_say():
    entries = compose(check_overrides(["recipe=methods/table"])).settings.methods
    assert entries["lora_pro"].optimizer == OptimizerChoice("lora_pro", {"moments": "full"})
    assert entries["ba_lora"].losses == LossChoice("ba_lora")
    assert entries["ba_lora"].options["init_lora_weights"] == "pissa"
    assert [entries[name].initialiser for name in ("lora_ga", "eva")] == [Initialiser("lora_ga"), Initialiser("eva")]
    assert set(NEW) < set(entries)


def test_old_texts_are_cut_to_the_context(files):
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    (files / "long.txt").write_text("Aromi is a pub. " * 99)
    (ids,) = methods.old_texts(files / "long.txt", tokenizer, model)
    assert ids.shape == (1, 96)
    (files / "empty.txt").write_text("<|endoftext|>\n")
    with pytest.raises(DataError, match="holds no text"):
        methods.old_texts(files / "empty.txt", tokenizer, model)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of one layer, and MRPC and STS-B of 12 rows."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(12))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    for task, parts, head in (("mrpc", ("train", "test"), "label"), ("stsb", ("train", "dev"), "score")):
        lines = [f"{i % 2}\tw{i} w{i + 1} w2\tw{i} w{(5 * i) % 9}" for i in range(12)]
        (folder / task).mkdir()
        for part in parts:
            (folder / task / f"{part}.tsv").write_text(f"{head}\tsentence1\tsentence2\n" + "\n".join(lines) + "\n")
    return folder


def glue_overrides(encoder, runs_dir, *more, task="mrpc"):
    return [
        *("recipe=glue", f"data={task}", f"data.path={encoder}/{task}", f"runs_dir={runs_dir}", "run_name=run"),
        *("model=encoder", f"model.name_or_path={encoder}", "max_length=20", "num_steps=3", "eval_steps=2"),
        *("batch_size=4", "bf16=false", "match_lora_rank=2", *more),
    ]


@pytest.mark.parametrize("method", ["lora_pro", "ba_lora", "lora_ga", "eva"])
def test_glue_saves_what_it_scored_head_included(encoder, tmp_path, method):
    given = glue_overrides(encoder, tmp_path, f"method={method}", "learning_rate=1e-2")
    folder = run_recipe(given).run_dir

    def outputs():
        lines = (folder / "predictions.jsonl").read_text().splitlines()
        return torch.tensor([json.loads(line)["outputs"] for line in lines])

    trained = outputs()
    glue.run_one(compose(check_overrides(given)).settings, folder)  # from the saved folder, on the untouched base
    torch.testing.assert_close(outputs(), trained, atol=1e-5, rtol=1e-4)
    assert trained.std(0).max() > 0


def test_a_regression_has_no_logits_for_ba_lora(encoder, tmp_path):
    with pytest.raises(ConfigError, match="ba_lora needs logits of classes or tokens; regression has one score"):
        run_recipe(glue_overrides(encoder, tmp_path, "method=ba_lora", task="stsb"))

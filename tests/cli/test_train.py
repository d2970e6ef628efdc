"""`polyrank train` on a file of one's own: every method on every kind of rows, and what `generate` makes of the run."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from polyrank.cli import main
from polyrank.data.causal_lm import IGNORED
from polyrank.recipes._frame.compose import options
from polyrank.recipes._train.template import encode_rows, prompt_ids, with_chat_template
from polyrank.recipes._train.validation import validation_nll

from .conftest import WORDS, make_base

KINDS = ("chat", "prompt_completion", "text")
NO_LANGUAGE_MODEL = {"head"}  # trains a new classifier
SHORTEST = {"pat": 6}  # its mask is final after a third of the steps, and has to move before
METHODS = [name for name in options("method") if name not in NO_LANGUAGE_MODEL]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    make_base(folder / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS) + 3,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder / "base")
    prompts = ["Once upon", "a time there", "was a", "little girl", "named Lily", "and the"]
    rows = {
        "chat": [
            {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "the dog ."}]}
            for p in prompts
        ],
        "prompt_completion": [{"prompt": p, "completion": "the dog ."} for p in prompts],
        "text": [{"text": f"{p} the dog ."} for p in prompts],
    }
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def train(place, *overrides):
    return main(["train", f"data={place / 'prompt_completion.jsonl'}", f"model={place / 'base'}", *overrides])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_kind_of_rows(place, monkeypatch, capsys, kind, method):
    monkeypatch.chdir(place)
    name = f"{method}-{kind}"
    status = main(
        ["train", f"data={place / kind}.jsonl", f"model={place / 'base'}", f"method={method}",
         f"training.max_steps={SHORTEST.get(method, 2)}", "training.per_device_train_batch_size=4", f"run_name={name}"]
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    run = place / "runs" / "train" / name
    assert (run / "finished").is_file()
    figures = json.loads((run / "result.json").read_text())["rows"][0]["figures"]
    assert figures["trainable_parameters"] > 0
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "Once upon", "--max-new-tokens", "4", "--json"]) == 0
    candidates = json.loads(capsys.readouterr().out)[0]["candidates"]
    assert len(candidates) == (3 if method.startswith("mcl") else 1)


def test_loss_on_the_answers_alone(place):
    """By hand: of `user: Once upon / assistant: the dog .` the answer and the end token are learned, nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    assert with_chat_template(tokenizer)
    chat = [{"role": "user", "content": "Once upon"}, {"role": "assistant", "content": "the dog ."}]
    twice = [*chat, {"role": "user", "content": "Lily"}, {"role": "assistant", "content": "and Lily"}]
    first, second = encode_rows(tokenizer, "chat", [{"messages": twice}], 64).rows
    learned = [tokenizer.decode([label for label in row["labels"] if label != IGNORED]) for row in (first, second)]
    assert learned[0].split() == ["the", "dog", ".", "</s>"]
    assert learned[1].split() == ["and", "Lily", "</s>"]
    prompt = prompt_ids(tokenizer, "chat", ["Once upon"])[0]
    assert first["input_ids"][: len(prompt)] == prompt  # generation asks in the words of training
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_held_out_rows_are_measured(place, monkeypatch):
    """Of K hypotheses: the best one's loss lies below the mixture's, and that within log K / n of it."""
    monkeypatch.chdir(place)
    assert train(place, "method=mcl", "training.max_steps=2", "validation_share=0.4", "run_name=held") == 0
    figures = json.loads((place / "runs/train/held/result.json").read_text())["rows"][0]["figures"]
    assert figures["oracle_nll"] <= figures["nll"] <= figures["oracle_nll"] + 1.0986123 / 4  # "the dog ." and its end


def test_validation_equals_the_models_own_loss(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    model = LlamaForCausalLM.from_pretrained(place / "base")
    rows = encode_rows(tokenizer, "text", [{"text": "Once upon a time"}, {"text": "the dog"}], 64)
    alone = [
        model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item()
        for row in rows.rows
    ]
    assert validation_nll(model, tokenizer, rows)["nll"] == pytest.approx(sum(alone) / 2, abs=1e-6)


MISTAKES = [
    (["method=lsrr"], "lsr"),
    (["training.max_stepps=2"], "max_steps"),
    (["training.output_dir=x"], "run's folder"),
    (["training.max_steps=0"], "num_steps"),
    (["model.target_modules=[q_proj,v_projj]"], "v_proj"),
    (["method=mcl", "model.target_modules=[q_proj,v_projj]"], "v_proj"),
    (["method.options.rr=4"], "rr"),
    (["columns.prompt=question"], "question"),
    (["max_length=2"], "max_length"),
    (["validation_share=2"], "validation_share"),
    (["validation=nowhere.jsonl"], "nowhere.jsonl"),
    (["recipe=e2e"], "data=FILE"),
    (["run_name=../up"], "run_name"),
    (["max_length"], "key=value"),
    (["method=head"], "classifier"),
    (["method=pat", "training.max_steps=2"], "total_steps"),
    (["model=nowhere/at-all"], "twice"),
    (["method=mcl", "training.label_smoothing_factor=0.1"], "label_smoothing"),
]


@pytest.mark.parametrize("given,named", MISTAKES)
def test_a_mistake_is_one_line_before_the_first_step(place, monkeypatch, capsys, given, named):
    monkeypatch.chdir(place)
    assert train(place, *given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("polyrank: error:")
    assert named in error


def test_goes_on_where_it_was_stopped(place, monkeypatch):
    """A run cut off after its checkpoint ends with the bits of one that was not."""
    from safetensors.torch import load_file
    from transformers import Trainer

    monkeypatch.chdir(place)
    plan = ["method=mcl", "training.max_steps=6", "training.save_steps=2", "training.per_device_train_batch_size=2"]
    assert train(place, *plan, "run_name=whole") == 0
    saved = Trainer._save_checkpoint

    def cut(self, *args, **kwargs):
        saved(self, *args, **kwargs)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save_checkpoint", cut)
        assert train(place, *plan, "run_name=cut") == 130
    assert train(place, *plan, "run_name=cut") == 0
    one, other = (
        load_file(place / f"runs/train/{name}/adapter/adapter_model.safetensors") for name in ("whole", "cut")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", ["lora", "full", "mcl", "sara"])
def test_a_run_that_diverges_ends_with_status_1_and_is_not_finished(place, monkeypatch, capsys, method):
    monkeypatch.chdir(place)
    given = [f"method={method}", "training.learning_rate=1e38", "training.max_steps=4", f"run_name=lost-{method}"]
    assert train(place, *given) == 1
    assert "step" in capsys.readouterr().err.strip().splitlines()[-1]
    run = place / "runs" / "train" / f"lost-{method}"
    assert not [file for name in ("finished", "result.json", "training.json") for file in run.rglob(name)]


@pytest.mark.parametrize("method", ["sara", "codyra", "dylora", "mcl", "lora"])
def test_steps_scheduled_are_steps_taken(place, monkeypatch, method):
    """Six rows in batches of two, two batches a step: two steps an epoch, told to the method beforehand."""
    from transformers import Trainer

    taken = []
    train_on = Trainer.train

    def counted(self, *args, **kwargs):
        result = train_on(self, *args, **kwargs)
        config = self.model.peft_config["default"] if hasattr(self.model, "peft_config") else None
        taken.append((self.state.global_step, self.state.max_steps, getattr(config, "total_steps", None)))
        return result

    monkeypatch.setattr(Trainer, "train", counted)
    monkeypatch.chdir(place)
    plan = ["training.num_train_epochs=3", "training.per_device_train_batch_size=2"]
    assert (
        train(place, f"method={method}", *plan, "training.gradient_accumulation_steps=2", f"run_name=s-{method}") == 0
    )
    ((steps, scheduled, told),) = taken
    assert steps == scheduled == 6
    assert told in (None, 6)

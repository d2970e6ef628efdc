"""A folder with everything that the examples of the command line name, and a way to run a command in it."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from no_network import guard
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polyrank.cli import main
from polyrank.core.records import Metric, Row, new_record, write_record
from polyrank.hypotheses import MclConfig

WORDS = ["Once", "upon", "a", "time", "there", "was", "little", "girl", "named", "Lily", "and", "dog", ".", "the"]


def make_base(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    ).save_pretrained(folder)
    return folder


def _make_adapter(base, folder, config):
    torch.manual_seed(1)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
            assert "adapter" not in name
    model.save_pretrained(folder)
    return model


@pytest.fixture
def make_adapter():
    return _make_adapter


@dataclass
class Done:
    """Exit status and what was printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def polyrank(capsys, caplog):
    """Run a command line, as typed, in this process."""

    def call(line):
        capsys.readouterr()
        status = main(shlex.split(line.removeprefix("polyrank ")) if isinstance(line, str) else line)
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return call


@pytest.fixture
def no_network(monkeypatch):
    """Nothing may ask for the network, also where the environment does not say that there is none."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = guard(monkeypatch)
    yield asked
    assert not asked, "asked for the network with all inputs local"


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = make_base(folder / "base")
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    _make_adapter(base, folder / "lora", lora)
    mcl = MclConfig(num_hypotheses=2, r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    _make_adapter(base, folder / "mcl", mcl)
    return folder


@pytest.fixture
def place(models_folder, tmp_path, monkeypatch):
    """The current folder of a user who types the examples."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models_folder / "mcl", tmp_path / "adapter")
    shutil.copytree(models_folder / "lora", tmp_path / "lora")
    shutil.copytree(
        models_folder / "base", tmp_path / "Qwen" / "Qwen3-0.6B"
    )  # a folder of the name goes before the hub
    pairs = [{"prompt": "Once upon", "completion": text} for text in ("a time", "a little girl", "the dog")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    lines = [
        {"id": str(i), "input": "x", "candidates": ["a b c d", "a b"], "references": ["a b c d", "e f"]}
        for i in range(3)
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seed in range(2):
        row = Row("LoRA", {"bleu": 30.0 + seed}, seed)
        record = new_record("e2e", "run", {"bleu": Metric("%", "higher")}, [row])
        write_record(record, tmp_path / "results" / f"{seed}.json")
    return tmp_path


@pytest.fixture
def interruptible():
    """Begin of a command line that takes Ctrl-C: a shell's background jobs ignore it, and so do the tests' children."""
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    return [sys.executable, "-c", f"{code} from polyrank.cli import main; sys.exit(main())"]

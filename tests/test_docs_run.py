"""Every Python block of README and docs is run, on random models of two layers.

A block is run as it stands, in an empty folder, with what its page takes for granted (a base model, a data set, a
batch) already there under the names that it uses. Two things are changed before: a model's name on the hub means a
small folder of the same kind (`HUB`), and what a page leaves to the reader ("...", a number of steps) is filled in
(`FILLED_IN`).
"""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from loading import load_module
from transformers import BertConfig, GPT2Config, LlamaConfig, TrainingArguments

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HUB = {
    "gpt2": "gpt2",
    "Qwen/Qwen2.5-0.5B": "llama",
    "sentence-transformers/all-MiniLM-L6-v2": "encoder",
    "models/paraphrase-TinyBERT-L6-v2": "encoder",
}
FILLED_IN = {
    "docs/decoding.md": {"processor(...)": "processor(text=prompts)"},
    "docs/methods/ba-lora.md": {'"pissa", ...)': '"pissa", r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")'},
    "docs/methods/computational-limits.md": {
        "phase_table([1.0, 2.7, 4.0, 6.3, 10.0], degrees)": "phase_table([1.0], degrees, 16, 2, [0])"
    },
    "docs/methods/initialisers.md": {"[...]": '["q_proj", "v_proj"]'},
    "docs/methods/lora-mcl-generation.md": {
        "model, ...,": "model, **inputs,",
        "(..., ": "(**inputs, ",
        "max_new_tokens=64": "max_new_tokens=3",
    },
    "docs/methods/lora-mcl.md": {
        "train_dataset=..., eval_dataset=..., data_collator=...": "train_dataset=train_dataset",
        "input_ids=...": "input_ids=input_ids",
        "max_new_tokens=40": "max_new_tokens=3",
        'TrainingArguments("run")': "args",
    },
    "docs/methods/lora-moe.md": {"args=..., train_dataset=...": "args=args, train_dataset=train_dataset"},
    "docs/methods/lora-pro.md": {", ...)": ", train_dataset=train_dataset)"},
    "docs/methods/lq-lora.md": {"r=64": "r=4", "budget_bits=2.75": "budget_bits=2.75, iterations=2"},
    "docs/methods/pat.md": {"total_steps=3000": "total_steps=6", "sparsity=0.25": "sparsity=0.25, rank=4"},
    "docs/metrics.md": {'["caption"]': '["oracle_cider_d"]'},
    "README.md": {'TrainingArguments("out")': "args", "max_new_tokens=30": "max_new_tokens=3"},
}


def blocks():
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for number, (language, text) in enumerate(re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)):
            if language == "python":
                yield pytest.param(name, text, id=f"{name}-{number}")


def llama(width=32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=17, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=17, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    return transformers.BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Small folders for the names in `HUB`; where the extra is installed, an encoder, its adapter, and an index."""
    from polyrank.cli import main

    folder = tmp_path_factory.mktemp("hub")
    load_module(ROOT / "tests" / "cli" / "conftest.py").make_base(folder / "llama")
    gpt2().save_pretrained(folder / "gpt2")
    if importlib.util.find_spec("faiss") is None:
        return folder
    import search_place as place

    place.make_encoder(folder / "encoder")
    place.make_adapter(folder / "encoder", folder / "adapter")
    place.make_data(folder / "documents")
    line = ["gpl", "index", str(folder / "documents"), "-o", str(folder / "index"), "--both", "--quiet"]
    assert main([*line, "--adapter", str(folder / "adapter")]) == 0
    return folder


@pytest.fixture
def small(hub, tmp_path, monkeypatch):
    """An empty folder, in which the names of models on the hub mean small ones."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    for cls in (
        transformers.AutoModelForCausalLM,
        transformers.AutoConfig,
        transformers.AutoTokenizer,
        transformers.LlamaForCausalLM,
    ):
        original = cls.from_pretrained
        here = lambda cls, name, *rest, original=original, **more: original(_local(hub, name), *rest, **more)  # noqa: E731
        monkeypatch.setattr(cls, "from_pretrained", classmethod(here))
    encoder = sentence_transformers.SentenceTransformer
    monkeypatch.setattr(
        sentence_transformers, "SentenceTransformer", lambda name, **more: encoder(_local(hub, name), **more)
    )
    return tmp_path


def _local(hub, name):
    return str(hub / HUB[name]) if name in HUB else name


ROWS = [
    {"input_ids": [3 + i % 5, 4, 5, 6], "labels": [-100, 4, 5, 6], "attention_mask": [1, 1, 1, 1]} for i in range(8)
]
BATCH = {name: torch.tensor([row[name] for row in ROWS[:4]]) for name in ROWS[0]}


def given(hub):
    """What the pages take for granted, under the names that they use."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub / "llama", padding_side="left")
    args = TrainingArguments("out", max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no")

    def train(model, task=None):
        for _ in range(2):
            model(**BATCH).loss.backward()

    def processor(text, **options):
        return tokenizer(text, return_tensors="pt", padding=True)

    processor.tokenizer = tokenizer
    inputs = BATCH["input_ids"]
    return {
        "torch": torch,
        "args": args,
        "train_config": args,
        "train_dataset": ROWS,
        "eval_dataset": ROWS,
        "data": ROWS,
        "rows": ROWS,
        "data_collator": None,
        "collator": None,
        "batch": BATCH,
        "batches": [BATCH],
        "first_batches": [BATCH],
        "calibration": [BATCH],
        "old_task": [BATCH],
        "inputs": inputs,
        "input_ids": inputs,
        "tokenizer": tokenizer,
        "processor": processor,
        "prompts": ["Once upon a", "the dog"],
        "train": train,
        "tasks": ["one", "two"],
        "accuracy": lambda model, task: 0.5,
        "W0": torch.randn(12, 12),
        "W": torch.randn(12, 12),
        "Trainer": transformers.Trainer,
        "base": llama(),
        "fresh_base": llama(),
        "base_model": llama(),
    }


def prepared(page, hub):
    """`given`, with the kind of model that this page speaks of."""
    import peft

    from polyrank import MclConfig, MoeConfig, generate_hypotheses

    names = given(hub)
    names |= {name: getattr(peft, name) for name in ("LoraConfig", "EvaConfig", "get_peft_model")}
    targets = ["q_proj", "v_proj"]
    stem = Path(page).stem
    if stem in ("allora", "lsr", "dylora"):
        names["base"] = bert()
    elif stem == "l4q":
        names |= {"base": llama(128), "fresh_base": llama(128)}
    elif stem == "computational-limits":
        names["model"] = llama()
    elif stem in ("lora-pro", "intruder"):
        names["model"] = peft.get_peft_model(
            llama(), peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
        )
    elif stem == "lora-moe":
        names["model"] = peft.get_peft_model(
            llama(), MoeConfig(num_experts=3, top_k=2, target_modules=targets, task_type="CAUSAL_LM")
        )
    elif stem in ("lora-mcl-generation", "lora-mcl-step", "decoding"):
        count = 5 if stem == "decoding" else 3
        config = MclConfig(num_hypotheses=count, r=2, target_modules=targets, task_type="CAUSAL_LM", init_weights=False)
        model = peft.get_peft_model(llama(), config)
        names |= {"model": model, "config": config, "optimizer": torch.optim.AdamW(model.parameters())}
        names["inputs"] = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
        names["tokens"] = generate_hypotheses(model, **names["inputs"], max_new_tokens=3)
    elif stem == "pat":
        names["args"] = TrainingArguments(
            "out", max_steps=6, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
        )
    return names


def make_files(hub, folder):
    """Files and folders that pages name."""
    line = {"id": "1", "input": "x", "candidates": ["a b c d", "a b"], "references": ["a b c d", "e f"]}
    (folder / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    if (hub / "index").is_dir():
        shutil.copytree(hub / "index", folder / "index")
        shutil.copytree(hub / "adapter", folder / "runs" / "gpl" / "<run>" / "adapter")


@pytest.mark.parametrize(("page", "text"), blocks())
def test_python_blocks_run(hub, small, page, text):
    if "gpl" in page:
        pytest.importorskip("faiss")
    make_files(hub, small)
    for before, after in FILLED_IN.get(page, {}).items():
        text = text.replace(before, after)
    names = prepared(page, hub)
    names["__name__"] = "polyrank.adapters.of_the_docs"  # for "from ._base import ..."
    names["__package__"] = "polyrank.adapters"
    if "register_adapter(" in text:
        sys.modules[names["__name__"]] = SimpleNamespace(__dict__=names)
    try:
        exec(compile(text, page, "exec"), names)
    finally:
        sys.modules.pop(names["__name__"], None)
        _forget("simple")


def _forget(name):
    """Take a method that a page registers out of the registry again."""
    import peft

    from polyrank.adapters import _peft_bridge, adapters

    if name in adapters:
        del adapters._entries[name]
        for table in (peft.PEFT_TYPE_TO_CONFIG_MAPPING, peft.PEFT_TYPE_TO_TUNER_MAPPING):
            table.pop(_peft_bridge.peft_type(name), None)


def test_what_is_filled_in_is_there():
    for page, changes in FILLED_IN.items():
        text = (ROOT / page).read_text()
        assert all(before in text for before in changes), page

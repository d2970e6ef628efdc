"""A small GPT-2 built here: tokenizer, random weights, a short training on plain sentences; kept in a folder.

The same sentences and settings give the same model (its seed is fixed: methods and seeds of a comparison share it).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.files import atomic_write
from ...core.seeding import derive_seed, seed_everything
from ...data.causal_lm import EncodedPairs
from .config import Optimization, Scratch

END = "<|endoftext|>"


def scratch_folder(scratch: Scratch, sentences: Sequence[str], cache: Path) -> str:
    """The folder of the trained model (config, weights, tokenizer) below `cache`, built where it is not there yet."""
    from .training import train

    recipe = {"scratch": dataclasses.asdict(scratch), "sentences": list(sentences)}
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    folder = cache / f"gpt2-{digest}"
    if (folder / "built.json").is_file():
        return str(folder)
    tokenizer = build_tokenizer(sentences, scratch.vocabulary)
    seed_everything(derive_seed(0, "scratch"))
    model = build_model(scratch, tokenizer)
    rows = plain_rows(tokenizer, sentences, scratch.context)
    plan = Optimization(
        num_steps=scratch.num_steps,
        batch_size=scratch.batch_size,
        learning_rate=scratch.learning_rate,
        warmup_steps=scratch.num_steps // 10,
    )
    spent = train(plan, scratch.learning_rate, model, tokenizer, rows, folder, seed=0)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    shutil.rmtree(folder / "training", ignore_errors=True)
    facts = {**spent, "rows": len(rows), "dropped_rows": rows.dropped}
    atomic_write(folder / "built.json", json.dumps(facts) + "\n")
    return str(folder)


def build_tokenizer(sentences: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE as GPT-2's, trained on the sentences; END begins, ends and pads."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        sentences, vocab_size=vocabulary, min_frequency=2, special_tokens=[END], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END)


def build_model(scratch: Scratch, tokenizer: Any) -> Any:
    """GPT-2 with random weights, no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    end = tokenizer.eos_token_id
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=scratch.context,
            n_embd=scratch.width,
            n_layer=scratch.layers,
            n_head=scratch.heads,
            bos_token_id=end,
            eos_token_id=end,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def plain_rows(tokenizer: Any, sentences: Sequence[str], max_length: int) -> EncodedPairs:
    """Rows of a plain language model: END, sentence, END, loss on all but the first; too long ones are dropped."""
    end, rows = tokenizer.eos_token_id, []
    for ids in tokenizer([f" {text}" for text in sentences])["input_ids"]:
        row = [end, *ids, end]
        if len(row) <= max_length:
            rows.append({"input_ids": row, "attention_mask": [1] * len(row), "labels": list(row)})
    return EncodedPairs(rows, len(sentences) - len(rows), max_length)

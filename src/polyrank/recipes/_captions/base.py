"""A small Llama built here from its configuration: a byte-level BPE of its own, random weights, a training on prompts
and targets; kept in a folder, so that an adapter has a frozen language model to adapt.

The same pairs and settings give the same model (its seed is fixed: methods and seeds of a comparison share it).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from ...core.files import atomic_write
from ...core.seeding import derive_seed, seed_everything
from ...data.causal_lm import EncodedPairs, TextPair, encode_pairs, padding_collator
from .._e2e.config import ModelChoice
from .._text.scratch_model import build_tokenizer
from .config import CaptionSettings
from .processes import check_can_build

BUILT = "built.json"


@dataclass(frozen=True, kw_only=True)
class SmallLlama:
    """Attributes: width is hidden_size, feed_forward intermediate_size; context in tokens; vocabulary counts the pieces
    of the BPE, words that the data adds not; bf16: autocast while it is trained."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    feed_forward: int = 352
    context: int = 128
    vocabulary: int = 3072
    num_steps: int = 500
    batch_size: int = 32
    learning_rate: float = 3e-3
    bf16: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "feed_forward", "context", "num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.small.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigError(f"model.small.width {self.width} must be an even multiple of its {self.heads} heads")
        if self.vocabulary < 258:
            raise ConfigError(f"model.small.vocabulary must be at least 258 (all bytes), got {self.vocabulary}")
        if not self.learning_rate > 0:
            raise ConfigError(f"model.small.learning_rate must be positive, got {self.learning_rate}")


@dataclass(frozen=True)
class CaptionModel(ModelChoice):
    """A base model as `ModelChoice` has it, or one built and trained here (`small`)."""

    small: SmallLlama | None = None

    def __post_init__(self) -> None:
        if self.small is None:
            super().__post_init__()
        elif self.name_or_path is not None or self.checkpoint is not None:
            raise ConfigError("model.small builds the model: leave model.name_or_path and model.checkpoint empty")


def small_llama_folder(
    small: SmallLlama, pairs: Sequence[TextPair], cache: Path, added_words: Sequence[str] = ()
) -> str:
    """The folder of the trained model (config, weights, tokenizer) below `cache`, built where it is not there yet.

    Args:
        pairs: what it is trained on, loss on the targets; prompts and targets together are what the BPE is made from.
        added_words: each becomes one token (visual words).
    """
    from .training import train

    texts = [[pair.prompt, pair.target] for pair in pairs]
    recipe = json.dumps({"small": dataclasses.asdict(small), "texts": texts, "words": list(added_words)})
    folder = cache / f"llama-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if (folder / BUILT).is_file():
        return str(folder)
    check_can_build("model.small")
    spoken = dict.fromkeys(text for prompt, target in texts for text in (prompt, target) if "<v" not in text)
    tokenizer = build_tokenizer(list(spoken), small.vocabulary)
    tokenizer.add_special_tokens({"additional_special_tokens": list(added_words)})
    seed_everything(derive_seed(0, "small llama"))
    model = build_small_llama(small, tokenizer)
    rows = encode_pairs(tokenizer, pairs, small.context)
    plan = CaptionSettings(
        num_steps=small.num_steps,
        batch_size=small.batch_size,
        learning_rate=small.learning_rate,
        schedule="linear",
        warmup=0.1,
        bf16=small.bf16,
        save_every=100,
    )
    ordered = by_length(rows, small.batch_size, small.num_steps)
    seconds = train(plan, model, ordered, padding_collator(tokenizer), folder, seed=0, in_order=True)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    shutil.rmtree(folder / "training", ignore_errors=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"time_s": seconds, "rows": len(rows), "dropped_rows": rows.dropped, "parameters": parameters}
    atomic_write(folder / BUILT, json.dumps(facts) + "\n")
    return str(folder)


def by_length(rows: EncodedPairs, batch_size: int, num_batches: int) -> EncodedPairs:
    """Rows in the order of training: batches of similar length (which saves padding), the batches shuffled.

    Each pass takes every row once, but for the last ones that fill no batch.
    """
    draw, order = random.Random(0), []
    while len(order) < num_batches:
        shuffled = list(range(len(rows)))
        draw.shuffle(shuffled)
        shuffled.sort(key=lambda i: len(rows[i]["input_ids"]))
        size = min(batch_size, len(rows))
        batches = [shuffled[first : first + size] for first in range(0, len(rows) - size + 1, size)]
        draw.shuffle(batches)
        order += batches
    chosen = [rows[i] for batch in order[:num_batches] for i in batch]
    return EncodedPairs(chosen, rows.dropped, rows.max_length)


def build_small_llama(small: SmallLlama, tokenizer: Any) -> Any:
    """LlamaForCausalLM with random weights and a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    end = tokenizer.eos_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=small.width,
            intermediate_size=small.feed_forward,
            num_hidden_layers=small.layers,
            num_attention_heads=small.heads,
            num_key_value_heads=small.heads,
            max_position_embeddings=small.context,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )

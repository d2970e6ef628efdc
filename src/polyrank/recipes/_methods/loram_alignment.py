"""LoRAM's pruned model in a run: pruned and, where asked for, aligned on general text; the same in a later sitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compression.loram import LoramConfig, align_pruned, load_pruned, prune_model, save_pruned
from ...core.errors import ConfigError, DataError
from ...core.seeding import preserved_torch_rng
from ...data.text_files import read_text

BREAK = "<|endoftext|>"


@dataclass(frozen=True)
class LoramOptions(LoramConfig):
    """Fields of LoramConfig, and the alignment of the pruned model.

    Attributes:
        align_steps: optimiser steps of it; 0: none. Its seed is fixed, as is a published model.
        align_text: general text, a file with `<|endoftext|>` between its texts; None: the run's own training rows,
            prompts and targets alike.
        align_learning_rate, align_batch_size: of the alignment; the paper's rate.
    """

    align_steps: int = 0
    align_text: Path | None = None
    align_learning_rate: float = 5e-5
    align_batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.align_steps < 0 or self.align_batch_size < 1:
            raise ConfigError("align_steps must be at least 0 and align_batch_size at least 1")
        if not self.align_learning_rate > 0:
            raise ConfigError(f"align_learning_rate must be positive, got {self.align_learning_rate}")
        if self.align_text is not None and not self.align_steps:
            raise ConfigError("align_text is of no use without align_steps")


def pruned_model(base: Any, own: LoramOptions, place: Any) -> Any:
    """The pruned copy of the base, aligned where asked for; `place.run_dir` gets pruned/. The random state stays."""
    folder = place.run_dir / "pruned"
    with preserved_torch_rng():
        if own.align_steps and (folder / "loram.json").is_file():  # of a sitting that was killed afterwards
            return load_pruned(folder, dtype=base.dtype)[0]
        model, plan = prune_model(base, own, place.batches() if own.scores == "taylor" else None)
        if own.align_steps:
            _align(model, plan, own, place)
        save_pruned(model, plan, folder)
    return model


def _align(model: Any, plan: Any, own: LoramOptions, place: Any) -> None:
    import torch

    from .._frame.training_log import training_log

    rows = [{**row, "labels": list(row["input_ids"])} for row in map(place.rows.__getitem__, range(len(place.rows)))]
    if own.align_text is not None:
        rows = text_rows(own.align_text, place.tokenizer, max(len(row["input_ids"]) for row in rows))
    align_pruned(
        model,
        plan,
        rows,
        place.collate,
        [training_log(place.run_dir / "alignment.jsonl", own.align_steps)],
        max_steps=own.align_steps,
        learning_rate=own.align_learning_rate,
        per_device_train_batch_size=own.align_batch_size,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        logging_steps=min(10, own.align_steps),
        seed=0,
    )


def text_rows(path: Path, tokenizer: Any, length: int) -> Sequence[dict[str, list[int]]]:
    """The texts of a file, each in pieces of at most `length` tokens, every token with its label.

    Raises: DataError where there is no text.
    """
    rows = []
    for text in filter(None, (text.strip() for text in read_text(path).split(BREAK))):
        ids = tokenizer(text)["input_ids"]
        pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
        rows += [{"input_ids": p, "attention_mask": [1] * len(p), "labels": list(p)} for p in pieces if len(p) > 1]
    if not rows:
        raise DataError(f"{path} holds no text")
    return rows

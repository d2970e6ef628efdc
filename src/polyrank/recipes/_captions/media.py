"""Examples with an image or a sound: batches for training, likelihoods, decoding; the processor is transformers' own.

A row is the prompt as the processor expands it (placeholders of the image's or sound's features), then the caption and
the end token, loss on the latter two. Captions of an example: one row each, or one drawn anew for every epoch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...core.errors import DataError
from ...core.files import append_json_line
from ...core.seeding import derive_seed, preserved_torch_rng
from ...data.audio import SAMPLE_RATE
from ...data.causal_lm import IGNORED, encode_targets
from ...evaluation.decoding import Cost, decode_inputs
from ...evaluation.predict import done_ids, order_lines, total_cost
from .._e2e.config import Decoding
from .config import OneRun

Kind = Literal["image", "audio"]
SHORTEST = SAMPLE_RATE // 10
"""Samples that a shorter sound is filled up to: of one placeholder Qwen2Audio cannot tell that it was expanded."""
_CLEANED = re.compile(r"[\n\\_\u3400-\u4dbf\u4e00-\u9fff]+")


@dataclass(frozen=True)
class MediaExample:
    """An image or sound, loaded when it is needed, with its captions."""

    id: str
    load: Callable[[], Any]
    captions: tuple[str, ...]


def clean_caption(text: str) -> str:
    """A candidate without newlines, backslashes, underscores and Chinese characters; alike for every method."""
    return " ".join(_CLEANED.sub(" ", text).split())


class CaptionRows:
    """The Trainer's rows: {"example", "target"}.

    Args: one_per_epoch: an example is one row, and which of its captions depends on seed, example and `epoch`;
        else each caption is a row.
    """

    def __init__(self, examples: Sequence[MediaExample], one_per_epoch: bool, seed: int) -> None:
        self.examples, self.one_per_epoch, self.seed, self.epoch = list(examples), one_per_epoch, seed, 0
        self.index = [(i, j) for i, e in enumerate(examples) for j in range(1 if one_per_epoch else len(e.captions))]
        if not self.index:
            raise DataError("no training examples")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> dict[str, Any]:
        i, j = self.index[number]
        example = self.examples[i]
        if self.one_per_epoch:
            j = derive_seed(self.seed, "caption", self.epoch, i) % len(example.captions)
        return {"example": example, "target": example.captions[j]}


def epoch_follower(rows: CaptionRows) -> Any:
    """A Trainer callback that tells the rows which epoch it is, after a resume too."""
    from transformers import TrainerCallback

    class Follow(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rows.epoch = int(state.epoch or 0)

    return Follow()


@dataclass(frozen=True)
class MediaCoder:
    """From examples to model inputs."""

    processor: Any
    kind: Kind
    prompt: str

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def prompts(self, examples: Sequence[MediaExample]) -> dict[str, Tensor]:
        """Inputs to generate from: prompts padded on the left, pixel_values or input_features."""
        media = [example.load() for example in examples]
        self.tokenizer.padding_side = "left"
        texts = [self.prompt] * len(media)
        if self.kind == "image":
            return dict(self.processor(text=texts, images=media, padding=True, return_tensors="pt"))
        media = [np.pad(sound, (0, max(0, SHORTEST - len(sound)))) for sound in media]
        return dict(
            self.processor(text=texts, audio=media, sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt")
        )

    def rows(self, examples: Sequence[MediaExample], targets: Sequence[str]) -> dict[str, Tensor]:
        """Inputs with labels: prompt, target, end token, padded on the right."""
        inputs = self.prompts(examples)
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
        ends = encode_targets(self.tokenizer, targets)
        prompts = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        longest = max(len(p) + len(t) for p, t in zip(prompts, ends, strict=True))
        pad = self.tokenizer.pad_token_id
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, target in zip(prompts, ends, strict=True):
            rest = longest - len(prompt) - len(target)
            columns["input_ids"].append(prompt + target + [pad] * rest)
            columns["attention_mask"].append([1] * (longest - rest) + [0] * rest)
            columns["labels"].append([IGNORED] * len(prompt) + target + [IGNORED] * rest)
        return {**inputs, **{name: torch.tensor(rows) for name, rows in columns.items()}}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The Trainer's data collator."""
        return self.rows([row["example"] for row in rows], [row["target"] for row in rows])


@torch.no_grad()
def caption_nll(
    model: Any, coder: MediaCoder, examples: Sequence[MediaExample], texts: Sequence[str], hypothesis: int | None
) -> tuple[list[float], list[int]]:
    """Summed NLL (nats, end token included) of each text for its example, and its tokens."""
    batch = coder.rows(examples, texts)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    batch = {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    routing = {} if hypothesis is None else {"hypothesis_idx": hypothesis}
    logits = model(**batch, **routing, use_cache=False).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return nll.double().sum(1).tolist(), (labels != IGNORED).sum(1).tolist()


def media_predictor(
    config: OneRun, coder: MediaCoder, tests: Mapping[str, Sequence[MediaExample]]
) -> Callable[[Any, str, Decoding, Path, int, bool], Cost]:
    """`Task.predict` for images and sounds: as evaluation/predict.py, batch after batch, on where it stopped."""

    def predict(model: Any, test: str, decoding: Decoding, path: Path, seed: int, likelihood: bool) -> Cost:
        examples, size = tests[test], config.decode_batch_size
        done, costs = done_ids(path), path.with_name("decoding_cost.jsonl")
        foreign = done - {example.id for example in examples}
        if foreign:
            raise DataError(f"{path} holds predictions of another set: id {min(foreign)!r} is not among the examples")
        for number, first in enumerate(range(0, len(examples), size)):
            batch = list(examples[first : first + size])
            if all(example.id in done for example in batch):
                continue
            with preserved_torch_rng():
                decoded = decode_inputs(
                    model,
                    coder.tokenizer,
                    coder.prompts(batch),
                    decoding.method,
                    num_candidates=config.num_hypotheses,
                    budget=config.num_hypotheses * decoding.beams,
                    max_new_tokens=config.max_new_tokens,
                    length_penalty=config.length_penalty,
                    repetition_penalty=config.repetition_penalty,
                    clean=clean_caption,
                    seed=derive_seed(seed, "decode", number),
                    **decoding.options,
                )
            for example, candidates in zip(batch, decoded.candidates, strict=True):
                if example.id not in done:
                    append_json_line(path, _line(model, coder, example, candidates, config.several, likelihood))
            append_json_line(costs, {"batch": number, **decoded.cost.as_dict()})
        order_lines(path, [example.id for example in examples])
        return total_cost(costs)

    return predict


def _line(
    model: Any, coder: MediaCoder, example: MediaExample, candidates: list[str], several: int | None, likelihood: bool
) -> dict[str, Any]:
    """One line of predictions.jsonl; candidate k is scored by the hypothesis that wrote it."""
    which: list[int | None] = list(range(several)) if several else [None] * len(candidates)
    scores = []
    for text, hypothesis in zip(candidates, which, strict=True):
        sums, tokens = caption_nll(model, coder, [example], [text], hypothesis)
        scores.append(-sums[0] / tokens[0])
    line = {"id": example.id, "input": coder.prompt, "candidates": candidates, "references": list(example.captions)}
    line["scores"] = scores
    if likelihood:
        copies = [example] * len(example.captions)
        columns = [
            caption_nll(model, coder, copies, example.captions, k) for k in (range(several) if several else [None])
        ]
        line["nll"] = [list(row) for row in zip(*(sums for sums, _ in columns), strict=True)]
        line["meta"] = {"nll_tokens": columns[0][1]}
    return line

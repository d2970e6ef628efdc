"""Decoding and scoring of tasks whose prompts are text alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...data.e2e import MultiReference
from ...evaluation.decoding import Cost
from ...evaluation.predict import predict
from ...evaluation.scoring import own_scores, reference_nll
from .._e2e.config import Decoding
from .config import OneRun


def text_predictor(
    config: OneRun, tokenizer: Any, tests: Mapping[str, Sequence[MultiReference]]
) -> Callable[[Any, str, Decoding, Path, int, bool], Cost]:
    """`Task.predict` for text prompts."""

    def predict_text(model: Any, test: str, decoding: Decoding, path: Path, seed: int, likelihood: bool) -> Cost:
        nll = partial(reference_nll, model, tokenizer, num_hypotheses=config.several) if likelihood else None
        return predict(
            model,
            tokenizer,
            tests[test],
            path,
            decoding.method,
            batch_size=config.decode_batch_size,
            seed=seed,
            score=partial(own_scores, model, tokenizer, by_hypothesis=config.several is not None),
            nll=nll,
            num_candidates=config.num_hypotheses,
            budget=config.num_hypotheses * decoding.beams,
            max_new_tokens=config.max_new_tokens,
            length_penalty=config.length_penalty,
            repetition_penalty=config.repetition_penalty,
            **decoding.options,
        )

    return predict_text

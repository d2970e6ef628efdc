"""From captioned sounds or images to the engine's Task: base model and processor, rows, decoding, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from .config import OneRun
from .media import CaptionRows, Kind, MediaCoder, MediaExample, epoch_follower, media_predictor
from .media_config import MediaModel
from .run import Task, compute
from .small_media import small_media_folder

ROLES = {"oracle_spider": "quality", "oracle_cider_d": "quality", "oracle_bleu": "quality", "mbleu_4": "diversity"}


def media_task(
    record: str,
    kind: Kind,
    config: OneRun,
    model: MediaModel,
    prompt: str,
    parts: Mapping[str, Sequence[MediaExample]],
    one_per_epoch: bool,
    run_dir: Path,
    inputs: Sequence[Path] = (),
    details: Mapping[str, Any] | None = None,
) -> Task:
    """Args: parts: "train", "test" and, where there is one, "validation"."""
    if model.small is not None:
        cache = config.cache_dir or run_dir / "cache"
        name = small_media_folder(model.small, kind, prompt, parts["train"], cache)
    else:
        name = str(model.name_or_path)
    base, processor = load_media_model(name, kind)
    coder = MediaCoder(processor, kind, prompt)
    rows = CaptionRows(parts["train"], one_per_epoch, config.seed)
    validation = CaptionRows(parts["validation"], False, config.seed) if "validation" in parts else None
    return Task(
        record=record,
        base=base,
        target_modules=model.target_modules,
        rows=rows,
        collator=coder.collate,
        tests=["test"],
        predict=media_predictor(config, coder, {"test": parts["test"]}),
        score=lambda test, path: compute(path, config.metrics),
        roles=ROLES,
        inputs=inputs,
        validation=validation,
        details=details or {},
        callbacks=[epoch_follower(rows)],
    )


def load_media_model(name_or_path: str, kind: Kind) -> tuple[Any, Any]:
    """Model and processor. Raises ConfigError where there is none of that name, or one of another kind."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2AudioForConditionalGeneration

    loader = AutoModelForImageTextToText if kind == "image" else Qwen2AudioForConditionalGeneration
    try:
        processor = AutoProcessor.from_pretrained(name_or_path)
        model = loader.from_pretrained(name_or_path, dtype="auto")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load an {kind} model from {name_or_path!r}: {str(error).splitlines()[0]}") from error
    missing = "image_processor" if kind == "image" else "feature_extractor"
    if not hasattr(processor, missing):
        raise ConfigError(f"{name_or_path!r} has no processor for {kind}s ({type(processor).__name__})")
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return model, processor

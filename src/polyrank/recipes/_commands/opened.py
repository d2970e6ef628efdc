"""A run or an adapter folder, opened to write text: its model, its tokenizer, and how a prompt was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from ...data.causal_lm import prepare_tokenizer
from .._train.template import read_template
from .saved import find_adapter, load_adapter, load_base, load_tokenizer


@dataclass(frozen=True)
class Opened:
    """num_hypotheses: K of a LoRA-MCL model, else None. template: kind of the rows it was trained on, if it says so."""

    model: Any
    tokenizer: Any
    num_hypotheses: int | None
    template: str | None


def open_model(source: str | Path, base: str | None = None, hypothesis: int | None = None) -> Opened:
    """The model that a run or an adapter folder holds; a run that trained the whole model keeps it in
    `model/`, one of PAT keeps the small model in `small/`.

    Raises: CheckpointError, ConfigError as `find_adapter` does; ConfigError, before anything is loaded, for a
        hypothesis that there is not.
    """
    for whole, beside in (("model", "model"), ("small", "adapter")):
        folder = Path(source) / whole
        if (folder / "config.json").is_file():
            _check(hypothesis, 1)
            tokenizer = prepare_tokenizer(load_tokenizer(folder))
            return Opened(load_base(str(folder)), tokenizer, None, read_template(Path(source) / beside))
    saved = find_adapter(source, base)
    _check(hypothesis, saved.num_hypotheses or 1)
    model = load_adapter(saved)
    tokenizer = prepare_tokenizer(load_tokenizer(saved.folder, saved.base))
    return Opened(model, tokenizer, saved.num_hypotheses, read_template(saved.folder))


def _check(hypothesis: int | None, count: int) -> None:
    if hypothesis is not None and hypothesis >= count:
        raise ConfigError(f"--hypothesis {hypothesis}: the adapter has {count}, numbered from 0")

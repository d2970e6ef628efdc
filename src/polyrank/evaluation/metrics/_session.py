"""What one evaluation shares between its metrics: places of models, scores already computed, where they are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from ...core.errors import ConfigError, check_choice
from ...core.files import sha256

T = TypeVar("T")

MODELS = {
    "sbert": "sentence-transformers/paraphrase-TinyBERT-L6-v2",
    "fluency": None,
    "bertscore": "FacebookAI/roberta-large",
    "spice": None,
}
"""What --model may name, and the hub model that stands in for it where it lies in the local hub cache."""


@dataclass
class Session:
    """State of one call of `evaluate`.

    Attributes:
        models: kind (see MODELS) -> folder or hub id.
        folder: where scores of slow metrics are kept as they come; None keeps them in memory only.
        progress: show a bar on standard error.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    progress: bool = False
    memo: dict[tuple[str, int], Any] = field(default_factory=dict)


_CURRENT: ContextVar[Session | None] = ContextVar("polyrank_metrics_session", default=None)


def current() -> Session:
    """The session of the evaluation that is under way; an empty one outside of any."""
    return _CURRENT.get() or Session()


@contextmanager
def session(
    models: Mapping[str, str] | None = None, folder: Path | None = None, progress: bool = False
) -> Iterator[Session]:
    """Metrics computed inside share their scores and find their models.

    Raises: UnknownNameError for a kind of model that there is none of; ConfigError for a place that is empty.
    """
    for kind, place in (models or {}).items():
        check_choice("model", kind, MODELS)
        if not place:
            raise ConfigError(f"model {kind!r}: give a folder or a hub id")
    token = _CURRENT.set(Session(dict(models or {}), folder, progress))
    try:
        yield current()
    finally:
        _CURRENT.reset(token)


def once(name: str, records: Sequence[Any], compute: Callable[[], T]) -> T:
    """`compute()`, remembered for these very records (or model place) until the session ends."""
    memo, key = current().memo, (name, id(records))
    if key not in memo:
        memo[key] = compute()
    value: T = memo[key]
    return value


def model_place(kind: str) -> str | None:
    """Folder or hub id of a model: as given, else the published one if the hub cache holds it; None where neither."""
    given = current().models.get(kind)
    if given is not None:
        return given
    published = MODELS[kind]
    if published is None or find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    return published if isinstance(try_to_load_from_cache(published, "config.json"), str) else None


def place_of(kind: str) -> str:
    """`model_place`, where there must be one."""
    place = model_place(kind)
    if place is None:
        raise ConfigError(f"no model for {kind!r}: give its folder")
    return place


def identity(kind: str) -> str:
    """A name for the model's content that a file name may bear: part of a folder's hash, or the hub id."""
    place = place_of(kind)
    if Path(place).exists():
        return once(f"identity/{kind}", (), lambda: sha256(place)[:12])
    return re.sub(r"[^\w.-]+", "_", place)

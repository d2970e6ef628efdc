"""Encoders for the scores that need a model, loaded from a folder or the hub cache by sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.errors import ConfigError
from ._session import once, place_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def encoder(kind: str) -> SentenceTransformer:
    """The model of that kind, loaded once in an evaluation; safetensors only, no remote code.

    Raises: ConfigError if there is none at the place given.
    """
    return once(f"encoder/{kind}", (), lambda: load(kind, place_of(kind)))


def load(kind: str, place: str) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(place, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"model {kind!r}: cannot load {place!r}: {reason}") from None
    return model.eval()


def sentence_vectors(model: Any, texts: Sequence[str], **options: Any) -> dict[str, np.ndarray]:
    """Text -> vector (d,), float64."""
    different = list(dict.fromkeys(texts))
    vectors = model.encode(different, convert_to_numpy=True, show_progress_bar=False, **options)
    return dict(zip(different, np.asarray(vectors, dtype=np.float64), strict=True))


def token_vectors(model: Any, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Text -> unit vectors (tokens, d) of the last layer, float64, without the tokens that begin and end a text."""
    different = list(dict.fromkeys(texts))
    found = model.encode(different, output_value="token_embeddings", convert_to_numpy=False, show_progress_bar=False)
    vectors = {}
    for text, rows in zip(different, found, strict=True):
        inner = rows.detach().cpu().double().numpy()[1:-1]
        vectors[text] = inner / np.linalg.norm(inner, axis=1, keepdims=True)
    return vectors

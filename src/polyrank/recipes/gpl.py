"""A retriever for a corpus without labels (GPL): queries are made from the documents, hard negatives mined, a teacher
scores both, and a small adapter on a sentence encoder learns the teacher's margins.

    corpus -> queries -> vectors -> negatives -> labels -> tuples -> training -> adapter/

Every stage is kept under a key of its settings and of what came before (retrieval/store.py says where): the same
command does nothing twice, another setting redoes what depends on it, and what is killed goes on.

Source: Wang et al. 2022, GPL (arXiv 2112.07577). Differs: training an adapter instead of all weights; a teacher that
needs no model (BM25 and the encoder itself, fused); keys instead of "the file exists".
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.files import full_disk_is_said, sha256
from ..core.provenance import portable
from ..retrieval.dense import is_normalised, load_encoder
from ..retrieval.store import Store, stage_key
from ._frame.registry import recipes
from ._gpl.config import FULL, CorpusSettings, GplConfig, LabelSettings, TrainingSettings
from ._gpl.stages import Prepared, Score, model_identity, prepare
from ._gpl.training import train

_log = logging.getLogger("polyrank")
__all__ = ["CorpusSettings", "GplConfig", "GplRun", "LabelSettings", "TrainingSettings", "run", "run_gpl"]


@dataclass(frozen=True)
class GplRun:
    """A finished run. `weights`: adapter/ (PEFT), or model/ (a whole sentence-transformers model) with adapter=full.

    Attributes: facts: trainable_parameters, parameters, train_s, tuples.
    """

    run_dir: Path
    weights: Path
    prepared: Prepared
    facts: dict[str, Any]


@recipes.decorator("gpl")
def run(config: GplConfig, run_dir: Path) -> None:
    """Adapt the encoder to the corpus. `run_dir` gets stages/, manifest.json, metrics.jsonl, adapter/ (or model/)."""
    run_gpl(config, run_dir)


def run_gpl(config: GplConfig, run_dir: str | Path, scorer: Score | None = None) -> GplRun:
    """All stages and training, each found or made.

    Args:
        scorer: a teacher given as a function from a list of (query, document) texts to as many numbers.
    Raises: DataError, ConfigError for what cannot be used; RunError if a file cannot be written.
    """
    run_dir = Path(run_dir)
    with full_disk_is_said(run_dir):
        store = Store(run_dir, config.engine, config.workers)
        store.describe("settings", portable(dataclasses.asdict(config)))
        normalised = config.similarity == "cosine" or is_normalised(load_encoder(config.encoder))
        prepared = prepare(config, store, normalised, scorer)
        key = training_key(config, prepared)
        facts = train(config, prepared, run_dir / "stages" / f"training-{key[:12]}", run_dir / "metrics.jsonl")
        facts |= {"tuples": prepared.tuples.counts["rows"]}
        weights = place(run_dir / "stages" / f"training-{key[:12]}" / "weights", run_dir, config.adapter == FULL)
        store.describe("training", {"key": key[:12], **facts, "weights": weights.name})
        _log.info("%s: %d of %d parameters trained", weights, facts["trainable_parameters"], facts["parameters"])
        return GplRun(run_dir, weights, prepared, facts)


def training_key(config: GplConfig, prepared: Prepared) -> str:
    """Key of the training: its settings, the student's weights, and the tuples."""
    settings = {item.name: getattr(config, item.name) for item in dataclasses.fields(TrainingSettings)}
    settings |= {"encoder": model_identity(config.encoder), "seed": config.seed, "rescale": config.rescale}
    settings["learning_rate"] = config.rate
    settings["side"] = "queries" if prepared.documents is not None else "both"
    if not config.keep_checkpoints:
        del settings["save_every"]
    return stage_key("training", settings, [prepared.corpus.key, prepared.queries.key, prepared.tuples.key])


def place(trained: Path, run_dir: Path, whole_model: bool) -> Path:
    """Put the trained weights where a user looks for them; what an earlier setting left there goes away."""
    target, other = (run_dir / name for name in (("model", "adapter") if whole_model else ("adapter", "model")))
    if not target.is_dir() or sha256(target) != sha256(trained):
        fresh = run_dir / f".{target.name}"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(trained, fresh)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    shutil.rmtree(other, ignore_errors=True)
    return target

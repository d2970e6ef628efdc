"""The table of metrics: a name, what it needs, which way is better."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from ...core.registry import Registry
from ._session import MODELS, model_place
from .predictions import Prediction
from .spice import corenlp_folder, spice_java

Value = float | list[float]
INSTALLED: dict[str, tuple[str, Callable[[], bool]]] = {
    "pycocoevalcap": (
        "the package pycocoevalcap (pip install 'polyrank[metrics]')",
        lambda: find_spec("pycocoevalcap") is not None,
    ),
    "java": (
        "Java on the PATH (for instance: apt install default-jre-headless)",
        lambda: shutil.which("java") is not None,
    ),
    "sentence_transformers": (
        "the package sentence-transformers (pip install sentence-transformers)",
        lambda: find_spec("sentence_transformers") is not None,
    ),
    "sbert": (
        f"a sentence encoder: --model sbert=FOLDER, or the hub id of published figures: {MODELS['sbert']}",
        lambda: model_place("sbert") is not None,
    ),
    "fluency": (
        "FENSE's fluency detector, whose published checkpoint (echecker_clotho_audiocaps_base) is made into --model"
        " fluency=FOLDER by python -m polyrank.evaluation.metrics.fluency",
        lambda: model_place("fluency") is not None,
    ),
    "bertscore": (
        f"an encoder: --model bertscore=FOLDER, or the hub id of published figures: {MODELS['bertscore']}",
        lambda: model_place("bertscore") is not None,
    ),
    "spice": (
        "Stanford CoreNLP 3.6.0 with its models: --model spice=FOLDER (stanford-corenlp-full-2015-12-09.zip, unpacked)",
        lambda: corenlp_folder() is not None,
    ),
    "spice_java": ("Java 8 to 14, or a later JDK, for SPICE's program", spice_java),
}


@dataclass(frozen=True)
class Metric:
    """A figure computed from all predictions of a run.

    Attributes:
        name: registry name, also the key of the result.
        compute: predictions -> float, or a list with one float for each hypothesis.
        better: "higher", "lower" or "neither".
        unit: what the number counts ("BLEU", "nats per token", ...).
        needs: "scores", "nll", "nll_tokens", "several_candidates", "several_references", "one_output": what the
            predictions must have; the keys of INSTALLED: what the machine must have, or `--model` name.
        on_request: computed only where it is named (a metric of one task, or a slow one).
    """

    name: str
    compute: Callable[[Sequence[Prediction]], Value]
    better: str
    unit: str
    needs: frozenset[str] = frozenset()
    on_request: bool = False

    def lacking(self, records: Sequence[Prediction]) -> str | None:
        """What the predictions lack for this metric, in words, or None where they have all of it."""
        checks: dict[str, tuple[str, Callable[[Prediction], bool]]] = {
            "several_candidates": ("at least two candidates", lambda r: len(r.candidates) > 1),
            "scores": ("'scores'", lambda r: r.scores is not None),
            "nll": ("'nll'", lambda r: r.nll is not None),
            "nll_tokens": ("'meta.nll_tokens'", lambda r: r.nll_tokens is not None),
            "one_output": (
                "one candidate, or 'scores' to choose one by",
                lambda r: len(r.candidates) == 1 or r.scores is not None,
            ),
        }
        missing = self.not_installed()
        if missing is not None:
            return missing
        for need in sorted(self.needs - INSTALLED.keys()):
            if need == "several_references":
                if not any(len(set(r.references)) > 1 for r in records):
                    return "at least two different references for some input"
                continue
            words, check = checks[need]
            without = [r.id for r in records if not check(r)]
            if without:
                return f"{words} (absent for {len(without)} of {len(records)} ids, first {without[0]!r})"
        return None

    def not_installed(self) -> str | None:
        """What this metric needs on the machine and does not find, and how to get it; None where nothing is missing."""
        return next((words for need, (words, found) in INSTALLED.items() if need in self.needs and not found()), None)


METRICS: Registry[Metric] = Registry("metric")


def metric(
    name: str, *, better: str, unit: str, needs: Sequence[str] = (), on_request: bool = False
) -> Callable[[Callable[[Sequence[Prediction]], Value]], Callable[[Sequence[Prediction]], Value]]:
    """Register a function as the metric of that name."""

    def add(compute: Callable[[Sequence[Prediction]], Value]) -> Callable[[Sequence[Prediction]], Value]:
        METRICS.register(name, Metric(name, compute, better, unit, frozenset(needs), on_request))
        return compute

    return add

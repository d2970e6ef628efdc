"""What `polyrank list` shows: one dict for each thing that can be named, the same keys for all of a kind."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from .._frame.compose import describe, options

Entries = list[dict[str, Any]]


def methods(config_dir: Path | None) -> Entries:
    """Adapter methods, with their own fields and tags; PEFT's own (lora, loha, ...) work as well."""
    import polyrank.hypotheses  # noqa: F401  (registers mcl)

    from ...adapters import adapters

    return [
        {"name": name, "summary": _summary(method.config), "tags": ", ".join(sorted(method.tags))}
        for name, method in adapters.items()
    ]


def recipes(config_dir: Path | None) -> Entries:
    return [{"name": name, "summary": describe(file)} for name, file in options("recipe", config_dir).items()]


def data(config_dir: Path | None) -> Entries:
    return [{"name": name, "summary": describe(file)} for name, file in options("data", config_dir).items()]


def objectives(config_dir: Path | None) -> Entries:
    """Ways in which hypotheses compete (`mode`)."""
    from ...objectives.winners import MODES, OBJECTIVES

    return [{"name": mode, "summary": OBJECTIVES.get(mode).description} for mode in MODES]


def metrics(config_dir: Path | None) -> Entries:
    from ...evaluation.metrics import METRICS

    return [
        {"name": name, "better": metric.better, "unit": metric.unit, "summary": _summary(metric.compute)}
        for name, metric in METRICS.items()
    ]


def _summary(thing: Any) -> str:
    """First sentence of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")

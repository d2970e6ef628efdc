"""Metrics of predictions: pure functions of texts and numbers, no model."""

from . import caption, data_to_text, diversity, likelihood, maths, quality, semantic
from ._registry import METRICS, Metric, metric
from ._session import MODELS
from .evaluate import PRESETS, Evaluation, evaluate, evaluate_predictions
from .predictions import Prediction, Skipped, parse_prediction, read_predictions
from .sentence import SENTENCE_SCORES, sentence_scores

__all__ = [
    "METRICS",
    "MODELS",
    "PRESETS",
    "SENTENCE_SCORES",
    "Evaluation",
    "Metric",
    "Prediction",
    "Skipped",
    "caption",
    "data_to_text",
    "diversity",
    "evaluate",
    "evaluate_predictions",
    "likelihood",
    "maths",
    "metric",
    "parse_prediction",
    "quality",
    "read_predictions",
    "semantic",
    "sentence_scores",
]

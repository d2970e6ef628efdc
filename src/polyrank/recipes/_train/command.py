"""`polyrank train`: what its keys mean as keys of the recipe `train`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...core.errors import ConfigError, name_message
from .._frame.compose import options
from ..train import OWN, Plan

_OPEN = ("method.options.", "columns.")
"""Groups whose keys the file or the method names, not the recipe."""


def train_overrides(given: Sequence[str]) -> list[str]:
    """The recipe's overrides for `data=FILE model=FOLDER method=NAME key=value ...`.

    Raises: ConfigError where data or model is missing, for a word that is no key=value, and for a field of
        TrainingArguments that the engine owns or does not take.
    """
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"cannot read {text!r}: write key=value, for instance data=train.jsonl")
        if key in found:
            raise ConfigError(f"{key!r} is given twice: {found[key]!r} and {value!r}")
        found[key] = value
    for key in ("data", "model"):
        if key not in found and not (key == "model" and any(name.startswith("model.") for name in found)):
            raise ConfigError(f"give {key}=: polyrank train data=train.jsonl model=FOLDER method=lora")
    overrides = ["recipe=train"]
    for key, value in found.items():
        overrides += _override(key, value)
    return overrides


def _override(key: str, value: str) -> list[str]:
    if key == "data":
        return [f"source={_quoted(value)}"]
    if key == "model" and value not in options("model"):
        return ["model=hub", f"model.name_or_path={_quoted(value)}"]
    if key in ("recipe", "source"):
        raise ConfigError(f"polyrank train takes data=FILE, not {key}= (recipes: polyrank run recipe=NAME)")
    if key == "validation" and value != "null":
        return [f"validation={_quoted(value)}"]
    name = key.removeprefix("training.")
    if name != key:
        if name in OWN:
            raise ConfigError(f"training.{name} cannot be set: {OWN[name]}")
        if name not in Plan.__dataclass_fields__:
            raise ConfigError(name_message("field in training", name, Plan.__dataclass_fields__))
    if key.startswith(_OPEN):
        return [f"++{key}={value}"]
    return [f"{key}={value}"]


def _quoted(value: str) -> str:
    """A text as Hydra reads it as one, whatever it holds."""
    if re.fullmatch(r"(['\"]).*\1", value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"

"""ALMA's parallel text: JSON records {"translation": {"en": ..., "de": ...}}, one a line or one list, and its prompt.

    Translate this from English to German:
    English: <source>
    German:                     then the translation and the end token

Source: ALMA (Xu et al. 2023), `human_written_data/deen/{train,valid,test}.de-en.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..core.errors import ConfigError, DataError, check_choice
from .causal_lm import TextPair
from .e2e import MultiReference
from .json_records import read_json_records, text_field

NAMES = {"en": "English", "de": "German", "fr": "French", "cs": "Czech", "is": "Icelandic", "zh": "Chinese",
         "ru": "Russian"}  # fmt: skip
PROMPT = "Translate this from {source_language} to {target_language}:\n{source_language}: {source}\n{target_language}:"


def check_translation_prompt(template: str) -> None:
    """Raise ConfigError unless the template holds {source} once and no field but the two languages beside it."""
    try:
        filled = template.format(source="\0", source_language="", target_language="")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"prompt template {template!r} may hold {{source}}, {{source_language}} and {{target_language}} only"
        ) from error
    if filled.count("\0") != 1:
        raise ConfigError(f"prompt template {template!r} must hold {{source}} once")


def translation_prompt(template: str, text: str, source: str, target: str) -> str:
    """The prompt for one sentence; languages are two-letter codes of NAMES."""
    for language in (source, target):
        check_choice("language", language, NAMES)
    return template.format(source=text, source_language=NAMES[source], target_language=NAMES[target])


def as_prompts(
    examples: Iterable[MultiReference], template: str = PROMPT, source: str = "en", target: str = "de"
) -> list[MultiReference]:
    """The examples with their input put into the prompt."""
    return [replace(e, input=translation_prompt(template, e.input, source, target)) for e in examples]


def as_pairs(examples: Iterable[MultiReference]) -> list[TextPair]:
    """One training pair for every reference."""
    return [TextPair(f"{e.id}-{j}", e.input, text) for e in examples for j, text in enumerate(e.references)]


def read_alma(path: str | Path, source: str = "en", target: str = "de") -> list[MultiReference]:
    """Each source sentence with its one translation, as it stands in the file (no prompt).

    Raises: DataError for a record without "translation", without one of the languages, or with an empty text.
    """
    name = Path(path).name.split(".")[0]
    examples = []
    for i, (where, record) in enumerate(read_json_records(path)):
        pair = record.get("translation")
        if not isinstance(pair, dict):
            raise DataError(f'{where}: expected {{"translation": {{{source!r}: ..., {target!r}: ...}}}}')
        examples.append(
            MultiReference(f"{name}-{i:06d}", text_field(pair, source, where), (text_field(pair, target, where),))
        )
    return examples

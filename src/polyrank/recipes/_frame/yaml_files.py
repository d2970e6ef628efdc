"""YAML from outside: plain values only, and none that a few lines can blow up or that name code to import."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from ...core.files import read_bytes

MAXIMUM_BYTES = 4 << 20
MOST_ALIASES = 30
"""Aliases of aliases multiply what is composed from them; thirty make 3^10 copies at most."""

MOST_NESTED = 100
_IMPORTS = "_target_"


def read_yaml(file: str | Path) -> Any:
    """The value of a YAML file.

    Raises: ConfigError, in one line, for a file that is no YAML, with tags of other than plain values, or that
        `check_yaml` refuses; DataError for one that cannot be read.
    """
    import yaml

    text = check_yaml(file)
    try:
        value = yaml.safe_load(text)
        _visit(value)
    except RecursionError:
        raise ConfigError(f"{file} is not valid YAML: nested too deeply, or within itself") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # ValueError: an impossible date
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    return value


def check_yaml(file: str | Path) -> str:
    """The text of a YAML file that a loader of plain values can be given: what is no valid YAML it refuses by itself.

    Raises: ConfigError for a file that is no UTF-8, nested too deeply, with too many aliases, or with a key that has
        Hydra import a class; DataError for one that cannot be read.
    """
    import yaml

    try:
        text = read_bytes(file, MAXIMUM_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    if _depth(text) > MOST_NESTED:  # PyYAML's time grows with the square of it
        raise ConfigError(f"{file} is not valid YAML: nested too deeply")
    aliases = 0
    try:
        for token in yaml.scan(text, yaml.SafeLoader):
            aliases += isinstance(token, yaml.AliasToken)
            if isinstance(token, yaml.ScalarToken) and token.value == _IMPORTS:
                raise ConfigError(f"{file}: the key {_IMPORTS!r} names a class to import, which no configuration may")
    except yaml.YAMLError:
        pass  # the loader says what is wrong
    if aliases > MOST_ALIASES:
        raise ConfigError(f"{file} holds {aliases} aliases; at most {MOST_ALIASES} are read")
    return text


def _depth(text: str) -> int:
    """The most brackets that are open at once; those in quoted texts count too."""
    deepest = depth = 0
    for sign in re.findall(r"[][{}]", text):
        depth = max(depth + (1 if sign in "[{" else -1), 0)
        deepest = max(deepest, depth)
    return deepest


def _visit(value: Any) -> None:
    """Go through all of it: a value that holds itself ends in a RecursionError here, and not somewhere later."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _visit(item)

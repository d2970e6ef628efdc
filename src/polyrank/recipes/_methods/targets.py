"""Which modules an adapter goes on: a misspelt name is a mistake in every recipe, for every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...core.errors import ConfigError, name_message


def check_targets(base: Any, targets: str | Sequence[str], field: str) -> None:
    """Raise ConfigError for the first name in a list that is no module of the model (regular expressions: PEFT's)."""
    if isinstance(targets, str):
        return
    modules = [name for name, _ in base.named_modules() if name]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            known = {name.rsplit(".", 1)[-1] for name in modules}
            raise ConfigError(name_message(f"module in {field}", target, {n for n in known if not n.isdigit()}))

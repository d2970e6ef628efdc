"""What an adapter's configuration from outside claims, held against what its weights hold, before anything is made.

A rank is a dimension of some tensor in the file, so a rank that no file of this size could hold is a mistake or an
attack: the layers would be allocated first and found not to fit afterwards. Names may be regular expressions, and some
take longer than a life to match.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from .errors import CheckpointError

ALWAYS_ALLOWED = 1024
"""A size up to which no weights are asked for: methods differ in which of their sizes a file shows."""

_SIZES = (
    *("r", "init_r", "lora_rank", "num_hypotheses", "num_experts", "num_terms", "num_vectors"),
    *("n_frequency", "num_virtual_tokens", "encoder_hidden_size", "encoder_num_layers", "num_layers"),
)
_EXACT = re.compile(r"LORA|POLYRANK_\w+")
"""Methods whose sizes are dimensions of their tensors; of others only the number of values is asked."""

_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
_KEYED_BY_PATTERN = ("rank_pattern", "alpha_pattern")
_LONGEST_PATTERN, _MOST_REPEATS = 5000, 8
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_REPEATS_IN_A_ROW = re.compile(r"[*+}]\??[()?:]*(?:\.|\\\w|\[[^\]]*\])[*+{]")


def check_claims(where: object, config: Mapping[str, Any], shapes: Iterable[Sequence[int]]) -> None:
    """Check an adapter's configuration against the shapes of its tensors.

    Args: where: names the folder in the errors.
    Raises: CheckpointError for a size that the weights cannot have, a pattern that could match for ever, or an option
        that names a module to import.
    """
    shapes = [shape for shape in shapes if prod(shape) > 0]
    exact = _EXACT.fullmatch(str(config.get("peft_type")))
    held = max((max(shape, default=1) for shape in shapes), default=0) if exact else sum(map(prod, shapes))
    patterns = config.get("rank_pattern")
    ranks = {f"rank_pattern[{key!r:.80}]": rank for key, rank in patterns.items()} if isinstance(patterns, dict) else {}
    for name, size in {**{name: config.get(name) for name in _SIZES}, **ranks}.items():
        if isinstance(size, int | float) and size > max(held, ALWAYS_ALLOWED):
            what = "no dimension of its weights is above" if exact else "its weights hold no more values than"
            raise CheckpointError(f"{where}: {name} is {size}, but {what} {held}")
    for pattern in _patterns(config):
        if hard_to_match(pattern):
            raise CheckpointError(f"{where}: the pattern {pattern!r:.120} is too complicated to be matched safely")
    if config.get("megatron_config") is not None:
        raise CheckpointError(f"{where}: megatron_config has a module imported by name; it is not supported")


def hard_to_match(pattern: str) -> bool:
    """Whether a regular expression could take very long: a repeated group, or many repeats one after another."""
    many = len(pattern) > _LONGEST_PATTERN or len(re.findall(r"[*+{]", pattern)) > _MOST_REPEATS
    return many or bool(_REPEATED_GROUP.search(pattern) or _REPEATS_IN_A_ROW.search(pattern))


def _patterns(config: Mapping[str, Any]) -> Iterable[str]:
    for name in _PATTERNS:
        value = config.get(name)
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))
    for name in _KEYED_BY_PATTERN:
        value = config.get(name)
        yield from value if isinstance(value, dict) else ()

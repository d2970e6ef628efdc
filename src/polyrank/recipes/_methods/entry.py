"""An entry of conf/method: one way to train a model, for recipes `glue`, `data_to_text`, `maths` and `methods`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...core.errors import ConfigError
from ...core.structure import from_dict
from .parts import Initialiser, LossChoice, OptimizerChoice

NO_ADAPTER = ("full", "head")


@dataclass(frozen=True)
class MethodEntry:
    """One way to train: an adapter with its options, and what goes with it.

    Attributes:
        name, label: as in file names and in tables.
        adapter: a registered method ("lsr") or a type of PEFT's ("lora", "loha"); "full": all parameters are trained;
            "head": nothing but the head.
        options: fields of the adapter's config.
        learning_rate: this method's own; the run's `learning_rate` goes before it.
        alpha_per_rank: lora_alpha = alpha_per_rank * r, whatever r is; None: lora_alpha as in `options`.
        match: option that is changed to reach a given number of parameters; a whole number, more of it is larger. None:
            the options stay as they are, where the size is known only once the data are (EVA's).
        initialiser, optimizer, losses: what the method brings beside its adapter, see parts.py.
    """

    name: str
    label: str
    adapter: str
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 5e-4
    alpha_per_rank: float | None = None
    match: str | None = "r"
    initialiser: Initialiser | None = None
    optimizer: OptimizerChoice | None = None
    losses: LossChoice | None = None

    def __post_init__(self) -> None:
        kinds = {"initialiser": Initialiser, "optimizer": OptimizerChoice, "losses": LossChoice}
        for part, kind in kinds.items():  # a method read back from a run's files
            if isinstance(getattr(self, part), Mapping):
                object.__setattr__(self, part, from_dict(kind, getattr(self, part), f"method.{part}"))
        for part in ("initialiser", "optimizer"):
            if self.adapter in NO_ADAPTER and getattr(self, part) is not None:
                raise ConfigError(f"method {self.name!r} ({self.adapter}) has no adapter, so it takes no {part}")
        if not self.learning_rate > 0:
            raise ConfigError(f"method.learning_rate must be positive, got {self.learning_rate}")
        if self.adapter in NO_ADAPTER and self.options:
            raise ConfigError(f"method {self.name!r} ({self.adapter}) has no adapter, so it takes no options")
        if self.alpha_per_rank is not None and "lora_alpha" in self.options:
            raise ConfigError("give method.alpha_per_rank or method.options.lora_alpha, not both")

    @property
    def has_adapter(self) -> bool:
        return self.adapter not in NO_ADAPTER


def method_entry(value: Any) -> MethodEntry:
    """Check an entry of conf/method. Raises ConfigError that says which entry it is and what is wrong with it."""
    if isinstance(value, MethodEntry):
        return value
    name = value.get("name") if isinstance(value, Mapping) else value
    try:
        return from_dict(MethodEntry, value, "method")
    except ConfigError as error:
        raise ConfigError(f"method {name!r} is no entry for recipe glue: {error}") from error


def with_option(method: MethodEntry, value: int) -> MethodEntry:
    """The method with its `match` option at this value."""
    return dataclasses.replace(method, options={**method.options, method.match: value})

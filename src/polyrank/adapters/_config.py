"""The configuration that every weight-level method shares."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from peft import PeftConfig

from ..core.claims import check_claims
from ..core.errors import ConfigError
from ..core.files import atomic_write
from ..core.structure import convert
from ._folders import CONFIG_NAME, read_object, read_shapes
from ._peft_bridge import get_pattern_key, peft_type

T = TypeVar("T")


@dataclass
class AdapterConfig(PeftConfig):
    """Fields that all methods share, with PEFT's own names. A method's config adds its own and nothing else.

    Raises (on construction): ConfigError for a rank below 1, a dropout outside [0, 1), a field of a wrong type.
    """

    method: ClassVar[str] = ""  # registry name, set by register_adapter
    layer_key: ClassVar[str] = ""  # name of the layer that a copy made by `for_layer` belongs to

    r: int = field(default=8, metadata={"help": "Rank of the update."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names (suffixes), a regular expression, or 'all-linear'. Default: as PEFT's LoRA chooses."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (suffixes) or a regular expression of modules to leave alone."}
    )
    lora_alpha: float = field(default=8, metadata={"help": "Scale numerator: the update is scaled by lora_alpha / r."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) instead."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input only, in [0, 1)."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Accepted for PEFT's sake; how a layer stores its weight is seen by its type."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train fully and save beside the adapter (a new head)."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: start as the base model. False: random, for tests."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Adapt only the layers of these indices."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the ModuleList that layers_to_transform counts in."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Name or regular expression to a rank that differs from r."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Name or regular expression to an alpha that differs from lora_alpha."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.method:
            raise ConfigError(f"{type(self).__name__} belongs to no registered method: use a method's own config")
        self.peft_type = peft_type(self.method)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
        self.check_int("r", minimum=1)
        self.check_number("lora_alpha")
        self.check_number("lora_dropout", low=0.0, high=1.0)
        for name, rank in (self.rank_pattern or {}).items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ConfigError(f"rank_pattern[{name!r}] must be an integer >= 1, got {rank!r}")
        for name, alpha in (self.alpha_pattern or {}).items():
            if not is_finite(alpha):
                raise ConfigError(f"alpha_pattern[{name!r}] must be a finite number, got {alpha!r:.60}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def check_int(self, name: str, minimum: int, maximum: int | None = None) -> None:
        value = getattr(self, name)
        too_large = maximum is not None and value > maximum if isinstance(value, int) else False
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum or too_large:
            bounds = f">= {minimum}" + (f" and <= {maximum}" if maximum is not None else "")
            raise ConfigError(f"{name} must be an integer {bounds}, got {value!r}")

    def check_number(self, name: str, low: float = -math.inf, high: float = math.inf) -> None:
        """Raise ConfigError unless the field is a finite number in [low, high)."""
        value = getattr(self, name)
        if not is_finite(value):
            raise ConfigError(f"{name} must be a finite number, got {value!r:.60}")
        if not low <= value < high:
            raise ConfigError(f"{name} must lie in [{low:g}, {high:g}), got {value!r}")

    def for_layer(self, key: str) -> AdapterConfig:
        """A copy for one layer: `layer_key` is its name, `r` and `lora_alpha` are what the patterns give it."""
        config = copy(self)
        config.layer_key = key
        config.r = config.layer_value(self.rank_pattern, self.r)
        config.lora_alpha = config.layer_value(self.alpha_pattern, self.lora_alpha)
        return config

    def layer_value(self, patterns: Mapping[str, T] | None, default: T) -> T:
        """The value whose pattern matches this layer's name, as PEFT matches (name, suffix, regular expression)."""
        return (patterns or {}).get(get_pattern_key((patterns or {}).keys(), self.layer_key), default)

    def scaling(self, rank: int, alpha: float) -> float:
        """Factor of the update: alpha / r, or alpha / sqrt(r) (rank-stabilised)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> AdapterConfig:
        """As PEFT's; what a local folder claims is checked against its weights, if it has any, before they are made.

        Raises: CheckpointError for a folder whose files cannot be trusted; ConfigError for a wrong field.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if (folder / CONFIG_NAME).is_file():
            values = read_object(folder)
            check_claims(folder, values, read_shapes(folder))
            cls._check_types(values)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    @classmethod
    def _check_types(cls, values: Mapping[str, Any]) -> None:
        """Raise ConfigError for a value of our own fields that is of another type: PEFT passes on what JSON holds."""
        pefts, hints = {item.name for item in fields(PeftConfig)}, get_type_hints(cls)
        for item in fields(cls):
            if item.name not in pefts and values.get(item.name) is not None:
                convert(values[item.name], hints[item.name], item.name)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        _explain_loading(Path(save_directory) / "README.md")


def is_finite(value: object) -> bool:
    """Whether this is a number, and one that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_LOADING = """
## How to load this adapter

This adapter's method comes from the package `polyrank`. Import it before PEFT reads the folder:

```python
import polyrank  # registers the adapter's type with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


def _explain_loading(readme: Path) -> None:
    """Say in the saved folder's README what has to be imported: PEFT alone cannot load the type."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if _LOADING.strip() not in text:  # PEFT's model card trims blank lines when it is written again
        atomic_write(readme, text + _LOADING)

"""What the YAML of recipe `translation` may say, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...core.errors import ConfigError, check_choice
from ...data.alma import NAMES, PROMPT, check_translation_prompt
from ...data.multi30k import TRANSLATION_SPLITS
from .base import CaptionModel
from .config import CaptionSettings, ManyRuns, OneRun, check_limits


@dataclass(frozen=True, kw_only=True)
class TranslationData:
    """Parallel text.

    Attributes:
        format: "alma": `train` is a JSON file in ALMA's format; "multi30k": `path` is Multi30k's folder, `train` its
            split.
        wmt: file of the ten-reference WMT14 test; None: not tested on.
        official: judge WMT14's candidates by the official reference too.
        test: a split of Multi30k, or an ALMA JSON file, to test on besides; None: none.
        template: the prompt.
        base_share: share of the training pairs that a small base model is trained on; the adapter gets the others.
        train_limit, test_limit: at most so many training pairs, and inputs of each test set.
    """

    format: Literal["alma", "multi30k"] = "alma"
    path: Path | None = None
    train: str = "train"
    wmt: Path | None = None
    official: bool = False
    test: str | None = None
    source: str = "en"
    target: str = "de"
    template: str = PROMPT
    base_share: float = 0.0
    train_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        for language in (self.source, self.target):
            check_choice("data language", language, NAMES)
        check_translation_prompt(self.template)
        if self.format == "multi30k":
            if self.path is None:
                raise ConfigError("data.format multi30k needs data.path, Multi30k's folder")
            check_choice("data.train", self.train, TRANSLATION_SPLITS)
            if self.test is not None:
                check_choice("data.test", self.test, TRANSLATION_SPLITS)
        if self.wmt is None and self.test is None:
            raise ConfigError("nothing to test on: give data.wmt, data.test, or both")
        if not 0 <= self.base_share < 1:
            raise ConfigError(f"data.base_share must be in [0, 1), got {self.base_share}")
        check_limits("data", {"train_limit": self.train_limit, "test_limit": self.test_limit})


@dataclass(frozen=True, kw_only=True)
class TranslationSettings(CaptionSettings):
    """CaptionSettings with model and data."""

    model: CaptionModel
    data: TranslationData = field(default_factory=TranslationData)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model.small is not None) != (self.data.base_share > 0):
            raise ConfigError("data.base_share is the share that model.small is trained on: give both or neither")


@dataclass(frozen=True, kw_only=True)
class TranslationConfig(OneRun, TranslationSettings):
    """One run."""


@dataclass(frozen=True, kw_only=True)
class TranslationTable(ManyRuns, TranslationSettings):
    """A table of runs."""

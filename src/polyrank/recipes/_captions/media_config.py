"""What the YAML of recipes `audio_captioning` and `image_captioning` may say, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...core.errors import ConfigError
from .config import CaptionSettings, ManyRuns, OneRun, check_limits
from .small_media import AUDIO, IMAGE, SmallMedia

AUDIO_PROMPT = f"{AUDIO[1]}{AUDIO[0]}{AUDIO[2]}Generate the caption in English: "
IMAGE_PROMPT = f"USER: {IMAGE}\nPlease carefully observe the image and come up with a caption for the image. ASSISTANT:"


@dataclass(frozen=True, kw_only=True)
class MediaModel:
    """The base model: a hub id or folder, or one of the same class built here (`small`); target_modules of the
    adapter: names, or one regular expression."""

    name_or_path: str | None = None
    small: SmallMedia | None = None
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if (self.name_or_path is None) == (self.small is None):
            raise ConfigError("model needs name_or_path (hub id or folder) or small, not both")


@dataclass(frozen=True, kw_only=True)
class AudioData:
    """Captioned sounds.

    Attributes:
        format: "clotho" or "audiocaps": their CSV files and folders of sound files; "digits": the spoken digits;
            "pack": HDF5 files, packed before.
        train, test, validation: for digits the split; else file of the captions (CSV) or pack, below `path`.
        audio: for each of those a folder of sound files below `path`; empty for digits and packs.
        pack_dir: where packed HDF5 files are kept (default: packs/ in the cache).
        max_seconds: longer sounds are cut. prompt: with the tokens of a sound.
    """

    format: Literal["clotho", "audiocaps", "digits", "pack"]
    path: Path
    train: str
    test: str
    validation: str | None = None
    audio: dict[str, str] = field(default_factory=dict)
    pack_dir: Path | None = None
    max_seconds: float = 30.0
    prompt: str = AUDIO_PROMPT
    train_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        if not self.max_seconds > 0:
            raise ConfigError(f"data.max_seconds must be positive, got {self.max_seconds}")
        if self.prompt.count(AUDIO[0]) != 1:
            raise ConfigError(f"data.prompt must hold {AUDIO[0]} once, got {self.prompt!r}")
        if self.format in ("clotho", "audiocaps"):
            for part in ("train", "test", *(["validation"] if self.validation else [])):
                if part not in self.audio:
                    raise ConfigError(
                        f"data.audio.{part}: the folder of the sounds of {getattr(self, part)!r} is needed"
                    )
        check_limits("data", {"train_limit": self.train_limit, "test_limit": self.test_limit})


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Captioned images.

    Attributes:
        format: "textcaps": TextCaps' JSON files and folders of images; "photos": a folder with metadata.jsonl.
        train, test, validation: splits. images: folder of the images, where it is not beside the JSON file.
    """

    format: Literal["textcaps", "photos"]
    path: Path
    train: str = "train"
    test: str = "val"
    validation: str | None = None
    images: Path | None = None
    prompt: str = IMAGE_PROMPT
    train_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        if self.prompt.count(IMAGE) != 1:
            raise ConfigError(f"data.prompt must hold {IMAGE} once, got {self.prompt!r}")
        check_limits("data", {"train_limit": self.train_limit, "test_limit": self.test_limit})


@dataclass(frozen=True, kw_only=True)
class AudioSettings(CaptionSettings):
    """CaptionSettings with model and data."""

    model: MediaModel
    data: AudioData


@dataclass(frozen=True, kw_only=True)
class AudioConfig(OneRun, AudioSettings):
    """One run."""


@dataclass(frozen=True, kw_only=True)
class AudioTable(ManyRuns, AudioSettings):
    """A table of runs."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings(CaptionSettings):
    """CaptionSettings with model and data."""

    model: MediaModel
    data: ImageData


@dataclass(frozen=True, kw_only=True)
class ImageConfig(OneRun, ImageSettings):
    """One run."""


@dataclass(frozen=True, kw_only=True)
class ImageTable(ManyRuns, ImageSettings):
    """A table of runs."""

"""What the YAML of recipe `image_captioning/bilingual` may say, and its data: images as visual words, captions."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...core.errors import ConfigError
from ...core.files import atomic_write
from ...data.causal_lm import TextPair
from ...data.e2e import MultiReference
from ...data.multi30k import LANGUAGES, NUM_CAPTIONS, CaptionedImage, read_captions
from ...data.visual_words import Codebook, as_text, image_vectors, quantize
from .base import CaptionModel
from .config import CaptionSettings, ManyRuns, OneRun, check_limits


@dataclass(frozen=True, kw_only=True)
class BilingualData:
    """Multi30k's images with five English and five German captions.

    Attributes:
        feature_captions: so many captions of each language, the first ones, describe the image (its visual words);
            the others are learned, or are the references.
        base_share: share of the training images that the base model is trained on, with all their other English
            captions; the adapters get the other images, half of the captions English, half German.
        base_german: share of the base model's images of which it reads the German captions, too: it knows one language
            well and the other a little, as the models do that people adapt.
        train_limit, test_limit: at most so many images.
    """

    path: Path
    test: str = "test_2016"
    feature_captions: int = 3
    base_share: float = 0.5
    base_german: float = 0.1
    codebook: Codebook = field(default_factory=Codebook)
    train_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.feature_captions < NUM_CAPTIONS:
            raise ConfigError(f"data.feature_captions must be in 1..{NUM_CAPTIONS - 1}, got {self.feature_captions}")
        if not 0 < self.base_share < 1:
            raise ConfigError(f"data.base_share must be in (0, 1), got {self.base_share}")
        if not 0 <= self.base_german <= 1:
            raise ConfigError(f"data.base_german must be in [0, 1], got {self.base_german}")
        check_limits("data", {"train_limit": self.train_limit, "test_limit": self.test_limit})


@dataclass(frozen=True, kw_only=True)
class BilingualSettings(CaptionSettings):
    """CaptionSettings with model and data."""

    model: CaptionModel
    data: BilingualData

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.small is None:
            raise ConfigError("image_captioning/bilingual builds its base model: give model.small (model=llama_small)")


@dataclass(frozen=True, kw_only=True)
class BilingualConfig(OneRun, BilingualSettings):
    """One run."""

    num_hypotheses: int = 2


@dataclass(frozen=True, kw_only=True)
class BilingualTable(ManyRuns, BilingualSettings):
    """A table of runs."""

    num_hypotheses: list[int] = field(default_factory=lambda: [2])


@dataclass(frozen=True)
class BilingualParts:
    """Prompts (visual words) and captions: pairs for the base model, pairs for the adapters, test examples, and the
    language of each test example's references by its id."""

    base: list[TextPair]
    adapter: list[TextPair]
    test: list[MultiReference]
    languages: dict[str, list[str]]


def bilingual_parts(data: BilingualData, cache: Path) -> BilingualParts:
    """Read and code the images; the same split and choice for every method and seed."""
    from .._text.training import chosen

    train = chosen(read_captions(data.path, "train"), data.train_limit)
    test = chosen(read_captions(data.path, data.test), data.test_limit)
    codes = visual_words(train, test, data, cache)
    order = list(range(len(train)))
    random.Random(0).shuffle(order)
    num_base = round(data.base_share * len(order))
    first, second = order[:num_base], order[num_base:]
    german = set(first[: round(data.base_german * num_base)])
    base = []
    for i in first:
        languages = LANGUAGES if i in german else LANGUAGES[:1]
        base += _captions(train[i], codes[train[i].id], data, languages)
    adapter = [pair for n, i in enumerate(second) for pair in _halves(train[i], codes[train[i].id], data, n)]
    examples, languages = [], {}
    for image in test:
        texts = [(lang, text) for lang in LANGUAGES for text in image.captions[lang][data.feature_captions :]]
        examples.append(MultiReference(image.id, codes[image.id], tuple(text for _, text in texts)))
        languages[image.id] = [lang for lang, _ in texts]
    return BilingualParts(base, adapter, examples, languages)


def visual_words(
    train: Sequence[CaptionedImage], test: Sequence[CaptionedImage], data: BilingualData, cache: Path
) -> dict[str, str]:
    """The prompt of every image by its id; kept in `cache`."""
    described = [[_description(image, data.feature_captions) for image in part] for part in (train, test)]
    book = data.codebook
    key = json.dumps([described, [book.levels, book.size, book.width]])
    path = cache / f"visual-words-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    if path.is_file():
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        return found
    codes = quantize(*image_vectors(described[0], described[1], book.width), book)
    texts = {
        image.id: as_text(row)
        for part, rows in zip((train, test), codes, strict=True)
        for image, row in zip(part, rows, strict=True)
    }
    atomic_write(path, json.dumps(texts) + "\n")
    return texts


def _description(image: CaptionedImage, count: int) -> dict[str, str]:
    return {lang: " ".join(image.captions[lang][:count]) for lang in LANGUAGES}


def _captions(image: CaptionedImage, prompt: str, data: BilingualData, languages: Sequence[str]) -> list[TextPair]:
    return [
        TextPair(f"{image.id}-{lang}-{j}", prompt, text)
        for lang in languages
        for j, text in enumerate(image.captions[lang])
        if j >= data.feature_captions
    ]


def _halves(image: CaptionedImage, prompt: str, data: BilingualData, number: int) -> list[TextPair]:
    """Each of the captions in one language, English and German by turns: half and half over all images."""
    pairs = []
    for j in range(data.feature_captions, NUM_CAPTIONS):
        lang = LANGUAGES[(number + j) % len(LANGUAGES)]
        pairs.append(TextPair(f"{image.id}-{lang}-{j}", prompt, image.captions[lang][j]))
    return pairs

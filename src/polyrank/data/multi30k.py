"""Multi30k: sentences about Flickr30k's photographs, one line an image, the same line in every file (.gz or plain).

    task1/<split>.<language>     one English caption and its translations
    task2/<split>.<i>.<language> five captions of each image, written independently in English and in German

The photographs are no part of it. Source: multi30k/dataset (Elliott et al. 2016), folders `data/task1/raw` and
`data/task2/raw`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError, DataError, check_choice
from .e2e import MultiReference
from .json_records import find_file
from .text_files import read_text

LANGUAGES = ("en", "de")
NUM_CAPTIONS = 5
CAPTION_SPLITS = ("train", "val", "test_2016")
TRANSLATION_SPLITS = ("train", "val", "test_2016_flickr", "test_2017_flickr", "test_2017_mscoco", "test_2018_flickr")


@dataclass(frozen=True)
class CaptionedImage:
    """An image by its line number, with its captions by language (five each)."""

    id: str
    captions: dict[str, tuple[str, ...]]


def caption_files(path: str | Path, split: str) -> list[Path]:
    """The ten files of a split: all English ones, then all German ones. Raises ConfigError, DataError."""
    check_choice("split", split, CAPTION_SPLITS)
    folder = Path(path) / "task2"
    names = [f"{split}.{i}.{language}" for language in LANGUAGES for i in range(1, NUM_CAPTIONS + 1)]
    return [find_file(folder, [name], f"captions {name}") for name in names]


def read_captions(path: str | Path, split: str = "train") -> list[CaptionedImage]:
    """All images of a split with five captions in each language.

    Raises: DataError where files differ in length (a caption would get another image), or a caption is empty (which,
        and how many).
    """
    files = caption_files(path, split)
    columns = [_lines(file) for file in files]
    _same_length(files, columns)
    for file, column in zip(files, columns, strict=True):
        empty = [i for i, line in enumerate(column, start=1) if not line]
        if empty:
            raise DataError(f"{str(file)!r}: {len(empty)} of {len(column)} captions are empty (first: line {empty[0]})")
    images = []
    for i in range(len(columns[0])):
        texts = [column[i] for column in columns]
        captions = {"en": tuple(texts[:NUM_CAPTIONS]), "de": tuple(texts[NUM_CAPTIONS:])}
        images.append(CaptionedImage(f"{split}-{i:05d}", captions))
    return images


def translation_files(path: str | Path, split: str, source: str = "en", target: str = "de") -> list[Path]:
    """The two files of a split of task1. Raises ConfigError, DataError."""
    check_choice("split", split, TRANSLATION_SPLITS)
    folder = Path(path) / "task1"
    return [find_file(folder, [f"{split}.{lang}"], f"sentences {split}.{lang}") for lang in (source, target)]


def read_translations(
    path: str | Path, split: str = "train", source: str = "en", target: str = "de"
) -> list[MultiReference]:
    """Each source sentence with its one translation; pairs of which a side is empty are left out.

    Raises: DataError where the files differ in length or hold no pair.
    """
    if source == target:
        raise ConfigError(f"source and target language are both {source!r}")
    files = translation_files(path, split, source, target)
    columns = [_lines(file) for file in files]
    _same_length(files, columns)
    pairs = [
        MultiReference(f"{split}-{i:05d}", a, (b,)) for i, (a, b) in enumerate(zip(*columns, strict=True)) if a and b
    ]
    if not pairs:
        raise DataError(f"{str(files[0])!r} and {files[1].name!r} hold no pair of sentences")
    return pairs


def _lines(file: Path) -> list[str]:
    lines = [" ".join(line.split()) for line in read_text(file).split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def _same_length(files: list[Path], columns: list[list[str]]) -> None:
    for file, column in zip(files, columns, strict=True):
        if len(column) != len(columns[0]):
            raise DataError(
                f"{str(file)!r} has {len(column)} lines and {files[0].name!r} {len(columns[0])}: line k must be image k"
            )

"""Captioned images: TextCaps as published, photographs with a metadata.jsonl, and a check that every image opens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from ..core.files import atomic_write, parse_json, read_json_lines
from .json_records import find_file, read_json_records, text_field
from .text_files import read_text

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
TEXTCAPS_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class CaptionedPhoto:
    """An image file with its captions, and what made the captions where it is known (a subject, a class)."""

    id: str
    path: Path
    captions: tuple[str, ...]


def read_textcaps(folder: str | Path, split: str, images: str | Path | None = None) -> list[CaptionedPhoto]:
    """TextCaps 0.1: TextCaps_0.1_<split>.json, one record a caption, gathered by image in order of first appearance.

    Args: images: folder of <image_id>.jpg; default: train_images/ (train, val) or test_images/ beside the JSON file.
    Raises: DataError for a file without "data", a record without image_id, or without caption; empty captions.
    """
    file = find_file(folder, [f"TextCaps_0.1_{split}.json"], f"TextCaps {split} set")
    place = Path(images) if images is not None else file.parent / ("test_images" if split == "test" else "train_images")
    try:
        whole = parse_json(read_text(file))
    except ValueError as error:
        raise DataError(f"{str(file)!r}: {error}") from None
    if not isinstance(whole, dict) or not isinstance(whole.get("data"), list) or not whole["data"]:
        raise DataError(f"{str(file)!r} has no records under 'data'")
    captions: dict[str, dict[str, None]] = {}
    for number, record in enumerate(whole["data"], start=1):
        where = f"{str(file)!r}, record {number}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: a record must be a JSON object, not {type(record).__name__}")
        name = text_field(record, "image_id", where)
        captions.setdefault(name, {})[text_field(record, "caption_str", where)] = None
    return [CaptionedPhoto(name, _image_file(place, name), tuple(texts)) for name, texts in captions.items()]


def read_photos(folder: str | Path, split: str) -> list[CaptionedPhoto]:
    """Photographs of a split listed in metadata.jsonl: file, caption, split.

    Raises: DataError for a missing or empty field, or no image of that split.
    """
    found = []
    for where, record in read_json_records(Path(folder) / "metadata.jsonl"):
        if text_field(record, "split", where) == split:
            name = text_field(record, "file", where)
            found.append(CaptionedPhoto(name, Path(folder) / name, (text_field(record, "caption", where),)))
    if not found:
        raise DataError(f"{str(folder)!r} holds no image of split {split!r}")
    return found


def open_image(path: str | Path) -> Any:
    """The image, RGB, decoded whole. Raises DataError where it is missing or does not open."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{str(path)!r}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{str(path)!r} does not open as an image: {str(error).splitlines()[0]}") from error


def usable_photos(photos: Sequence[CaptionedPhoto], skipped: Path) -> list[CaptionedPhoto]:
    """The photographs that open; the others go into `skipped` (JSON lines: id, reason), which a second call reads.

    Raises: DataError where none opens.
    """
    if skipped.is_file():
        bad = {item["id"] for item in read_json_lines(skipped)}
    else:
        items = []
        for photo in photos:
            try:
                open_image(photo.path)
            except DataError as error:
                items.append({"id": photo.id, "reason": str(error)})
        bad = {item["id"] for item in items}
        if len(bad) == len(photos):
            raise DataError(f"none of the {len(photos)} images opens; the first: {items[0]['reason']}")
        atomic_write(skipped, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    return [photo for photo in photos if photo.id not in bad]


def _image_file(folder: Path, name: str) -> Path:
    return next(
        (folder / f"{name}{end}" for end in ENDINGS if (folder / f"{name}{end}").is_file()), folder / f"{name}.jpg"
    )

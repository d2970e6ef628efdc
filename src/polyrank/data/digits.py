"""Spoken digits (Free Spoken Digit Dataset, a part of it) as captioned clips: metadata.csv beside wavs.zip.

Captions are made from the metadata: three sentences that say digit and speaker.
Source: Jakobovski/free-spoken-digit-dataset.
"""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path

from ..core.errors import DataError
from .clips import Clip, read_csv_rows

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("{speaker} says {digit}", "the digit {digit} is spoken by {speaker}", "a man speaks the number {digit}")


def read_digits(folder: str | Path, split: str) -> list[Clip]:
    """The clips of a split ("train" or "test"). Raises DataError where files are missing or a row makes no sense."""
    archive = Path(folder) / "wavs.zip"
    if not archive.is_file():
        raise DataError(f"{str(folder)!r} holds no wavs.zip")
    with zipfile.ZipFile(archive) as file:
        inside = {Path(name).name: name for name in file.namelist()}
    clips = []
    for row in read_csv_rows(Path(folder) / "metadata.csv", ("file", "digit", "speaker", "split")):
        if row["digit"] not in map(str, range(10)) or row["file"] not in inside:
            raise DataError(f"{str(folder)!r}: the row of {row['file']!r} names no digit 0..9 or no file of wavs.zip")
        if row["split"] == split:
            captions = [c.format(speaker=row["speaker"], digit=WORDS[int(row["digit"])]) for c in CAPTIONS]
            sound = partial(_member, archive, inside[row["file"]])
            clips.append(Clip(row["file"], sound, tuple(captions), source=row["speaker"]))
    if not clips:
        raise DataError(f"{str(folder)!r} holds no clip of split {split!r}")
    return clips


def _member(archive: Path, name: str) -> bytes:
    with zipfile.ZipFile(archive) as file:
        return file.read(name)

"""Captioned sound clips as Clotho and AudioCaps publish them: CSV files and, got elsewhere, a folder of sound files.

Clotho: `file_name,caption_1..caption_5`. AudioCaps: `audiocap_id,youtube_id,start_time,caption`, one row a caption; its
sound files are looked for as <youtube_id>, Y<youtube_id>, <youtube_id>_<start>..., or <audiocap_id>, with any ending.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import DataError
from .text_files import read_text


@dataclass(frozen=True)
class Clip:
    """A clip: where its sound is (a path, or what gives a file's bytes) and its captions."""

    name: str
    sound: Path | Callable[[], bytes]
    captions: tuple[str, ...]
    source: str = ""


def read_clotho(csv_path: str | Path, audio: str | Path) -> list[Clip]:
    """The clips of one of Clotho's CSV files. Raises DataError: no such columns, a clip twice, an empty caption."""
    rows = read_csv_rows(csv_path, ("file_name", "caption_1"))
    columns = sorted(name for name in rows[0] if name.startswith("caption_"))
    clips: dict[str, Clip] = {}
    for number, row in enumerate(rows, start=2):
        name = row["file_name"].strip()
        captions = tuple(" ".join((row[column] or "").split()) for column in columns)
        if not name or name in clips:
            raise DataError(f"{str(csv_path)!r}, line {number}: file_name {name!r} is empty or appears twice")
        if not all(captions):
            empty = columns[captions.index("")]
            raise DataError(f"{str(csv_path)!r}, line {number}: {empty} of {name!r} is empty")
        clips[name] = Clip(name, Path(audio) / name, captions, source=name)
    return list(clips.values())


def read_audiocaps(csv_path: str | Path, audio: str | Path) -> list[Clip]:
    """The clips of one of AudioCaps' CSV files, captions of one video gathered. Raises as `read_clotho`."""
    rows = read_csv_rows(csv_path, ("audiocap_id", "youtube_id", "start_time", "caption"))
    found: dict[str, tuple[str, str, list[str]]] = {}
    for number, row in enumerate(rows, start=2):
        name, caption = row["youtube_id"].strip(), " ".join((row["caption"] or "").split())
        if not name or not caption:
            what = "caption" if name else "youtube_id"
            raise DataError(f"{str(csv_path)!r}, line {number}: {what} is empty")
        found.setdefault(name, (row["start_time"].strip(), row["audiocap_id"].strip(), []))[2].append(caption)
    files = _by_stem(Path(audio))
    clips = []
    for name, (start, number_id, captions) in found.items():
        file = next((files[stem] for stem in _stems(name, start, number_id, files) if stem in files), None)
        clips.append(Clip(name, file or Path(audio) / name, tuple(captions), source=f"{name}@{start}"))
    return clips


def _stems(name: str, start: str, number: str, files: dict[str, Path]) -> list[str]:
    """Names under which the sound of a video may lie, without ending."""
    exact = [name, f"Y{name}", f"{name}_{start}", f"Y{name}_{start}", number]
    return exact + [stem for stem in files if stem.startswith((f"{name}_{start}_", f"{name}_{start}."))]


def _by_stem(folder: Path) -> dict[str, Path]:
    return {file.stem: file for file in sorted(folder.iterdir())} if folder.is_dir() else {}


def read_csv_rows(path: str | Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(read_text(Path(path)), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{str(path)!r}, after line {reader.line_num}: {error}") from error
    for column in needed:
        if column not in (reader.fieldnames or ()):
            present = ", ".join(reader.fieldnames or ()) or "none"
            raise DataError(f"{str(path)!r} has no column {column!r}; its columns are {present}")
    if not rows:
        raise DataError(f"{str(path)!r} has a header and no rows")
    return rows

"""Captioned clips packed into one HDF5 file: 16 kHz mono samples beside their captions.

    <dataset>_<subset>_resample_mean_raw_ident_raw.hdf
        audio        (N,) float32 of varying length        audio_shape  (N, 2) int64: channels (1), samples
        captions     (N, C) text, "" where a clip has fewer    dataset, subset, source, fname  (N,) text
        index        (N,) int64: line of the clip list         sha256       (N,) text, of the samples' bytes

Packing goes shard after shard into `<file>.parts/`, each written whole or not at all, and ends with one file made of
them: an interrupted pack goes on with the first shard that is missing, and nothing stands in it twice. A clip whose
sound cannot be used is left out and named, with the reason, in `<file>.skipped.jsonl`.

Source: the data preparation of LoRA-MCL's audio recipe ("resample, mean, raw"). Differs: sound of varying length is not
padded; sha256 is new.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError
from ..core.files import atomic_path, atomic_write
from .audio import SAMPLE_RATE, load_mono
from .clips import Clip

TEXTS = ("dataset", "subset", "source", "fname", "sha256")


@dataclass(frozen=True)
class Packed:
    """What a pack holds: the file, its clips, and those left out (name, reason)."""

    path: Path
    num_clips: int
    skipped: list[dict[str, Any]]


def pack_name(dataset: str, subset: str) -> str:
    """The file name under which the LoRA-MCL project's programs look for a subset."""
    return f"{dataset}_{subset}_resample_mean_raw_ident_raw.hdf"


def pack(
    clips: Sequence[Clip],
    path: str | Path,
    *,
    dataset: str,
    subset: str,
    max_samples: int | None = None,
    shard_size: int = 64,
) -> Packed:
    """Pack clips into `path`, on from an interrupted call with the same clips.

    Args:
        max_samples: longer clips are cut (Clotho: 480,000; AudioCaps: 160,000).
        shard_size: clips written at once; what a kill can cost.
    Raises: ConfigError without h5py; DataError for no clips, a name twice, or where no clip can be used, or where
        `path` holds other clips.
    """
    h5py = _h5py()
    path = Path(path)
    names = [clip.name for clip in clips]
    if not names:
        raise DataError("no clips to pack")
    if len(set(names)) < len(names):
        raise DataError(f"the clip {next(n for n in names if names.count(n) > 1)!r} appears twice")
    key = _digest(
        json.dumps([dataset, subset, max_samples, shard_size, [[c.name, c.captions] for c in clips]]).encode()
    )
    skipped_path, parts = path.with_name(path.name + ".skipped.jsonl"), path.with_name(path.name + ".parts")
    if path.is_file():
        with open_pack(path) as file:
            if file.attrs["key"] != key:
                raise DataError(f"{str(path)!r} was packed from other clips or settings; remove it to pack anew")
            return Packed(path, len(file["audio"]), json.loads(file.attrs["skipped"]))
    if parts.is_dir() and (not (parts / "key").is_file() or (parts / "key").read_text() != key):
        shutil.rmtree(parts)
    atomic_write(parts / "key", key)
    shards = [parts / f"{first:08d}.hdf" for first in range(0, len(clips), shard_size)]
    for number, shard in enumerate(shards):
        if not shard.is_file():
            _write_shard(h5py, shard, clips, number * shard_size, shard_size, max_samples)
    skipped = _join(h5py, shards, path, {"dataset": dataset, "subset": subset, "key": key})
    atomic_write(skipped_path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in skipped))
    shutil.rmtree(parts)
    return Packed(path, len(clips) - len(skipped), skipped)


def _write_shard(h5py: Any, path: Path, clips: Sequence[Clip], first: int, size: int, max_samples: int | None) -> None:
    kept, skipped = [], []
    for index, clip in enumerate(clips[first : first + size], start=first):
        try:
            if not clip.captions or not all(text.strip() for text in clip.captions):
                raise DataError("a caption is empty" if clip.captions else "there is no caption")
            sound = clip.sound() if callable(clip.sound) else clip.sound
            kept.append((index, clip, load_mono(sound, clip.name, max_samples)))
        except DataError as error:
            skipped.append({"index": index, "fname": clip.name, "reason": str(error)})
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        _write(h5py, file, kept)
        file.attrs["skipped"] = json.dumps(skipped)


def _write(h5py: Any, file: Any, rows: list[tuple[int, Clip, Any]]) -> None:
    """The columns that a clip brings with it."""
    import numpy as np

    text, count = h5py.string_dtype("utf-8"), len(rows)
    audio = file.create_dataset("audio", (count,), h5py.vlen_dtype(np.float32))
    captions = max((len(clip.captions) for _, clip, _ in rows), default=1)
    columns = {name: file.create_dataset(name, (count,), text) for name in ("source", "fname", "sha256")}
    table = file.create_dataset("captions", (count, captions), text)
    file["audio_shape"] = np.array([[1, len(samples)] for *_, samples in rows], np.int64).reshape(count, 2)
    file["index"] = np.array([index for index, *_ in rows], np.int64)
    for i, (_, clip, samples) in enumerate(rows):
        audio[i] = samples
        table[i] = [*clip.captions, *[""] * (captions - len(clip.captions))]
        columns["source"][i], columns["fname"][i] = clip.source, clip.name
        columns["sha256"][i] = _digest(samples.tobytes())


def _join(h5py: Any, shards: Sequence[Path], path: Path, facts: dict[str, str]) -> list[dict[str, Any]]:
    """One file of all shards; returns what they left out."""
    import numpy as np

    skipped: list[dict[str, Any]] = []
    sizes, widths = [], []
    for shard in shards:
        with open_pack(shard) as file:
            sizes.append(len(file["audio"]))
            widths.append(file["captions"].shape[1])
            skipped += json.loads(file.attrs["skipped"])
    total = sum(sizes)
    if not total:
        raise DataError(f"none of the clips can be used; the first: {skipped[0]['reason']}")
    text = h5py.string_dtype("utf-8")
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as out:
        out.create_dataset("audio", (total,), h5py.vlen_dtype(np.float32))
        out.create_dataset("captions", (total, max(widths)), text)
        out.create_dataset("audio_shape", (total, 2), np.int64)
        out.create_dataset("index", (total,), np.int64)
        for name in TEXTS:
            out.create_dataset(name, (total,), text)
        start = 0
        for shard, size in zip(shards, sizes, strict=True):
            with h5py.File(shard, "r") as file:
                for i in range(size):
                    out["audio"][start + i] = file["audio"][i]
                    row = file["captions"].asstr()[i].tolist()
                    out["captions"][start + i] = row + [""] * (max(widths) - len(row))
                for name in ("audio_shape", "index", "source", "fname", "sha256") if size else ():
                    out[name][start : start + size] = file[name][:]
            start += size
        for name in ("dataset", "subset"):
            out[name][:] = [facts[name]] * total
        out.attrs.update(key=facts["key"], sample_rate=SAMPLE_RATE, skipped=json.dumps(skipped))
    return skipped


@dataclass(frozen=True)
class PackedClip:
    """One row of a pack: samples (n,) float32 at 16 kHz."""

    fname: str
    audio: Any
    captions: tuple[str, ...]


class AudioPack(Sequence[PackedClip]):
    """The rows of a pack, read from disk one at a time.

    Raises: DataError for a file that is no pack, a column that is missing, or a row whose samples are not those that
        were packed (checked on reading).
    """

    def __init__(self, path: str | Path) -> None:
        self.file = open_pack(path)
        self.path = Path(path)
        missing = sorted({"audio", "audio_shape", "captions", "fname", "sha256"} - set(self.file))
        if missing:
            raise DataError(f"{str(path)!r} is no pack of captioned clips: it lacks {', '.join(missing)}")

    def __len__(self) -> int:
        return len(self.file["audio"])

    def __getitem__(self, index: Any) -> Any:
        name, samples = self.file["fname"].asstr()[index], self.file["audio"][index]
        if _digest(samples.tobytes()) != self.file["sha256"].asstr()[index]:
            raise DataError(f"{str(self.path)!r}: the samples of {name!r} are not those that were packed")
        captions = tuple(text for text in self.file["captions"].asstr()[index].tolist() if text)
        return PackedClip(name, samples, captions)

    def __iter__(self) -> Iterator[PackedClip]:
        return (self[i] for i in range(len(self)))


def open_pack(path: str | Path) -> Any:
    """The HDF5 file, for reading. Raises DataError where it is missing, damaged or no HDF5."""
    h5py = _h5py()
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{str(path)!r} is no HDF5 file that can be read: {str(error).splitlines()[0]}") from error


def _digest(data: bytes | Iterable[int]) -> str:
    return hashlib.sha256(bytes(data)).hexdigest()


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise ConfigError("packed audio needs the package h5py (pip install 'polyrank[captioning]')") from None
    return h5py

"""Artefacts of a run, each under a key made of the corpus, its own settings and those of every stage before it.

    <run>/manifest.json                      what was made, with which settings, how many rows, how long: for a person
    <run>/stages/<stage>-<hash12>/stage.json one stage's settings and counts; written last: the stage is whole
    <run>/stages/<stage>-<hash12>/rows.jsonl  its rows (or vectors.npy, float32)
    <run>/stages/<stage>-<hash12>/parts/      while it is being made: finished batches, each written atomically
    <run>/adapter/                           the trained adapter (PEFT), or <run>/model/ for full fine-tuning

Equal keys mean equal content: a stage found whole is not made again, another setting gives another folder, and a kill
loses at most the batch at hand. Apart from manifest.json, which carries times, every file is the same byte for byte
however often the run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from ..core.errors import CheckpointError, DataError
from ..core.files import atomic_path, atomic_write, parse_json, read_bytes
from .engine import run_parts

FORMAT = 2
"""Raised when the content of a stage changes for equal settings."""


class Work(Protocol):
    """How a stage is made: `num_parts` batches, each a function of its number, so that any process can make it."""

    num_parts: int
    unit: str
    """What is counted in the progress bar, in words."""

    def __call__(self, part: int, file: BinaryIO) -> Mapping[str, int]:
        """Write one part to `file`; return counts, "rows" among them."""


@dataclass(frozen=True)
class Stage:
    """A stage that is whole on disk."""

    name: str
    key: str
    folder: Path
    counts: Mapping[str, int]

    def rows(self) -> Rows:
        return Rows(self.folder / "rows.jsonl")

    def vectors(self) -> np.ndarray:
        """(n, d) float32, memory-mapped."""
        return np.load(self.folder / "vectors.npy", mmap_mode="r", allow_pickle=False)


class Rows(Sequence[Any]):
    """Rows of a JSON-lines file by number, read when asked for; in memory are eight bytes a row."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        self._ends = _line_ends(self.path)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        return json.loads(os.pread(self._file, int(self._ends[index]) - start, start))

    def __iter__(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def __reduce__(self) -> Any:
        return Rows, (self.path,)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


class Store:
    """The stages of one run.

    Args:
        run_dir: the run's folder.
        engine: "local" or "ray" (see `engine.run_parts`). workers: processes that make parts, with "ray".
    Raises: CheckpointError if the folder was written by another version of this format.
    """

    def __init__(self, run_dir: str | Path, engine: str = "local", workers: int = 2) -> None:
        self.run_dir, self.engine, self.workers = Path(run_dir), engine, workers
        self.manifest_file = self.run_dir / "manifest.json"
        self._manifest = self._read_manifest()

    def make(
        self,
        name: str,
        settings: Mapping[str, Any],
        needs: Sequence[Stage],
        work: Callable[[], Work],
        vector_size: Callable[[], int] | None = None,
    ) -> Stage:
        """The stage of these settings: found, or made now.

        Args:
            needs: stages whose content this one depends on; their keys go into its key.
            work: called only if something is left to do.
            vector_size: for a stage of float32 vectors, their dimension.
        Raises: whatever the work raises; RunError if a file cannot be written.
        """
        key = stage_key(name, settings, [need.key for need in needs])
        folder = self.run_dir / "stages" / f"{name}-{key[:12]}"
        marker = folder / "stage.json"
        if marker.is_file():
            counts = parse_json(read_bytes(marker))["counts"]
            _tidy(folder)
            self._note(name, key, settings, counts, None)
            return Stage(name, key, folder, counts)
        start = time.perf_counter()
        todo = work()
        parts = folder / "parts"
        run_parts(todo, parts, name, engine=self.engine, workers=self.workers)
        counts = self._join(folder, parts, todo.num_parts, vector_size() if vector_size is not None else None)
        description = {"stage": name, "key": key, "settings": settings, "needs": [n.key[:12] for n in needs]}
        atomic_write(marker, json.dumps({**description, "counts": counts}, indent=2, ensure_ascii=False) + "\n")
        _tidy(folder)
        self._note(name, key, settings, counts, time.perf_counter() - start)
        return Stage(name, key, folder, counts)

    def describe(self, section: str, value: Any) -> None:
        """Put something into the manifest under its own heading."""
        if self._manifest.get(section) != value:
            self._manifest[section] = value
            self._write_manifest()

    @staticmethod
    def _join(folder: Path, parts: Path, num_parts: int, dimension: int | None) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for part in range(num_parts):
            counts.update(parse_json(read_bytes(parts / f"{part:06d}.json")))
        with (
            atomic_path(folder / ("rows.jsonl" if dimension is None else "vectors.npy")) as path,
            path.open("wb") as out,
        ):
            if dimension is not None:
                header = {"descr": "<f4", "fortran_order": False, "shape": (counts["rows"], dimension)}
                np.lib.format.write_array_header_1_0(out, header)
            for part in range(num_parts):
                with (parts / f"{part:06d}.part").open("rb") as file:
                    shutil.copyfileobj(file, out, 1 << 20)
        return dict(sorted(counts.items()))

    def _note(self, name: str, key: str, settings: Any, counts: Mapping[str, int], seconds: float | None) -> None:
        """Enter a stage into the manifest; its time stays that of the sitting that finished it."""
        label = f"{name}-{key[:12]}"
        known = self._manifest["stages"].get(label, {})
        time_s = round(seconds, 3) if seconds is not None else known.get("time_s")
        entry = {"settings": settings, "counts": counts, "time_s": time_s}
        entry = json.loads(json.dumps(entry))
        if entry != known:
            self._manifest["stages"][label] = entry
            self._write_manifest()

    def _read_manifest(self) -> dict[str, Any]:
        if not self.manifest_file.exists():
            return {"format": FORMAT, "stages": {}}
        try:
            value = parse_json(read_bytes(self.manifest_file))
        except ValueError as error:
            raise CheckpointError(f"{self.manifest_file}: {error}") from None
        found = value.get("format") if isinstance(value, dict) else None
        if found != FORMAT or not isinstance(value.get("stages"), dict):
            raise CheckpointError(
                f"{self.manifest_file} has format {found!r}, this version reads {FORMAT}; give another run folder"
            )
        return dict(value)

    def _write_manifest(self) -> None:
        atomic_write(self.manifest_file, json.dumps(self._manifest, indent=2, ensure_ascii=False) + "\n")


def stage_key(name: str, settings: Mapping[str, Any], needs: Sequence[str]) -> str:
    """Hex digest of a stage: its name, its settings, the keys of the stages before it, and the format."""
    content = json.dumps([FORMAT, name, settings, list(needs)], sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _tidy(folder: Path) -> None:
    """Remove what a whole stage does not need: its parts, and files that a kill left half written."""
    shutil.rmtree(folder / "parts", ignore_errors=True)
    for file in folder.glob(".*"):
        file.unlink(missing_ok=True)


def _line_ends(path: Path) -> np.ndarray:
    """Byte offsets just past every line break."""
    ends, offset = [], 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 10) + offset + 1)
            offset += len(block)
    return np.concatenate(ends) if ends else np.zeros(0, dtype=np.int64)

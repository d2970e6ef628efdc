"""Building an index: streaming, resumable, and never a half-made one in place of a whole one.

Documents are copied into the index first, so that the source is read once; vectors are appended block by block to a
file that a later run goes on with. The manifest is replaced last, in one step; until then the earlier index, if there
was one, answers. What is held in memory is one block of texts and vectors (and, for IVF, the training sample).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..core.errors import ConfigError, DataError, RunError, check_choice
from ..core.files import atomic_write, parse_json
from ..core.seeding import derive_seed
from .corpus import Document, document_text, json_line
from .index import (
    ADAPTER_FILES,
    FORMAT,
    MANIFEST,
    EncoderIdentity,
    Index,
    Manifest,
    manifest_json,
    open_index,
    read_manifest,
)

Encode = Callable[[Sequence[str]], np.ndarray]
Progress = Callable[[int, int], None]
LOCK = ".index.lock"
TRAIN_PER_LIST = 64
ROUNDS = 12


def build_index(
    documents: Iterable[Document],
    encode: Encode,
    folder: str | Path,
    encoder: EncoderIdentity,
    *,
    kind: str = "flat",
    num_lists: int | None = None,
    adapter: str | Path | None = None,
    block: int = 4096,
    progress: Progress | None = None,
) -> Index:
    """Index documents; on from where an earlier, equal build stopped. An index that is up to date is left as it is.

    Args:
        encode: texts -> vectors (n, d) float32.
        num_lists: of an IVF index; default: about the square root of the number of documents.
        adapter: folder to copy into the index.
        block: documents encoded at a time. progress: gets (documents done, of how many).
    Raises: DataError for an empty corpus or a repeated id; ConfigError for a folder that holds something else, or more
        lists than documents; RunError if it cannot be written, or another process is building there.
    """
    check_choice("kind of index", kind, ("flat", "ivf"))
    folder, start = Path(folder), time.perf_counter()
    if (folder.exists() and not folder.is_dir()) or (
        folder.is_dir() and not (folder / MANIFEST).exists() and not (folder / LOCK).exists() and any(folder.iterdir())
    ):
        raise ConfigError(f"{folder} exists already and is no index; give another folder")
    with _writing(folder):
        copy = folder / ".documents"
        count, corpus, offsets = _copy_documents(documents, copy)
        lists = _number_of_lists(kind, num_lists, count)
        key = _key(corpus, encoder, kind, lists)
        known = _open_if_whole(folder, key)
        if known is not None:
            copy.unlink()
            return known
        work = folder / f".building-{key}"
        _remove(entry for entry in folder.glob(".building-*") if entry != work)
        work.mkdir(exist_ok=True)
        os.replace(copy, work / "documents.jsonl")
        np.save(work / "offsets.npy", offsets)
        _encode_rest(work, count, encoder.dim, encode, block, progress)
        if kind == "ivf":
            _into_lists(work, lists, block)
        else:
            os.replace(work / "vectors.part", work / "vectors.npy")
        if adapter is not None:
            (work / "adapter").mkdir(exist_ok=True)
            for name in ADAPTER_FILES:
                shutil.copyfile(Path(adapter) / name, work / "adapter" / name)
        for file in work.iterdir():
            _flush(file)
        _remove([folder / f"data-{key}"])
        os.replace(work, folder / f"data-{key}")
        manifest = Manifest(FORMAT, key, kind, count, lists, corpus, encoder, round(time.perf_counter() - start, 3))  # type: ignore[arg-type]
        atomic_write(folder / MANIFEST, json.dumps(manifest_json(manifest), indent=1) + "\n")
        _remove(entry for entry in folder.glob("data-*") if entry.name != f"data-{key}")
    return open_index(folder)


def _copy_documents(documents: Iterable[Document], file: Path) -> tuple[int, str, np.ndarray]:
    """Write documents.jsonl. Returns the number of documents, its hash, and the offsets of its lines."""
    digest, offsets, seen = hashlib.sha256(), [0], set()
    with file.open("wb") as out:
        for document in documents:
            if document.id in seen:
                raise DataError(
                    f"the identifier {document.id!r} appears twice in the corpus; identifiers must be unique"
                )
            seen.add(document.id)
            line = json_line({"id": document.id, "title": document.title, "text": document.text}).encode()
            out.write(line)
            digest.update(line)
            offsets.append(offsets[-1] + len(line))
    if not seen:
        raise DataError("the corpus is empty: there is nothing to index")
    return len(seen), digest.hexdigest(), np.array(offsets, dtype=np.int64)


def _number_of_lists(kind: str, given: int | None, count: int) -> int:
    if kind == "flat":
        if given is not None:
            raise ConfigError("num_lists belongs to an ivf index; a flat one has none")
        return 0
    lists = given if given is not None else max(1, round(count**0.5))
    if not 1 <= lists <= count:
        raise ConfigError(f"num_lists must be 1 to the number of documents, {count}; got {lists}")
    return lists


def _key(corpus: str, encoder: EncoderIdentity, kind: str, lists: int) -> str:
    content = [FORMAT, corpus, encoder.weights, encoder.dim, encoder.adapter, kind, lists]
    if encoder.documents is not None:
        content.append(encoder.documents)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _open_if_whole(folder: Path, key: str) -> Index | None:
    if not (folder / MANIFEST).exists() or read_manifest(folder).key != key:
        return None
    with suppress(ValueError):
        return open_index(folder)
    return None


def _encode_rest(work: Path, count: int, dim: int, encode: Encode, block: int, progress: Progress | None) -> None:
    """Append the vectors that vectors.part, an .npy file from its first byte on, does not hold yet."""
    part = work / "vectors.part"
    if (work / "vectors.npy").exists():
        (work / "vectors.npy").unlink()  # an earlier build got further, but not to the manifest
    header = _npy_header(count, dim)
    row_bytes = 4 * dim
    done = max(0, part.stat().st_size - len(header)) // row_bytes if part.exists() else 0
    with part.open("r+b" if done else "wb") as out:
        if not done:
            out.write(header)
        out.truncate(len(header) + done * row_bytes)
        out.seek(0, os.SEEK_END)
        for texts in _texts(work / "documents.jsonl", done, block):
            if progress is not None:
                progress(done, count)
            vectors = np.ascontiguousarray(encode(texts), dtype="<f4")
            if vectors.shape != (len(texts), dim) or not np.isfinite(vectors).all():
                raise RunError(
                    f"the encoder gave {vectors.shape} for {len(texts)} texts of dimension {dim}, or no number"
                )
            out.write(vectors.tobytes())
            out.flush()
            done += len(texts)
    if progress is not None:
        progress(count, count)


def _npy_header(count: int, dim: int) -> bytes:
    import io

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (count, dim)})
    return buffer.getvalue()


def _texts(file: Path, skip: int, block: int) -> Iterator[list[str]]:
    texts: list[str] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            if number < skip:
                continue
            texts.append(document_text(Document(**parse_json(line))))
            if len(texts) == block:
                yield texts
                texts = []
    if texts:
        yield texts


def _into_lists(work: Path, lists: int, block: int) -> None:
    """k-means on a sample, then the vectors list by list; inside a list in the corpus' order."""
    import faiss

    vectors = np.load(work / "vectors.part", mmap_mode="r", allow_pickle=False)
    count, dim = vectors.shape
    draw = np.random.default_rng(derive_seed(0, "index", count))
    sample = np.sort(draw.choice(count, size=min(count, TRAIN_PER_LIST * lists), replace=False))
    means = faiss.Kmeans(
        dim, lists, niter=ROUNDS, spherical=True, seed=1234, min_points_per_centroid=1, max_points_per_centroid=2**30
    )
    means.train(np.ascontiguousarray(vectors[sample]))
    centroids = np.ascontiguousarray(means.centroids, dtype=np.float32)
    nearest = np.empty(count, dtype=np.int64)
    for begin in range(0, count, block):
        part = vectors[begin : begin + block]
        nearest[begin : begin + block] = faiss.knn(part, centroids, 1, faiss.METRIC_INNER_PRODUCT)[1][:, 0]
    rows = np.argsort(nearest, kind="stable")
    with (work / "vectors.npy").open("wb") as out:
        out.write(_npy_header(count, dim))
        for begin in range(0, count, block):
            out.write(np.ascontiguousarray(vectors[rows[begin : begin + block]], dtype="<f4").tobytes())
    np.save(work / "centroids.npy", centroids)
    np.save(work / "starts.npy", np.searchsorted(nearest[rows], np.arange(lists + 1)).astype(np.int64))
    np.save(work / "rows.npy", rows.astype(np.int64))
    (work / "vectors.part").unlink()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Hold the index' folder for one builder; what the system refuses becomes one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("a") as lock:
            _lock(lock, folder)
            yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else (error.strerror or str(error)).lower()
        hint = "; free some space and run the same command again, it goes on from here" if full else ""
        raise RunError(f"could not write the index {folder}: {reason} (an earlier index is intact){hint}") from error


def _lock(lock: IO[Any], folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # a system without file locks
        pass
    except BlockingIOError:
        raise RunError(f"another process is building an index in {folder}") from None


def _flush(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _remove(entries: Iterable[Path]) -> None:
    for entry in list(entries):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)

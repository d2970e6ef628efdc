"""A search index on disk, memory-mapped: exact (flat) or by inverted lists (IVF).

    index.json            what was indexed, by which encoder, with which files; written last, so an index is whole
    data-<key>/
        documents.jsonl      {"id", "title", "text"}, one line a document
        offsets.npy          (n + 1,) int64: where each line begins, and the end
        vectors.npy          (n, d) float32, in the corpus' order (flat) or list by list (ivf)
        centroids.npy, starts.npy, rows.npy      ivf: (lists, d) float32; (lists + 1,) int64, where each list begins;
                                                 (n,) int64, the document of each vector
        adapter/             a copy of the adapter, where there is one

FAISS computes (k-means, exact search over blocks of the mapped vectors) but none of its own files is read: those are
parsed by C++ code that trusts them. Arrays are plain .npy, opened without pickle, and their shapes, types and sizes are
held against the manifest before anything is computed, so a file from outside can give wrong answers but not more.

Similarity is the dot product. IVF: k-means (Lloyd) on a sample, unit centroids; a query looks into the lists whose
centroids have the highest dot product with it. Source: Johnson, Douze & Jégou 2019 (FAISS).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core.errors import CheckpointError, ConfigError, UserError
from ..core.files import parse_json, read_bytes, sha256
from ..core.structure import from_dict
from .corpus import Document

FORMAT = 1
MANIFEST = "index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
Kind = Literal["flat", "ivf"]


@dataclass(frozen=True)
class EncoderIdentity:
    """Which encoder made the vectors.

    Attributes: model: name, as given; weights: hash of all weights (those of the adapter too) and of how vectors are
        made of them; adapter: hash of the adapter's files (its configuration too), None without one; dim: d;
        documents: `weights` of the encoder that made the documents' vectors, where it is another: queries alone were
        adapted.
    """

    model: str
    weights: str
    dim: int
    adapter: str | None = None
    documents: str | None = None

    def describe(self) -> str:
        adapter = f"adapter {self.adapter[:8]}" if self.adapter else "no adapter"
        alone = ", documents without it" if self.documents else ""
        return f"model {self.model!r} with {adapter}{alone} (weights {self.weights[:8]})"


@dataclass(frozen=True)
class Manifest:
    """What index.json says. key names the data folder; corpus is the hash of documents.jsonl."""

    format: int
    key: str
    kind: Kind
    num_documents: int
    num_lists: int
    corpus: str
    encoder: EncoderIdentity
    built_in_s: float = 0.0


def adapter_hash(folder: str | Path) -> str:
    """Hash of an adapter's two files. Raises DataError if one is missing."""
    return hashlib.sha256("".join(sha256(Path(folder) / name) for name in ADAPTER_FILES).encode()).hexdigest()


def identify(encoder: Any, model: str, adapter: str | Path | None = None) -> EncoderIdentity:
    """The identity of a sentence-transformers model as it is now; `adapter` is the folder it was loaded from."""
    import torch

    digest = hashlib.sha256()
    for module in encoder:
        config = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
        digest.update(f"{type(module).__name__} {sorted(config.items())}\n".encode())
    digest.update(f"{encoder.max_seq_length}\n".encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    found = adapter_hash(adapter) if adapter is not None else None
    return EncoderIdentity(model, digest.hexdigest(), int(encoder.get_embedding_dimension()), found)


class Index:
    """An index that was opened; nothing but the small arrays is in memory."""

    def __init__(self, folder: Path, manifest: Manifest, arrays: dict[str, np.ndarray]) -> None:
        self.folder, self.manifest = folder, manifest
        self._vectors, self._offsets = arrays["vectors"], arrays["offsets"]
        self._ivf = (arrays["centroids"], arrays["starts"], arrays["rows"]) if manifest.kind == "ivf" else None

    def __len__(self) -> int:
        return self.manifest.num_documents

    @property
    def data(self) -> Path:
        return self.folder / f"data-{self.manifest.key}"

    @property
    def adapter(self) -> Path | None:
        """The copy of the adapter's folder; None where the index was made by the base model."""
        return self.data / "adapter" if self.manifest.encoder.adapter else None

    @property
    def size_bytes(self) -> int:
        """Of everything but the documents' text and the adapter."""
        return sum(file.stat().st_size for file in self.data.glob("*.npy"))

    def check_encoder(self, identity: EncoderIdentity) -> None:
        """Raises CheckpointError unless this encoder made the index."""
        mine = self.manifest.encoder
        if (identity.weights, identity.dim, identity.adapter) != (mine.weights, mine.dim, mine.adapter):
            raise CheckpointError(
                f"{self.folder} was built by {mine.describe()}, not by {identity.describe()};"
                f" build an index with this encoder, or search with the other"
            )

    def search(self, queries: np.ndarray, k: int, num_probes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The best documents for query vectors (q, d).

        Args: num_probes: lists looked into (ivf only; default: a sixteenth of them, at least 8).
        Returns: document numbers (q, min(k, n)) int64, best first, -1 where the lists held fewer; scores, float32.
        Raises: ConfigError for k < 1, other dimensions, or values that are not finite.
        """
        import faiss

        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if k < 1 or queries.ndim != 2 or queries.shape[1] != self.manifest.encoder.dim:
            raise ConfigError(f"search needs k >= 1 and queries (q, {self.manifest.encoder.dim}), got {queries.shape}")
        if not np.isfinite(queries).all():
            raise ConfigError("a query's vector is not finite")
        k = min(k, len(self))
        if self._ivf is None:
            scores, found = faiss.knn(queries, self._vectors, k, faiss.METRIC_INNER_PRODUCT)
        else:
            found, scores = self._search_lists(queries, k, num_probes)
        order = np.lexsort((found, -scores))
        return np.take_along_axis(found, order, 1), np.take_along_axis(scores, order, 1)

    def _search_lists(self, queries: np.ndarray, k: int, num_probes: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Exact search inside the nearest lists; each list is read once for all queries that look into it."""
        import faiss

        centroids, starts, rows = self._ivf  # type: ignore[misc]
        num_probes = min(num_probes or max(8, len(centroids) // 16), len(centroids))
        _, probed = faiss.knn(queries, centroids, num_probes, faiss.METRIC_INNER_PRODUCT)
        found = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for one in np.unique(probed):
            begin, end = int(starts[one]), int(starts[one + 1])
            if begin == end:
                continue
            asking = np.flatnonzero((probed == one).any(1))
            new_scores, new = faiss.knn(
                queries[asking], self._vectors[begin:end], min(k, end - begin), faiss.METRIC_INNER_PRODUCT
            )
            all_scores = np.concatenate([scores[asking], new_scores], 1)
            all_found = np.concatenate([found[asking], np.where(new >= 0, rows[begin + new], -1)], 1)
            best = np.lexsort((all_found, -all_scores))[:, :k]
            found[asking], scores[asking] = (np.take_along_axis(x, best, 1) for x in (all_found, all_scores))
        return found, scores

    def documents(self, numbers: Sequence[int]) -> list[Document]:
        """Documents by number, each read from disk. Raises CheckpointError if a line is not what was written."""
        found = []
        with (self.data / "documents.jsonl").open("rb") as file:
            for number in numbers:
                begin, end = int(self._offsets[number]), int(self._offsets[number + 1])
                file.seek(begin)
                try:
                    value = parse_json(file.read(end - begin))
                    found.append(from_dict(Document, value))
                except (ValueError, UserError) as error:
                    raise CheckpointError(f"{self.data / 'documents.jsonl'}, document {number}: {error}") from None
        return found


def open_index(folder: str | Path) -> Index:
    """Open an index. Raises CheckpointError if it is missing, from another version, truncated or altered in shape."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    data, n, dim = folder / f"data-{manifest.key}", manifest.num_documents, manifest.encoder.dim
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "vectors": ((n, dim), np.float32),
        "offsets": ((n + 1,), np.int64),
    }
    if manifest.kind == "ivf":
        lists = manifest.num_lists
        shapes |= {"centroids": ((lists, dim), np.float32), "starts": ((lists + 1,), np.int64)}
        shapes["rows"] = ((n,), np.int64)
    arrays = {name: _mapped(data / f"{name}.npy", *expected) for name, expected in shapes.items()}
    documents = data / "documents.jsonl"
    _check_regular(documents)
    _check_bounds(data / "offsets.npy", arrays["offsets"], documents.stat().st_size)
    if manifest.kind == "ivf":
        _check_bounds(data / "starts.npy", arrays["starts"], n)
        rows = arrays["rows"]
        if rows.min() < 0 or rows.max() >= n:
            raise CheckpointError(f"{data / 'rows.npy'} names documents outside 0..{n - 1}")
    return Index(folder, manifest, arrays)


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check index.json. Raises CheckpointError."""
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{folder} is no index (no {MANIFEST}); build one with: polyrank gpl index")
    try:
        value = parse_json(read_bytes(file, 1 << 20))
        version = value.get("format") if isinstance(value, dict) else None
        if version != FORMAT:
            raise ConfigError(f"format {version!r} is not known; this version reads {FORMAT}; build the index again")
        manifest = from_dict(Manifest, value)
        _check_choices(manifest)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return manifest


def _check_choices(manifest: Manifest) -> None:
    if not re.fullmatch(r"[0-9a-f]{16}", manifest.key):
        raise ConfigError(f"key must be 16 hexadecimal digits, got {manifest.key!r}")
    for name, value in (("num_documents", manifest.num_documents), ("encoder.dim", manifest.encoder.dim)):
        if not 1 <= value < 1 << 40:
            raise ConfigError(f"{name} is out of range: {value}")
    if manifest.kind == "ivf" and not 1 <= manifest.num_lists <= manifest.num_documents:
        raise ConfigError(f"num_lists is out of range: {manifest.num_lists}")


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    return asdict(manifest)


def _mapped(file: Path, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    _check_regular(file)
    try:
        array = np.lib.format.open_memmap(file, mode="r")  # np.load would open zip files too
    except Exception as error:  # the header is a Python literal: reading it can fail in many ways
        raise CheckpointError(f"{file} is no whole array: {str(error).splitlines()[0]}") from None
    if array.shape != shape or array.dtype != kind or not array.flags.c_contiguous:
        expected = f"{np.dtype(kind).name} {shape}"
        raise CheckpointError(f"{file} holds {array.dtype} {array.shape}; the manifest says {expected}")
    return array


def _check_regular(file: Path) -> None:
    if file.is_symlink() or not file.is_file():
        raise CheckpointError(f"{file} is missing or no regular file; build the index again")


def _check_bounds(file: Path, bounds: np.ndarray, last: int) -> None:
    """Starts of consecutive pieces: from 0 to `last`, never backwards."""
    if bounds[0] != 0 or bounds[-1] != last or (np.diff(bounds) < 0).any():
        raise CheckpointError(f"{file} does not divide 0..{last}: it is damaged, or belongs to another index")

"""Hard negatives: for every query the nearest documents of several retrievers, united, without its positives.

A document with the query's own identifier is no negative, as BEIR has it, nor is one that shares no word with the query
(BM25's score 0): among those the order of the corpus alone would decide.

Each retriever gives its top k after the positives are taken out (the reference takes out of the top k, so gives one
less). The union keeps the retrievers' order and holds no document twice. Exact; ties go to the lower index.
Source: GPL (Wang et al. 2022), stage 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .corpus import Document, document_text, json_line
from .dense import encode_corpus, load_encoder
from .exact import exact_top_k
from .lexical import ENGLISH, Bm25Index
from .store import Rows

BM25 = "bm25"


@dataclass
class VectorWork:
    """Vectors of rows: of documents (title and text), or of queries (text)."""

    rows: Rows
    encoder: str
    part_size: int = 2048
    batch_size: int = 64
    unit: str = "texts"

    @property
    def num_parts(self) -> int:
        return -(-len(self.rows) // self.part_size)

    def dimension(self) -> int:
        return int(_loaded(self.encoder).get_embedding_dimension())

    def __call__(self, part: int, file: BinaryIO) -> Mapping[str, int]:
        texts = [row_text(row) for row in self.rows[part * self.part_size : (part + 1) * self.part_size]]
        file.write(encode_corpus(_loaded(self.encoder), texts, self.batch_size).astype("<f4").tobytes())
        return {"rows": len(texts)}


@lru_cache(maxsize=1)
def _loaded(name: str) -> Any:
    """One encoder stays loaded: documents and queries are encoded one after the other."""
    return load_encoder(name)


@dataclass
class NegativeWork:
    """Negatives of every query; parts are runs of queries.

    Args:
        vectors: for each dense retriever, the .npy files of document and query vectors, both memory-mapped.
    """

    corpus: Rows
    queries: Rows
    vectors: Mapping[str, tuple[Path, Path]]
    bm25: bool
    k: int
    language: str | None = ENGLISH
    part_size: int = 512
    unit: str = "queries"

    @property
    def num_parts(self) -> int:
        return -(-len(self.queries) // self.part_size)

    @cached_property
    def _ids(self) -> list[str]:
        return [row["_id"] for row in self.corpus]

    @cached_property
    def _position(self) -> dict[str, int]:
        return {identifier: number for number, identifier in enumerate(self._ids)}

    @cached_property
    def _lexical(self) -> Bm25Index:
        return Bm25Index.build((row_text(row) for row in self.corpus), self.language)

    def __call__(self, part: int, file: BinaryIO) -> Mapping[str, int]:
        start, end = part * self.part_size, min((part + 1) * self.part_size, len(self.queries))
        rows = self.queries[start:end]
        left_out = [{*row["documents"], row["_id"]} for row in rows]
        positives = [{self._position[one] for one in out if one in self._position} for out in left_out]
        lists: list[Sequence[np.ndarray]] = []
        most = max(map(len, positives))
        for documents, queries in self.vectors.values():
            vectors = np.load(queries, mmap_mode="r", allow_pickle=False)[start:end]
            docs = np.load(documents, mmap_mode="r", allow_pickle=False)
            lists.append(exact_top_k(vectors, docs, self.k + most)[0])
        if self.bm25:
            ids, scores = self._lexical.search([row["text"] for row in rows], self.k + most)
            lists.append([row[values > 0] for row, values in zip(ids, scores, strict=True)])
        counts = {"rows": len(rows), "negatives": 0, "queries_without_negative": 0}
        for number, row in enumerate(rows):
            found = united([ranking[number] for ranking in lists], positives[number], self.k)
            line = {"query": row["_id"], "negatives": [self._ids[index] for index in found]}
            file.write(json_line(line).encode())
            counts["negatives"] += len(found)
            counts["queries_without_negative"] += not found
        return counts


def united(rankings: Sequence[Iterable[int]], positives: set[int], k: int) -> list[int]:
    """Of every ranking the first k that are no positive; the union in order, nothing twice."""
    union: dict[int, None] = {}
    for ranking in rankings:
        kept = [int(index) for index in ranking if int(index) not in positives][:k]
        union.update(dict.fromkeys(kept))
    return list(union)


def row_text(row: Mapping[str, Any]) -> str:
    """Text of a query's row, or title and text of a document's."""
    return document_text(Document(row["_id"], row.get("title", ""), row["text"]))

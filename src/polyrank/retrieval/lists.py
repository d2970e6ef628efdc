"""Labels for whole lists: every mined document of a query with the teacher's score, and the order of training.

Where a pair (tuples.py) says one margin of a query, a list of D says all D (D - 1) / 2. What is trained on it is
`polyrank.objectives.margins`. The query's own document is in no list: see `LabelWork.source_is_positive`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

from ..core.errors import DataError
from ..core.seeding import derive_seed
from .corpus import json_line
from .store import Rows
from .teachers import Teacher
from .tuples import pass_order


@dataclass
class ListLabelWork:
    """For every query its mined documents and their scores; parts are runs of queries."""

    queries: Rows
    negatives: Rows
    corpus: Rows
    teacher: Teacher
    part_size: int = 256
    unit: str = "queries"

    @property
    def num_parts(self) -> int:
        return -(-len(self.queries) // self.part_size)

    @cached_property
    def _position(self) -> dict[str, int]:
        return {row["_id"]: number for number, row in enumerate(self.corpus)}

    def __call__(self, part: int, file: BinaryIO) -> Mapping[str, int]:
        numbers = range(part * self.part_size, min((part + 1) * self.part_size, len(self.queries)))
        found = {number: self.negatives[number]["negatives"] for number in numbers}
        pairs = [(number, self._position[one]) for number, documents in found.items() for one in documents]
        scores = iter(self.teacher(pairs)) if pairs else iter(())
        for number, documents in found.items():
            line = {"query": self.queries[number]["_id"], "documents": documents}
            file.write(json_line({**line, "scores": [float(next(scores)) for _ in documents]}).encode())
        return {"rows": len(found), "scored_pairs": len(pairs)}


@dataclass
class ListWork:
    """The order of training: lists by their number in the labels, pass by pass, each in its own shuffled order.

    Args:
        total: number of lists (steps x batch size).
        documents: of each list, drawn anew each time ("chosen": their places in the list); None: all.
    """

    labels: Rows
    total: int
    seed: int
    documents: int | None = None
    part_size: int = 65536
    unit: str = "lists"

    @property
    def num_parts(self) -> int:
        return -(-self.total // self.part_size)

    @cached_property
    def _usable(self) -> dict[int, int]:
        """Number of documents by number of the list, where there are enough for a margin."""
        least = max(2, self.documents or 2)
        usable = {n: len(row["documents"]) for n, row in enumerate(self.labels) if len(row["documents"]) >= least}
        if not usable:
            raise DataError(f"no query has {least} mined documents: the corpus is too small for lists of that length")
        return usable

    def __call__(self, part: int, file: BinaryIO) -> Mapping[str, int]:
        end = min((part + 1) * self.part_size, self.total)
        numbers = list(self._usable)
        order: list[int] = []
        shuffled = -1
        for place in range(part * self.part_size, end):
            number, position = divmod(place, len(numbers))
            if number != shuffled:
                order, shuffled = pass_order(numbers, self.seed, number), number
            line: dict[str, object] = {"row": order[position]}
            if self.documents is not None:
                chance = random.Random(derive_seed(self.seed, "list", number, order[position]))
                line["chosen"] = chance.sample(range(self._usable[order[position]]), self.documents)
            file.write(json_line(line).encode())
        return {"rows": end - part * self.part_size}


def list_margin(labels: Rows) -> float:
    """The largest margin of all lists. Raises DataError if no list has two documents."""
    largest = max((max(row["scores"]) - min(row["scores"]) for row in labels if len(row["scores"]) > 1), default=None)
    if largest is None:
        raise DataError("no query has two mined documents: the corpus needs at least three")
    return float(largest)

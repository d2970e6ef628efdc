"""Training of recipe `gpl` on lists (`pairs=all`): texts and scores of each step, and the loss.

With `side=queries` the documents keep the vectors that the encoder gave them before; they are read from the stage that
mining made, so a step encodes queries alone and compares each with every document of its list.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...objectives.margins import all_margins_mse
from ...retrieval.mine import row_text
from .stages import Prepared


class Lists:
    """Every list's documents (numbers in the corpus) and scores; eight bytes a labelled document are in memory.

    Args:
        rescale: (largest margin of all lists, wanted largest); None: scores stay.
    """

    def __init__(self, prepared: Prepared, rescale: tuple[float, float] | None = None) -> None:
        self.corpus, self.queries, self.tuples = prepared.corpus.rows(), prepared.queries.rows(), prepared.tuples.rows()
        known = {row["_id"]: number for number, row in enumerate(self.corpus)}
        places = {row["_id"]: number for number, row in enumerate(self.queries)}
        factor = rescale[1] / rescale[0] if rescale is not None and rescale[0] > 0 else 1.0
        self.documents: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []
        self.query: list[int] = []
        for row in prepared.labels.rows():
            self.query.append(places[row["query"]])
            self.documents.append(np.array([known[one] for one in row["documents"]], dtype=np.int32))
            self.scores.append(np.array(row["scores"], dtype=np.float32) * factor)

    def at(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents and scores of one row of the training file."""
        line = self.tuples[number]
        documents, scores = self.documents[line["row"]], self.scores[line["row"]]
        return (documents[line["chosen"]], scores[line["chosen"]]) if "chosen" in line else (documents, scores)

    def dataset(self, with_documents: bool) -> Any:
        """A datasets.Dataset: the query, if asked for the documents in columns of their own, the row's number."""
        from datasets import Dataset

        data = Dataset.from_dict({"query": [self.query[line["row"]] for line in self.tuples]})
        return data.add_column("label", list(range(len(self.tuples)))).with_transform(
            lambda batch: self._texts(batch, with_documents)
        )

    def _texts(self, batch: dict[str, list[int]], with_documents: bool) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"query": [self.queries[number]["text"] for number in batch["query"]]}
        if with_documents:
            chosen = [self.at(number)[0] for number in batch["label"]]
            for place in range(len(chosen[0])):
                out[f"document_{place}"] = [row_text(self.corpus[int(row[place])]) for row in chosen]
        return out | {"label": batch["label"]}


class ListLoss(nn.Module):
    """`all_margins_mse` of the encoder's scores against the teacher's.

    Args:
        vectors: (documents, d) of the whole corpus, where documents stay as they are; None: they come as texts.
        cosine: scores are cosines and not dot products.
    """

    def __init__(self, model: Any, lists: Lists, vectors: np.ndarray | None, cosine: bool) -> None:
        super().__init__()
        self.model, self.lists, self.vectors, self.cosine = model, lists, vectors, cosine

    def forward(self, sentence_features: Any, labels: Tensor) -> Tensor:
        features = list(sentence_features)
        queries = self.model(features[0])["sentence_embedding"].float()
        rows = [self.lists.at(int(number)) for number in labels]
        width = max(len(scores) for _, scores in rows)
        scores, mask = torch.zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.bool)
        for place, (_, row) in enumerate(rows):
            scores[place, : len(row)], mask[place, : len(row)] = torch.from_numpy(row), True
        if self.vectors is not None:
            documents = torch.zeros(len(rows), width, queries.shape[-1])
            for place, (numbers, _) in enumerate(rows):
                documents[place, : len(numbers)] = torch.from_numpy(np.asarray(self.vectors[numbers]))
            documents = documents.to(queries.device)
        else:
            documents = torch.stack([self.model(one)["sentence_embedding"].float() for one in features[1:]], dim=1)
        if self.cosine:
            queries, documents = (nn.functional.normalize(x, dim=-1) for x in (queries, documents))
        student = (queries[:, None] * documents).sum(-1)
        return all_margins_mse(student, scores.to(student.device), mask.to(student.device))

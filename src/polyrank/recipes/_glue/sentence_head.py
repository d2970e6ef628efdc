"""A classifier on a sentence encoder: each text goes through the encoder alone, the head sees the two vectors.

    u = sqrt(d) m / |m|,   m the mean of a text's d-dimensional token vectors
    logits = H [|u - v|, u * v]       one text: H u

Such encoders (all-MiniLM) were trained on texts one by one and with the mean as their vector; what transformers' own
heads take, the first token of both texts together, means nothing to them yet.

Source: the features are InferSent's (Conneau et al. 2017, section 3.1), the mean Sentence-BERT's (Reimers and Gurevych
2019). Differs: u and v alone are left out, so that the order of the texts does not matter and a short run is not spent
on weights that say nothing (STS-B, head alone, 120 steps of 16: Pearson .81 on validation, .77 with them); vectors have
length sqrt(d), so that the features are about 1 in size whatever the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


def sentence_vectors(tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """tokens (N, T, d), attention_mask (N, T) -> (N, d), each of length sqrt(d); fp32 or better."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
    return normalize((tokens * mask).sum(1), dim=-1) * tokens.shape[-1] ** 0.5


def pair_features(u: Tensor, v: Tensor) -> Tensor:
    """u, v (B, d) -> (B, 2 d)."""
    return torch.cat([(u - v).abs(), u * v], dim=-1)


class SentenceClassifier(PreTrainedModel):
    """`config` is the encoder's, with num_labels, problem_type and texts_per_row (1 or 2) added."""

    config_class = AutoConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config)
        self.classifier = nn.Linear(config.hidden_size * config.texts_per_row, config.num_labels)
        self.post_init()

    @classmethod
    def from_encoder(cls, name: str, num_labels: int, problem_type: str, texts_per_row: int) -> SentenceClassifier:
        """A pretrained encoder with a new head. Raises what AutoModel raises."""
        config = AutoConfig.from_pretrained(name, num_labels=num_labels, problem_type=problem_type)
        config.texts_per_row = texts_per_row
        encoder = AutoModel.from_pretrained(name, config=config)
        model = cls(config)
        model.encoder = encoder
        return model

    def start_at(self, mean: float) -> None:
        """Let a regression begin at the mean label, which its head would otherwise spend most of a short run on."""
        torch.nn.init.constant_(self.classifier.bias, mean)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        """input_ids, attention_mask (n B, T): the first texts of all rows, then the second; labels (B,)."""
        inputs.pop("return_dict", None)
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        vectors = sentence_vectors(tokens, attention_mask).chunk(self.config.texts_per_row)
        features = pair_features(*vectors) if len(vectors) == 2 else vectors[0]
        logits = self.classifier(features.to(self.classifier.weight.dtype))
        loss = None
        if labels is not None and self.config.problem_type == "regression":
            loss = mse_loss(logits.squeeze(-1).float(), labels.float())
        elif labels is not None:
            loss = cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def encode_apart(columns: Sequence[Sequence[str]], tokenizer: Any, max_length: int) -> tuple[list[dict], list[int]]:
    """Every text of a row on its own: one dict a row with lists of lists, and the length of its longest text uncut."""
    encoded = [tokenizer(list(texts), truncation=True, max_length=max_length) for texts in columns]
    uncut = [tokenizer(list(texts), verbose=False)["input_ids"] for texts in columns]
    keys = [key for key in encoded[0] if key in tokenizer.model_input_names]
    rows = [{key: [part[key][i] for part in encoded] for key in keys} for i in range(len(columns[0]))]
    return rows, [max(map(len, ids)) for ids in zip(*uncut, strict=True)]


class ApartCollator:
    """Rows of `encode_apart` -> padded tensors: the first texts of all rows, then the second."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        keys = [key for key in rows[0] if key != "labels"]
        texts = len(rows[0]["input_ids"])
        flat = [{key: row[key][i] for key in keys} for i in range(texts) for row in rows]
        batch = dict(self.tokenizer.pad(flat, return_tensors="pt"))
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

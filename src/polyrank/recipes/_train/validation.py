"""The loss on rows that were held out, in the encoding of training."""

from __future__ import annotations

from typing import Any

import torch

from ...data.causal_lm import IGNORED, EncodedPairs, padding_collator


@torch.no_grad()
def validation_nll(
    model: Any, tokenizer: Any, rows: EncodedPairs, num_hypotheses: int | None = None, batch_size: int = 16
) -> dict[str, float]:
    """NLL per labelled token of held-out rows, teacher-forced, nats, a mean over rows of their token means.

    With S_ik the summed NLL of row i (n_i labelled tokens) under hypothesis k:
        nll         mean_i -log((1/K) sum_k exp(-S_ik)) / n_i     of K hypotheses: of their uniform mixture
        oracle_nll  mean_i min_k S_ik / n_i                       K > 1 alone; no likelihood

    Args: num_hypotheses: K of a LoRA-MCL model; None for one model.
    Relations: equals `mixture_nll` and `oracle_nll` of evaluation/metrics/likelihood.py on the same sums.
    """
    which: list[int | None] = [None] if num_hypotheses is None else list(range(num_hypotheses))
    sums = torch.stack([_sums(model, tokenizer, rows, k, batch_size) for k in which], 1)
    counts = torch.tensor([sum(label != IGNORED for label in row["labels"][1:]) for row in rows.rows])
    K = sums.shape[1]
    mixture = -torch.logsumexp(-sums, 1) + torch.log(torch.tensor(float(K), dtype=torch.float64))
    figures = {"nll": float((mixture / counts).mean())}
    if K > 1:
        figures["oracle_nll"] = float((sums.min(1).values / counts).mean())
    return figures


def _sums(model: Any, tokenizer: Any, rows: EncodedPairs, hypothesis: int | None, batch_size: int) -> torch.Tensor:
    """Summed NLL of each row, shape (rows,), fp64."""
    collate, device = padding_collator(tokenizer), next(model.parameters()).device
    routing = {} if hypothesis is None else {"hypothesis_idx": hypothesis}
    model.eval()
    parts = []
    for first in range(0, len(rows), batch_size):
        batch = {k: v.to(device) for k, v in collate(rows.rows[first : first + batch_size]).items()}
        labels = batch.pop("labels")
        logits = model(**batch, **routing, use_cache=False).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
        )
        parts.append(nll.double().sum(1).cpu())
    return torch.cat(parts)

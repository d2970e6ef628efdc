"""Alignment of a pruned model: a short training on general text before any adapter, which its publisher does once.

All weights are trained but the head's (and an embedding's that it shares). Weights that unstructured pruning has set to
zero get no gradient, so that AdamW leaves them there. The identity of LoRAM's recovery then no longer holds, by design:
the adapter is trained on the aligned weights and used with the original ones.

Source: LoRAM (arXiv 2502.13533): learning rate 5e-5, one epoch of about 105 million tokens, the head frozen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..core.errors import ConfigError
from ._pruning_folder import PruningPlan
from ._pruning_scores import block_layers


def align_pruned(
    model: Any,
    plan: PruningPlan,
    rows: Sequence[dict[str, Any]],
    collator: Any = None,
    callbacks: Sequence[Any] = (),
    **arguments: Any,
) -> Any:
    """Train a pruned language model further; returns the model itself, in eval mode, what requires gradients as before.

    Args:
        rows: `input_ids` and `labels` of general text, every token with its label.
        collator: pads a batch; default: transformers' own for rows of one length.
        arguments: of transformers' TrainingArguments; default: one epoch of batches of 8 at 5e-5, nothing saved.
    Raises: ConfigError without rows, for a model without a language model's head, or with an adapter on it.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"alignment trains a language model on text; {type(model).__name__} has no head for words")
    if hasattr(model, "peft_config"):
        raise ConfigError("align the pruned model before an adapter is put on it")
    if not len(rows):
        raise ConfigError("alignment needs general text: there are no rows")
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    frozen = set(head.parameters())
    for parameter in before:
        parameter.requires_grad_(parameter not in frozen)
    zeros = [] if plan.pattern == "structured" else [layer.weight for _, _, layer in block_layers(model)]
    hooks = [weight.register_hook(_Keeping(weight)) for weight in zeros]
    try:
        with tempfile.TemporaryDirectory() as folder:
            given = {"output_dir": folder, "save_strategy": "no", "report_to": "none", "remove_unused_columns": False}
            given |= {"learning_rate": 5e-5, "num_train_epochs": 1, "per_device_train_batch_size": 8, **arguments}
            options = {"data_collator": collator, "callbacks": list(callbacks)}
            trainer = Trainer(model, TrainingArguments(**given), train_dataset=rows, **options)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, trained in before.items():
            parameter.requires_grad_(trained)
    return model.eval()


class _Keeping:
    """Takes the gradient from the entries of a weight that are zero now."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.mask = weight.detach() != 0

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self.mask.to(gradient.device)

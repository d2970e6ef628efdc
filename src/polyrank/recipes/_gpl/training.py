"""Training of recipe `gpl` with sentence-transformers' own Trainer: student, adapter, losses, warm-up, resume."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, UserError
from ...core.files import atomic_write, parse_json, read_bytes
from ...core.seeding import derive_seed, seed_everything
from ...retrieval.dense import load_encoder, mark_queries_only
from ...retrieval.mine import row_text
from ...retrieval.store import Rows
from .._frame.training_log import train_on, training_log
from .._methods.budget import config_type
from .._methods.targets import check_targets
from .config import FULL, GplConfig
from .stages import Prepared

ATTENTION = {
    "bert": ("query", "key", "value"),
    "roberta": ("query", "key", "value"),
    "xlm-roberta": ("query", "key", "value"),
    "electra": ("query", "key", "value"),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "mpnet": ("attn.q", "attn.k", "attn.v"),
    "modernbert": ("Wqkv",),
    "t5": ("q", "k", "v"),
}
"""Names of the query, key and value projections by model type."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_config(config: GplConfig, encoder: Any) -> Any:
    """Config of the adapter for this encoder.

    Raises: ConfigError if its targets are no modules of the encoder, or a value is refused.
    """
    kind = config_type(config.adapter)
    targets = config.target_modules
    if targets is None:
        model_type = encoder.config.model_type
        if model_type not in ATTENTION:
            raise ConfigError(
                f"target_modules of a {model_type!r} encoder are not known; give target_modules=[...] or all-linear"
            )
        targets = list(ATTENTION[model_type])
    check_targets(encoder.transformers_model, targets, "target_modules")
    given: dict[str, Any] = {"target_modules": targets}
    if config.adapter == "lora":
        given |= {"r": config.rank, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    try:
        return kind(**{**given, **config.adapter_options})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"adapter_options of {config.adapter!r}: {str(error).splitlines()[0]}") from error


def student(config: GplConfig) -> Any:
    """The encoder with its new adapter, all else frozen. The same start for the same seed."""
    encoder = load_encoder(config.encoder)
    limit = encoder.max_seq_length
    encoder.max_seq_length = min(config.max_length, limit) if limit else config.max_length
    if config.adapter != FULL:
        seed_everything(derive_seed(config.seed, "adapter"))
        try:
            encoder.add_adapter(adapter_config(config, encoder))
        except UserError:
            raise
        except ValueError as error:
            raise ConfigError(f"adapter {config.adapter!r}: {str(error).splitlines()[0]}") from error
    return encoder


def train(config: GplConfig, prepared: Prepared, folder: Path, log: Path) -> dict[str, Any]:
    """Train in `folder`, on from the newest checkpoint there; returns facts about the training.

    `folder` gets weights/ (a PEFT folder, or a whole sentence-transformers model for full fine-tuning) and, last,
    training.json. Checkpoints are removed at the end, or kept as adapters (`keep_checkpoints`).
    """
    marker = folder / "training.json"
    if marker.is_file():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a kill may have come between
        return dict(parse_json(read_bytes(marker)))
    encoder = student(config)
    parameters = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    total = sum(p.numel() for p in encoder.parameters())
    facts: dict[str, Any] = {"trainable_parameters": parameters, "parameters": total}
    if config.tsdae_steps:
        facts["tsdae_s"] = warm_up(config, encoder, prepared, folder, log.with_name("tsdae.jsonl"))
    data, loss = data_and_loss(config, encoder, prepared)
    seconds = run_trainer(config, encoder, data, loss, folder / "checkpoints", log)
    facts["train_s"] = seconds
    save_weights(config, encoder, folder / "weights")
    if prepared.documents is not None:
        mark_queries_only(folder / "weights")
    if config.keep_checkpoints:
        keep_adapters(folder)
    atomic_write(marker, json.dumps(facts) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return facts


def keep_adapters(folder: Path) -> None:
    """Put the adapter of every checkpoint into `folder`/step-N, as `folder`/weights has the last."""
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        kept = folder / f"step-{checkpoint.name.rpartition('-')[2]}"
        shutil.copytree(folder / "weights", kept, dirs_exist_ok=True)
        atomic_write(kept / ADAPTER_WEIGHTS, (checkpoint / ADAPTER_WEIGHTS).read_bytes())


def save_weights(config: GplConfig, encoder: Any, folder: Path) -> None:
    """The adapter as PEFT saves it, or the whole model; equal bytes for equal weights."""
    if config.adapter == FULL:
        encoder.save_pretrained(str(folder), create_model_card=False)
        return
    encoder.transformers_model.save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    values = parse_json(read_bytes(file))
    for key, value in values.items():  # PEFT writes sets, whose order is that of the process
        if key in ("target_modules", "exclude_modules", "modules_to_save") and isinstance(value, list):
            values[key] = sorted(value)
    atomic_write(file, json.dumps(values, indent=2, sort_keys=True))


def data_and_loss(config: GplConfig, encoder: Any, prepared: Prepared) -> tuple[Any, Any]:
    """The training rows and what is minimised on them."""
    if not prepared.lists:
        return TupleTexts(prepared, labels=config.loss == "margin_mse").dataset(), make_loss(config, encoder)
    from .lists import ListLoss, Lists

    lists = Lists(prepared, (prepared.margin, config.rescale) if config.rescale is not None else None)
    vectors = prepared.documents.vectors() if prepared.documents is not None else None
    loss = ListLoss(encoder, lists, vectors, config.similarity == "cosine")
    return lists.dataset(with_documents=vectors is None), loss


def make_loss(config: GplConfig, encoder: Any) -> Any:
    """GPL's MarginMSE, or QGen's multiple negatives ranking loss (cosine, scale 20)."""
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss, MultipleNegativesRankingLoss
    from sentence_transformers.util import pairwise_cos_sim, pairwise_dot_score

    if config.loss == "qgen":
        return MultipleNegativesRankingLoss(encoder, scale=20.0)
    return MarginMSELoss(encoder, pairwise_cos_sim if config.similarity == "cosine" else pairwise_dot_score)


class TupleTexts:
    """Texts of the tuples, read from disk when a batch needs them; numbers alone are in memory (16 bytes a tuple)."""

    def __init__(self, prepared: Prepared, labels: bool) -> None:
        self.corpus, self.queries, self.labels = prepared.corpus.rows(), prepared.queries.rows(), labels
        self.tuples = prepared.tuples.rows()

    def dataset(self) -> Any:
        """A datasets.Dataset with query, positive and, for MarginMSE, negative and label, in the tuples' order."""
        import numpy as np
        from datasets import Dataset

        documents = {row["_id"]: number for number, row in enumerate(self.corpus)}
        queries = {row["_id"]: number for number, row in enumerate(self.queries)}
        columns = {name: np.zeros(len(self.tuples), dtype=np.int32) for name in ("query", "positive", "negative")}
        label = np.zeros(len(self.tuples), dtype=np.float32)
        for number, row in enumerate(self.tuples):
            columns["query"][number] = queries[row["query"]]
            columns["positive"][number], columns["negative"][number] = (
                documents[row["positive"]],
                documents[row["negative"]],
            )
            label[number] = row["margin"]
        if not self.labels:
            del columns["negative"]
        data = Dataset.from_dict({**columns, "label": label} if self.labels else columns)
        return data.with_transform(self._texts)

    def _texts(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"query": [self.queries[number]["text"] for number in batch["query"]]}
        for name in ("positive", "negative"):
            if name in batch:
                out[name] = [row_text(self.corpus[number]) for number in batch[name]]
        return out | {"label": batch["label"]} if self.labels else out


def run_trainer(
    config: GplConfig, encoder: Any, data: Any, loss: Any, folder: Path, log: Path, **changes: Any
) -> float:
    """Train to the last step, on from the newest whole checkpoint; returns seconds spent in steps."""
    from transformers import PrinterCallback
    from transformers.utils import logging

    logging.disable_progress_bar()
    arguments = training_arguments(config, folder, **changes)
    callback = training_log(log, arguments.max_steps)
    trainer = trainer_class()(model=encoder, args=arguments, train_dataset=data, loss=loss, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    train_on(trainer, folder)
    return round(float(callback.train_s), 3)


def training_arguments(config: GplConfig, folder: Path, **changes: Any) -> Any:
    import torch
    from sentence_transformers.base.training_args import BatchSamplers
    from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments

    return SentenceTransformerTrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": config.steps,
            "per_device_train_batch_size": config.batch_size,
            "learning_rate": config.rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": config.warmup_steps,
            "weight_decay": config.weight_decay,
            "max_grad_norm": 1.0,
            "bf16": config.precision == "bf16",
            "use_cpu": not torch.cuda.is_available(),  # else bf16 is refused where there is no GPU
            "logging_steps": min(10, changes.get("max_steps", config.steps)),
            "save_steps": config.save_every,
            "save_total_limit": None if config.keep_checkpoints else 2,
            "seed": derive_seed(config.seed, "training"),
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "batch_sampler": BatchSamplers.NO_DUPLICATES if config.loss == "qgen" else in_file_order,
            **changes,
        }
    )


def in_file_order(dataset: Any, batch_size: int, drop_last: bool, **unused: Any) -> Any:
    """Batches of rows in the order of the file."""
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


def trainer_class() -> Any:
    """sentence-transformers' Trainer without its model card, which would read and tokenise a part of the data first."""
    from sentence_transformers.sentence_transformer.trainer import SentenceTransformerTrainer

    class Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
        def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
            pass

    return Trainer


def warm_up(config: GplConfig, encoder: Any, prepared: Prepared, folder: Path, log: Path) -> float:
    """TSDAE on the corpus: the encoder reads a text with 60 % of its words deleted, a decoder writes the whole text.

    Trains what GPL trains afterwards: the adapter alone, with a decoder of its own that is thrown away, or all weights,
    tied to the decoder's. Source: Wang et al. 2021 (TSDAE). Differs: they always train all weights.
    """
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import DenoisingAutoEncoderLoss

    done = folder / "tsdae" / "weights.safetensors"
    if done.is_file():
        load_trained(encoder, done)
        return 0.0
    tied = config.adapter == FULL
    path = None if tied else str(encoder.transformers_model.config._name_or_path)
    seed_everything(derive_seed(config.seed, "decoder"))
    loss = DenoisingAutoEncoderLoss(encoder, decoder_name_or_path=path, tie_encoder_decoder=tied)
    rows = prepared.corpus.rows()
    order = random.Random(derive_seed(config.seed, "tsdae")).choices(range(len(rows)), k=config.tsdae_steps * 8)
    data = Dataset.from_dict({"text": order}).with_transform(deletion(rows, config.seed))
    seconds = run_trainer(
        config,
        encoder,
        data,
        loss,
        folder / "tsdae" / "checkpoints",
        log,
        max_steps=config.tsdae_steps,
        per_device_train_batch_size=8,
        learning_rate=config.tsdae_learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        save_strategy="no",
        batch_sampler=in_file_order,
    )
    save_trained(encoder, done)
    return seconds


def deletion(rows: Rows, seed: int, share: float = 0.6) -> Callable[[dict[str, list[int]]], dict[str, list[str]]]:
    """A transform from row numbers to pairs (text with a share of its words deleted, at least one kept; text)."""

    def transform(batch: dict[str, list[int]]) -> dict[str, list[str]]:
        texts = [row_text(rows[number]) for number in batch["text"]]
        noisy = []
        for number, text in zip(batch["text"], texts, strict=True):
            words, chance = text.split(), random.Random(derive_seed(seed, "deletion", number))
            noisy.append(" ".join([word for word in words if chance.random() >= share] or words[:1]))
        return {"noisy": noisy, "text": texts}

    return transform


def save_trained(encoder: Any, path: Path) -> None:
    """The trainable parameters of the encoder, as they stand."""
    from safetensors.torch import save

    tensors = {name: p.detach().clone().contiguous() for name, p in encoder.named_parameters() if p.requires_grad}
    atomic_write(path, save(tensors))


def load_trained(encoder: Any, path: Path) -> None:
    from safetensors.torch import load_file

    encoder.load_state_dict(load_file(path), strict=False)

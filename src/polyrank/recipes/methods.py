"""Every method on one task at one budget: what it learns, what it costs, what it forgets.

A run adapts a small pretrained language model to restaurant descriptions (E2E) for a fixed number of steps, its size
changed until it has as nearly as can be the parameters of LoRA of one rank, and measures

    nll           nats per token of the test inputs' references, end tokens included
    forgetting    nats per token of texts of the old task, after training minus before
    step time     median of the optimiser steps of this sitting, the first two left out
    peak memory   model, optimiser state and the peak of one step's allocations above them

and writes result.json with one row. `methods/table` makes such a run for every method and seed.

What is killed goes on: training from its newest checkpoint, a table with the first run that has no result.json.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError
from ..core.files import atomic_write
from ..core.records import Metric, Record, Row, new_record, read_record, record_to_json
from ..data.text_files import read_text
from ..evaluation.metrics import evaluate_predictions
from ..evaluation.scoring import reference_nll
from ._frame.registry import recipes
from ._methods.budget import budget_parameters
from ._methods.entry import MethodEntry
from ._text.config import TextSettings, TextShared
from ._text.training import load, trained_model
from .data_to_text import TextData, decode

_log = logging.getLogger("polyrank")

COLUMNS = {
    "nll": Metric("nats per token", "lower", "NLL", "quality"),
    "bleu": Metric("BLEU", "higher", "BLEU"),
    "forgetting": Metric("nats per token", "lower", "forgetting", "cost"),
    "step_time_s": Metric("s", "lower", "step time", "cost"),
    "peak_memory_bytes": Metric("bytes", "lower", "peak memory", "cost"),
    "trainable_parameters": Metric("", None, "trainable parameters", "cost"),
    "over_budget": Metric("%", None, "parameters over the budget"),
    "train_time_s": Metric("s", None, "training"),
    "old_nll": Metric("nats per token", None, "NLL of the old task"),
}
BREAK = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class MethodsShared(TextShared):
    """What all runs of a table share.

    Attributes:
        retention: texts of the base model's old task, `<|endoftext|>` between them; None: forgetting is not measured.
        decode_inputs: so many test inputs are also put into words and scored by BLEU; 0: none.
    """

    data: TextData
    retention: Path | None = None
    decode_inputs: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decode_inputs < 0:
            raise ConfigError(f"decode_inputs must not be negative, got {self.decode_inputs}")

    def files(self) -> list[Path]:
        """Files that the result depends on."""
        named = (self.model.checkpoint, self.model.tokenizer, self.retention)
        return [*self.data.files(), *(file for file in named if file is not None)]


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(MethodsShared, TextSettings):
    """One run: one method, one seed."""


@dataclass(frozen=True, kw_only=True)
class MethodsTableConfig(MethodsShared):
    """Methods x seeds. learning_rate: None: each method's own, `methods.<name>.learning_rate`."""

    methods: dict[str, MethodEntry]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods:
            raise ConfigError("methods must hold at least one method")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds must hold at least one value, each once, got {self.seeds}")
        self.runs()

    def runs(self) -> list[tuple[str, MethodsConfig]]:
        """Folder's name and configuration of every run, seed by seed: a table cut short still compares the methods."""
        shared = {item.name: getattr(self, item.name) for item in fields(MethodsShared)}
        return [
            (f"{name}-seed{seed}", MethodsConfig(**shared, method=method, seed=seed))
            for seed in self.seeds
            for name, method in self.methods.items()
        ]


@recipes.decorator("methods")
def run(config: MethodsConfig, run_dir: Path) -> None:
    """Train, score. `run_dir` gets adapter/, metrics.jsonl, result.json; predictions.jsonl where asked for."""
    run_one(config, run_dir)


@recipes.decorator("methods/table")
def run_table(config: MethodsTableConfig, run_dir: Path) -> None:
    """All runs of a table, one after the other, each in its folder; then one result.json with every row."""
    start, todo, records = time.perf_counter(), config.runs(), []
    for number, (name, one) in enumerate(todo, start=1):
        folder = run_dir / name
        finished = (folder / "result.json").is_file()
        _log.info("run %d of %d: %s%s", number, len(todo), name, " is finished" if finished else "")
        one = dataclasses.replace(one, cache_dir=one.cache_dir or run_dir / "base_model")
        records.append(read_record(folder / "result.json") if finished else run_one(one, folder))
    table = new_record(
        "methods",
        "run",
        {key: value for key, value in COLUMNS.items() if any(key in record.metrics for record in records)},
        [row for record in records for row in record.rows],
        config=dataclasses.asdict(config),
        inputs=config.files(),
        time_s=sum(record.time_s or 0.0 for record in records),
        details={
            "runs": {name: dict(record.details) for (name, _), record in zip(todo, records, strict=True)},
            "last_sitting_s": round(time.perf_counter() - start, 3),
        },
        notes=list(dict.fromkeys(note for record in records for note in record.notes)),
    )
    atomic_write(run_dir / "result.json", record_to_json(table))


def run_one(config: MethodsConfig, run_dir: Path) -> Record:
    """One run, on from where it stopped; writes and returns its record."""
    start = time.perf_counter()
    pairs, examples = config.data.parts()
    base, tokenizer = load(config, pairs, run_dir)
    budget = budget_parameters(config, base)  # type: ignore[arg-type]
    texts = old_texts(config.retention, tokenizer, base) if config.retention is not None else []
    before = old_nll(base, texts)
    model, training = trained_model(config, base, tokenizer, pairs, run_dir)
    figures: dict[str, float | None] = {"nll": nll_per_token(model, tokenizer, examples)}
    if before is not None:
        figures["old_nll"] = after = old_nll(model, texts)
        figures["forgetting"] = after - before  # type: ignore[operator]
    figures |= {key: training[key] for key in ("step_time_s", "peak_memory_bytes", "trainable_parameters")}
    figures["train_time_s"] = training["time_s"]
    if budget is not None:
        figures["over_budget"] = 100.0 * (training["trainable_parameters"] / budget - 1.0)
    if config.decode_inputs:
        written = run_dir / "predictions.jsonl"
        decode(config, model, tokenizer, examples[: config.decode_inputs], written)
        figures["bleu"] = evaluate_predictions(written, ["bleu"])["bleu"]  # type: ignore[assignment]
    details = {
        "training": training,
        "old_nll_before": before,
        "num_inputs": len(examples),
        "num_references": sum(len(e.references) for e in examples),
    }
    record = make_record(config, figures, details, budget, time.perf_counter() - start)
    atomic_write(run_dir / "result.json", record_to_json(record))
    _log.info("%s: %s", config.method.label, ", ".join(f"{k} {v:.4g}" for k, v in record.rows[0].figures.items()))
    return record


def make_record(
    config: MethodsConfig,
    figures: Mapping[str, float | None],
    details: Mapping[str, Any],
    budget: int | None,
    time_s: float,
) -> Record:
    """One row; what could not be measured is left out of it."""
    shown = {key: round(figures[key], 6) for key in COLUMNS if figures.get(key) is not None}  # type: ignore[arg-type]
    part = config.data.test or "held-out"
    notes = [f"NLL: all references of {details['num_inputs']} {part} inputs of {config.data.name}."]
    if details["old_nll_before"] is not None and config.retention is not None:
        notes.append(
            f"Forgetting: rise of the NLL of the texts in {config.retention.name};"
            f" before training it was {details['old_nll_before']:.3f}."
        )
    if "peak_memory_bytes" in shown:
        notes.append("Peak memory: model, optimiser state, and what one step allocates above them.")
    if budget is not None:
        size = config.batch_size * config.accumulation_steps
        length = f"{config.num_steps} steps" if config.num_steps else f"{config.num_epochs} epochs"
        rank = f" (LoRA of rank {config.match_lora_rank})" if config.match_lora_rank else ""
        notes.append(f"Budget: {budget:,} trainable parameters{rank}, {length} of {size} rows.")
    return new_record(
        "methods",
        "run",
        {key: COLUMNS[key] for key in shown},
        [Row(config.method.label, shown, config.seed, row_settings(config, details["training"]))],
        config=dataclasses.asdict(config),
        inputs=config.files(),
        time_s=round(time_s, 3),
        details=details,
        notes=notes,
    )


def row_settings(config: MethodsConfig, training: Mapping[str, Any]) -> dict[str, Any]:
    """The size that reaches the budget, and the learning rate."""
    method = MethodEntry(**training["method"])
    option = method.match or "r"
    size = f"{option}={method.options[option]}" if option in method.options else "–"
    return {"size": size, "learning_rate": config.rate}


def nll_per_token(model: Any, tokenizer: Any, examples: list[Any]) -> float:
    """Nats per token of all references, summed over all of them before dividing."""
    prompts, references = [e.input for e in examples], [list(e.references) for e in examples]
    sums, tokens = reference_nll(model, tokenizer, prompts, references)
    return sum(s[0] for row in sums for s in row) / sum(n for row in tokens for n in row)


def old_texts(path: Path, tokenizer: Any, model: Any) -> list[Any]:
    """The texts of a file as ids (1, T), cut to the model's context. Raises DataError where there is none."""
    context = getattr(model.config, "max_position_embeddings", None)
    texts = [text.strip() for text in read_text(path).split(BREAK) if text.strip()]
    if not texts:
        raise DataError(f"{path} holds no text")
    return [tokenizer(text, return_tensors="pt").input_ids[:, :context] for text in texts]


def old_nll(model: Any, texts: list[Any]) -> float | None:
    """Nats per token of the old task's texts; None without any."""
    import torch

    from ..analysis.weight_pairs import mean_token_loss

    if not texts:
        return None
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad():
            return mean_token_loss(model, ({"input_ids": x.to(device), "labels": x.to(device)} for x in texts))
    finally:
        model.train(training)

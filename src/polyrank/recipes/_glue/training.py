"""Rows, encoder, adapter and training of recipe `glue`; training goes on from its newest checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, DataError
from ...core.files import atomic_write
from ...core.seeding import derive_seed, preserved_torch_rng, seed_everything
from ...data.glue import PARTS, LabelledText, get_task, read_parts
from ...evaluation.glue_metrics import task_scores
from ...training.steps import optimizer_steps
from .._frame.training_log import train_on, training_log
from .._methods.budget import adapter_config, count_parameters, matched_method
from .._methods.parts import changes_base, initialise, optimizer_arguments, save_adapter, trainer_class
from .._methods.preparation import PROCEDURES, Place, prepare
from .._methods.targets import check_targets
from .config import Encoder, GlueConfig, GlueData, Settings

MARKER = "training.json"


@dataclass(frozen=True)
class Rows:
    """One part of a task as token ids, one dict a row; `cut` of its rows were longer than max_length."""

    ids: list[str]
    labels: list[int | float]
    inputs: list[dict[str, Any]]
    cut: int

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.inputs[index], "labels": self.labels[index]}


def model_source(model: Encoder) -> str:
    """Folder of the package that carries the model, where it is installed; else the hub id or folder named."""
    if model.package is not None and find_spec(model.package) is not None:
        return str(files(model.package) / "model")
    return model.name_or_path


def load_tokenizer(model: Encoder) -> Any:
    """Raises ConfigError where there is none of that name."""
    from transformers import AutoTokenizer

    name = model_source(model)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"cannot load a tokenizer from {name!r}: {_first_line(error)}") from error


def load_encoder(model: Encoder, data: GlueData, seed: int = 0) -> Any:
    """The encoder with a new head, the same for every method at a seed: class logits, or one score.

    Raises: ConfigError where there is no such model, where it has no sequence classification, or a misspelt module.
    """
    from transformers import AutoModelForSequenceClassification, logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would report that the head is new
    name = model_source(model)
    seed_everything(derive_seed(seed, "head"))
    classes = get_task(data.task).num_classes
    kind = "regression" if classes is None else "single_label_classification"
    try:
        if model.texts == "apart":
            from .sentence_head import SentenceClassifier

            base = SentenceClassifier.from_encoder(name, classes or 1, kind, len(get_task(data.task).texts))
        else:
            base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes or 1, problem_type=kind)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"cannot load a sequence classifier from {name!r}: {_first_line(error)}") from error
    check_targets(base, model.head_modules, "model.head_modules")
    return base


def read_rows(config: GlueConfig, tokenizer: Any, max_positions: int) -> dict[str, Rows]:
    """Train, validation and test as token ids; validation and test sorted by length, which saves padding.

    Raises: as `read_parts`; ConfigError where max_length exceeds what the model has positions for.
    """
    if config.max_length > max_positions:
        raise ConfigError(f"max_length {config.max_length} exceeds the model's {max_positions} positions")
    task = get_task(config.data.task)
    parts = read_parts(task, config.data.path, config.data.hub_id, config.data.validation_share)
    limits = {part: getattr(config.data, f"{part}_limit") for part in PARTS}
    encoded = {}
    for part, rows in parts.items():
        chosen, apart = _limited(rows, limits[part], part), config.model.texts == "apart"
        encoded[part] = encode(chosen, tokenizer, config.max_length, sort=part != "train", apart=apart)
    if len(encoded["train"]) < 2:
        raise DataError(f"training needs at least 2 rows, got {len(encoded['train'])}")
    return encoded


def _limited(rows: Sequence[LabelledText], limit: int | None, part: str) -> Sequence[LabelledText]:
    if limit is None or limit >= len(rows):
        return rows
    chosen = sorted(random.Random(derive_seed(0, "glue", part)).sample(range(len(rows)), limit))
    return [rows[i] for i in chosen]


def encode(rows: Sequence[LabelledText], tokenizer: Any, max_length: int, sort: bool, apart: bool = False) -> Rows:
    """Token ids of every row; what is longer than max_length is cut (the longer sentence first) and counted."""
    columns = [list(texts) for texts in zip(*(row.texts for row in rows), strict=True)]
    if apart:
        from .sentence_head import encode_apart

        inputs, lengths = encode_apart(columns, tokenizer, max_length)
    else:
        lengths = [len(ids) for ids in tokenizer(*columns, verbose=False)["input_ids"]]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        keys = [key for key in encoded if key in tokenizer.model_input_names]
        inputs = [{key: encoded[key][i] for key in keys} for i in range(len(rows))]
    order = sorted(range(len(rows)), key=lengths.__getitem__) if sort else range(len(rows))
    return Rows(
        [rows[i].id for i in order],
        [rows[i].label for i in order],
        [inputs[i] for i in order],
        sum(length > max_length for length in lengths),
    )


def positions(base: Any) -> int:
    """Tokens that the model has positions for; RoBERTa's begin after its padding token's id."""
    config = base.config
    offset = (config.pad_token_id or 0) + 1 if "roberta" in str(config.model_type) else 0
    return int(getattr(config, "max_position_embeddings", 1 << 30)) - offset


def use_bf16(choice: bool | str) -> bool:
    """ "auto": whether torch says that the processor (or the GPU) multiplies bf16 in hardware."""
    import torch

    if choice != "auto":
        return bool(choice)
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


def num_steps(config: Settings, rows: int) -> tuple[int, int]:
    """(optimiser steps, steps between two validations)."""
    shape = {"batch_size": config.batch_size, "accumulation": config.gradient_accumulation_steps}
    epoch = optimizer_steps(rows, epochs=1, **shape)
    steps = config.num_steps if config.num_epochs is None else optimizer_steps(rows, epochs=config.num_epochs, **shape)
    return steps, min(config.eval_steps or epoch, steps)


def adapted(config: GlueConfig, base: Any, place: Place) -> tuple[Any, GlueConfig]:
    """The model as the method trains it, and the configuration with the options that reach the parameter budget."""
    if not config.method.has_adapter:
        heads = tuple(f"{name}." for name in config.model.head_modules)
        for name, parameter in base.named_parameters():
            parameter.requires_grad = config.method.adapter == "full" or _within(name, heads)
        return base, config
    check_targets(base, config.model.target_modules, "model.target_modules")
    config = dataclasses.replace(config, method=matched_method(config, base))
    seed_everything(derive_seed(config.seed, "adapter"))
    try:
        adapter = adapter_config(config.method, config.model, head=True, num_steps=place.num_steps)
        return prepare(config.method, base, adapter, place), config
    except ValueError as error:
        raise ConfigError(f"method {config.method.name!r}: {_first_line(error)}") from error


def _within(name: str, heads: tuple[str, ...]) -> bool:
    return any(f".{name}".find(f".{head}") >= 0 for head in heads)


def trained_model(config: GlueConfig, run_dir: Path) -> tuple[Any, dict[str, Rows], dict[str, Any]]:
    """The Trainer with the best checkpoint in it (trained now, or in an earlier sitting), the rows, and facts.

    `run_dir` gets adapter/ (PEFT folder and tokenizer; model/ without an adapter), training.json beside it as the sign
    that it is whole, training/ (Trainer's checkpoints, removed at the end) and metrics.jsonl.
    """
    import polyrank.hypotheses  # noqa: F401  registers the adapter methods

    tokenizer = load_tokenizer(config.model)
    base = load_encoder(config.model, config.data, config.seed)
    rows = read_rows(config, tokenizer, positions(base))
    folder = run_dir / ("adapter" if config.method.has_adapter else "model")
    collator, procedure = _collator(config, tokenizer), PROCEDURES.get(config.method.adapter)
    place = Place(run_dir, num_steps(config, len(rows["train"]))[0], rows["train"], tokenizer, collator)  # type: ignore[arg-type]
    if (run_dir / MARKER).is_file():
        facts = json.loads((run_dir / MARKER).read_text(encoding="utf-8"))
        model = _saved_model(base, folder, config) if procedure is None else procedure.reopen(base, place)
        return make_trainer(config, model, tokenizer, rows, run_dir, training=False), rows, facts
    if config.model.texts == "apart" and get_task(config.data.task).num_classes is None:
        base.start_at(sum(rows["train"].labels) / len(rows["train"]))
    model, config = adapted(config, base, place)
    initialise(config.method.initialiser, model, rows["train"], collator, config.seed)  # type: ignore[arg-type]
    initial = None
    if config.method.has_adapter and changes_base(config.method.initialiser, model.peft_config["default"]):
        initial = run_dir / "training" / "initial"
        model.save_pretrained(str(initial))
    facts = count_parameters(model, config.model.head_modules)
    trainer = make_trainer(config, model, tokenizer, rows, run_dir)
    facts |= _train(trainer, run_dir / "training", config)
    facts |= {"method": dataclasses.asdict(config.method), "learning_rate": config.rate}
    facts |= {"rows": {part: len(found) for part, found in rows.items()}}
    facts |= {"cut_rows": {part: found.cut for part, found in rows.items()}}
    if procedure is None:
        save_adapter(trainer.model, folder, initial)
    else:
        model = procedure.finish(trainer.model, base, place)
        trainer = make_trainer(config, model, tokenizer, rows, run_dir, training=False)
    tokenizer.save_pretrained(str(folder))
    atomic_write(run_dir / MARKER, json.dumps(facts) + "\n")
    shutil.rmtree(run_dir / "training", ignore_errors=True)
    return trainer, rows, facts


def _saved_model(base: Any, folder: Path, config: GlueConfig) -> Any:
    from peft import PeftModel

    if config.method.has_adapter:
        return PeftModel.from_pretrained(base, str(folder))
    return type(base).from_pretrained(str(folder))


def make_trainer(
    config: GlueConfig, model: Any, tokenizer: Any, rows: dict[str, Rows], run_dir: Path, training: bool = True
) -> Any:
    """transformers' Trainer: AdamW (or the method's optimiser), linear decay after warm-up, validation and a checkpoint
    every eval_steps. training: False for a trained model that only predicts."""
    import torch
    from transformers import PrinterCallback, TrainingArguments

    steps, eval_steps = num_steps(config, len(rows["train"]))
    bf16 = use_bf16(config.bf16)
    arguments = TrainingArguments(
        output_dir=str(run_dir / "training"),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        per_device_eval_batch_size=config.eval_batch_size,
        learning_rate=config.rate,
        lr_scheduler_type="linear",
        warmup_steps=round(config.warmup * steps),
        weight_decay=config.weight_decay,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{config.main_score}",
        greater_is_better=True,
        seed=derive_seed(config.seed, "training"),
        data_seed=derive_seed(config.seed, "order"),
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    kind, more = _trainer_class(config.model), {}
    if training:
        task = "regression" if get_task(config.data.task).num_classes is None else "classification"
        kind, more = trainer_class(config.method.losses, kind, task)
        more |= optimizer_arguments(config.method.optimizer, model, config.rate, config.weight_decay)
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=_collator(config, tokenizer),
        compute_metrics=_validation_scores(config),
        callbacks=[training_log(run_dir / "metrics.jsonl", steps)],
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _collator(config: GlueConfig, tokenizer: Any) -> Any:
    if config.model.texts == "apart":
        from .sentence_head import ApartCollator

        return ApartCollator(tokenizer)
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)


def _trainer_class(encoder: Encoder) -> Any:
    """Trainer; with a learning rate of their own for the head's modules where the model asks for one."""
    from transformers import Trainer

    heads = tuple(f"{name}." for name in encoder.head_modules)

    class HeadRateTrainer(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            head = {id(p) for name, p in self.model.named_parameters() if _within(name, heads)}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in head]
                group["params"] = [p for p in group["params"] if id(p) not in head]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": encoder.head_learning_rate})
            return optimizer

    return Trainer if encoder.head_learning_rate is None else HeadRateTrainer


def _validation_scores(config: GlueConfig) -> Any:
    """Scores of the validation part; one that is NaN (a model that diverged) counts as the worst, -1."""
    task = config.data.task

    def compute(prediction: Any) -> dict[str, float]:
        labels, regression = prediction.label_ids, get_task(task).num_classes is None
        scores = task_scores(task, labels, prediction.predictions, regression)
        return {name: value if math.isfinite(value) else -1.0 for name, value in scores.items()}

    return compute


def _train(trainer: Any, folder: Path, config: GlueConfig) -> dict[str, Any]:
    """Train, on from the newest whole checkpoint; the best one is in the model afterwards."""

    train_on(trainer, folder)
    log = next(item for item in trainer.callback_handler.callbacks if hasattr(item, "train_s"))
    steps = trainer.state.max_steps
    history = [entry for entry in trainer.state.log_history if f"eval_{config.main_score}" in entry]
    return {
        "train_time_s": log.train_s,
        "step_time_s": log.train_s / steps,
        "num_steps": steps,
        "best_step": trainer.state.best_global_step,
        "validation": trainer.state.best_metric,
        "validations": [[entry["step"], entry[f"eval_{config.main_score}"]] for entry in history],
        "bf16": bool(trainer.args.bf16),
    }


def predict(trainer: Any, rows: Rows) -> Any:
    """Model outputs for every row, (rows, classes) or (rows, 1), fp32, the random state left as it was."""
    with preserved_torch_rng():
        return trainer.predict(rows, metric_key_prefix="test").predictions


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""Base model, adapter and training of recipes `data_to_text` and `maths`; on from the newest checkpoint."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...core.errors import ConfigError
from ...core.files import atomic_write
from ...core.seeding import derive_seed, seed_everything
from ...data.causal_lm import EncodedPairs, TextPair, encode_pairs, encode_prompts, padding_collator
from ...evaluation.decoding import check_room
from .._e2e.training import MARKER, base_folder, load_base, load_tokenizer
from .._frame.training_log import train_on, training_log
from .._methods.budget import adapter_config, matched_method
from .._methods.entry import MethodEntry
from .._methods.parts import changes_base, initialise, optimizer_arguments, save_adapter, trainer_class
from .._methods.preparation import PROCEDURES, Place, base_trainer, prepare
from .._methods.targets import check_targets
from .config import Optimization, TextSettings
from .scratch_model import scratch_folder

T = TypeVar("T")


def chosen(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items, the same random choice for every method and seed, in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(0).sample(range(len(items)), limit))]


def load(config: TextSettings, pairs: Sequence[TextPair], run_dir: Path) -> tuple[Any, Any]:
    """Base model and tokenizer; converted or built first where the configuration says so."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if config.model.scratch is not None:
        sentences = list(dict.fromkeys(pair.target for pair in pairs))
        name = scratch_folder(config.model.scratch, sentences, config.cache_dir or run_dir / "base_model")
    else:
        name = base_folder(config, run_dir)  # type: ignore[arg-type]  (it reads model and cache_dir alone)
    return load_base(name), load_tokenizer(name, config.model.end_token)


def with_room(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[bool]:
    """For each prompt whether it leaves room for `max_new_tokens` in the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    lengths = [len(ids) for ids in encode_prompts(tokenizer, prompts)]
    return [context is None or length + max_new_tokens <= context for length in lengths]


def check_prompts(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Raise DataError, before anything is trained, where a prompt leaves no room for `max_new_tokens`."""
    check_room(model, [len(ids) for ids in encode_prompts(tokenizer, prompts)], max_new_tokens)


def trained_model(
    config: TextSettings, base: Any, tokenizer: Any, pairs: Sequence[TextPair] | EncodedPairs, run_dir: Path
) -> tuple[Any, dict[str, Any]]:
    """The adapted model, trained (now, on from a checkpoint, or in an earlier sitting), and facts.

    `run_dir` gets adapter/ (PEFT folder and tokenizer; model/ for full fine-tuning) with training.json as the sign that
    it is whole, training/ (Trainer's checkpoints, removed at the end) and metrics.jsonl.
    """
    from peft import PeftModel

    import polyrank  # noqa: F401  registers the adapter methods

    folder = run_dir / ("adapter" if config.method.has_adapter else "model")
    procedure, trained = PROCEDURES.get(config.method.adapter), (folder / MARKER).is_file()
    facts = json.loads((folder / MARKER).read_text(encoding="utf-8")) if trained else {}
    if trained:
        shutil.rmtree(run_dir / "training", ignore_errors=True)  # a kill may have come between
    if trained and procedure is None:
        if config.method.has_adapter:
            return PeftModel.from_pretrained(base, str(folder)).eval(), facts
        return type(base).from_pretrained(str(folder)).eval(), facts
    rows = pairs if isinstance(pairs, EncodedPairs) else encode_pairs(tokenizer, pairs, config.max_length)
    steps = config.total_steps(len(rows))
    place = Place(run_dir, steps, rows, tokenizer)
    if trained and procedure is not None:
        return procedure.reopen(base, place).eval(), facts
    model, initial = base, None
    if config.method.has_adapter:
        check_targets(base, config.model.target_modules, "model.target_modules")
        matched = matched_method(config, base)  # type: ignore[arg-type]
        options = {**matched.options, "task_type": "CAUSAL_LM"}
        config = dataclasses.replace(config, method=dataclasses.replace(matched, options=options))
        seed_everything(derive_seed(config.seed, "adapter"))
        try:
            adapter = adapter_config(config.method, config.model, head=False, num_steps=steps)  # type: ignore[arg-type]
            model = prepare(config.method, base, adapter, place)
            initialise(config.method.initialiser, model, rows, padding_collator(tokenizer), config.seed)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(f"method {config.method.name!r}: {str(error).splitlines()[0]}") from error
        if changes_base(config.method.initialiser, adapter):
            initial = run_dir / "training" / "initial"
            model.save_pretrained(str(initial))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    spent = train(config, config.rate, model, tokenizer, rows, run_dir, config.seed, config.method)
    if procedure is not None:
        model = procedure.finish(model, base, place)
    else:
        save_adapter(model, folder, initial)
    tokenizer.save_pretrained(str(folder))
    facts = {**spent, "rows": len(rows), "dropped_rows": rows.dropped, "trainable_parameters": parameters}
    facts |= {"method": dataclasses.asdict(config.method), "learning_rate": config.rate}
    atomic_write(folder / MARKER, json.dumps(facts) + "\n")
    shutil.rmtree(run_dir / "training", ignore_errors=True)
    return model.eval(), facts


def train(
    plan: Optimization,
    rate: float,
    model: Any,
    tokenizer: Any,
    rows: EncodedPairs,
    run_dir: Path,
    seed: int,
    method: MethodEntry | None = None,
) -> dict[str, Any]:
    """Train to the plan's end, with the method's own optimiser and losses.

    Returns: time_s, with earlier sittings up to the checkpoint; with a method also step_time_s (median of this sitting)
    and peak_memory_bytes, each None where too few steps were left to measure.
    """
    import torch
    from transformers import PrinterCallback, TrainingArguments

    folder = run_dir / "training"
    steps = plan.total_steps(len(rows))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.accumulation_steps,
        learning_rate=rate,
        lr_scheduler_type=plan.schedule,
        warmup_steps=min(plan.warmup_steps, steps),
        weight_decay=plan.weight_decay,
        label_smoothing_factor=plan.label_smoothing,
        max_grad_norm=plan.max_grad_norm,
        logging_steps=10,
        save_steps=plan.save_every,
        save_total_limit=2,
        seed=derive_seed(seed, "training"),
        data_seed=derive_seed(seed, "order"),
        bf16=plan.bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    log = training_log(run_dir / "metrics.jsonl", steps, memory=method is not None)
    kind, more = trainer_class(method.losses if method else None, base_trainer(model), "generation")
    more |= optimizer_arguments(method.optimizer if method else None, model, rate, plan.weight_decay)
    collator = padding_collator(tokenizer)
    trainer = kind(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[log], **more)
    trainer.remove_callback(PrinterCallback)
    train_on(trainer, folder)
    if method is None:
        return {"time_s": log.train_s}
    return {"time_s": log.train_s, "step_time_s": log.step_time_s, "peak_memory_bytes": log.peak_memory_bytes}

"""Adapter and training of recipes `translation`, `image_captioning`, `audio_captioning`; on from the newest
checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from ...core.files import atomic_write
from ...core.seeding import derive_seed, seed_everything
from .._frame.training_log import train_on, training_log
from .._methods.targets import check_targets
from .config import CaptionSettings, OneRun
from .processes import first_process, part

MARKER = "training.json"


def adapter_config(config: OneRun, num_rows: int, target_modules: Any) -> Any:
    """PEFT's LoraConfig for "mle", MclConfig for "mcl", the MoE's config for "moe"."""
    from peft import LoraConfig

    from ...hypotheses import MclConfig
    from ...routing import MoeConfig

    method = config.method
    shared = {
        "r": config.adapter_rank,
        "lora_alpha": config.adapter_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM",
    }
    kind: Any = LoraConfig
    if method.name == "mcl":
        kind = MclConfig
        shared |= {"num_hypotheses": config.num_hypotheses, "mode": method.mode, "epsilon": method.epsilon}
        shared["initial_temperature"] = config.initial_temperature
        shared["temperature_decay"] = method.annealed_to ** (1 / config.total_steps(num_rows))
    elif method.name == "moe":
        kind = MoeConfig
        shared["num_experts"] = config.num_hypotheses
    try:
        return kind(**{**shared, **method.options})
    except TypeError as error:
        raise ConfigError(f"method.options: {error}") from error


def trained_model(
    config: OneRun,
    base: Any,
    rows: Any,
    collator: Callable[..., Any],
    target_modules: Any,
    run_dir: Path,
    validation: Any = None,
    callbacks: Sequence[Any] = (),
) -> tuple[Any, dict[str, Any]]:
    """The adapted model, trained (now, on from a checkpoint, or in an earlier sitting), and facts.

    `run_dir` gets adapter/ (with training.json as the sign that it is whole), training/ (Trainer's checkpoints, removed
    at the end) and metrics.jsonl.
    """
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import Trainer

    import polyrank  # noqa: F401  registers the adapter methods

    from ...hypotheses import MclTrainer
    from ...routing import MoeTrainer

    folder = run_dir / "adapter"
    if (folder / MARKER).is_file():
        facts = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        device = "cuda" if torch.cuda.is_available() else "cpu"  # where the Trainer would have left it
        return PeftModel.from_pretrained(base, str(folder)).to(device).eval(), facts
    seed_everything(derive_seed(config.seed, "adapter"))
    check_targets(base, target_modules, "model.target_modules")
    try:
        model = get_peft_model(base, adapter_config(config, len(rows), target_modules))
    except ValueError as error:
        raise ConfigError(f"method {config.method.name!r}: {str(error).splitlines()[0]}") from error
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kind = {"mcl": MclTrainer, "moe": MoeTrainer}.get(config.method.name, Trainer)
    seconds = train(config, model, rows, collator, run_dir, config.seed, kind, validation, callbacks=callbacks)
    dropped = getattr(rows, "dropped", 0)
    facts = {"time_s": seconds, "rows": len(rows), "dropped_rows": dropped, "trainable_parameters": parameters}
    part()  # some may still read the best checkpoint
    if first_process():
        model.save_pretrained(str(folder))
        atomic_write(folder / MARKER, json.dumps(facts) + "\n")
        shutil.rmtree(run_dir / "training", ignore_errors=True)
    return model.eval(), facts


def train(
    plan: CaptionSettings,
    model: Any,
    rows: Any,
    collator: Callable[..., Any],
    run_dir: Path,
    seed: int,
    kind: Any = None,
    validation: Any = None,
    in_order: bool = False,
    callbacks: Sequence[Any] = (),
) -> float:
    """Train to the plan's end; returns seconds of the optimiser steps, those of earlier sittings included.

    Args:
        kind: Trainer's class; default: transformers' own.
        in_order: rows are taken as they stand, not shuffled.
    """
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = run_dir / "training"
    validate = plan.patience is not None and validation is not None
    log = training_log(run_dir / "metrics.jsonl", plan.total_steps(len(rows)))
    callbacks = [log, *callbacks]
    if validate:
        callbacks.append(EarlyStoppingCallback(plan.patience, 0.001))  # type: ignore[arg-type]
    trainer = (kind or Trainer)(
        model=model,
        args=_arguments(plan, len(rows), folder, seed, validate, in_order),
        train_dataset=rows,
        eval_dataset=validation if validate else None,
        data_collator=collator,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    train_on(trainer, folder)
    return log.train_s


def _arguments(plan: CaptionSettings, num_rows: int, folder: Path, seed: int, validate: bool, in_order: bool) -> Any:
    import torch
    from transformers import TrainingArguments

    steps = plan.total_steps(num_rows)
    schedule, kwargs = plan.schedule, {}
    if plan.schedule == "cosine" and plan.last_rate:
        schedule, kwargs = "cosine_with_min_lr", {"min_lr_rate": plan.last_rate}  # type: ignore[assignment]
    every = (
        {
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "restore_callback_states_from_checkpoint": True,
        }
        if validate
        else {"save_strategy": "steps", "save_steps": plan.save_every}
    )
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.accumulation_steps,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=kwargs,
        warmup_steps=round(plan.warmup * steps),
        weight_decay=plan.weight_decay,
        adam_beta1=plan.adam_betas[0],
        adam_beta2=plan.adam_betas[1],
        adam_epsilon=plan.adam_epsilon,
        max_grad_norm=plan.max_grad_norm,
        bf16=plan.bf16,
        train_sampling_strategy="sequential" if in_order else "random",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        save_total_limit=2,
        seed=derive_seed(seed, "training"),
        data_seed=derive_seed(seed, "order"),
        metric_for_best_model="eval_loss" if validate else None,
        greater_is_better=False if validate else None,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **every,
    )

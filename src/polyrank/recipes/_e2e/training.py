"""Base model, tokenizer and trained adapter of recipe `e2e`; training goes on from its newest checkpoint."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from ...core.files import atomic_write
from ...core.seeding import derive_seed, seed_everything
from ...data.causal_lm import EncodedPairs, encode_pairs, padding_collator, prepare_tokenizer
from ...data.e2e import read_pairs
from ...data.llama2c import cached_llama2c
from .._frame.training_log import train_on, training_log
from .._methods.targets import check_targets
from .config import E2eConfig

MARKER = "training.json"


def base_folder(config: E2eConfig, run_dir: Path) -> str:
    """Hub id or folder of the base model; a llama2.c file is converted first, once."""
    model = config.model
    if model.checkpoint is None or model.tokenizer is None:
        assert model.name_or_path is not None
        return model.name_or_path
    return str(cached_llama2c(model.checkpoint, model.tokenizer, config.cache_dir or run_dir / "base_model"))


def load_tokenizer(name_or_path: str, end_token: str | None = None) -> Any:
    """Its tokenizer, with a padding token. Raises ConfigError where there is none, or no such end token in it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except OSError as error:
        raise ConfigError(f"cannot load a tokenizer from {name_or_path!r}: {str(error).splitlines()[0]}") from error
    if end_token is not None:
        if end_token not in tokenizer.get_vocab():
            raise ConfigError(f"model.end_token {end_token!r} is no token of {name_or_path!r}")
        tokenizer.eos_token = end_token
    return prepare_tokenizer(tokenizer)


def load_base(name_or_path: str) -> Any:
    """The causal language model. Raises ConfigError where there is none of that name."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path)
    except OSError as error:
        raise ConfigError(f"cannot load a model from {name_or_path!r}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        if "AutoModel" in str(error):
            raise ConfigError(f"{name_or_path!r} is no causal language model") from error
        raise


def adapter_config(config: E2eConfig) -> Any:
    """PEFT's LoraConfig for "mle", MclConfig for "mcl", MoeConfig for "moe"."""
    from peft import LoraConfig

    from ...hypotheses import MclConfig
    from ...routing import MoeConfig

    shared = {"r": config.adapter_rank, "target_modules": config.model.target_modules, "task_type": "CAUSAL_LM"}
    method = config.method
    try:
        if method.name == "mle":
            return LoraConfig(**{**shared, "lora_alpha": config.adapter_alpha, **method.options})
        if method.name == "moe":
            experts = {"num_experts": config.num_hypotheses, "lora_alpha": config.adapter_alpha}
            return MoeConfig(**{**shared, **experts, **method.options})
        own = {"num_hypotheses": config.num_hypotheses, "mode": method.mode, "epsilon": method.epsilon}
        own["temperature_decay"] = method.annealed_to ** (1 / config.num_steps)
        return MclConfig(**{**shared, "lora_alpha": config.adapter_alpha, **own, **method.options})
    except TypeError as error:
        raise ConfigError(f"method.options: {error}") from error


def training_rows(config: E2eConfig, tokenizer: Any) -> EncodedPairs:
    """Training rows; where `train_limit` is set, the same random choice for every method and seed."""
    pairs = read_pairs(config.data.path, config.data.train, config.data.template)
    if config.data.train_limit is not None and config.data.train_limit < len(pairs):
        pairs = random.Random(0).sample(pairs, config.data.train_limit)
    return encode_pairs(tokenizer, pairs, config.max_length)


def trained_model(config: E2eConfig, run_dir: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The adapted model, trained (now, on from a checkpoint, or in an earlier sitting), its tokenizer, and facts.

    `run_dir` gets adapter/ (PEFT folder and tokenizer, with training.json as the sign that it is whole), training/
    (Trainer's checkpoints, removed at the end) and metrics.jsonl.
    """
    from peft import PeftModel, get_peft_model
    from transformers.utils import logging

    import polyrank  # noqa: F401  registers the adapter methods

    logging.disable_progress_bar()
    name = base_folder(config, run_dir)
    tokenizer = load_tokenizer(name, config.model.end_token)
    base, folder = load_base(name), run_dir / "adapter"
    if (folder / MARKER).is_file():
        facts = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        shutil.rmtree(run_dir / "training", ignore_errors=True)  # a kill may have come between
        return PeftModel.from_pretrained(base, str(folder)).eval(), tokenizer, facts
    rows = training_rows(config, tokenizer)
    seed_everything(derive_seed(config.seed, "adapter"))
    check_targets(base, config.model.target_modules, "model.target_modules")
    model = get_peft_model(base, adapter_config(config))
    seconds = _train(config, model, tokenizer, rows, run_dir)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = {"time_s": seconds, "rows": len(rows), "dropped_rows": rows.dropped, "trainable_parameters": parameters}
    atomic_write(folder / MARKER, json.dumps(facts) + "\n")
    shutil.rmtree(run_dir / "training", ignore_errors=True)
    return model.eval(), tokenizer, facts


def _train(config: E2eConfig, model: Any, tokenizer: Any, rows: EncodedPairs, run_dir: Path) -> float:
    """Train to `num_steps`; returns seconds of the optimiser steps, those of earlier sittings included."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from ...hypotheses import MclTrainer
    from ...routing import MoeTrainer

    folder = run_dir / "training"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.num_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * config.num_steps),
        weight_decay=0.0,
        logging_steps=10,
        save_steps=config.save_every,
        save_total_limit=2,
        seed=derive_seed(config.seed, "training"),
        data_seed=derive_seed(config.seed, "order"),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    kind = {"mcl": MclTrainer, "moe": MoeTrainer}.get(config.method.name, Trainer)
    log = training_log(run_dir / "metrics.jsonl", config.num_steps)
    collator = padding_collator(tokenizer)
    trainer = kind(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[log])
    trainer.remove_callback(PrinterCallback)
    train_on(trainer, folder)
    return log.train_s

"""Run by test_ddp.py on each rank: trains in every mode and writes down what came out."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import TrainingArguments

from polyrank import MclConfig, MclTrainer

MODES = ("wta", "relaxed-wta", "annealed-wta", "random-wta", "mean")
CASES = {
    **{mode: {"mode": mode} for mode in MODES},
    "accumulation": {"mode": "relaxed-wta", "accumulation": 2},
    "checkpointing": {"mode": "wta", "gradient_checkpointing": True},
    "losers": {"mode": "wta", "skip_losers": True},
}
COMPARED = ("loss", "grad_norm", "oracle_nll", "mixture_nll", "nll_0", "nll_2", "wins_0", "wins_1", "wins_2", "margin")


def fixtures():
    """The module beside this file with the tiny models."""
    spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(case: str, folder: str, rows_per_step: int, accumulation: int = 1, cls: type = MclTrainer) -> MclTrainer:
    """Three steps of plain SGD; rows_per_step on this process and micro-batch."""
    tiny, options = fixtures(), CASES[case]
    build, targets, task = tiny.BASES["llama"]
    model = get_peft_model(
        build(), MclConfig(r=3, target_modules=targets, task_type=task, num_hypotheses=3, mode=options["mode"])
    )
    tiny.randomize(model)
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=rows_per_step,
        gradient_accumulation_steps=accumulation * options.get("accumulation", 1),
        per_device_eval_batch_size=2,
        gradient_checkpointing=options.get("gradient_checkpointing", False),
        max_steps=3,
        logging_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.05,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    rows = tiny.make_rows(24)
    trainer = cls(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:7],
        data_collator=tiny.collate,
        skip_losers=options.get("skip_losers", False),
    )
    trainer.train()
    return trainer


def outcome(trainer: MclTrainer) -> dict[str, torch.Tensor]:
    """Adapter, logged figures and evaluation as tensors."""
    found = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    for step, logged in enumerate([h for h in trainer.state.log_history if "loss" in h]):
        found[f"log.{step}"] = torch.tensor([logged[name] for name in COMPARED], dtype=torch.float64)
    metrics = trainer.evaluate()
    found["eval"] = torch.tensor([metrics[f"eval_{name}"] for name in COMPARED if name != "grad_norm"])
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name in CASES:
        trainer = train(name, str(target / name), rows_per_step=2)
        save_file(outcome(trainer), target / f"{name}.{trainer.args.process_index}.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        os._exit(0)  # gloo's own way out now and then ends in std::terminate, or waits for ever

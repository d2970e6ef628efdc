"""Training of one arm of the toy experiment: K hypotheses, one seed, evaluation every few steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from ...core.seeding import derive_seed
from ...data.markov import MarkovDataset
from ...hypotheses.step import StepOptions, winner_step
from ...objectives import annealing_time, temperature_at
from .model import Evaluation, MarkovConfig, build_model, evaluate

OnStep = Callable[[int, dict[str, Any] | None], None]
"""Called before each step, and once after the last, with the step and the evaluation at that point, if there is one."""


@dataclass
class Arm:
    """One training: K hypotheses under one seed.

    Attributes: history: one entry an evaluation on the curve's sequences, {"step": ..., then the fields of Evaluation};
        measured: the fields of Evaluation at the end, on the larger final sample; time_s: wall time.
    """

    hypotheses: int
    seed: int
    history: list[dict[str, Any]]
    measured: dict[str, Any]
    trainable_parameters: int
    time_s: float

    @property
    def final(self) -> Evaluation:
        return Evaluation(**self.measured)


def held_out_data(config: MarkovConfig, seed: int, split: str = "evaluation") -> MarkovDataset:
    """The held-out sequences of a seed, the same for every K: of the curve, or of the final figures (split "final")."""
    size = config.num_final if split == "final" else config.num_evaluation
    return MarkovDataset(config.chains, size, config.sequence_length, start=config.start, seed=seed, split=split)


def training_data(config: MarkovConfig, seed: int) -> MarkovDataset:
    """num_steps batches, each sequence seen once, the same for every K."""
    size = config.num_steps * config.batch_size
    return MarkovDataset(config.chains, size, config.sequence_length, start=config.start, seed=seed)


def guess_winners(matrices: Any, tokens: Tensor) -> Tensor:
    """Hypothesis (B,) under whose first-order matrix (K, 2, 2) each sequence (B, T) is most likely.

    A guess for the step's speculation: a wrong one costs time, never exactness.
    """
    log_p = torch.as_tensor(matrices, dtype=torch.float64).clamp_min(1e-12).log()
    return log_p[:, tokens[:, :-1], tokens[:, 1:]].sum(-1).argmax(0)


class ArmTraining:
    """K hypotheses in training: model, optimiser, data; `step` and `evaluate` may be called as one likes.

    Attributes: model, a PeftModel; held_out (N, T) sequences; matrices, those of the last evaluation, None before.
    """

    def __init__(self, config: MarkovConfig, k: int, seed: int) -> None:
        self.config, self.k = config, k
        self.model = build_model(config, k, seed)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scheduler = get_scheduler(config.lr_scheduler_type, self.optimiser, config.warmup_steps, config.num_steps)
        self.batches = training_data(config, seed).tokens.split(config.batch_size)
        self.held_out = held_out_data(config, seed).tokens
        self.generator = torch.Generator().manual_seed(derive_seed(seed, "markov", "ties", k))
        self.loss_factor = 1 / (config.sequence_length - 1) if config.normalize_loss_by_T else 1.0
        self.matrices: list[list[list[float]]] | None = None

    def evaluate(self, tokens: Tensor | None = None) -> Evaluation:
        """On sequences (N, T); default: those of the curve."""
        evaluation = evaluate(self.model, self.k, self.held_out if tokens is None else tokens)
        self.matrices = evaluation.matrices
        return evaluation

    def step(self, number: int) -> None:
        """Optimiser step `number`, from 0."""
        tokens, guess = self.batches[number], None
        if self.speculates(number):  # rows of one guess side by side: one matrix product for each hypothesis
            guess = guess_winners(self.matrices, tokens)
            order = guess.argsort(stable=True)
            tokens, guess = tokens[order], guess[order]
        winner_step(
            self.model,
            {"input_ids": tokens, "labels": tokens},
            config=self.model.peft_config["default"],
            temperature=temperature(self.config, number),
            options=StepOptions(guess=guess),
            generator=self.generator,
            backward=lambda loss: (loss * self.loss_factor).backward(),
        )
        self.optimiser.step()
        self.scheduler.step()
        self.optimiser.zero_grad(set_to_none=False)

    def speculates(self, number: int) -> bool:
        """Whether winners are guessed: where one hypothesis takes all and the hypotheses have parted."""
        return self.k > 1 and self.config.mode == "wta" and self.matrices is not None and number >= 10


def train(config: MarkovConfig, k: int, seed: int, on_step: OnStep | None = None) -> tuple[Any, Arm]:
    """Train K hypotheses. Returns the model and what was measured on the way."""
    started = time.perf_counter()
    arm, history = ArmTraining(config, k, seed), []
    for step in range(config.num_steps + 1):
        measured = None
        if step % config.eval_every == 0 or step == config.num_steps:
            measured = {"step": step, **asdict(arm.evaluate())}
            history.append(measured)
        if on_step is not None:
            on_step(step, measured)
        if step < config.num_steps:
            arm.step(step)
    measured = asdict(arm.evaluate(held_out_data(config, seed, "final").tokens))
    size = sum(p.numel() for p in arm.parameters)
    return arm.model, Arm(k, seed, history, measured, size, time.perf_counter() - started)


def temperature(config: MarkovConfig, step: int) -> float:
    """Annealing temperature of a step, nats; the whole training is one epoch."""
    passed = annealing_time(config.temperature_schedule, global_step=step, epoch=step / config.num_steps)
    return temperature_at(passed, config.initial_temperature, config.final_temperature, config.temperature_decay)

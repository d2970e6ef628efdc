"""transformers' Trainer for LoRA-MCL: nothing to learn, every mode, and figures on what the hypotheses do.

    MclTrainer(model=..., args=TrainingArguments(...), train_dataset=...).train()

Each micro-batch is one call of the model, in which the winner-only step runs (`competition.py`); the Trainer's own
backward, accumulation, clipping and DDP see an ordinary loss. It is normalised over the whole accumulated batch of all
ranks, so that 4 x 1 equals 1 x 4 and two ranks equal one. The annealing clock counts optimiser steps or epochs;
micro-batches and evaluation do not move it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..core.errors import ConfigError, DataError, RunError, check_choice
from ..core.seeding import derive_seed
from ..objectives import annealing_time, temperature_at, win_counts
from .competition import StepRequest, is_language_batch
from .config import MclConfig
from .evaluation import EvaluatingTrainer, ScoredRows
from .forward import competing_config
from .guesses import WinnerHistory
from .monitor import LossMonitor
from .persistence import CheckpointingTrainer
from .prepared import base_of, prepared
from .scorer import HypothesisScorer, pooled_features, winners_of
from .skip_losers import skip_losers as leave_losers_alone
from .slices import Revival, broken_hypotheses, revive
from .step import StepOptions

_log = logging.getLogger("polyrank")

NORMALIZERS = ("sequences", "tokens")


class MclTrainer(EvaluatingTrainer, CheckpointingTrainer):
    """Trains the hypotheses of a model that has an MclConfig adapter.

    Args (beside those of transformers' Trainer):
        step_options: how a step is computed (`StepOptions`); exact and two-pass by default.
        speculative: guess each row's winner from the last time it was seen and keep that graph: one forward less for
            a right guess. Exact. Costs the memory of a graph while scoring; helps from the second epoch on.
        skip_losers: a hypothesis that no sequence of a step has trained keeps its values and its optimiser state in
            that step. By default it does as in the LoRA-MCL project: zero gradients still decay the moments, and
            momentum and weight decay still move it.
        normalize_by: "sequences" (the mean over sequences of sum_k w_k L_k, as the method has it) or "tokens" (the sum
            over labelled tokens divided by their number, as transformers' Trainer does for plain models).
        revival: when to overwrite a hypothesis that wins nothing (`Revival`); None: never.
        scorer: a HypothesisScorer to be trained along on who wins, True to make one; saved with the adapter.
        scorer_learning_rate: of the scorer, under the same schedule; default: the model's.

    Logged beside transformers' figures, over the rows since the last log and over all ranks: oracle_nll, mixture_nll,
    nll_k, wins_k, win_share_k, assignment_entropy, effective_hypotheses, dead_hypotheses, margin, tie_rate, and
    temperature, guess_hits and scorer_loss where they apply. Evaluation reports the same with `eval_`, where
    `eval_loss` is the hard winner-takes-all (oracle) loss whatever the mode, unsmoothed.

    Raises: ConfigError for a model without hypotheses or options that contradict each other; `train` RunError where
        all hypotheses, or one that is to be saved, have weights that are not finite.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        step_options: StepOptions | None = None,
        speculative: bool = False,
        skip_losers: bool = False,
        normalize_by: str = "sequences",
        revival: Revival | None = None,
        scorer: HypothesisScorer | bool | None = None,
        scorer_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("normalize_by", normalize_by, NORMALIZERS)
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ConfigError(
                "compute_loss_func has no place in MclTrainer: the hypotheses compete by the model's loss"
            )
        if self.args.n_gpu > 1 and not self.is_model_parallel:
            _log.warning("several GPUs in one process: only one is used; start with torchrun to use all")
            self.args._n_gpu = 1
        self.args.logging_nan_inf_filter = False  # it would log a finite loss in the place of NaN
        self.mcl_config: MclConfig = self._find_config()
        self.step_options = step_options or StepOptions()
        self.evaluation_options = StepOptions(max_rows_per_pass=self.step_options.max_rows_per_pass)
        self.speculative, self.skip_losers = speculative, skip_losers
        self.normalize_by, self.revival = normalize_by, revival
        self.scorer = self._make_scorer(scorer)
        self.scorer_learning_rate = scorer_learning_rate
        self._check_sharded()

        K, reduction = self.mcl_config.num_hypotheses, self.mcl_config.loss_reduction
        self.monitor = LossMonitor(K, reduction)
        self.rows = ScoredRows(K, reduction)
        self.history = WinnerHistory()
        self.wins_since_look = torch.zeros(K, dtype=torch.float64)
        self.scorer_losses: list[float] = []
        self.num_revived = 0
        self.generator = torch.Generator().manual_seed(derive_seed(self.args.seed, "mcl", self.args.process_index))
        self.add_callback(_Steps(self))

    def _find_config(self) -> MclConfig:
        config = competing_config(base_of(self.model))
        if config is None:
            raise ConfigError(
                f"{type(self.model).__name__} has no active LoRA-MCL adapter; add one with "
                "get_peft_model(model, MclConfig(...))"
            )
        return config

    def _make_scorer(self, scorer: HypothesisScorer | bool | None) -> HypothesisScorer | None:
        if not scorer:
            return None
        K = self.mcl_config.num_hypotheses
        if scorer is True:
            config = base_of(self.model).config
            scorer = HypothesisScorer(config.get_text_config().hidden_size, K)
        if scorer.num_hypotheses != K:
            raise ConfigError(f"the scorer scores {scorer.num_hypotheses} hypotheses, the model has {K}")
        return scorer.to(self.args.device)

    def _check_sharded(self) -> None:
        self._keep_graphs = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not self._keep_graphs:
            return
        for name in ("speculative", "skip_losers", "revival", "scorer"):
            if getattr(self, name):
                raise ConfigError(f"{name} does not work where parameters are sharded (FSDP, DeepSpeed)")
        _log.warning("sharded training (FSDP, DeepSpeed) keeps the graphs of all hypotheses; DDP needs one at a time")

    # -- the loss ---------------------------------------------------------------------------------------------------

    def temperature(self) -> float | None:
        """The temperature of the next step, nats; None outside of annealed-wta."""
        config = self.mcl_config
        if config.mode != "annealed-wta":
            return None
        time = annealing_time(
            config.temperature_schedule, global_step=self.state.global_step, epoch=self.state.epoch or 0.0
        )
        return temperature_at(time, config.initial_temperature, config.final_temperature, config.temperature_decay)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if inputs.get("labels") is None:
            raise DataError("MclTrainer needs `labels` in every batch")
        if not torch.is_grad_enabled():
            outputs = model(**inputs, step_request=StepRequest())
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        keys = self.history.keys(inputs) if self.speculative else None
        guess = self.history.guess(keys) if keys else None
        request = StepRequest(
            temperature=self.temperature(),
            generator=self.generator,
            options=self.step_options if guess is None else replace(self.step_options, guess=guess),
            label_smoothing=self.args.label_smoothing_factor,
            loss_scale=self._loss_scale(),
            keep_graphs=self._keep_graphs,
        )
        if self.normalize_by == "sequences":
            request.num_sequences = num_items_in_batch
        elif num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        outputs = model(**inputs, step_request=request)
        result = request.result
        self.monitor.add(result.losses, result.token_counts)
        self.wins_since_look += win_counts(result.losses[:, result.token_counts > 0])
        if keys:
            self.history.learn(keys, result.winners, result.guess_hits, guess)
        if self.scorer is not None:
            self._train_scorer(model, inputs, result.losses, num_items_in_batch)
        loss = outputs.loss * self.args.world_size  # ranks are averaged, the loss is normalised over all of them
        return (loss, outputs) if return_outputs else loss

    def _loss_scale(self) -> float:
        scaler = getattr(self.accelerator, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Any]], device: torch.device) -> Tensor | None:
        """What the loss is divided by: sequences with labels, or labelled tokens, of all micro-batches and ranks."""
        if not batch_samples or batch_samples[0].get("labels") is None:
            return None
        base = base_of(self.model)
        count = torch.zeros((), dtype=torch.float64)
        for batch in batch_samples:
            labels = batch["labels"]
            if not is_language_batch(base, batch):
                count += len(labels)
                continue
            labelled = (labels[:, 1:] if prepared(base).shift else labels) != -100
            count += labelled.sum() if self.normalize_by == "tokens" else labelled.any(dim=1).sum()
        count = count.to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count.reshape(1)).sum()
        return count.clamp_min(1)

    # -- the scorer -------------------------------------------------------------------------------------------------

    def _train_scorer(self, model: nn.Module, inputs: Mapping[str, Any], losses: Tensor, count: Any) -> None:
        inputs = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
        loss = self.scorer.loss(pooled_features(self.accelerator.unwrap_model(model), inputs), winners_of(losses))
        self.scorer_losses.append(float(loss.detach()))
        share = self.args.world_size * losses.shape[1] / count if self.normalize_by == "sequences" else 1.0
        self.accelerator.backward(loss * share)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if self.scorer is not None:
            known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            new = [parameter for parameter in self.scorer.parameters() if id(parameter) not in known]
            if new:
                rate = self.scorer_learning_rate or self.args.learning_rate
                optimizer.add_param_group({"params": new, "lr": rate, "weight_decay": 0.0})
        if self.skip_losers:
            leave_losers_alone(optimizer, self.model)
        return optimizer

    # -- around the optimiser's step --------------------------------------------------------------------------------

    def _before_optimizer(self) -> None:
        if self.scorer is not None:
            for parameter in self.scorer.parameters():
                if parameter.grad is not None and self.args.world_size > 1:
                    parameter.grad.copy_(self.accelerator.reduce(parameter.grad, "mean"))

    def _after_optimizer(self) -> None:
        if self.scorer is not None:
            self.scorer.zero_grad()

    def _check_finite(self, all_of_it: bool) -> None:
        """Raise RunError where a hypothesis (`all_of_it`), or every one of them, has values that are not finite."""
        bad = broken_hypotheses(self.model, self.mcl_config.num_hypotheses)
        if len(bad) == self.mcl_config.num_hypotheses or (all_of_it and bad):
            raise RunError(
                f"step {self.state.global_step}: the weights of hypotheses {bad} are not finite; training stops and "
                "earlier checkpoints stay (a smaller learning rate or max_grad_norm helps)"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self._keep_graphs:
            self._check_finite(all_of_it=True)
        super()._save_checkpoint(model, trial)

    def _after_step(self) -> None:
        """Stop where nothing finite is left; look for dead hypotheses, when it is time."""
        if not self._keep_graphs:
            self._check_finite(all_of_it=False)
        if self.revival is None or self.state.global_step % self.revival.every:
            return
        wins = self.wins_since_look.to(self.args.device, torch.float32)
        wins = self.accelerator.reduce(wins, "sum") if self.args.world_size > 1 else wins
        self.wins_since_look.zero_()
        winner, total = int(wins.argmax()), float(wins.sum())
        dead = [k for k, won in enumerate(wins.tolist()) if k != winner and won <= self.revival.threshold * total]
        if total and dead:
            seed = derive_seed(self.args.seed, "revival", self.state.global_step)
            revive(self.model, self.optimizer, dead, winner, self.revival.noise, seed)
            _log.info("step %d: revived %s from hypothesis %d", self.state.global_step, dead, winner)
            self.num_revived += len(dead)

    # -- what is logged and kept ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # every rank comes here, after the same step
            logs |= self._window_figures()
        super().log(logs, start_time)

    def _window_figures(self) -> dict[str, float]:
        """Figures of the rows since the last call, over all ranks."""
        vector = self.monitor.as_vector().to(self.args.device)
        if self.args.world_size > 1:
            vector = self.accelerator.reduce(vector, "sum")
        window = LossMonitor(self.monitor.num_hypotheses, self.monitor.reduction)
        window.load_vector(vector)
        self.monitor.reset()
        figures = window.figures()
        if (temperature := self.temperature()) is not None:
            figures["temperature"] = temperature
        if self.revival is not None:
            figures["revived"] = float(self.num_revived)
        if (rate := self.history.take_hit_rate()) is not None:
            figures["guess_hits"] = rate
        if self.scorer_losses:
            figures["scorer_loss"] = sum(self.scorer_losses) / len(self.scorer_losses)
            self.scorer_losses.clear()
        return figures

    def training_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            "generator": self.generator.get_state(),
            "monitor": self.monitor.as_vector(),
            "wins_since_look": self.wins_since_look,
            **self.history.tensors(),
        }
        facts = {
            "revived": self.num_revived,
            "hits": self.history.hits,
            "guesses": self.history.guesses,
            "scorer_losses": self.scorer_losses,
        }
        return tensors, facts

    def load_training_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.generator.set_state(tensors["generator"])
        self.monitor.load_vector(tensors["monitor"])
        self.wins_since_look.copy_(tensors["wins_since_look"])
        self.history.load(tensors)
        self.num_revived = int(facts["revived"])
        self.history.hits, self.history.guesses = int(facts["hits"]), int(facts["guesses"])
        self.scorer_losses = [float(loss) for loss in facts["scorer_losses"]]


class _Steps(TrainerCallback):
    """Tells the trainer when the optimiser steps."""

    def __init__(self, trainer: MclTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._before_optimizer()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._after_optimizer()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._after_step()

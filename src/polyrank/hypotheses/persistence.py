"""Checkpoints of a training run: written whole, checked before they are used, resumed as if nothing had happened."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer

from ..core.errors import CheckpointError, RunError
from .checkpoint import (
    check_checkpoint,
    check_trainer_state,
    is_complete,
    load_state,
    newest_complete,
    read_as_checkpoint,
    save_state,
    stop_at_the_end,
)
from .scorer import FILE_NAME as SCORER_FILE
from .scorer import HypothesisScorer

_log = logging.getLogger("polyrank")
_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "remote process exited",
)
"""What gloo and NCCL say, as plain RuntimeErrors, of a process that has gone."""


class CheckpointingTrainer(Trainer):
    """Adds to transformers' checkpoints what the hypotheses need; the inheriting trainer gives the state."""

    scorer: HypothesisScorer | None

    def training_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain facts of this rank that a resumed run needs."""
        raise NotImplementedError

    def load_training_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end.

        Raises: CheckpointError for a checkpoint that is missing, truncated, foreign, or of another K or rank; the model
            is then untouched. RunError where another process of a distributed run has gone.
        """
        if resume_from_checkpoint is True:
            found = newest_complete(self.args.output_dir)
            if found is None:
                raise CheckpointError(f"{self.args.output_dir} holds no complete checkpoint to resume from")
            resume_from_checkpoint = str(found)
        stop_at_the_end(self)
        try:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)
        except RuntimeError as error:
            if self.args.world_size == 1 or not _is_lost_process(error):
                raise
            kept = newest_complete(self.args.output_dir)
            goes_on = f"from {kept.name}, with resume_from_checkpoint=True" if kept else "from the first step"
            raise RunError(
                f"rank {self.args.process_index}: another process of this training has ended; see what it printed, then"
                f" start all of them again: training goes on {goes_on} ({str(error).splitlines()[0].split('. ')[0]})"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if not is_complete(resume_from_checkpoint):
            raise CheckpointError(
                f"{resume_from_checkpoint} is no complete checkpoint: trainer_state.json is missing or cut off"
            )
        check_trainer_state(resume_from_checkpoint)
        if hasattr(target, "peft_config") and hasattr(target, "active_adapters") and not self.is_fsdp_enabled:
            check_checkpoint(resume_from_checkpoint, target)
        load_state(resume_from_checkpoint, self.args.process_index)  # raises before anything is changed
        scorer = self._read_scorer(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if scorer is not None:
            self.scorer.load_state_dict(scorer.state_dict())

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        scorer = self._read_scorer(best)
        super()._load_best_model()
        if scorer is not None:
            self.scorer.load_state_dict(scorer.state_dict())

    def _read_scorer(self, folder: str) -> HypothesisScorer | None:
        if self.scorer is None:
            if Path(folder, SCORER_FILE).is_file():
                _log.warning("%s holds a scorer that this run does not train; it is left out", folder)
            return None
        return HypothesisScorer.load(folder, self.scorer.num_hypotheses)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with read_as_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        state = load_state(checkpoint, self.args.process_index)
        if state is None:
            _log.warning("%s: no state of rank %d; its draws start anew", checkpoint, self.args.process_index)
            return
        self.load_training_state(*state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with read_as_checkpoint(f"{checkpoint}/rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        save_state(output_dir, self.args.process_index, *self.training_state())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.scorer is not None and self.args.should_save:
            self.scorer.save(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write checkpoint-N, or nothing: what a full disk has left behind is removed, older checkpoints stay.

        Raises: RunError where the checkpoint cannot be written.
        """
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        existed = folder.exists()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RunError, RuntimeError) as error:
            if _is_lost_process(error):
                raise
            if self.args.should_save and not existed:
                shutil.rmtree(folder, ignore_errors=True)
            kept = newest_complete(folder.parent)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(
                f"could not write {folder}: {reason} "
                f"({f'{kept.name} is intact' if kept else 'no earlier checkpoint exists'}); see that there is space and"
                " that the folder may be written, then run the same again: training goes on from there"
            ) from error


def _is_lost_process(error: BaseException) -> bool:
    """Whether torch.distributed says that another process cannot be reached any more."""
    return isinstance(error, getattr(torch.distributed, "DistError", ())) or any(text in str(error) for text in _LOST)

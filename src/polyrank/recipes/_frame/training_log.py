"""A Trainer callback that writes metrics.jsonl as training goes and times the steps, on from an earlier sitting.

A line is written at every checkpoint too: the Trainer's running loss is no part of a checkpoint, so a line over steps
before and after one would, in a run that was killed and resumed there, be the mean of the later steps alone.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from ...core.errors import PolyrankError, RunError
from ...core.files import append_json_line, atomic_write, read_json_lines


def training_log(path: Path, num_steps: int, memory: bool = False) -> Any:
    """The callback. It ends a run whose loss or trained weights are no longer finite (RunError).

    Each line: step, what the Trainer logs (loss or validation scores), train_s, time_s (seconds).

    `train_s` is the time within optimiser steps alone, validation and saving left out; `callback.train_s` is that of
    all sittings, of which only the steps up to the checkpoint resumed from are counted. With `memory` the second step
    of a sitting, the first to have the optimiser's state, is watched: `callback.peak_memory_bytes` is what model and
    optimiser hold and the step's peak above it. `callback.step_time_s` is the median of this sitting's other steps.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import TrainerCallback

    from ...training.memory import AllocationPeak, resident_bytes

    console = Console(stderr=True)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))

    class Log(TrainerCallback):
        def __init__(self) -> None:
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
            self.train_s, self.before_s, self.start, self.step_start = 0.0, 0.0, time.perf_counter(), 0.0
            self.step_times: list[float] = []
            self.watched: Any = None
            self.peak_memory_bytes: int | None = None

        @property
        def step_time_s(self) -> float | None:
            """None where this sitting had no step but those left out."""
            return statistics.median(self.step_times[2:]) if len(self.step_times) > 2 else None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.logging_nan_inf_filter = False  # it would log another figure in the place of NaN
            lines = read_json_lines(path) if path.exists() else []
            kept = [line for line in lines if line["step"] <= state.global_step]
            atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))
            if kept:
                self.train_s, self.before_s = kept[-1]["train_s"], kept[-1]["time_s"]
            self.start = time.perf_counter()
            self.bar.start()
            self.task = self.bar.add_task("", total=num_steps, completed=state.global_step)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if memory and len(self.step_times) == 1:
                device = next(kwargs["model"].parameters()).device.type
                self.peak_memory_bytes = resident_bytes(kwargs["model"], kwargs["optimizer"])
                self.watched = AllocationPeak(device).__enter__()
            self.step_start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step_times.append(time.perf_counter() - self.step_start)
            self.train_s += self.step_times[-1]
            if self.watched is not None:
                self.watched.__exit__(None, None, None)
                self.peak_memory_bytes += self.watched.bytes
                self.watched = None
            self.bar.update(self.task, completed=state.global_step)
            control.should_log = control.should_log or control.should_save

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                self.check_finite(state.global_step, kwargs["model"], logs["loss"])
            logs = {key: value for key, value in (logs or {}).items() if value == value}  # JSON knows no NaN
            if not state.is_world_process_zero or not ({"loss", "eval_loss"} & logs.keys()):
                return
            seconds = self.before_s + time.perf_counter() - self.start
            times = {"train_s": round(self.train_s, 3), "time_s": round(seconds, 3)}
            append_json_line(path, {"step": state.global_step, **logs, **times})
            if "loss" in logs:
                self.bar.update(self.task, description=f"loss {float(logs['loss']):.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.stop()
            self.check_finite(state.global_step, kwargs["model"])

        def check_finite(self, step: int, model: Any, loss: float = 0.0) -> None:
            """A line is written before every checkpoint: one of values that are not finite is never saved."""
            bad = not_finite(model)
            if bad is not None or not math.isfinite(loss):
                self.bar.stop()
                what = f"the loss is {loss}" if bad is None else f"{bad} is not finite"
                raise _diverged(what, step)

    return Log()


def train_on(trainer: Any, folder: Path) -> None:
    """Train to the last step, on from the newest whole checkpoint in `folder`, and not a step further."""
    from ...hypotheses.checkpoint import newest_complete, stop_at_the_end

    last = newest_complete(folder) if folder.is_dir() else None
    stop_at_the_end(trainer)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    except PolyrankError:
        raise
    except Exception as error:  # a decomposition of NaN, for instance: what broke is not what is wrong
        bad = not_finite(trainer.model)
        if bad is None:
            raise
        raise _diverged(f"{bad} is not finite", trainer.state.global_step) from error


def not_finite(model: Any) -> str | None:
    """The name of a trained parameter with a value that is not finite; None where all are finite."""
    trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
    return next((name for name, value in trained if not value.detach().isfinite().all()), None)


def _diverged(what: str, step: int) -> RunError:
    return RunError(f"training diverged: {what} by step {step}; try a lower learning rate")

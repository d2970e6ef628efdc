"""What a training checkpoint must hold to be resumed, checked before anything is loaded from it.

Beside transformers' own files a checkpoint of `MclTrainer` holds one `mcl_state_<rank>.safetensors` for each rank:
the generator of ties, the guessed winners, and the running sums. All of it is plain tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..core.errors import CheckpointError, DataError, PolyrankError
from ..core.files import atomic_write, parse_json, read_bytes
from .config import MclConfig

_FORMAT = "polyrank-mcl-state-1"
_LAST_WRITTEN = "trainer_state.json"


def check_checkpoint(folder: str | Path, model: PeftModel) -> None:
    """Raise CheckpointError unless the folder holds an adapter of this model's K, rank and layers, whole.

    The message says what was found and what was expected. Nothing of the model is touched.
    """
    folder = Path(folder)
    adapter = model.active_adapters[0]
    expected: MclConfig = model.peft_config[adapter]
    source = folder if adapter == "default" else folder / adapter
    config = _read_config(source / "adapter_config.json")
    if config.get("peft_type") != expected.peft_type.value:
        raise CheckpointError(f"{source} holds a {config.get('peft_type')!r} adapter, not {expected.peft_type.value!r}")
    for name, what in (("num_hypotheses", "hypotheses"), ("r", "as rank")):
        if config.get(name) != getattr(expected, name):
            raise CheckpointError(
                f"{source} was saved with {config.get(name)} {what}, the model has {getattr(expected, name)}"
            )
    wanted = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model, adapter_name=adapter).items()}
    _compare(source / "adapter_model.safetensors", wanted)


def _read_config(path: Path) -> Mapping[str, object]:
    try:
        config = parse_json(read_bytes(path, maximum_bytes=1 << 24))
    except DataError as error:
        raise CheckpointError(f"no adapter to resume from: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: no JSON object")
    return config


def _compare(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless a safetensors file is whole and has these tensors with these shapes."""
    try:
        with safe_open(path, "pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {str(error).splitlines()[0]}") from None
    if missing := sorted(set(wanted) - set(found)):
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(wanted)} tensors of the adapter ({missing[0]}, ...)"
        )
    if unknown := sorted(set(found) - set(wanted)):
        raise CheckpointError(f"{path} holds {len(unknown)} tensors that the adapter has not ({unknown[0]}, ...)")
    for key, shape in wanted.items():
        if found[key] != shape:
            raise CheckpointError(f"{path}: {key} has shape {found[key]}, the model's has {shape}")


def newest_complete(run_dir: str | Path) -> Path | None:
    """The checkpoint-N folder of the largest N that was written to its end; None without one."""
    numbered = []
    for folder in Path(run_dir).glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and is_complete(folder):
            numbered.append((int(number), folder))
    return max(numbered)[1] if numbered else None


def is_complete(folder: str | Path) -> bool:
    """Whether a checkpoint was written to its end: its last file is there and is JSON, no part of one."""
    try:
        json.loads(read_bytes(Path(folder) / _LAST_WRITTEN))  # as transformers writes it: NaN may be in a log
    except (DataError, ValueError):
        return False
    return True


def stop_at_the_end(trainer: Any) -> None:
    """Make a Trainer that is resumed from a checkpoint of its last step train no further: the last of its steps, or the
    one at which an EarlyStoppingCallback had seen enough (its count is in a checkpoint where TrainingArguments say
    restore_callback_states_from_checkpoint).

    transformers looks at either after a step alone: a run that was killed between its last checkpoint and its end would
    train further.
    """
    from transformers import EarlyStoppingCallback

    run_epoch = getattr(trainer, "_run_epoch", None)
    if run_epoch is None:
        return

    def run(*args: Any, **kwargs: Any) -> Any:
        stopped = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in trainer.callback_handler.callbacks
        )
        if stopped or 0 < trainer.state.max_steps <= trainer.state.global_step:
            trainer.control.should_training_stop = True
            return None
        return run_epoch(*args, **kwargs)

    trainer._run_epoch = run


def check_trainer_state(folder: str | Path) -> None:
    """Raise CheckpointError unless transformers can read where the run stood."""
    from transformers import TrainerState

    path = Path(folder) / _LAST_WRITTEN
    with read_as_checkpoint(path):
        state = TrainerState.load_from_json(str(path))
        for name, value in (("global_step", state.global_step), ("max_steps", state.max_steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise CheckpointError(f"{path}: {name} must be a whole number >= 0, got {value!r:.80}")


@contextmanager
def read_as_checkpoint(path: str | Path) -> Iterator[None]:
    """While transformers reads a checkpoint's files, which it trusts: whatever it raises becomes a CheckpointError."""
    try:
        yield
    except PolyrankError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{path} is damaged or does not belong to this run: {reason:.300}") from error


def save_state(folder: str | Path, rank: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, object]) -> Path:
    """Write a rank's training state, whole or not at all."""
    metadata = {"format": _FORMAT, "facts": json.dumps(dict(facts))}
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return atomic_write(_state_path(folder, rank), save(whole, metadata))


def load_state(folder: str | Path, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, object]] | None:
    """What `save_state` wrote; None where this rank saved none (another number of ranks, another Trainer).

    Raises: CheckpointError for a file that is truncated or foreign.
    """
    path = _state_path(folder, rank)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(f"{path} is no training state of polyrank (format {metadata.get('format')!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(parse_json(metadata["facts"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is truncated or damaged: {str(error).splitlines()[0]}") from None


def _state_path(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"mcl_state_{rank}.safetensors"

"""A pruned model and what was cut from it, saved and loaded; adapter folders read and written whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.errors import CheckpointError, ConfigError, DataError, RunError
from ..core.files import atomic_write, parse_json, read_bytes
from ._pruning_layout import Unit, cut

PLAN, CONFIG, WEIGHTS = "loram.json", "adapter_config.json", "adapter_model.safetensors"
_FORMAT, _MARK = "polyrank-loram-1", "#loram-"


@dataclass(frozen=True)
class PruningPlan:
    """What was removed.

    Attributes:
        pattern: structured, semi_structured or unstructured.
        base: name or folder of the whole model.
        units: structured: all attention and feed-forward blocks with what each keeps.
        plain: whether the pruned model's config says all its sizes.
        masks: otherwise: a hash of which weights stay.
    """

    pattern: str
    base: str
    units: tuple[Unit, ...]
    plain: bool
    masks: str = ""

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that tell prunings apart."""
        what = json.dumps([self.pattern, self.masks, [(u.layer, u.kind, u.groups, u.kept) for u in self.units]])
        return hashlib.sha256(what.encode()).hexdigest()[:12]

    def mark(self, base: str) -> str:
        """A model's name with the fingerprint."""
        return f"{base.partition(_MARK)[0]}{_MARK}{self.fingerprint}"

    def check_mark(self, base: Any, adapter: str | Path) -> None:
        """Raise CheckpointError if the base model's name in an adapter's config is that of another pruned model."""
        base = str(base or "")
        name, mark, found = base.rpartition(_MARK)
        if not mark and base and (Path(base) / PLAN).is_file():
            name, found = base, read_plan(base).fingerprint
        elif not mark:
            return
        if found != self.fingerprint:
            raise CheckpointError(
                f"{adapter} was trained on another pruned model: pruning {found} of {name!r}, not {self.fingerprint}"
            )


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_pruned(model: nn.Module, plan: PruningPlan, folder: str | Path) -> Path:
    """Write a pruned model: transformers' own files, and loram.json with the plan."""
    folder = Path(folder)
    model.save_pretrained(str(folder))
    atomic_write(folder / PLAN, json.dumps({"format": _FORMAT, **dataclasses.asdict(plan)}) + "\n")
    return folder


def read_plan(folder: str | Path) -> PruningPlan:
    """The plan of a saved pruned model. Raises CheckpointError if it is missing or damaged."""
    path = Path(folder) / PLAN
    try:
        content = parse_json(read_bytes(path, maximum_bytes=1 << 28))
        if content.pop("format") != _FORMAT:
            raise CheckpointError(f"{path} is no plan of this version ({_FORMAT})")
        units = []
        for unit in content.pop("units"):
            writers = {name: (int(parts), int(size)) for name, (parts, size) in unit.pop("writers").items()}
            units.append(Unit(**{**unit, "kept": tuple(unit["kept"]), "writers": writers}))
        return PruningPlan(units=tuple(units), **content)
    except DataError as error:
        raise CheckpointError(f"no pruned model: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: {error}") from None


def load_pruned(folder: str | Path, **kwargs: Any) -> tuple[nn.Module, PruningPlan]:
    """A pruned model and its plan; `kwargs` are `from_pretrained`'s (dtype, quantization_config, ...).

    Where `plan.plain`, `AutoModelForCausalLM.from_pretrained(folder)` loads the model as well; elsewhere layers differ
    in ways that a config cannot say, and each is cut while the model is built.
    """
    import transformers

    plan = read_plan(folder)
    try:
        architecture = str((transformers.AutoConfig.from_pretrained(str(folder)).architectures or [""])[0])
    except Exception as error:  # whatever transformers meets in a folder that it did not write
        raise CheckpointError(f"{folder} holds no model: {next(iter(str(error).splitlines()), '')}") from error
    known = getattr(transformers, architecture, None)
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        raise CheckpointError(f"{folder}: transformers has no model class {architecture!r}")
    if plan.plain:
        return known.from_pretrained(str(folder), **kwargs), plan

    def build(self: Any, config: Any, *args: Any, **more: Any) -> None:
        known.__init__(self, config, *args, **more)
        for unit in plan.units:
            cut(self, unit)

    shaped = type(known.__name__, (known,), {"__init__": build, "__module__": known.__module__})
    return shaped.from_pretrained(str(folder), **kwargs), plan


def adapter_files(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a PEFT adapter folder. Raises CheckpointError where they are missing or damaged."""
    folder = Path(folder)
    try:
        config = parse_json(read_bytes(folder / CONFIG, maximum_bytes=1 << 24))
        state = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise CheckpointError(f"{folder / WEIGHTS}: no such file") from None
    except (DataError, ValueError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder} is no adapter: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG} is damaged: no JSON object")
    return config, state


def write_adapter(folder: Path, config: str, state: Mapping[str, Tensor]) -> Path:
    """Write an adapter folder, whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty: choose a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            save_file({key: value.cpu().contiguous() for key, value in state.items()}, workspace / WEIGHTS)
            atomic_write(workspace / CONFIG, config + "\n")
            workspace.chmod(0o755)
            os.replace(workspace, folder)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
    except OSError as error:
        raise RunError(f"could not write {folder}: {error.strerror or error}") from error
    return folder

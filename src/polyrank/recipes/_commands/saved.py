"""A saved adapter and its base model, found from a run's folder or an adapter folder, opened with care."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...analysis.adapter_files import open_adapter
from ...core.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class SavedAdapter:
    """Folder of the adapter; its base model (hub id or folder); PEFT's type; K of a LoRA-MCL adapter, else None."""

    folder: Path
    base: str
    method: str
    num_hypotheses: int | None


def adapter_folder(source: str | Path) -> Path:
    """The adapter folder that is meant: the folder itself, its `adapter/`, or the only one below it.

    Raises: CheckpointError if there is none; ConfigError if there are several, naming them.
    """
    path = Path(source)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    found = sorted(file.parent for file in path.rglob("adapter_config.json") if "checkpoint-" not in str(file))
    if not found:
        raise CheckpointError(f"{path} holds no adapter (no adapter_config.json)")
    if len(found) > 1:
        raise ConfigError(f"{path} holds several adapters; name one: {', '.join(map(str, found))}")
    return found[0]


def find_adapter(source: str | Path, model: str | None = None) -> SavedAdapter:
    """Find and check an adapter and the name of its base model.

    Raises: CheckpointError if the files cannot be trusted; ConfigError if no base model is named anywhere.
    """
    folder = adapter_folder(source)
    config = open_adapter(folder).config
    base = model or _model_of_run(folder) or config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{folder} does not say which base model it belongs to; give --model")
    method, K = str(config.get("peft_type")), None
    if method == "POLYRANK_MCL":
        K = config.get("num_hypotheses")
        if not isinstance(K, int) or isinstance(K, bool) or K < 1:
            raise CheckpointError(f"{folder}: num_hypotheses must be a whole number >= 1, got {K!r}")
    return SavedAdapter(folder, base, method, K)


def _model_of_run(folder: Path) -> str | None:
    """The converted base model that a run keeps in `base_model/`, two folders up at most: the run may have moved."""
    for place in list(folder.resolve().parents)[:2]:
        kept = [file.parent for file in place.glob("base_model/*/config.json")]
        if len(kept) == 1:
            return str(kept[0])
    return None


def load_base(name: str) -> Any:
    """The base model, as the class that its config names. Raises ConfigError in one line if it cannot be loaded."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = str(next(iter(config.architectures or ()), ""))
        known = getattr(transformers, architecture, None) if architecture.isidentifier() else None
        loader = known if hasattr(known, "from_pretrained") else transformers.AutoModelForCausalLM
        return loader.from_pretrained(name).eval()
    except Exception as error:  # whatever transformers meets in a folder that it did not write
        raise ConfigError(f"cannot load base model {name!r}: {_first_line(error)}") from error


def load_tokenizer(*places: str | Path) -> Any:
    """The tokenizer from the first of the places that has one. Raises ConfigError if none has."""
    from transformers import AutoTokenizer

    reason = ""
    for place in places:
        if Path(place).is_dir() and not any(Path(place).glob("tokenizer*")):
            continue
        try:
            return AutoTokenizer.from_pretrained(str(place))
        except Exception as error:  # as above
            reason = f": {_first_line(error)}"
    raise ConfigError(f"no tokenizer in {' or '.join(map(str, places))}{reason}")


def load_adapter(saved: SavedAdapter) -> Any:
    """The base model with the adapter loaded into it. Raises CheckpointError if it does not fit."""
    from peft import PeftModel

    base = load_base(saved.base)
    try:
        return PeftModel.from_pretrained(base, str(saved.folder)).eval()
    except Exception as error:  # PEFT trusts a configuration: any error of its code can be the folder's fault
        raise CheckpointError(f"{saved.folder} does not fit {saved.base!r}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""A saved adapter and its base model, found from a run's folder or an adapter folder, opened with care."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...analysis.adapter_files import open_adapter
from ...core.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class SavedAdapter:
    """Folder of the adapter; its base model (hub id or folder); PEFT's type; K of a LoRA-MCL adapter, else None.

    kind: what the folder is, beyond its type: "lq_lora" (its base is quantised and lies in it), "pat" (its base has
    modules that cut channels), else "adapter".
    """

    folder: Path
    base: str
    method: str
    num_hypotheses: int | None
    kind: str = "adapter"

    def check_base(self, command: str) -> None:
        """Raise ConfigError where what `command` makes is for the named base and the adapter has another."""
        if self.kind == "lq_lora" and command == "export":
            raise ConfigError(
                f"{self.folder} is an LQ-LoRA: its base is quantised and lies in the folder, so there is nothing to"
                f" export for {self.base!r}; merge folds it into the quantised base"
            )
        if self.kind == "pat":
            raise ConfigError(
                f"{self.folder} is a PAT model: its base has modules that cut channels, so there is nothing to"
                f" {command}; the run keeps the small model, merged, in small/"
            )


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
    return SavedAdapter(folder, base, method, K, _kind(folder, config))


def _kind(folder: Path, config: Mapping[str, Any]) -> str:
    from ...compression._pat_modules import NAME
    from ...compression._quantised_linear import FILE

    if str(config.get("peft_type")) == "LORA" and (folder / FILE).is_file():
        return "lq_lora"
    modules = config.get("modules_to_save")
    return "pat" if isinstance(modules, list) and NAME in modules else "adapter"


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
    """The base model with the adapter loaded into it, as it was trained.

    Raises: CheckpointError if it does not fit: an error of the loader, a tensor of the folder that has no place in the
        model, or one of the model's that the folder lacks.
    """
    from peft import PeftModel

    from ...compression.lq_lora import load_lq_lora
    from ...compression.pat import load_pat

    base = load_base(saved.base)
    load = {"lq_lora": load_lq_lora, "pat": load_pat}.get(saved.kind, PeftModel.from_pretrained)
    try:
        model = load(base, str(saved.folder)).eval()
        _check_names(model, saved)
        return model
    except CheckpointError:
        raise
    except Exception as error:  # PEFT trusts a configuration: any error of its code can be the folder's fault
        raise CheckpointError(f"{saved.folder} does not fit {saved.base!r}: {_first_line(error)}") from error


def _check_names(model: Any, saved: SavedAdapter) -> None:
    """PEFT leaves out, without a word, what a folder has too much, and warns of what it lacks."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    file = saved.folder / "adapter_model.safetensors"
    if not file.is_file():
        return
    with safe_open(file, "pt") as tensors:
        held = set(tensors.keys())
    wanted = set(get_peft_model_state_dict(model))
    for names, text in (
        (held - wanted, "holds {count} tensors that have no place in {base!r} ({first}, ...)"),
        (wanted - held, "lacks {count} tensors that {base!r} needs ({first}, ...)"),
    ):
        if names:
            said = text.format(count=len(names), base=saved.base, first=min(names))
            raise CheckpointError(f"{saved.folder} {said}: it was trained on another base")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""Methods that change the base model before LoRA is put on it, or the trained model afterwards.

`method.adapter` is one of the names in PROCEDURES; `method.options` holds fields of the procedure's own config and of
PEFT's LoraConfig together. Whoever adds one gives the config class and three functions (`Procedure`).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, name_message
from ...core.structure import from_dict
from ...data.causal_lm import padding_collator
from .entry import MethodEntry
from .parts import changes_base


@dataclass(frozen=True)
class Place:
    """What a procedure may need beside the model: the run's folder, its number of steps, its rows, the tokenizer.

    collator: pads rows to a batch with labels; None: that of a language model.
    """

    run_dir: Path
    num_steps: int
    rows: Sequence[dict[str, Any]]
    tokenizer: Any
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return (self.collator or padding_collator(self.tokenizer))(rows)

    def batches(self, count: int = 4, size: int = 8) -> list[dict[str, Any]]:
        """The first rows as padded batches with labels: data to calibrate on."""
        chosen = [self.rows[i] for i in range(min(count * size, len(self.rows)))]
        return [self.collate(chosen[i : i + size]) for i in range(0, len(chosen), size)]


@dataclass(frozen=True)
class Procedure:
    """One method.

    Attributes:
        config: returns the dataclass of its own options; `total_steps`, where it has one, is the run's.
        prepare: (base, own, lora, place) -> PeftModel that is trained. The base must stay usable if `finish` needs it.
        finish: (model, base, place) -> the model to decode with; it saves what is to be kept, `adapter/` at least.
        reopen: (base, place) -> the same, from what `finish` saved.
        counted: (base, own) -> the model that LoRA is trained on, and how many parameters are trained beside LoRA.
    """

    config: Callable[[], type]
    prepare: Callable[[Any, Any, Any, Place], Any]
    finish: Callable[[Any, Any, Place], Any]
    reopen: Callable[[Any, Place], Any]
    counted: Callable[[Any, Any], tuple[Any, int]] = lambda base, own: (base, 0)


def _loram_config() -> type:
    from .loram_alignment import LoramOptions

    return LoramOptions


def _prepare_loram(base: Any, own: Any, lora: Any, place: Place) -> Any:
    from peft import get_peft_model

    from .loram_alignment import pruned_model

    return get_peft_model(pruned_model(base, own, place), lora)


def _loram_counted(base: Any, own: Any) -> tuple[Any, int]:
    from ...compression.loram import prune_model

    return prune_model(base, dataclasses.replace(own, scores="magnitude"))[0], 0  # scores do not change sizes


def _finish_loram(model: Any, base: Any, place: Place) -> Any:
    from ...compression.loram import recover_adapter

    small, folder = place.run_dir / "adapter_pruned", place.run_dir / "adapter"
    model.save_pretrained(str(small))
    shutil.rmtree(folder, ignore_errors=True)  # of a sitting that was killed here
    recover_adapter(small, place.run_dir / "pruned", folder)
    return _adapter_on_base(base, place)


def _adapter_on_base(base: Any, place: Place) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(place.run_dir / "adapter"))


def _pat_config() -> type:
    from ...compression.pat import PatConfig

    return PatConfig


def _prepare_pat(base: Any, own: Any, lora: Any, place: Place) -> Any:
    from ...compression.pat import get_pat_model

    return get_pat_model(base, own, lora)


def _pat_counted(base: Any, own: Any) -> tuple[Any, int]:
    from ...compression.pat import new_modules

    return base, sum(parameter.numel() for parameter in new_modules(base, own).parameters())


def _finish_pat(model: Any, base: Any, place: Place) -> Any:
    from ...compression.pat import shrink

    model.save_pretrained(str(place.run_dir / "adapter"))
    small = shrink(model)
    small.save_pretrained(str(place.run_dir / "small"))
    place.tokenizer.save_pretrained(str(place.run_dir / "small"))
    return small


def _reopen_pat(base: Any, place: Place) -> Any:
    return type(base).from_pretrained(str(place.run_dir / "small"))


def _lq_lora_config() -> type:
    from ...compression.lq_lora import LqLoraConfig

    return LqLoraConfig


def _prepare_lq_lora(base: Any, own: Any, lora: Any, place: Place) -> Any:
    from ...compression.lq_lora import FILE, get_lq_lora_model, load_lq_lora, save_lq_lora

    start = place.run_dir / "quantised_start"
    if (start / FILE).is_file():  # of a sitting that was killed: the same codes again
        return load_lq_lora(base, start, is_trainable=True)
    model = get_lq_lora_model(base, own, lora, place.batches(own.fisher_rows, 1))
    save_lq_lora(model, start)
    return model


def _finish_lq_lora(model: Any, base: Any, place: Place) -> Any:
    from ...compression.lq_lora import save_lq_lora

    save_lq_lora(model, place.run_dir / "adapter")
    shutil.rmtree(place.run_dir / "quantised_start", ignore_errors=True)
    return model


def _reopen_lq_lora(base: Any, place: Place) -> Any:
    from ...compression.lq_lora import load_lq_lora

    return load_lq_lora(base, place.run_dir / "adapter")


PROCEDURES: dict[str, Procedure] = {
    "lq_lora": Procedure(_lq_lora_config, _prepare_lq_lora, _finish_lq_lora, _reopen_lq_lora),
    "loram": Procedure(_loram_config, _prepare_loram, _finish_loram, _adapter_on_base, _loram_counted),
    "pat": Procedure(_pat_config, _prepare_pat, _finish_pat, _reopen_pat, _pat_counted),
}


def lora_part(method: MethodEntry) -> MethodEntry:
    """The method as plain LoRA, without the procedure's own options; any other method as it is.

    Raises: ConfigError for an option that neither the procedure nor LoRA has.
    """
    if method.adapter not in PROCEDURES:
        return method
    from peft import LoraConfig

    own = {item.name for item in dataclasses.fields(PROCEDURES[method.adapter].config())}
    known = own | {item.name for item in dataclasses.fields(LoraConfig)}
    for name in method.options:
        if name not in known:
            raise ConfigError(f"method.options: {name_message(f'option of {method.adapter}', name, known)}")
    if method.initialiser is not None:
        raise ConfigError(f"method {method.name!r} changes the base model; it takes no initialiser")
    rest = {name: value for name, value in method.options.items() if name not in own}
    return dataclasses.replace(method, adapter="lora", options=rest)


def prepare(method: MethodEntry, base: Any, lora: Any, place: Place) -> Any:
    """The base with its adapter: PEFT's own way, or the procedure's. Raises ConfigError for options out of range."""
    procedure = PROCEDURES.get(method.adapter)
    if procedure is None:
        from peft import get_peft_model

        return get_peft_model(base, lora)
    if changes_base(None, lora):
        raise ConfigError(
            f"init_lora_weights={lora.init_lora_weights!r} changes the base model, as {method.adapter} does"
        )
    return procedure.prepare(base, own_config(method, place.num_steps), lora, place)


def own_config(method: MethodEntry, num_steps: int) -> Any:
    """The procedure's own part of the options. Raises ConfigError for a value out of range."""
    kind = PROCEDURES[method.adapter].config()
    own = {item.name for item in dataclasses.fields(kind)}
    given = {name: value for name, value in method.options.items() if name in own}
    if "total_steps" in own:
        given.setdefault("total_steps", num_steps)
    return from_dict(kind, given, "method.options")


def trained_part(method: MethodEntry, base: Any) -> tuple[Any, int]:
    """The model that the adapter is put on (the base, or what the procedure makes of it), for counting parameters, and
    how many parameters are trained beside the adapter."""
    if method.adapter not in PROCEDURES:
        return base, 0
    return PROCEDURES[method.adapter].counted(base, own_config(method, 1 << 20))


def base_trainer(model: Any) -> type:
    """transformers' Trainer, or the one that a procedure's model needs."""
    from transformers import Trainer

    if any(name.endswith("polyrank_pat") for name, _ in model.named_modules()):
        from ...compression.pat import PatTrainer

        return PatTrainer
    kinds = {config.peft_type.value for config in getattr(model, "peft_config", {}).values()}
    if "POLYRANK_MCL" in kinds:
        from ...hypotheses import MclTrainer

        return MclTrainer
    if "POLYRANK_MOE" in kinds:
        from ...routing import MoeTrainer

        return MoeTrainer
    return Trainer

"""Any method on a file of one's own: chats, prompts and answers, or plain text.

    polyrank train data=train.jsonl model=Qwen/Qwen3-0.6B method=lsr training.max_steps=200

A run reads the file, holds a share of it out for validation where asked, trains one adapter (or K hypotheses, or the
whole model), and measures the loss on what was held out. It remembers how a prompt was written, so that
`polyrank generate RUN` asks the model in the words it was trained with.

What is killed goes on from its newest checkpoint with the same command.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core.errors import ConfigError, name_message
from ..core.files import atomic_write
from ..core.records import Metric, Row, new_record, record_to_json
from ..core.seeding import derive_seed
from ..core.structure import from_dict
from ..data.user_files import UserData, read_user_data, split_validation
from ._frame.registry import recipes
from ._methods.entry import MethodEntry
from ._text.config import TextModel, TextSettings
from ._text.training import load, trained_model
from ._train.template import encode_rows, save_template, template_rows, with_chat_template
from ._train.validation import validation_nll

_log = logging.getLogger("polyrank")
OWN = {
    "output_dir": "the run's folder holds the checkpoints",
    "seed": "give seed=",
    "data_seed": "it follows from seed=",
    "resume_from_checkpoint": "the same command goes on by itself",
    "remove_unused_columns": "rows hold what the model takes",
    "report_to": "figures go to metrics.jsonl",
}
SEVERAL = ("mle", "mcl", "moe")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of training, under the names of transformers' TrainingArguments.

    Attributes: max_steps goes before num_train_epochs. learning_rate: None: the method's own.
    """

    num_train_epochs: int = 3
    max_steps: int | None = None
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    label_smoothing_factor: float = 0.0
    max_grad_norm: float = 1.0
    save_steps: int = 100
    bf16: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run on a user's file.

    Attributes:
        source: a file, a folder of files or a hub id, see data/user_files.py; split: of a hub id or a folder.
        columns: what the file calls a column, by the name it is to have: {prompt: question}.
        validation: a file of its own; validation_share: a share of the rows, in (0, 1), held out by prompt.
        max_length: tokens of a row; longer ones are dropped and counted.
    """

    source: str
    model: TextModel
    method: Any
    training: Plan = field(default_factory=Plan)
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    validation: str | None = None
    validation_share: float | None = None
    max_length: int = 1024
    seed: int = 0
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", own_method(self.method))
        if self.model.scratch is not None:
            raise ConfigError("model.scratch is built from a benchmark's sentences; give model=<hub id or folder>")
        if self.validation is not None and self.validation_share is not None:
            raise ConfigError("give validation (a file) or validation_share, not both")
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share must lie in (0, 1), got {self.validation_share}")
        if self.training.label_smoothing_factor and self.method.adapter == "mcl":
            raise ConfigError("training.label_smoothing_factor: winners are chosen by the plain loss; leave it at 0")
        self.settings()

    def settings(self) -> TextSettings:
        """The same run as the parts that train it know it. Raises ConfigError for a value out of range."""
        plan = self.training
        return TextSettings(
            model=self.model,
            method=self.method,
            seed=self.seed,
            num_steps=plan.max_steps,
            num_epochs=plan.num_train_epochs if plan.max_steps is None else None,
            batch_size=plan.per_device_train_batch_size,
            accumulation_steps=plan.gradient_accumulation_steps,
            learning_rate=plan.learning_rate,
            schedule=plan.lr_scheduler_type,
            warmup_steps=plan.warmup_steps,
            weight_decay=plan.weight_decay,
            label_smoothing=plan.label_smoothing_factor,
            max_grad_norm=plan.max_grad_norm,
            save_every=plan.save_steps,
            bf16=plan.bf16,
            max_length=self.max_length,
            cache_dir=self.cache_dir,
        )


def own_method(value: Any) -> MethodEntry:
    """An entry of conf/method as one adapter with its options; the entries of K hypotheses and of experts included."""
    if isinstance(value, MethodEntry):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"method must name an entry (see polyrank list methods), got {value!r}")
    if value.get("name") not in SEVERAL or "adapter" in value:
        entry = from_dict(MethodEntry, value, "method")
        if entry.adapter == "head":
            raise ConfigError("method 'head' trains a new classifier; a language model has none")
        return entry
    known = {"name", "label", "decodings", "wide", "mode", "epsilon", "annealed_to", "options"}
    for key in value:
        if key not in known:
            raise ConfigError(name_message("field in method", key, known))
    name, adapter = str(value["name"]), {"mle": "lora"}.get(str(value["name"]), str(value["name"]))
    options = {"r": 8, **(value.get("options") or {})}
    if adapter == "mcl":
        options = {**{key: value[key] for key in ("mode", "epsilon") if key in value}, **options}
    return MethodEntry(name, str(value["label"]), adapter, options, 1e-3, _alpha(options), None)


def _alpha(options: Mapping[str, Any]) -> float | None:
    return None if "lora_alpha" in options else 2.0


@recipes.decorator("train")
def run(config: TrainConfig, run_dir: Path) -> None:
    """Train and measure. `run_dir` gets adapter/ (or model/), metrics.jsonl, data.json, result.json."""
    data, held = parts(config)
    kind, learned = template_rows(data.kind, data.rows)
    for note in data.notes:
        _log.info("%s: %s", config.source, note)
    for reason, number in data.dropped.items():
        _log.warning("%d rows left out: %s", number, reason)
    settings = config.settings()
    base, tokenizer = load(settings, [], run_dir)
    if kind == "chat" and with_chat_template(tokenizer):
        _log.warning("the tokenizer has no chat template: each message becomes a line 'role: text'")
    rows = encode_rows(tokenizer, kind, learned, config.max_length)
    held_rows = None
    if held is not None:
        held_rows = encode_rows(tokenizer, kind, template_rows(held.kind, held.rows)[1], config.max_length)
    if rows.dropped:
        _log.warning("%d rows are longer than max_length %d and left out", rows.dropped, config.max_length)
    _log.info("%s: %d rows to learn, kind %s", config.source, len(rows), kind)
    facts = {"kind": data.kind, "rows": len(rows), "dropped_rows": rows.dropped, "fingerprint": data.fingerprint}
    atomic_write(run_dir / "data.json", json.dumps(facts) + "\n")
    model, training = trained_model(settings, base, tokenizer, rows, run_dir)
    save_template(run_dir / ("adapter" if config.method.has_adapter else "model"), kind)
    several = training["method"]["options"].get("num_hypotheses", 3) if config.method.adapter == "mcl" else None
    figures = {} if held_rows is None else validation_nll(model, tokenizer, held_rows, several)
    record = new_record(
        "train",
        "run",
        {key: value for key, value in COLUMNS.items() if key in figures or key not in NLL},
        [
            Row(
                config.method.label,
                figures
                | {
                    "train_time_s": round(training["time_s"], 3),
                    "trainable_parameters": training["trainable_parameters"],
                },
                config.seed,
                {"data": Path(config.source).name},
            )
        ],
        config=dataclasses.asdict(config),
        inputs=[path for path in (Path(config.source),) if path.is_file()],
        time_s=round(training["time_s"], 3),
        details={"training": dict(training), "data": facts},
        notes=[] if figures else ["no rows were held out: no loss was measured (validation_share=0.1 holds some out)"],
    )
    atomic_write(run_dir / "result.json", record_to_json(record))


NLL = ("nll", "oracle_nll")
COLUMNS = {
    "nll": Metric("nats per token", "lower", "NLL of held-out answers", "quality"),
    "oracle_nll": Metric("nats per token", "lower", "NLL of the best hypothesis"),
    "train_time_s": Metric("s", label="training", role="cost"),
    "trainable_parameters": Metric("", label="trainable parameters", role="cost"),
}


def parts(config: TrainConfig) -> tuple[UserData, UserData | None]:
    """Rows to learn from, and rows held out (None where none were asked for)."""
    data = read_user_data(config.source, columns=config.columns or None, split=config.split)
    if config.validation is None and config.validation_share is None:
        return data, None
    seed = derive_seed(config.seed, "validation")
    return split_validation(data, share=config.validation_share, file=config.validation, seed=seed)

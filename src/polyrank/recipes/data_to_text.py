"""Data to text as LoRA and LoRMA evaluate it: a GPT-2-style model learns to put E2E, WebNLG or DART inputs into words.

A run trains one adapter (or, with method=full, the whole model) on linearised inputs with loss on the target alone and
label smoothing, AdamW and a linear schedule after warm-up; writes one text for each test input by beam search with a
length penalty and no repeated n-grams; and scores it against all references with the challenge's metrics.

What is killed goes on: training from its newest checkpoint, decoding with the first batch that is missing.

Source: LoRA (Hu et al. 2021) and LoRMA (arXiv 2506.07621), their GPT-2 experiments. Differs: see docs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..core.errors import ConfigError, check_choice
from ..core.files import atomic_write
from ..core.records import Metric, Record, Row, new_record, record_to_json
from ..core.seeding import derive_seed
from ..data.causal_lm import TextPair
from ..data.dart import SPLITS, find_dart, read_dart
from ..data.e2e import SPLITS as E2E_SPLITS
from ..data.e2e import MultiReference, find_split, read_groups
from ..data.linearize import linearize_mr
from ..data.webnlg import CATEGORIES, find_webnlg, read_webnlg
from ..evaluation.decoding import Cost
from ..evaluation.metrics import METRICS, evaluate_predictions
from ..evaluation.metrics.data_to_text import E2E, WEBNLG
from ..evaluation.predict import predict
from ..evaluation.scoring import reference_nll
from ._frame.registry import recipes
from ._text.config import TextSettings
from ._text.training import check_prompts, chosen, load, trained_model

_log = logging.getLogger("polyrank")
FORMATS = {"e2e": E2E, "webnlg": WEBNLG, "dart": WEBNLG}
COSTS = {
    "nll": Metric("nats per token", "lower", "NLL of the references"),
    "decode_time_s": Metric("s", label="decoding", role="cost"),
    "train_time_s": Metric("s", label="training", role="cost"),
    "trainable_parameters": Metric("", label="trainable parameters", role="cost"),
}


@dataclass(frozen=True, kw_only=True)
class TextData:
    """The data set.

    Attributes:
        format: of the files below `path`; see data/{e2e,webnlg,dart}.py.
        test: split that is scored; None: `test_share` of the inputs of `train` are held out for it, the same for every
            seed.
        categories: WebNLG only: all, or those that 2017's training set has (seen), or the others.
        template: the prompt; {input} is the linearised input.
        train_limit: at most so many training sentences; test_limit: at most so many test inputs.
    """

    name: str
    format: Literal["e2e", "webnlg", "dart"]
    path: Path
    train: str = "train"
    test: str | None = "test"
    test_share: float | None = None
    categories: str = "all"
    template: str = "{input}\n"
    train_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        splits = E2E_SPLITS if self.format == "e2e" else SPLITS
        check_choice("data.train", self.train, splits)
        if self.test is not None:
            check_choice("data.test", self.test, splits)
        if (self.test is None) != (self.test_share is not None):
            raise ConfigError("give data.test, or data.test=null and data.test_share")
        if self.test_share is not None and not 0 < self.test_share < 1:
            raise ConfigError(f"data.test_share must be in (0, 1), got {self.test_share}")
        check_choice("data.categories", self.categories, CATEGORIES if self.format == "webnlg" else ("all",))
        if self.template.count("{input}") != 1:
            raise ConfigError(f"data.template {self.template!r} must hold {{input}} once")
        for name in ("train_limit", "test_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")

    def files(self) -> list[Path]:
        find = {"e2e": find_split, "webnlg": find_webnlg, "dart": find_dart}[self.format]
        found = [find(self.path, split) for split in dict.fromkeys((self.train, self.test or self.train))]
        return [file for item in found for file in (item if isinstance(item, list) else [item])]

    def read(self, split: str, categories: str = "all") -> list[MultiReference]:
        """Inputs of a split as prompts, with all their references."""
        if self.format == "e2e":
            examples = read_groups(self.path, split, "{mr}")
            examples = [dataclasses.replace(e, input=linearize_mr(e.input)) for e in examples]
        elif self.format == "webnlg":
            examples = read_webnlg(self.path, split, categories)
        else:
            examples = read_dart(self.path, split)
        return [dataclasses.replace(e, input=self.template.replace("{input}", e.input)) for e in examples]

    def parts(self) -> tuple[list[TextPair], list[MultiReference]]:
        """Training pairs and test examples."""
        train = self.read(self.train)
        if self.test is not None:
            test = self.read(self.test, self.categories)
        else:
            test = chosen(train, max(1, round(len(train) * (self.test_share or 0))))
            held = {example.id for example in test}
            train = [example for example in train if example.id not in held]
        pairs = [TextPair(f"{e.id}-{j}", e.input, text) for e in train for j, text in enumerate(e.references)]
        return chosen(pairs, self.train_limit), chosen(test, self.test_limit)


@dataclass(frozen=True, kw_only=True)
class DataToTextConfig(TextSettings):
    """One run. metrics: None: those of the data's challenge, as far as they can be computed on this machine."""

    data: TextData
    label_smoothing: float = 0.1
    metrics: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.metrics or ():
            check_choice("metrics", name, METRICS.names())


@recipes.decorator("data_to_text")
def run(config: DataToTextConfig, run_dir: Path) -> None:
    """Train, decode, score. `run_dir` gets adapter/, metrics.jsonl, predictions.jsonl, result.json."""
    pairs, examples = config.data.parts()
    base, tokenizer = load(config, pairs, run_dir)
    check_prompts(base, tokenizer, [example.input for example in examples], config.max_new_tokens)
    model, training = trained_model(config, base, tokenizer, pairs, run_dir)
    cost = decode(config, model, tokenizer, examples, run_dir / "predictions.jsonl", nll=True)
    names, notes = available(config.metrics or FORMATS[config.data.format], required=config.metrics is not None)
    results = evaluate_predictions(run_dir / "predictions.jsonl", [*names, "mixture_nll"])
    record = make_record(config, training, results, names, cost, notes)
    atomic_write(run_dir / "result.json", record_to_json(record))
    _log.info("%s", ", ".join(f"{name} {results[name]:.4g}" for name in names))


def decode(
    config: TextSettings, model: Any, tokenizer: Any, examples: Sequence[Any], path: Path, *, nll: bool = False
) -> Cost:
    """One text for each example by beam search, appended to predictions.jsonl."""
    return predict(
        model,
        tokenizer,
        examples,
        path,
        "beam",
        batch_size=config.decode_batch_size,
        seed=derive_seed(config.seed, "decode"),
        nll=partial(reference_nll, model, tokenizer, num_hypotheses=None) if nll else None,
        num_candidates=1,
        budget=config.num_beams,
        max_new_tokens=config.max_new_tokens,
        length_penalty=config.length_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
    )


def available(names: Sequence[str], required: bool) -> tuple[list[str], list[str]]:
    """The metrics that can be computed here, and a note for each that cannot.

    Raises: ConfigError for one that cannot, where they were asked for by name.
    """
    notes = {}
    for name in names:
        lacking = METRICS.get(name).not_installed()
        if lacking is not None:
            if required:
                raise ConfigError(f"metric {name!r} needs {lacking}")
            notes[name] = f"{name} was not computed: it needs {lacking}"
            _log.warning("%s", notes[name])
    return [name for name in names if name not in notes], list(notes.values())


def make_record(
    config: DataToTextConfig,
    training: Mapping[str, Any],
    results: Mapping[str, Any],
    names: Sequence[str],
    cost: Cost,
    notes: Sequence[str],
) -> Record:
    """One row."""
    figures = {name: results[name] for name in names}
    figures |= {"nll": results["mixture_nll"]}
    figures |= cost_figures(training, cost)
    entry = {name: METRICS.get(name) for name in names}
    columns = {
        name: Metric(m.unit, m.better, name.replace("_", "-"), "quality" if name == names[0] else "")  # type: ignore[arg-type]
        for name, m in entry.items()
    }
    files = [file for file in (config.model.checkpoint, config.model.tokenizer) if file is not None]
    return new_record(
        "data-to-text",
        "run",
        {**columns, **COSTS},
        [Row(config.method.label, figures, config.seed, row_settings(config, config.data.name))],
        config=dataclasses.asdict(config),
        inputs=[*config.data.files(), *files],
        time_s=round(training["time_s"] + cost.time_s, 3),
        details={
            "training": dict(training),
            "num_examples": results["num_examples"],
            "num_references": results["num_references"],
        },
        notes=notes,
    )


def cost_figures(training: Mapping[str, Any], cost: Cost) -> dict[str, float]:
    return {
        "decode_time_s": round(cost.time_s, 3),
        "train_time_s": round(training["time_s"], 3),
        "trainable_parameters": training["trainable_parameters"],
    }


def row_settings(config: TextSettings, data: str) -> dict[str, Any]:
    """What tells rows of a method apart: data, model, and the parameters asked for where they were."""
    model = config.model
    if model.scratch is not None:
        name = f"gpt2 {model.scratch.layers}x{model.scratch.width}"
    else:
        name = Path(model.name_or_path).name if model.name_or_path else model.checkpoint.stem  # type: ignore[union-attr]
    settings = {"data": data, "model": name}
    if config.match_lora_rank is not None:
        settings["size"] = f"LoRA r={config.match_lora_rank}"
    return settings

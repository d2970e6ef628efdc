"""Mathematical reasoning as LoRMA evaluates it: train on worked solutions, write greedily, compare the final answers.

A run trains one adapter (or, with method=full, the whole model) on MetaMathQA, GSM8K or MATH records with loss on the
solution alone, lets it solve the test problems without sampling, and counts exact matches of the final answer. A test
problem whose prompt leaves no room for an answer in the model's context counts as wrong; how many there were stands in
the result.

Source: LoRMA (arXiv 2506.07621) and MetaMath (Yu et al. 2023), prompts and answer forms: see data/maths.py and
evaluation/metrics/maths.py.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.errors import ConfigError, DataError
from ..core.files import atomic_write
from ..core.records import Metric, Record, Row, new_record, record_to_json
from ..data.causal_lm import TextPair
from ..data.e2e import MultiReference
from ..data.maths import PROMPT, TEST_PROMPT, Problem, check_template, fill, problem_files, read_problems
from ..evaluation.decoding import Cost
from ..evaluation.metrics import METRICS, evaluate_predictions
from ..evaluation.metrics.maths import final_answer, final_number
from ._frame.registry import recipes
from ._text.config import TextSettings
from ._text.training import chosen, load, trained_model, with_room
from .data_to_text import COSTS, cost_figures, decode, row_settings

_log = logging.getLogger("polyrank")
SCORES = {"number": "gsm8k_accuracy", "latex": "math_accuracy"}


@dataclass(frozen=True, kw_only=True)
class MathsData:
    """Problems to learn from and to solve.

    Attributes:
        path, test_path: a file, or a folder that holds the splits `train`, `test`; test_path None: as path.
        answers: "number" (GSM8K) or "latex" (MATH): how answers are compared.
        template: the prompt in training; test_template: in the test. {question} is the problem.
        train_limit, test_limit: at most so many problems.
    """

    name: str
    path: Path
    test_path: Path | None = None
    train: str = "train"
    test: str = "test"
    answers: Literal["number", "latex"] = "number"
    keep_calculations: bool = False
    template: str = PROMPT
    test_template: str = TEST_PROMPT
    train_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        check_template(self.template, "data.template")
        check_template(self.test_template, "data.test_template")
        for name in ("train_limit", "test_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")

    def files(self) -> list[Path]:
        return [*problem_files(self.path, self.train), *problem_files(self.test_path or self.path, self.test)]

    def pairs(self) -> list[TextPair]:
        problems = chosen(read_problems(self.path, self.train, self.keep_calculations), self.train_limit)
        return [TextPair(p.id, fill(self.template, p.question), p.solution) for p in problems]

    def examples(self) -> list[MultiReference]:
        """Raises DataError for a test problem whose solution gives no answer."""
        problems = chosen(read_problems(self.test_path or self.path, self.test), self.test_limit)
        for problem in problems:
            if not _has_answer(problem, self.answers):
                raise DataError(
                    f"the solution of test problem {problem.id} gives no answer: {problem.solution[-60:]!r}"
                )
        return [MultiReference(p.id, fill(self.test_template, p.question), (p.solution,)) for p in problems]


def _has_answer(problem: Problem, answers: str) -> bool:
    if answers == "number":
        return final_number(problem.solution) is not None
    return final_answer(problem.solution) is not None


@dataclass(frozen=True, kw_only=True)
class MathsConfig(TextSettings):
    """One run."""

    data: MathsData
    num_beams: int = 1
    no_repeat_ngram_size: int = 0
    length_penalty: float = 1.0
    max_new_tokens: int = 512


@recipes.decorator("maths")
def run(config: MathsConfig, run_dir: Path) -> None:
    """Train, solve, score. `run_dir` gets adapter/, metrics.jsonl, predictions.jsonl, result.json."""
    pairs, examples = config.data.pairs(), config.data.examples()
    base, tokenizer = load(config, pairs, run_dir)
    room = with_room(base, tokenizer, [example.input for example in examples], config.max_new_tokens)
    fitting = [example for example, fits in zip(examples, room, strict=True) if fits]
    if not fitting:
        raise DataError(
            f"none of the {len(examples)} test prompts leaves room for max_new_tokens {config.max_new_tokens}"
        )
    if len(fitting) < len(examples):
        _log.warning("%d of %d test prompts leave no room for an answer: wrong", room.count(False), len(examples))
    model, training = trained_model(config, base, tokenizer, pairs, run_dir)
    cost = decode(config, model, tokenizer, fitting, run_dir / "predictions.jsonl")
    score = SCORES[config.data.answers]
    solved = float(evaluate_predictions(run_dir / "predictions.jsonl", [score])[score])  # type: ignore[arg-type]
    accuracy = solved * len(fitting) / len(examples)
    record = make_record(config, training, accuracy, room, cost)
    atomic_write(run_dir / "result.json", record_to_json(record))
    _log.info("%s: %.2f %% of %d problems", score, accuracy, len(examples))


def make_record(
    config: MathsConfig, training: Mapping[str, Any], accuracy: float, room: Sequence[bool], cost: Cost
) -> Record:
    """One row."""
    entry = METRICS.get(SCORES[config.data.answers])
    costs = {key: value for key, value in COSTS.items() if key != "nll"}
    columns = {entry.name: Metric(entry.unit, "higher", entry.name.replace("_", " "), "quality"), **costs}
    files = [file for file in (config.model.checkpoint, config.model.tokenizer) if file is not None]
    figures = {entry.name: accuracy, **cost_figures(training, cost)}
    return new_record(
        "maths",
        "run",
        columns,
        [Row(config.method.label, figures, config.seed, row_settings(config, config.data.name))],
        config=dataclasses.asdict(config),
        inputs=[*config.data.files(), *files],
        time_s=round(training["time_s"] + cost.time_s, 3),
        details={"training": dict(training), "num_examples": len(room), "inputs_too_long": room.count(False)},
    )

"""Translation with K candidates: LoRA by maximum likelihood against LoRA-MCL, ALMA's prompt, the ten-reference WMT14
test.

A run trains one adapter on parallel text (loss on the translation and its end token), lets it write K candidates for
every test sentence in each of its decodings, and scores them: leave-one-out, oracle and pairwise BLEU.
`translation/small` does so with a small Llama that is built and trained here on a part of Multi30k's pairs.

Source: LoRA-MCL (arXiv 2507.10419), its translation experiment. Differs: see docs/methods/translation.md.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

from ..data.alma import as_pairs, as_prompts, read_alma
from ..data.causal_lm import encode_pairs, padding_collator
from ..data.e2e import MultiReference
from ..data.multi30k import read_translations, translation_files
from ..data.wmt import read_extra_references
from ._captions.base import small_llama_folder
from ._captions.run import Task, compute, run_in_processes, run_table
from ._captions.text import text_predictor
from ._captions.translation_config import TranslationConfig, TranslationData, TranslationTable
from ._e2e.training import base_folder, load_base, load_tokenizer
from ._frame.registry import recipes
from ._text.training import check_prompts, chosen, with_room

_log = logging.getLogger("polyrank")
ROLES = {"oracle_bleu": "quality", "leave_one_out_bleu": "quality", "pairwise_bleu": "diversity"}


@recipes.decorator("translation")
def run(config: TranslationConfig, run_dir: Path) -> None:
    """Train, decode, score. `run_dir` gets adapter/, metrics.jsonl, predictions.jsonl, decodings/, result.json."""
    run_in_processes(config, task, run_dir)


run.distributed = True  # type: ignore[attr-defined]


@recipes.decorator("translation/table")
def table(config: TranslationTable, run_dir: Path) -> None:
    """Methods x K x seeds, then one result.json with every row."""
    run_table(config, TranslationConfig, task, run_dir, {})


def task(config: TranslationConfig, run_dir: Path) -> Task:
    """Everything that the engine needs; a small base model is built first where it is not there yet."""
    data = config.data
    tests = {name: as_prompts(e, data.template, data.source, data.target) for name, e in read_tests(data).items()}
    train = as_prompts(chosen(read_train(data), data.train_limit), data.template, data.source, data.target)
    base_part, adapter_part = split(train, data.base_share)
    if config.model.small is not None:
        cache = config.cache_dir or run_dir / "cache"
        name = small_llama_folder(config.model.small, as_pairs(base_part), cache)
    else:
        name = base_folder(config, run_dir)  # type: ignore[arg-type]  (it reads model and cache_dir alone)
    base, tokenizer = load_base(name), load_tokenizer(name, config.model.end_token)
    tests = {name: fitting(name, base, tokenizer, part, config.max_new_tokens) for name, part in tests.items()}
    return Task(
        record="translation",
        base=base,
        target_modules=config.model.target_modules,
        rows=encode_pairs(tokenizer, as_pairs(adapter_part), config.max_length),
        collator=padding_collator(tokenizer),
        tests=list(tests),
        predict=text_predictor(config, tokenizer, tests),
        score=lambda test, path: compute(path, config.metrics),
        roles=ROLES,
        inputs=inputs(data),
        details={"num_test_inputs": {name: len(examples) for name, examples in tests.items()}},
    )


def read_train(data: TranslationData) -> list[MultiReference]:
    """Training pairs without a prompt."""
    if data.format == "multi30k":
        return read_translations(data.path, data.train, data.source, data.target)  # type: ignore[arg-type]
    return read_alma(_alma_file(data, data.train), data.source, data.target)


def read_tests(data: TranslationData) -> dict[str, list[MultiReference]]:
    """The test sets without a prompt, WMT14's first; the same random choice for every method and seed."""
    tests = {}
    if data.wmt is not None:
        tests["wmt14"] = read_extra_references(data.wmt, data.official)
    if data.test is not None and data.format == "multi30k":
        tests["multi30k"] = read_translations(data.path, data.test, data.source, data.target)  # type: ignore[arg-type]
    elif data.test is not None:
        tests["test"] = read_alma(_alma_file(data, data.test), data.source, data.target)
    return {name: chosen(examples, data.test_limit) for name, examples in tests.items()}


def split(examples: list[MultiReference], share: float) -> tuple[list[MultiReference], list[MultiReference]]:
    """(for the base model, for the adapter): a random `share` and the rest, the same for every method and seed."""
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    first = set(order[: round(share * len(order))])
    return [e for i, e in enumerate(examples) if i in first], [e for i, e in enumerate(examples) if i not in first]


def fitting(
    name: str, base: Any, tokenizer: Any, examples: list[MultiReference], max_new_tokens: int
) -> list[MultiReference]:
    """The examples whose prompt leaves room for a translation; how many do not is logged.

    Raises: DataError where none does.
    """
    room = with_room(base, tokenizer, [example.input for example in examples], max_new_tokens)
    if not any(room):
        check_prompts(base, tokenizer, [example.input for example in examples], max_new_tokens)
    if not all(room):
        _log.warning("%s: %d of %d inputs are too long for the model and left out", name, room.count(False), len(room))
    return [example for example, fits in zip(examples, room, strict=True) if fits]


def inputs(data: TranslationData) -> list[Path]:
    """Files that the result depends on."""
    files = [data.wmt] if data.wmt is not None else []
    names = [data.train, *([data.test] if data.test is not None else [])]
    if data.format == "multi30k":
        files += [file for name in names for file in translation_files(data.path, name, data.source, data.target)]  # type: ignore[arg-type]
    else:
        files += [_alma_file(data, name) for name in names]
    return files


def _alma_file(data: TranslationData, name: str) -> Path:
    return Path(name) if data.path is None else data.path / name

"""Captions of images with K hypotheses.

`image_captioning`: TextCaps on LLaVA-1.6. Images that do not open are left out and named in the run's folder.
`image_captioning/small` runs the same way, from training to the table, on a small LlavaNext built from its
configuration and on the photographs of DreamBooth.

`image_captioning/bilingual`: half of the training captions English, half German, K = 2. Multi30k has captions and no
photographs: an image is given as visual words, made from captions that are neither learned nor scored
(data/visual_words.py). Does each hypothesis take a language?

Source: LoRA-MCL (arXiv 2507.10419), its image captioning experiments. Differs: see docs/methods/captioning.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..core.files import atomic_write, read_json_lines
from ..core.records import Metric
from ..data.causal_lm import encode_pairs, padding_collator
from ..data.images import open_image, read_photos, read_textcaps, usable_photos
from ..data.multi30k import LANGUAGES, caption_files
from ..evaluation.decoding import Cost
from ..evaluation.metrics import METRICS, evaluate_predictions
from ._captions.base import small_llama_folder
from ._captions.bilingual import BilingualConfig, BilingualParts, BilingualTable, bilingual_parts
from ._captions.languages import LanguageGuess, of_language, win_shares_by_language, written_shares
from ._captions.media import MediaExample
from ._captions.media_config import ImageConfig, ImageTable
from ._captions.media_task import media_task
from ._captions.run import Scores, Task, compute, run_in_processes, run_one, run_table
from ._captions.text import text_predictor
from ._e2e.config import Decoding
from ._e2e.training import load_base, load_tokenizer
from ._frame.registry import recipes
from ._text.training import chosen

ROLES = {"oracle_bleu": "quality", "oracle_cider_d": "quality", "mbleu_4": "diversity"}
WINS = "win_shares_by_language"
BY_LANGUAGE = ("oracle_cider_d", "oracle_bleu")


@recipes.decorator("image_captioning")
def run(config: ImageConfig, run_dir: Path) -> None:
    """Train, decode, score. `run_dir` gets adapter/, metrics.jsonl, predictions.jsonl, decodings/, result.json, and
    skipped-<part>.jsonl."""
    run_in_processes(config, image_task, run_dir)


run.distributed = True  # type: ignore[attr-defined]


@recipes.decorator("image_captioning/table")
def table(config: ImageTable, run_dir: Path) -> None:
    """Methods x K x seeds, then one result.json with every row."""
    run_table(config, ImageConfig, image_task, run_dir, {})


def image_task(config: ImageConfig, run_dir: Path) -> Task:
    """Everything that the engine needs; a small base model is built first where it is not there yet."""
    data = config.data
    limits = {"train": data.train_limit, "test": data.test_limit}
    examples, skipped = {}, {}
    for part in ("train", "test", *(["validation"] if data.validation else [])):
        split = getattr(data, part)
        if data.format == "textcaps":
            photos = read_textcaps(data.path, split, data.images)
        else:
            photos = read_photos(data.path, split)
        photos = chosen(photos, limits.get(part))
        usable = usable_photos(photos, run_dir / f"skipped-{part}.jsonl")
        skipped[part] = len(photos) - len(usable)
        examples[part] = [MediaExample(photo.id, partial(open_image, photo.path), photo.captions) for photo in usable]
    return media_task(
        "captions-image",
        "image",
        config,
        config.model,
        data.prompt,
        examples,
        one_per_epoch=False,
        run_dir=run_dir,
        details={"skipped_images": skipped},
    )


@recipes.decorator("image_captioning/bilingual")
def run_bilingual(config: BilingualConfig, run_dir: Path) -> None:
    """Train, decode, score. `run_dir` gets adapter/, metrics.jsonl, predictions.jsonl, decodings/, result.json."""
    run_one(config, bilingual_task(config, run_dir), run_dir)


@recipes.decorator("image_captioning/bilingual_table")
def bilingual_table(config: BilingualTable, run_dir: Path) -> None:
    """Methods x seeds, then one result.json with every row, and win_shares.png."""
    record = run_table(config, BilingualConfig, bilingual_task, run_dir, {})
    panels = []
    for name, details in record.details["runs"].items():
        found = [part[WINS] for part in details["decodings"].values() if WINS in part]
        panels += [(name, found[0])] if found else []
    if panels:
        from ..report.caption_figures import win_share_figure

        atomic_write(run_dir / "win_shares.png", win_share_figure(panels))


def bilingual_task(config: BilingualConfig, run_dir: Path) -> Task:
    """Everything that the engine needs; the base model is built first where it is not there yet."""
    cache = config.cache_dir or run_dir / "cache"
    parts = bilingual_parts(config.data, cache)
    words = config.data.codebook.tokens()
    assert config.model.small is not None
    name = small_llama_folder(config.model.small, parts.base, cache, words)
    base, tokenizer = load_base(name), load_tokenizer(name)
    predict = text_predictor(config, tokenizer, {"test": parts.test})
    pairs = [*parts.base, *parts.adapter]
    guess = LanguageGuess({lang: [pair.target for pair in pairs if f"-{lang}-" in pair.id] for lang in LANGUAGES})

    def predict_tagged(model: Any, test: str, decoding: Decoding, path: Path, seed: int, likelihood: bool) -> Cost:
        cost = predict(model, test, decoding, path, seed, likelihood)
        tag_languages(path, parts)
        return cost

    return Task(
        record="captions-bilingual",
        base=base,
        target_modules=config.model.target_modules,
        rows=encode_pairs(tokenizer, parts.adapter, config.max_length),
        collator=padding_collator(tokenizer),
        tests=["test"],
        predict=predict_tagged,
        score=lambda test, path: bilingual_scores(path, config.metrics, guess),
        roles=ROLES,
        columns=language_columns(),
        inputs=[file for split in ("train", config.data.test) for file in caption_files(config.data.path, split)],
    )


def tag_languages(path: Path, parts: BilingualParts) -> None:
    """Write the language of each reference into meta.languages of every line, where it is not there yet."""
    records = read_json_lines(path)
    if all("languages" in record.get("meta", {}) for record in records):
        return
    for record in records:
        record["meta"] = {**record.get("meta", {}), "languages": parts.languages[record["id"]]}
    atomic_write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def bilingual_scores(path: Path, names: Sequence[str], guess: LanguageGuess) -> Scores:
    """The scores over all references, those against the references of one language, and who speaks what.

    `both_languages`: share of the images of which the candidates are in both languages. `win_purity`: mean over
    languages of the largest win share; 1/K where no hypothesis leans to a language, 1 where each has its own.
    """
    scores = compute(path, names)
    records = read_json_lines(path)
    for lang in LANGUAGES:
        wanted = [key for key in BY_LANGUAGE if key in METRICS and METRICS.get(key).not_installed() is None]
        for key, value in evaluate_predictions(of_language(records, lang), wanted).items():
            if key in wanted:
                scores[f"{key}_{lang}"] = value  # type: ignore[assignment]
    written = written_shares(records, guess)
    told = [{guess(text) for text in record["candidates"]} for record in records]
    scores["both_languages"] = sum(set(LANGUAGES) <= langs for langs in told) / len(records)
    scores.details["written_shares"] = written
    if "nll" in records[0] and len(records[0]["nll"][0]) > 1:
        wins = win_shares_by_language(records)
        scores.details[WINS] = wins
        scores["win_purity"] = sum(max(row) for row in wins.values()) / len(wins)
    return scores


def language_columns() -> Mapping[str, Metric]:
    """Columns of the figures by language."""
    columns = {
        f"{key}_{lang}": Metric(METRICS.get(key).unit, "higher", f"{key.replace('_', ' ')}, {lang}")
        for key in BY_LANGUAGE
        if key in METRICS
        for lang in LANGUAGES
    }
    columns["both_languages"] = Metric("share", "higher", "candidates in both languages")
    columns["win_purity"] = Metric("share", None, "win purity")
    return columns

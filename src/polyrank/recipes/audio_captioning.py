"""Captions of sounds with K hypotheses: Clotho and AudioCaps on Qwen2-Audio.

Sounds are packed first (16 kHz, mono, one HDF5 file a subset; data/audio_pack.py); what cannot be read is left out and
named beside the pack. One caption of a clip is drawn for every epoch. `audio_captioning/small` runs the same way, from
training to the table, on a small Qwen2-Audio built from its configuration and on spoken digits.

Source: LoRA-MCL (arXiv 2507.10419), its audio captioning experiments. Differs: see docs/methods/captioning.md.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from ..data.audio import SAMPLE_RATE
from ..data.audio_pack import AudioPack, Packed, pack, pack_name
from ..data.clips import read_audiocaps, read_clotho
from ..data.digits import read_digits
from ._captions.media import MediaExample
from ._captions.media_config import AudioConfig, AudioData, AudioTable
from ._captions.media_task import media_task
from ._captions.run import Task, run_in_processes, run_table
from ._frame.registry import recipes
from ._text.training import chosen

SUBSETS = {"clotho": {"train": "dev", "validation": "val", "test": "eval"}, "audiocaps": {"validation": "val"}}


@recipes.decorator("audio_captioning")
def run(config: AudioConfig, run_dir: Path) -> None:
    """Pack, train, decode, score. `run_dir` gets adapter/, metrics.jsonl, predictions.jsonl, result.json, ..."""
    run_in_processes(config, task, run_dir)


run.distributed = True  # type: ignore[attr-defined]


@recipes.decorator("audio_captioning/table")
def table(config: AudioTable, run_dir: Path) -> None:
    """Methods x K x seeds, then one result.json with every row."""
    run_table(config, AudioConfig, task, run_dir, {})


def task(config: AudioConfig, run_dir: Path) -> Task:
    """Everything that the engine needs; sounds are packed and a small base model built where they are not yet."""
    data, cache = config.data, config.cache_dir or run_dir / "cache"
    packs = {part: packed(data, part, data.pack_dir or cache / "packs") for part in parts_of(data)}
    limits = {"train": data.train_limit, "test": data.test_limit}
    examples = {part: chosen(sounds(pack.path), limits.get(part)) for part, pack in packs.items()}
    skipped = {part: len(pack.skipped) for part, pack in packs.items()}
    return media_task(
        "captions-audio",
        "audio",
        config,
        config.model,
        data.prompt,
        examples,
        one_per_epoch=True,
        run_dir=run_dir,
        inputs=[pack.path for pack in packs.values()],
        details={"skipped_sounds": skipped},
    )


def parts_of(data: AudioData) -> list[str]:
    """Names of the parts that the data has."""
    return ["train", "test", *(["validation"] if data.validation else [])]


def packed(data: AudioData, part: str, folder: Path) -> Packed:
    """The pack of a part, made now where it is not there."""
    name = getattr(data, part)
    if data.format == "pack":
        path = data.path / name
        return Packed(path, len(AudioPack(path)), [])
    if data.format == "digits":
        clips = read_digits(data.path, name)
    else:
        read = read_clotho if data.format == "clotho" else read_audiocaps
        clips = read(data.path / name, data.path / data.audio[part])
    subset = SUBSETS.get(data.format, {}).get(part, part)
    limit = round(data.max_seconds * SAMPLE_RATE)
    path = folder / pack_name(data.format, subset)
    return pack(clips, path, dataset=data.format, subset=subset, max_samples=limit)


def sounds(path: Path) -> list[MediaExample]:
    """The clips of a pack; samples are read when they are needed. Raises: DataError for clips without a caption."""
    pack = AudioPack(path)
    names, captions = pack.file["fname"].asstr()[:], pack.file["captions"].asstr()[:]
    without = [str(name) for name, texts in zip(names, captions, strict=True) if not any(map(str.strip, texts))]
    if without:
        raise DataError(f"{str(path)!r}: {len(without)} of {len(names)} clips have no caption (first: {without[0]!r})")
    return [
        MediaExample(str(name), partial(_samples, pack, i), tuple(text for text in texts if text.strip()))
        for i, (name, texts) in enumerate(zip(names, captions, strict=True))
    ]


def _samples(pack: AudioPack, index: int) -> Any:
    return pack[index].audio

"""Small models of the real classes, built from their configurations, with real processors: LlavaNext and Qwen2Audio.

Random weights, then a short training of all of them on the training captions, so that an adapter has something to
adapt. The same captions and settings give the same model; it is kept in a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from ...core.files import atomic_write
from ...core.seeding import derive_seed, seed_everything
from .._text.scratch_model import build_tokenizer
from .base import BUILT
from .config import CaptionSettings
from .media import CaptionRows, Kind, MediaCoder, MediaExample
from .processes import check_can_build

IMAGE, AUDIO = "<image>", ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
TILE, PATCH = 32, 8  # pixels


@dataclass(frozen=True, kw_only=True)
class SmallMedia:
    """Attributes: layers, heads, width of the text model and of the image or audio tower alike; seconds: longest sound;
    num_steps: of the training of all weights; 0: they stay random."""

    layers: int = 2
    heads: int = 4
    width: int = 64
    vocabulary: int = 600
    seconds: int = 2
    num_steps: int = 60
    batch_size: int = 8
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        least = {"layers": 2, "heads": 1, "width": 8, "vocabulary": 258, "seconds": 1, "num_steps": 0, "batch_size": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"model.small.{name} must be at least {low}, got {getattr(self, name)}")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigError(f"model.small.width {self.width} must be an even multiple of its {self.heads} heads")


def small_media_folder(
    small: SmallMedia, kind: Kind, prompt: str, examples: Sequence[MediaExample], cache: Path
) -> str:
    """The folder of the trained model and its processor below `cache`, built where it is not there yet."""
    from .training import train

    texts = [[example.id, *example.captions] for example in examples]
    recipe = json.dumps({"small": dataclasses.asdict(small), "kind": kind, "prompt": prompt, "texts": texts})
    folder = cache / f"{kind}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if (folder / BUILT).is_file():
        return str(folder)
    check_can_build("model.small")
    tokenizer = build_tokenizer([prompt, *(text for _, *captions in texts for text in captions)], small.vocabulary)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE] if kind == "image" else list(AUDIO)})
    seed_everything(derive_seed(0, "small", kind))
    model, processor = (llava_next if kind == "image" else qwen2_audio)(small, tokenizer)
    seconds = 0.0
    if small.num_steps:
        plan = CaptionSettings(
            num_steps=small.num_steps, batch_size=small.batch_size, learning_rate=small.learning_rate, schedule="linear"
        )
        rows = CaptionRows(examples, one_per_epoch=False, seed=0)
        seconds = train(plan, model, rows, MediaCoder(processor, kind, prompt).collate, folder, seed=0)
    model.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    shutil.rmtree(folder / "training", ignore_errors=True)
    atomic_write(folder / BUILT, json.dumps({"time_s": seconds}) + "\n")
    return str(folder)


def llava_next(small: SmallMedia, tokenizer: Any) -> tuple[Any, Any]:
    """LlavaNextForConditionalGeneration (CLIP tower, Llama) with its processor: tiles of 32 pixels, patches of 8."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    shape = {"hidden_size": small.width, "intermediate_size": 2 * small.width, "num_hidden_layers": small.layers}
    shape["num_attention_heads"] = small.heads
    grid = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=TILE, patch_size=PATCH, projection_dim=small.width),
        text_config=LlamaConfig(
            **shape,
            num_key_value_heads=small.heads,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            **_ends(tokenizer),
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=grid,
        image_seq_length=(TILE // PATCH) ** 2,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=grid
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
    return LlavaNextForConditionalGeneration(config), processor


def qwen2_audio(small: SmallMedia, tokenizer: Any) -> tuple[Any, Any]:
    """Qwen2AudioForConditionalGeneration with its processor: 32 mel bands, sounds of up to `seconds`."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        Qwen2Config,
        WhisperFeatureExtractor,
    )

    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=32,
            encoder_layers=small.layers,
            encoder_attention_heads=small.heads,
            encoder_ffn_dim=2 * small.width,
            d_model=small.width,
            max_source_positions=50 * small.seconds,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=small.width,
            intermediate_size=2 * small.width,
            num_hidden_layers=small.layers,
            num_attention_heads=small.heads,
            num_key_value_heads=small.heads,
            max_position_embeddings=512,
            **_ends(tokenizer),
        ),
        audio_token_index=tokenizer.convert_tokens_to_ids(AUDIO[0]),
    )
    sounds = WhisperFeatureExtractor(feature_size=32, chunk_length=small.seconds)
    processor = Qwen2AudioProcessor(feature_extractor=sounds, tokenizer=tokenizer)
    return Qwen2AudioForConditionalGeneration(config), processor


def _ends(tokenizer: Any) -> dict[str, int]:
    end = tokenizer.eos_token_id
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}

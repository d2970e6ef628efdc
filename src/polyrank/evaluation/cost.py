"""What decoding costs, counted where the model is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Cost:
    """What decoding took. Tokens are counted as the model evaluates them: prompt padding not, rows of beams all.

    Attributes:
        beams: the budget B of one input.
        prefill_tokens: positions run through the model before anything is written: prompt tokens of the decoder, and
            what comes out of an encoder (text, audio frames, image patches).
        decode_tokens: tokens run through the decoder after the prompt, finished rows included.
        forward_calls: calls of the decoder.
        time_s: wall time, seconds, tokenization included.
    """

    beams: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    forward_calls: int = 0
    time_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        total = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Cost(**{**total, "beams": max(self.beams, other.beams)})

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@contextmanager
def counted(model: Any) -> Iterator[Cost]:
    """Count the tokens that a transformers model (inside a PEFT model or not) evaluates within the block."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cost = Cost()

    def decoder_called(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("decoder_input_ids", kwargs.get("input_ids", args[0] if args else None))
        if ids is None:
            ids = kwargs["inputs_embeds"][..., 0]
        cost.forward_calls += 1
        if ids.shape[1] == 1:
            cost.decode_tokens += ids.numel()
            return
        cost.prefill_tokens += _positions(kwargs.get("attention_mask"), tuple(ids.shape))

    def encoder_called(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        cost.prefill_tokens += _positions(kwargs.get("attention_mask"), tuple(hidden.shape[:2]))

    handles = [base.register_forward_pre_hook(decoder_called, with_kwargs=True)]
    handles += [module.register_forward_hook(encoder_called, with_kwargs=True) for module in encoders(base)]
    try:
        yield cost
    finally:
        for handle in handles:
            handle.remove()


def encoders(base: Any) -> list[Any]:
    """The encoder of an encoder-decoder model, or the image and audio towers of a decoder."""
    if getattr(base.config, "is_encoder_decoder", False):
        return [base.get_encoder()]
    found = [base.get_encoder(modality=modality) for modality in ("image", "audio")]
    return [module for module in dict.fromkeys(found) if module is not base]


def _positions(mask: Any, shape: tuple[int, ...]) -> int:
    """How many of (rows, length) positions are no padding; all where no mask of that shape tells."""
    if mask is not None and tuple(mask.shape) == shape:
        return int(mask.sum())
    return shape[0] * shape[1]

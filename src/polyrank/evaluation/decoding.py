"""One interface to every way of writing K candidates for an input, and a record of what each costs.

Budget: B = beams x separate decodings, the same for every method, and every method gives exactly K candidates; the
methods are those of `decoders.py`. `decode` takes prompts, `decode_inputs` what a processor made (images, audio, text
for an encoder).

Equal beams are not equal compute (a beam search reads the prompt once for each beam, and its dead beams are computed
on), so what the model evaluated is counted and returned too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError
from ..data.causal_lm import encode_prompts
from .cost import Cost, counted
from .decoders import DECODERS, SAMPLERS, Decoder, Request

__all__ = [
    "DECODERS",
    "SAMPLERS",
    "Cost",
    "Decoded",
    "Decoder",
    "Request",
    "check_room",
    "counted",
    "decode",
    "decode_inputs",
    "pad_left",
    "to_text",
]

MODELS_SAMPLERS = ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


@dataclass(frozen=True)
class Decoded:
    """K candidates for each input, in the order of the inputs, and the cost of all."""

    candidates: list[list[str]]
    cost: Cost


def decode(
    model: Any,
    tokenizer: Any,
    inputs: Sequence[str | Sequence[int]],
    method: str = "beam",
    *,
    num_candidates: int,
    budget: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    **options: Any,
) -> Decoded:
    """Write exactly K candidates for each prompt.

    Args:
        model: a causal transformers or PEFT model ("mcl": one with a LoRA-MCL adapter of K hypotheses, "moe_*": one
            with a LoRA-MoE adapter).
        tokenizer: its tokenizer, with a padding token.
        inputs: prompts, as text or as token ids (of a chat template, for instance).
        method: a name in DECODERS.
        num_candidates: K.
        budget: B beams an input; None means K.
        max_new_tokens: longest candidate, end token included.
        batch_size: inputs decoded at once (rows: times B). Inputs of similar length share a batch.
        length_penalty, repetition_penalty: as in transformers' generate, for every method.
        seed: of torch, set before the first batch where given.
        options: of the method; and `router`, `router_top_k` for a LoRA-MoE (`route_experts`).
    Returns: candidates without prompt, special tokens and surrounding or repeated white space, and the cost.
    Raises: ConfigError for a budget below K or one that the method cannot split; DataError for a prompt that leaves no
        room in the model's context; UnknownNameError for a method.
    """
    run, budget = _checked(method, num_candidates, budget, max_new_tokens)
    start = time.perf_counter()
    texts = [prompt for prompt in inputs if isinstance(prompt, str)]
    encoded = iter(encode_prompts(tokenizer, texts) if texts else ())
    prompts = [next(encoded) if isinstance(prompt, str) else list(prompt) for prompt in inputs]
    check_room(model, [len(prompt) for prompt in prompts], max_new_tokens)
    generate = {"length_penalty": length_penalty, "repetition_penalty": repetition_penalty}
    generate |= _limits(tokenizer, max_new_tokens, tokenizer.eos_token_id)
    written: dict[int, list[str]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    with _ready(model, seed, options) as options, counted(model) as cost:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = pad_left([prompts[i] for i in chosen], tokenizer.pad_token_id, device)
            texts = _candidates(run, model, tokenizer, Request(batch, num_candidates, budget, generate, options))
            written |= dict(zip(chosen, texts, strict=True))
    cost.beams, cost.time_s = budget, time.perf_counter() - start
    return Decoded([written[i] for i in range(len(prompts))], cost)


def decode_inputs(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Tensor],
    method: str = "beam",
    *,
    num_candidates: int,
    budget: int | None = None,
    max_new_tokens: int = 128,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    clean: Callable[[str], str] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Decoded:
    """Write exactly K candidates for each row of one batch of model inputs.

    Args:
        model: anything with transformers' `generate`: decoders, encoder-decoders, image and audio models, PEFT models.
        tokenizer: of the text that is written (a processor's `.tokenizer`), with a padding token.
        inputs: what `generate` takes, as a processor makes it: input_ids and attention_mask (left-padded for
            decoders), pixel_values, input_features, feature_attention_mask, decoder_input_ids, ... Moved to the model's
            device; floating tensors get its dtype.
        eos_token_id: what ends a candidate; default: the tokenizer's end token.
        clean: text -> text, for each candidate (the same for every method).
        the others: as in `decode`.
    Returns, raises: as `decode`; DataError where the inputs hold no rows; ConfigError for Whisper, whose own `generate`
        cuts audio into windows and keeps one candidate of each search.
    """
    from ..hypotheses.inputs import batch_size

    run, budget = _checked(method, num_candidates, budget, max_new_tokens)
    if hasattr(model, "generate_with_fallback"):
        raise ConfigError("Whisper's generate keeps one candidate of each search: it cannot write K candidates")
    start = time.perf_counter()
    batch = _on_device(inputs, model)
    if batch_size(batch) < 1:
        raise DataError("the inputs hold no rows")
    prompt = batch.get("decoder_input_ids" if model.config.is_encoder_decoder else "input_ids")
    check_room(model, [1 if prompt is None else prompt.shape[1]], max_new_tokens)
    ends = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    generate = {"length_penalty": length_penalty, "repetition_penalty": repetition_penalty}
    generate |= _limits(tokenizer, max_new_tokens, ends)
    with _ready(model, seed, options) as options, counted(model) as cost:
        texts = _candidates(run, model, tokenizer, Request(batch, num_candidates, budget, generate, options))
    if clean is not None:
        texts = [[clean(text) for text in row] for row in texts]
    cost.beams, cost.time_s = budget, time.perf_counter() - start
    return Decoded(texts, cost)


def _checked(method: str, num_candidates: int, budget: int | None, max_new_tokens: int) -> tuple[Decoder, int]:
    """The decoder of a name, and the budget."""
    run = DECODERS.get(method)
    budget = num_candidates if budget is None else budget
    if num_candidates < 1 or budget < num_candidates:
        raise ConfigError(
            f"num_candidates must be at least 1 and budget at least that, got {num_candidates} and {budget}"
        )
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    return run, budget


def _limits(tokenizer: Any, max_new_tokens: int, ends: int | Sequence[int]) -> dict[str, Any]:
    ends = list(ends) if isinstance(ends, Sequence) else ends
    return {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}


@contextmanager
def _ready(model: Any, seed: int | None, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Evaluation mode, the seed, no sampling settings of the model's own, and the routing that the options name; gives
    the options that are the method's."""
    options = dict(options)
    router, top_k = options.pop("router", None), options.pop("router_top_k", None)
    if seed is not None:
        torch.manual_seed(seed)
    was_training = model.training
    model.eval()
    from ..hypotheses.prepared import base_of

    base = base_of(model)
    usual = getattr(base, "generation_config", None)
    if usual is not None:
        base.generation_config = _without_samplers(usual)
    try:
        if router is None:
            if top_k is not None:
                raise ConfigError(f"router_top_k {top_k} goes with router='sparse'")
            yield options
        else:
            from ..routing import route_experts

            with route_experts(model, router, top_k=top_k):
                yield options
    finally:
        model.train(was_training)
        if usual is not None:
            base.generation_config = usual


def _without_samplers(config: Any) -> Any:
    """A model's generation config without those of its settings that cut the distribution beside the ones named here:
    generate fills what a call leaves open from it, so that `sample` would not sample by its own settings alone."""
    config = copy.deepcopy(config)
    for name in MODELS_SAMPLERS:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    return config


def _candidates(run: Decoder, model: Any, tokenizer: Any, request: Request) -> list[list[str]]:
    """The K texts of each row, prompt cut off."""
    rows = without_prompt(model, run(model, request), request)
    texts = to_text(tokenizer, rows, request.generate["eos_token_id"])
    count = request.num_candidates
    return [texts[first : first + count] for first in range(0, len(texts), count)]


def without_prompt(model: Any, rows: Tensor, request: Request) -> Tensor:
    """What was written: rows (batch * K, length) without the tokens in front that the decoder was given.

    Some models return the prompt and some do not (those that embed it themselves): it is cut where it stands.
    """
    if model.config.is_encoder_decoder:
        given = request.inputs.get("decoder_input_ids")
        if given is None:
            start = model.generation_config.decoder_start_token_id
            start = model.generation_config.bos_token_id if start is None else start
            given = None if start is None else torch.full((1, 1), start, device=rows.device)
    else:
        given = request.inputs.get("input_ids")
    if given is None or given.shape[1] > rows.shape[1]:
        return rows
    given = given.repeat_interleave(len(rows) // len(given), 0)
    return rows[:, given.shape[1] :] if torch.equal(rows[:, : given.shape[1]], given) else rows


def _on_device(inputs: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    device, dtype = next(model.parameters()).device, model.dtype
    return {
        key: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for key, value in inputs.items()
        if value is not None
    }


def check_room(model: Any, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Raise DataError where a prompt and `max_new_tokens` do not fit into the model's context together."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    longest = max(lengths, default=0)
    if context is not None and longest + max_new_tokens > context:
        raise DataError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the model's context of {context}"
        )


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | None = None) -> dict[str, Tensor]:
    """input_ids and attention_mask (rows, longest), padding in front."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def to_text(tokenizer: Any, rows: Tensor, ends: int | Sequence[int] | None = None) -> list[str]:
    """New tokens (rows, length) as text up to the first end token (the tokenizer's or `ends`), white space single."""
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = set(ends) if isinstance(ends, Sequence) else {ends}
    texts = []
    for row in rows.tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(" ".join(tokenizer.decode(row[:stop], skip_special_tokens=True).split()))
    return texts

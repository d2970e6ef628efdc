"""The ways to write K candidates for each input of a batch, with B beams an input.

    beam             one search with B beams, its K best                        transformers' own
    diverse_beam     B beams in K groups under a Hamming penalty                diverse_beam.py
    sample           K samples by temperature, top_k, top_p, typical_p; B = K   transformers' own
    ancestral, top_k, nucleus, typical     `sample` with the published settings
    tta              K inputs with SpecAugment masks, each with B / K beams     spec_augment.py
    mcl              each of K hypotheses with B / K beams, its best            polyrank.hypotheses
    moe_dense        `beam`, every token through all experts of a LoRA-MoE      polyrank.routing
    moe_sparse       `beam`, every token through its best experts               polyrank.routing
    moe_stochastic   K runs with B / K beams, one expert drawn per token        polyrank.routing
    moe_expert       each of K experts alone with B / K beams, its best         polyrank.routing

A LoRA-MoE decodes by the gates it was trained with in `beam`, `diverse_beam` and the samplers. A decoder returns
(batch * K, length), the K of one input next to each other, the prompt in front where `generate` puts it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.errors import ConfigError, DataError, unknown_name
from ..core.registry import Registry
from .diverse_beam import diverse_beam_generate
from .no_repeat import NoRepeatedNgrams
from .spec_augment import MEDIUM, spec_augment


@dataclass(frozen=True)
class Request:
    """What a decoder gets: one batch of `generate`'s inputs, K, B, further arguments of `generate`, its own options."""

    inputs: dict[str, Tensor]
    num_candidates: int
    budget: int
    generate: dict[str, Any]
    options: dict[str, Any]

    @property
    def prompt_length(self) -> int:
        """Tokens of a decoder's prompt, padding included."""
        ids = self.inputs.get("input_ids")
        return 0 if ids is None else ids.shape[1]

    def beams_each(self, what: str = "candidates") -> int:
        """B / K. Raises ConfigError where K does not divide B."""
        beams, rest = divmod(self.budget, self.num_candidates)
        if rest:
            raise ConfigError(f"budget {self.budget} must be a multiple of the {self.num_candidates} {what}")
        return beams


Decoder = Callable[[Any, Request], Tensor]
DECODERS: Registry[Decoder] = Registry("decoding method")

SAMPLERS: Mapping[str, Mapping[str, Any]] = {
    "ancestral": {},
    "top_k": {"top_k": 50},
    "nucleus": {"top_p": 0.95},
    "typical": {"typical_p": 0.95},
}
"""Name -> generate's arguments. All else is as the model gives it: temperature 1, no top-k, no nucleus."""


@DECODERS.decorator("beam")
def beam_search(model: Any, request: Request) -> Tensor:
    """The K best of one beam search with B beams. Option: no_repeat_ngram_size (of what is written, not the prompt)."""
    options = dict(request.options)
    size = options.pop("no_repeat_ngram_size", 0)
    if size and not model.config.is_encoder_decoder:
        options["logits_processor"] = [NoRepeatedNgrams(size, request.prompt_length)]
    elif size:
        options["no_repeat_ngram_size"] = size
    return model.generate(
        **request.inputs,
        **request.generate,
        num_beams=request.budget,
        num_return_sequences=request.num_candidates,
        do_sample=False,
        **options,
    )


@DECODERS.decorator("diverse_beam")
def diverse_beam_search(model: Any, request: Request) -> Tensor:
    """B beams in K groups. Options: diversity_penalty (0.5), selection ("pooled" or "one_per_group")."""
    return diverse_beam_generate(
        model,
        **request.inputs,
        **request.generate,
        num_beams=request.budget,
        num_groups=request.num_candidates,
        num_return_sequences=request.num_candidates,
        **{"diversity_penalty": 0.5, **request.options},
    )


@DECODERS.decorator("sample")
def sample(model: Any, request: Request, **settings: Any) -> Tensor:
    """K samples. Options: temperature, top_k, top_p, typical_p; without any, from the model's own distribution."""
    if request.budget != request.num_candidates:
        raise ConfigError(f"sampling takes a budget of num_candidates ({request.num_candidates}), got {request.budget}")
    return model.generate(
        **request.inputs,
        **request.generate,
        num_beams=1,
        num_return_sequences=request.num_candidates,
        **{**_sampling({}), **settings, **request.options},
    )


for _name, _settings in SAMPLERS.items():
    DECODERS.register(_name, partial(sample, **_settings))


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of generate that sample by these settings alone, whatever the model's generation config says."""
    return {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}


def _search(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of generate from the options of a decoder that runs K times: its beams, or `sampling` by name."""
    options = dict(options)
    if (name := options.pop("sampling", None)) is None:
        return {**_sampling({}), **options} if options.get("do_sample") else {"do_sample": False, **options}
    if name not in SAMPLERS:
        raise unknown_name("sampling", name, SAMPLERS)
    return {**_sampling(SAMPLERS[name]), **options}


@DECODERS.decorator("mcl")
def all_hypotheses(model: Any, request: Request) -> Tensor:
    """Each hypothesis with B / K beams, its best candidate; candidate k is hypothesis k's.

    Options: sampling (a name in SAMPLERS: one sample of each hypothesis), and what `generate` takes.
    """
    from ..hypotheses.generation import generate_hypotheses

    beams = request.beams_each("hypotheses")
    rows = generate_hypotheses(
        model, **request.inputs, num_beams=beams, **{**request.generate, **_search(request.options)}
    )
    _check_count(rows.shape[0], request, "hypotheses")
    return _by_input(rows)


@DECODERS.decorator("tta")
def augmented_inputs(model: Any, request: Request) -> Tensor:
    """Each of K augmented inputs with B / K beams, its best candidate: SpecAugment on log-mel features.

    Options: time_fraction (0.4), frequency_fraction (0.6), time_axis (-1), sampling. The masks of augmentation k are
    the same for the whole batch.
    """
    beams = request.beams_each()
    options = {"time_fraction": MEDIUM[0], "frequency_fraction": MEDIUM[1], "time_axis": -1, **request.options}
    masks = {name: options.pop(name) for name in ("time_fraction", "frequency_fraction", "time_axis")}
    features = request.inputs.get("input_features")
    if features is None:
        given = ", ".join(sorted(request.inputs))
        raise DataError(f"test-time augmentation masks audio: the inputs need input_features, got {given}")
    masks["length"] = _longest(request.inputs, features.shape[masks["time_axis"]])
    copies = [spec_augment(features, **masks) for _ in range(request.num_candidates)]
    return _runs(model, request, beams, _search(options), {"input_features": torch.cat(copies)})


def _longest(inputs: Mapping[str, Tensor], frames: int) -> int:
    """Frames of the longest row, by the first mask of that length."""
    for name in ("feature_attention_mask", "input_features_mask", "attention_mask"):
        mask = inputs.get(name)
        if mask is not None and mask.shape[-1] == frames:
            return int(mask.sum(-1).max())
    return frames


@DECODERS.decorator("moe_dense")
def dense_router(model: Any, request: Request) -> Tensor:
    """`beam` through all experts of a LoRA-MoE, however it was trained."""
    from ..routing import route_experts

    with route_experts(model, "dense"):
        return beam_search(model, request)


@DECODERS.decorator("moe_sparse")
def sparse_router(model: Any, request: Request) -> Tensor:
    """`beam` through the best experts of each token. Option: experts_per_token (the adapter's own, 2 if dense)."""
    from ..routing import route_experts

    options = dict(request.options)
    with route_experts(model, "sparse", top_k=options.pop("experts_per_token", None)):
        return beam_search(model, replace(request, options=options))


@DECODERS.decorator("moe_stochastic")
def stochastic_router(model: Any, request: Request) -> Tensor:
    """K runs of a LoRA-MoE with B / K beams; each token of each layer goes to one expert, drawn by its gates.

    Option: sampling.
    """
    from ..routing import route_experts

    with route_experts(model, "stochastic"):
        return _runs(model, request, request.beams_each(), _search(request.options), {})


@DECODERS.decorator("moe_expert")
def one_expert_a_run(model: Any, request: Request) -> Tensor:
    """Each of a LoRA-MoE's K experts alone with B / K beams; candidate e is expert e's. Option: sampling."""
    from ..routing import num_experts, route_experts

    beams = request.beams_each("experts")
    _check_count(num_experts(model), request, "experts")
    runs = []
    for expert in range(request.num_candidates):
        with route_experts(model, expert):
            runs.append(
                model.generate(**request.inputs, **request.generate, num_beams=beams, **_search(request.options))
            )
    longest = max(rows.shape[1] for rows in runs)
    pad_id = request.generate.get("pad_token_id") or 0
    return _by_input(torch.stack([pad(rows, (0, longest - rows.shape[1]), value=pad_id) for rows in runs]))


def _runs(
    model: Any, request: Request, beams: int, settings: Mapping[str, Any], replaced: Mapping[str, Tensor]
) -> Tensor:
    """The best of `beams` for K copies of the batch (all rows, then all rows again, ...), decoded together.

    Args: replaced: inputs that differ from copy to copy, K-major. Encoders that see the same in each copy run once.
    """
    from ..hypotheses.inputs import batch_size, media_token_ids, repeat_rows
    from ..hypotheses.prepared import base_of
    from ..hypotheses.towers import run_towers_once

    count, base = request.num_candidates, base_of(model)
    inputs = repeat_rows(request.inputs, count, batch_size(request.inputs), media_token_ids(base.config))
    with run_towers_once(base, count) if not replaced else nullcontext():
        rows = model.generate(
            **{**inputs, **replaced}, **request.generate, num_beams=beams, num_return_sequences=1, **settings
        )
    return _by_input(rows.view(count, -1, rows.shape[-1]))


def _by_input(rows: Tensor) -> Tensor:
    """(K, batch, length) -> (batch * K, length)."""
    return rows.transpose(0, 1).reshape(-1, rows.shape[-1])


def _check_count(found: int, request: Request, what: str) -> None:
    if found != request.num_candidates:
        raise ConfigError(f"the model has {found} {what}, {request.num_candidates} candidates were asked for")

"""Diverse beam search (Vijayakumar et al. 2018): G groups of beams, each kept away from what the groups before it
chose.

At step t group g extends its b beams by the tokens of highest

    Theta(y, v) = sum_{s<t} log p'(y_s) + log p(v | y, c) - lambda * #{beams of groups 1..g-1 that chose v at step t}

(Hamming diversity; Theta keeps the penalties of the steps before). With lambda = 0 every group is plain beam search
with b beams; with G = 1 it is plain beam search with G b beams. A finished sequence competes inside its group by
Theta / length^length_penalty; a group stops as plain beam search does (`early_stopping`).

What is returned: "pooled", the K best of all groups together, as transformers did; or "one_per_group", the best of each
group, which the method's authors had in mind and which keeps K candidates apart where b > 1.

Relations: "pooled" gives the tokens of transformers 4.50's group beam search (tests hold stored outputs of it).
Differs: transformers has moved its own to a repository of remote code; this one is passed to `generate` as a function.
A group that has stopped no longer counts in the penalty (transformers 4 let it count as choosing the padding token).
Only end tokens and the maximum length stop a sequence; other stopping criteria are not asked.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, check_choice

SELECTIONS = ("pooled", "one_per_group")
_NEVER = -1e9


def diverse_beam_generate(
    model: Any,
    *,
    num_beams: int,
    num_groups: int,
    diversity_penalty: float,
    num_return_sequences: int | None = None,
    selection: str = "pooled",
    **as_generate: Any,
) -> Any:
    """`model.generate` with diverse beam search.

    Args:
        model: any transformers or PEFT model with `generate`.
        num_beams: B, beams of all groups together.
        num_groups: G, divides B.
        diversity_penalty: lambda, nats, not negative.
        num_return_sequences: K candidates an input; default G. "one_per_group" gives exactly G.
        selection: "pooled" (best first) or "one_per_group" (in the order of the groups).
        as_generate: input_ids, attention_mask, max_new_tokens, length_penalty, repetition_penalty, ...
    Returns: what `generate` gives: LongTensor (batch * K, length), prompt included for decoders; an output object with
        `sequences` and `sequences_scores` (penalties included) where return_dict_in_generate is set.
    Raises: ConfigError for sizes that do not fit.
    """
    check_choice("selection", selection, SELECTIONS)
    if num_groups < 1 or num_beams % num_groups:
        raise ConfigError(f"num_beams {num_beams} must be a multiple of num_groups {num_groups}")
    if not diversity_penalty >= 0:
        raise ConfigError(f"diversity_penalty must be at least 0, got {diversity_penalty}")
    count = num_groups if num_return_sequences is None else num_return_sequences
    if not 1 <= count <= num_beams or (selection == "one_per_group" and count != num_groups):
        limit = f"{num_groups}, one for each group" if selection == "one_per_group" else f"in 1..{num_beams}"
        raise ConfigError(f"num_return_sequences must be {limit}, got {count}")
    if as_generate.get("do_sample"):
        raise ConfigError("diverse beam search does not sample; leave do_sample out")
    search = partial(
        _diverse_beam_search, groups=num_groups, penalty=float(diversity_penalty), count=count, selection=selection
    )
    return model.generate(custom_generate=search, num_beams=num_beams, do_sample=False, **as_generate)


def _diverse_beam_search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    groups: int,
    penalty: float,
    count: int,
    selection: str,
    **model_kwargs: Any,
) -> Any:
    """The loop behind `generate`: input_ids (batch * B, length) and all keyword arguments come prepared, expanded."""
    beams = generation_config.num_beams
    size, batch = beams // groups, input_ids.shape[0] // beams
    device, prompt = input_ids.device, input_ids.shape[1]
    ends = generation_config._eos_token_tensor
    pad = generation_config._pad_token_tensor
    pad_id = int(pad) if pad is not None else int(ends[0]) if ends is not None else 0
    use_cache = model_kwargs.get("use_cache")
    steps = generation_config.max_length - prompt

    running = input_ids.view(batch, groups, size, prompt)
    scores = torch.full((batch, groups, size), _NEVER, dtype=torch.float32, device=device)
    scores[..., 0] = 0.0
    finished = torch.full((batch, groups, size, generation_config.max_length), pad_id, device=device)
    finished_scores = torch.full((batch, groups, size), -torch.inf, dtype=torch.float32, device=device)
    done = torch.zeros(batch, groups, dtype=torch.bool, device=device)
    step = 0
    while step < steps and not bool(done.all()):
        flat = running.reshape(batch * beams, prompt + step)
        inputs = model.prepare_inputs_for_generation(
            flat, next_sequence_length=1 if use_cache and step else None, is_first_iteration=step == 0, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        log_probs = outputs.logits[:, -1].to(torch.float32, copy=True).log_softmax(-1)
        log_probs = log_probs.view(batch, groups, size, -1)
        step += 1
        chosen, parents, scores, ended = _choose(flat, log_probs, logits_processor, scores, done, ends, penalty)
        best = torch.stack([group_scores[:, 0] for _, _, group_scores, _ in ended], 1)
        for g, (parent, token, group_scores, hit) in enumerate(ended):
            rows = _take(running[:, g], parent)
            rows = torch.cat([rows, token[..., None], rows.new_full((*token.shape, steps - step), pad_id)], -1)
            value = group_scores / step**generation_config.length_penalty
            value = value.masked_fill(~hit | done[:, g, None], -torch.inf)
            value[:, size:] = -torch.inf  # only the first b of the candidates may end, the rest keeps b beams running
            _keep_best(finished[:, g], finished_scores[:, g], rows, value)
        running = torch.cat([_take(running.flatten(0, 1), parents.flatten(0, 1)), chosen.flatten(0, 1)[..., None]], -1)
        running = running.view(batch, groups, size, -1)
        done |= _stops(finished_scores, best, step, steps, generation_config)
        if use_cache and not bool(done.all()) and step < steps:
            offset = torch.arange(batch * groups, device=device).view(batch, groups, 1) * size
            _reorder(model, model_kwargs, (parents + offset).flatten())
    value = (scores / max(step, 1) ** generation_config.length_penalty).masked_fill(done[..., None], -torch.inf)
    rows = torch.nn.functional.pad(running, (0, finished.shape[-1] - running.shape[-1]), value=pad_id)
    for g in range(groups):
        _keep_best(finished[:, g], finished_scores[:, g], rows[:, g], value[:, g])
    return _select(finished, finished_scores, count, selection, prompt, step, ends, generation_config)


def _choose(
    rows: Tensor, log_probs: Tensor, process: Any, scores: Tensor, done: Tensor, ends: Tensor | None, penalty: float
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Group after group, the best continuations under the penalty.

    The penalty comes before the logits processors, as in transformers 4: a repetition penalty multiplies what the
    diversity penalty has left. Processors see the rows of all groups, which some of them count.

    Args: rows (batch G b, t) written so far; log_probs (batch, G, b, V); process: (rows, scores (rows, V)) -> scores;
        scores (batch, G, b); done (batch, G).
    Returns: tokens, parents (which beam of the group) and scores of the beams that run on, each (batch, G, b); and for
        each group (parents, tokens, scores, is an end token) of its candidates, best first, each (batch, (1 + ends) b).
    """
    batch, groups, size, vocabulary = log_probs.shape
    keep = max(2, 1 + (len(ends) if ends is not None else 0)) * size
    used = torch.zeros(batch, vocabulary, dtype=log_probs.dtype, device=log_probs.device)
    tokens, parents, kept, candidates = [], [], [], []
    for g in range(groups):
        penalised = log_probs.clone()
        penalised[:, g] -= penalty * used[:, None]
        processed = process(rows, penalised.flatten(0, 2)).view(log_probs.shape)[:, g]
        total = processed + scores[:, g, :, None]
        value, index = total.flatten(1).topk(min(keep, size * vocabulary), dim=1)
        parent, token = index // vocabulary, index % vocabulary
        hit = torch.isin(token, ends) if ends is not None else torch.zeros_like(token, dtype=torch.bool)
        candidates.append((parent, token, value, hit))
        order = (value + hit * _NEVER * 10).topk(size, dim=1).indices
        tokens.append(token.gather(1, order))
        parents.append(parent.gather(1, order))
        kept.append(value.gather(1, order))
        counts = (~done[:, g]).to(used.dtype)[:, None].expand(-1, size)
        used.scatter_add_(1, tokens[-1], counts)
    return torch.stack(tokens, 1), torch.stack(parents, 1), torch.stack(kept, 1), candidates


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows (n, b, length) by index (n, c) -> (n, c, length)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _keep_best(pool: Tensor, pool_scores: Tensor, rows: Tensor, scores: Tensor) -> None:
    """Put rows into a pool (n, b, length) in place where they beat what is there; equals stay as they came."""
    merged = torch.cat([pool_scores, scores], 1)
    order = merged.argsort(dim=1, descending=True, stable=True)[:, : pool.shape[1]]
    pool.copy_(_take(torch.cat([pool, rows], 1), order))
    pool_scores.copy_(merged.gather(1, order))


def _stops(finished_scores: Tensor, best: Tensor, step: int, steps: int, config: Any) -> Tensor:
    """Which groups (batch, G) cannot improve: full, and (unless early_stopping) nothing running could still win."""
    full = finished_scores[..., -1] > -torch.inf
    if config.early_stopping is True:
        return full
    longest = steps if config.early_stopping == "never" and config.length_penalty > 0 else step
    return full & (finished_scores[..., -1] >= best / longest**config.length_penalty)


def _reorder(model: Any, model_kwargs: dict[str, Any], rows: Tensor) -> None:
    cache = model_kwargs.get("past_key_values")
    if cache is None:
        return
    if hasattr(model, "_reorder_cache"):
        model_kwargs["past_key_values"] = model._reorder_cache(cache, rows)
    else:
        cache.reorder_cache(rows)


def _select(
    finished: Tensor,
    scores: Tensor,
    count: int,
    selection: str,
    prompt: int,
    steps: int,
    ends: Tensor | None,
    config: Any,
) -> Any:
    """K candidates an input out of the groups' pools (batch, G, b, length), cut to the longest.

    Args: prompt, steps: tokens before the first written one, and tokens written.
    """
    from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

    batch = finished.shape[0]
    if selection == "one_per_group":
        sequences, values = finished[:, :, 0], scores[:, :, 0]
    else:
        order = scores.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :count]
        sequences, values = _take(finished.flatten(1, 2), order), scores.flatten(1).gather(1, order)
    sequences = sequences.reshape(batch * count, -1)
    longest = steps
    if ends is not None:
        ended = torch.isin(sequences[:, prompt : prompt + steps], ends)
        longest = int(torch.where(ended.any(1), ended.int().argmax(1) + 1, steps).max()) if steps else 0
    sequences = sequences[:, : prompt + longest]
    if config.return_dict_in_generate:
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=values.flatten())
    return sequences

"""Where a transformer can be cut: the groups of attention heads and of feed-forward neurons, family by family.

A unit is what shares one inner dimension: an attention (its groups: the key and value heads, each with the query heads
that read it) or a feed-forward block (its groups: the neurons). Writers produce the inner dimension, readers take it.
Whole heads only: rotary embeddings couple the dimensions within one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError, nearest

GATED = ("llama", "mistral", "qwen2", "qwen3")
ENCODERS = ("bert", "roberta")
FAMILIES = (*GATED, "gpt2", *ENCODERS)


@dataclass(frozen=True)
class Unit:
    """One attention or feed-forward block.

    Attributes:
        kind: "attention" or "ffn".
        layer: index of the transformer layer.
        groups: heads (those of keys and values) or neurons of the full model.
        kept: indices of the groups that stay, ascending.
        writers: name of the layer -> (parts, size): its outputs are `parts` blocks of `groups` times `size` rows.
        readers: name of the layer -> size: its inputs are `groups` times `size` columns.
    """

    kind: str
    layer: int
    groups: int
    kept: tuple[int, ...]
    writers: dict[str, tuple[int, int]]
    readers: dict[str, int]

    def __post_init__(self) -> None:
        in_order = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        if not self.kept or not in_order or self.kept[0] < 0 or self.kept[-1] >= self.groups:
            raise ConfigError(
                f"layer {self.layer}, {self.kind}: the kept indices must ascend within 0..{self.groups - 1} "
                f"(another order would exchange weights without notice), got {list(self.kept)[:8]}"
            )

    def keeping(self, kept: Any) -> Unit:
        """The same unit with other kept groups. Raises ConfigError unless they ascend and exist."""
        return replace(self, kept=tuple(int(i) for i in kept))

    def rows(self, name: str) -> Tensor:
        """Kept outputs of a writer, in its full numbering."""
        return positions(self.kept, self.groups, *self.writers[name])

    def columns(self, name: str) -> Tensor:
        """Kept inputs of a reader, in its full numbering."""
        return positions(self.kept, self.groups, 1, self.readers[name])


def positions(kept: tuple[int, ...], groups: int, parts: int, size: int) -> Tensor:
    """Flat positions of the kept groups in `parts` blocks of `groups` x `size`."""
    within = torch.tensor(kept)[:, None] * size + torch.arange(size)
    return (torch.arange(parts)[:, None] * groups * size + within.flatten()).flatten()


def units(model: nn.Module) -> list[Unit]:
    """All units of a model, nothing pruned yet.

    Raises: ConfigError for a family that is not known here, naming the known ones.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in FAMILIES:
        hint = nearest(str(family), FAMILIES)
        raise ConfigError(
            f"heads and neurons of model type {family!r} are not known"
            + (f" (nearest: {hint!r})" if hint else "")
            + f"; known: {', '.join(FAMILIES)}. Unstructured pruning takes any model"
        )
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    describe = _gated if family in GATED else _gpt2 if family == "gpt2" else _encoder
    return [unit for i in range(config.num_hidden_layers) for unit in describe(config, prefix, i)]


def _gated(config: Any, prefix: str, i: int) -> Iterator[Unit]:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = config.num_key_value_heads
    if config.num_attention_heads % groups:
        raise ConfigError(f"{config.num_attention_heads} query heads do not divide into {groups} groups")
    queries = size * (config.num_attention_heads // groups)
    attention, ffn = f"{prefix}layers.{i}.self_attn.", f"{prefix}layers.{i}.mlp."
    writers = {f"{attention}q_proj": (1, queries), f"{attention}k_proj": (1, size), f"{attention}v_proj": (1, size)}
    yield Unit("attention", i, groups, tuple(range(groups)), writers, {f"{attention}o_proj": queries})
    neurons = config.intermediate_size
    writers = {f"{ffn}gate_proj": (1, 1), f"{ffn}up_proj": (1, 1)}
    yield Unit("ffn", i, neurons, tuple(range(neurons)), writers, {f"{ffn}down_proj": 1})


def _gpt2(config: Any, prefix: str, i: int) -> Iterator[Unit]:
    heads, block = config.num_attention_heads, f"{prefix}h.{i}."
    size, neurons = config.hidden_size // heads, config.n_inner or 4 * config.hidden_size
    writers, readers = {f"{block}attn.c_attn": (3, size)}, {f"{block}attn.c_proj": size}
    yield Unit("attention", i, heads, tuple(range(heads)), writers, readers)
    yield Unit("ffn", i, neurons, tuple(range(neurons)), {f"{block}mlp.c_fc": (1, 1)}, {f"{block}mlp.c_proj": 1})


def _encoder(config: Any, prefix: str, i: int) -> Iterator[Unit]:
    heads, neurons, block = config.num_attention_heads, config.intermediate_size, f"{prefix}encoder.layer.{i}."
    size = config.hidden_size // heads
    writers = {f"{block}attention.self.{name}": (1, size) for name in ("query", "key", "value")}
    yield Unit("attention", i, heads, tuple(range(heads)), writers, {f"{block}attention.output.dense": size})
    writers = {f"{block}intermediate.dense": (1, 1)}
    yield Unit("ffn", i, neurons, tuple(range(neurons)), writers, {f"{block}output.dense": 1})


@torch.no_grad()
def cut(model: nn.Module, unit: Unit) -> None:
    """Remove the groups that are not kept from the unit's layers, in place; layers that are cut already stay."""
    for name in unit.writers:
        _select(model.get_submodule(name), unit.rows(name), outputs=True)
    for name in unit.readers:
        _select(model.get_submodule(name), unit.columns(name), outputs=False)
    if unit.kind == "attention":
        parent = model.get_submodule(next(iter(unit.writers)).rpartition(".")[0])
        size = next(iter(unit.readers.values()))
        for attribute in ("split_size", "all_head_size"):
            if hasattr(parent, attribute):
                setattr(parent, attribute, len(unit.kept) * size)
        for attribute in ("num_heads", "num_attention_heads"):
            if hasattr(parent, attribute):
                setattr(parent, attribute, len(unit.kept))


def _select(layer: nn.Module, index: Tensor, outputs: bool) -> None:
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise ConfigError(f"only Linear and Conv1D layers can be cut, not {type(layer).__name__}")
    dim = int(outputs == isinstance(layer, Conv1D))
    if layer.weight.shape[dim] == len(index):
        return
    names = ("in_features", "out_features") if isinstance(layer, nn.Linear) else ("nx", "nf")
    setattr(layer, names[outputs], len(index))
    layer.weight = _selected(layer.weight, index, dim)
    if outputs and layer.bias is not None:
        layer.bias = _selected(layer.bias, index, 0)


def _selected(parameter: nn.Parameter, index: Tensor, dim: int) -> nn.Parameter:
    chosen = parameter.detach().index_select(dim, index.to(parameter.device)).contiguous()
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)


def fit_config(model: nn.Module, cut_units: list[Unit]) -> bool:
    """Write the new sizes into the model's config where its family can say them: equal ones in all layers.

    Returns: whether the config now says all of them, so that plain `from_pretrained` builds the model.
    """
    config, family, expressed = model.config, model.config.model_type, True
    for kind in ("attention", "ffn"):
        of_kind = [unit for unit in cut_units if unit.kind == kind]
        counts = {len(unit.kept) for unit in of_kind}
        if all(len(unit.kept) == unit.groups for unit in of_kind):
            continue
        changes: dict[str, int] = {}
        if len(counts) == 1 and kind == "ffn":
            changes = {"n_inner" if family == "gpt2" else "intermediate_size": counts.pop()}
        elif len(counts) == 1 and family in GATED:
            groups = counts.pop()
            size = of_kind[0].writers[next(n for n in of_kind[0].writers if n.endswith("k_proj"))][1]
            queries = next(iter(of_kind[0].readers.values())) // size
            changes = {"num_attention_heads": groups * queries, "num_key_value_heads": groups, "head_dim": size}
        try:
            type(config).from_dict({**config.to_dict(), **changes})
        except StrictDataclassError:  # a family's own rule: Llama's width must be a multiple of its heads
            changes = {}
        expressed = expressed and bool(changes)
        for name, value in changes.items():
            setattr(config, name, value)
    return expressed

"""LQ-LoRA: each weight is split into a quantised matrix, frozen, and a low-rank one that an ordinary LoRA holds.

    W ~ Q + L1 L2:   repeat  L1, L2 = svd_r(W - Q);  Q = NF(W - L1 L2)   until |W - Q - L1 L2| rises; the best is kept
    A = L2 / sqrt(s),  B = L1 / sqrt(s),  s = alpha / r:   Q + s B A = Q + L1 L2

W, Q (out, in); L1 (out, r), L2 (r, in) with the root of the singular values on either side. With the Fisher information
F (out, in), sums of squared gradients of single examples, the SVD is that of D1 (W - Q) D2, D1 and D2 the roots of F's
means of rows and columns, taken off afterwards: it minimises sum F (W - Q - L1 L2)^2 exactly where F has rank one. The
form of each matrix (bits, blocks, scales: see `_quant_normal_float`) is chosen by an integer program: the least sum of
|sqrt(F) (W - Q - L1 L2)|^2 whose storage is within the budget.

Source: LQ-LoRA (Guo et al. 2024) and its released code.
Differs: the best iterate is returned (the release: the one after it, which is worse); rows and columns of F that are
zero get a floor; layers with bias and Conv1D are split too; sizes need not divide by the blocks; the padding and the
offset are counted in the budget.

Trained are A and B; Q is held as packed codes and decoded in each pass. `save_lq_lora` writes both, `make_dense` puts
ordinary layers in place of the packed ones, to merge the adapter into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError
from . import _quant_normal_float as nf
from ._quant_allocation import Batch, allocate, fisher_information, rows_out
from ._quant_decomposition import decompose, weighted_svd
from ._quant_normal_float import NormalFloat, NormalFloatLinear
from ._quantised_linear import FILE, load_quantised, make_dense, quantised_layers, save_quantised

__all__ = ["FILE", "LqLoraConfig", "decompose", "fisher_information", "get_lq_lora_model", "load_lq_lora", "make_dense",
           "save_lq_lora", "weighted_svd"]  # fmt: skip


@dataclass(frozen=True)
class LqLoraConfig:
    """How to split a model. Rank, alpha and layers are those of the LoraConfig beside it.

    Raises (on construction): ConfigError for a value that is not in the paper's lists or out of range.
    """

    budget_bits: float = field(default=3.0, metadata={"help": "Bits a weight of the quantised parts, all in all."})
    bits: Sequence[int] = field(default=nf.BITS, metadata={"help": "b to choose from."})
    absmax_bits: Sequence[int] = field(default=nf.BITS, metadata={"help": "b0, bits of a block's absmax."})
    block_sizes: Sequence[int] = field(default=nf.BLOCK_SIZES, metadata={"help": "B0, weights that share an absmax."})
    absmax_block_sizes: Sequence[int] = field(default=nf.ABSMAX_BLOCK_SIZES, metadata={"help": "B1, absmax a scale."})
    scale_dtypes: Sequence[str] = field(default=nf.SCALE_DTYPES, metadata={"help": "Types of the scales."})
    iterations: int = field(default=100, metadata={"help": "At most so many alternations of SVD and quantisation."})
    table_iterations: int = field(default=1, metadata={"help": "The same, for the table that the choice rests on."})
    fisher_rows: int = field(default=0, metadata={"help": "Training rows for the Fisher information; 0: unweighted."})
    seed: int = field(default=0, metadata={"help": "Of the randomised SVD."})
    time_limit_s: float = field(default=60.0, metadata={"help": "Of the integer program."})

    def __post_init__(self) -> None:
        for name in ("iterations", "table_iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.fisher_rows < 0:
            raise ConfigError(f"fisher_rows must not be negative, got {self.fisher_rows}")
        if not 0 < self.budget_bits <= 16:
            raise ConfigError(f"budget_bits must be in (0, 16], got {self.budget_bits}")
        self.candidates()

    def candidates(self) -> list[NormalFloat]:
        lists = (self.bits, self.absmax_bits, self.block_sizes, self.absmax_block_sizes, self.scale_dtypes)
        for name, values in zip(nf.CHOICES, lists, strict=True):
            if not isinstance(values, (list, tuple)) or not values:
                allowed = ", ".join(map(str, nf.CHOICES[name]))
                raise ConfigError(
                    f"{name} to choose from must be a list that is not empty, got {values!r} (of {allowed})"
                )
        return nf.candidates(**dict(zip(nf.CHOICES, lists, strict=True)))


def choose_forms(
    layers: Mapping[str, nn.Module], ranks: Mapping[str, int], config: LqLoraConfig, fisher: Mapping[str, Tensor]
) -> dict[str, NormalFloat]:
    """The form of each layer by the integer program. Raises ConfigError where the budget is too small."""
    forms, names = config.candidates(), list(layers)
    counts = [layers[name].weight.numel() for name in names]
    storage = np.array([[form.storage_bytes(count) for form in forms] for count in counts])
    least = 8 * storage.min(axis=1).sum() / sum(counts)
    if config.budget_bits < least:
        nearest = math.ceil(least * 1e4) / 1e4
        raise ConfigError(f"budget_bits {config.budget_bits} is too small for these layers: the least is {nearest}")
    if len(forms) == 1:
        return dict.fromkeys(names, forms[0])
    errors = np.zeros(storage.shape)
    for i, name in _shown(list(enumerate(names)), "errors of each precision"):
        W = rows_out(layers[name], layers[name].weight).detach().float()
        F, start = fisher.get(name), weighted_svd(W, ranks[name], fisher.get(name), config.seed)
        shared = config.table_iterations, config.seed, layers[name].weight.dtype, start
        errors[i] = [decompose(W, ranks[name], form, F, *shared).error ** 2 for form in forms]
    chosen = allocate(errors, storage, math.floor(config.budget_bits * sum(counts) / 8), config.time_limit_s)
    return {name: forms[c] for name, c in zip(names, chosen, strict=True)}


def get_lq_lora_model(
    base: nn.Module, config: LqLoraConfig, lora: Any, batches: Iterable[Batch] = (),
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> Any:  # fmt: skip
    """The base with PEFT's LoRA on it, its adapted layers quantised, the adapter at L1 L2. The base is changed.

    Args:
        lora: a LoraConfig; its adapter is named "default".
        batches, loss: to take the Fisher information from (`fisher_information`); none: errors count alike.
    Raises: ConfigError for a layer that is no Linear or Conv1D, a budget below the least, an initialiser in `lora`.
    """
    from peft import get_peft_model

    if lora.init_lora_weights is not True or lora.use_dora or lora.lora_alpha <= 0:
        raise ConfigError("LQ-LoRA sets the adapter's first values: leave init_lora_weights, use_dora; alpha above 0")
    model = get_peft_model(base, lora)
    adapted = {name: model.base_model.model.get_submodule(name) for name in model.base_model.targeted_module_names}
    layers = {name: layer.get_base_layer() for name, layer in adapted.items()}
    for name, layer in layers.items():
        if type(layer) not in (nn.Linear, Conv1D):
            raise ConfigError(f"LQ-LoRA splits Linear and Conv1D layers; {name!r} is a {type(layer).__name__}")
        if not torch.isfinite(layer.weight).all():
            raise ConfigError(f"the weight of {name!r} holds values that are not finite")
    batches = list(batches)
    fisher = fisher_information(model, layers, batches, loss) if batches else {}
    forms = choose_forms(layers, {name: layer.r["default"] for name, layer in adapted.items()}, config, fisher)
    for name, layer in _shown(list(adapted.items()), "low-rank plus quantised"):
        old, rank = layers[name], layer.r["default"]
        W, form = rows_out(old, old.weight), forms[name]
        split = decompose(W, rank, form, fisher.get(name), config.iterations, config.seed, old.weight.dtype)
        new = NormalFloatLinear(*W.shape[::-1], isinstance(old, Conv1D), **asdict(form)).fill(split.parts)
        layer.base_layer = new.take_place_of(old)
        _write_factors(layer, split.L1, split.L2)
    return model


@torch.no_grad()
def _write_factors(layer: Any, L1: Tensor, L2: Tensor) -> None:
    """A, B of the LoRA; directions that r has and the layer has not stay random in A, zero in B."""
    A, B, root = layer.lora_A["default"].weight, layer.lora_B["default"].weight, math.sqrt(layer.scaling["default"])
    A[: len(L2)].copy_(L2 / root)
    B[:, : len(L2)].copy_(L1 / root)


def bits_per_parameter(model: nn.Module) -> float:
    """Of the quantised parts: 8 times their bytes over their weights."""
    layers = quantised_layers(model).values()
    return 8 * sum(layer.storage_bytes for layer in layers) / sum(m.in_features * m.out_features for m in layers)


def save_lq_lora(model: Any, folder: str | Path) -> Path:
    """PEFT's adapter folder with quantised.safetensors in it: one is of no use without the other."""
    model.save_pretrained(str(folder))
    return save_quantised(model, folder)


def load_lq_lora(base: nn.Module, folder: str | Path, is_trainable: bool = False) -> Any:
    """The model that `save_lq_lora` wrote, on a base of the same architecture. Raises CheckpointError if it misfits."""
    from peft import PeftModel

    return load_quantised(PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable), folder)


def _shown(items: list[Any], what: str) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)

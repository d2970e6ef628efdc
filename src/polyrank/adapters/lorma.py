"""LoRMA: the frozen weight is multiplied by a learned square matrix, W' = S W ("pre") or W' = W S ("post").

W (out, in); n = out for pre, in for post; B (n, r), A (r, n); s = alpha / r.

    pi:        S = s shift(B A),  shift(M)[i, j] = M[i, (j - i) mod n]: full rank at LoRA's number of parameters
    plus:      S = I + s B A: the update s B (A W) or s (W B) A is a LoRA tied to W, of rank <= r
    complete:  S = I + A, A (n, n) trained whole: an upper bound, as large as the layer

Source: LoRMA, Findings of ACL 2025, arXiv 2506.07621. Start: pi: B Kaiming-uniform with B[:, 0] = 1, A = 0 but
A[0, 0] = 1, both over sqrt(s); plus: B = 0, A Kaiming-uniform; complete: A = 0.
Differs:
- every variant is applied as y = W x + D W x or W (x + D x), D = S - I, which is exactly 0 at the start. For pi
  D = s (shift(B (A - c e_00)) + c diag(B[:, 0] - c)) with c = 1 / sqrt(s); so that the stored c is the same number in
  every dtype (a model may be cast, saved, loaded), c is rounded to bf16 and s = 1 / c^2 follows (within 0.8 %; exact
  for alpha = r, 4 r, r / 4).
- dropout touches the adapter's input only; the released layers also drop the frozen path's input.
- the bias is never multiplied: in pre, S acts on W x and not on the layer's output.
- post has the scale s in every variant; the released code omits it without inflation.
- S is never formed: pi as in `_rank_inflation`, plus by the order of the products, 2 r n multiply-adds a token.

Weight decay is off (`decay=False`; see `decay_groups`; transformers' Trainer is told so): pi has no residual, so that a
decayed step multiplies S, and with it the *pretrained* weight, by (1 - lr wd)^2. plus and complete would decay towards
W; decay=True gives that.
Several active adapters multiply: the merged weight is ... S2 S1 W S1' S2' .... Merging keeps a copy of W: S may be
ill-conditioned, and unmerging is exact. Packed q/k/v (GPT-2's c_attn): pre mixes the rows of q, k and v, and for pi
their order matters; use side="post" there, which shares one S of the input between the three.
Quantised layers run through their own forward, in any backend that PEFT's helper knows; merging and lora_factors work
where it can dequantise (not GPTQ, AWQ, AQLM, EETQ, INC). In post the adapted input is rounded to the layer's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError, check_choice
from ._base import AdapterConfig, AdapterLayer, register_adapter
from ._rank_inflation import choose_form, fold, folded_linear, multiply
from ._weight_decay import teach_trainer

VARIANTS = ("pi", "plus", "complete")
SIDES = ("pre", "post")


@dataclass
class LormaConfig(AdapterConfig):
    """LoRMA. A layer has 2 r n parameters (n^2 if complete).

    Raises (on construction): ConfigError for an unknown variant or side, lora_alpha <= 0 save in plus.
    """

    variant: str = field(default="pi", metadata={"help": f"How S is made from B and A: {', '.join(VARIANTS)}."})
    side: str = field(default="pre", metadata={"help": "pre: W' = S W. post: W' = W S."})
    decay: bool = field(
        default=False, metadata={"help": "Let weight decay act on the parameters (it shrinks W in pi)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, VARIANTS)
        check_choice("side", self.side, SIDES)
        if not isinstance(self.decay, bool):
            raise ConfigError(f"decay must be True or False, got {self.decay!r}")
        for alpha in (self.lora_alpha, *(self.alpha_pattern or {}).values()):
            if self.variant != "plus" and alpha <= 0:
                raise ConfigError(f"lora_alpha must be > 0 for variant {self.variant!r}, got {alpha!r}")


def pi_corner(scale: float) -> float:
    """c = 1 / sqrt(s), rounded to bf16: the one number that the identity rests on."""
    return torch.tensor(scale, dtype=torch.float64).rsqrt().bfloat16().item()


def pi_start(n: int, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """B (n, r), A (r, n) with shift(B A) = c^2 I."""
    c = pi_corner(scale)
    B, A = torch.empty(n, rank), torch.zeros(rank, n)
    nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    B *= c
    B[:, 0] = A[0, 0] = c
    return B, A


def pi_deviation(B: Tensor, A: Tensor, c: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B', A', d) with shift(B' A') + diag(d) = S - I where s c^2 = 1, S = s shift(B A); exactly 0 at `pi_start`."""
    corner = torch.zeros_like(A)
    corner[0, 0] = c
    return B * scale, A - corner, (B[:, 0] - c) * (scale * c)


def low_rank_product(z: Tensor, B: Tensor, A: Tensor, bias: Tensor | None = None) -> Tensor:
    """B A (z - bias), for z (..., n); the bias is taken off in the r-dimensional space."""
    return linear(linear(z, A, None if bias is None else -(A @ bias)), B)


class LormaLinear(AdapterLayer):
    parameter_names = ("A", "B")
    other_param_names = (*AdapterLayer.other_param_names, "variant", "side", "start", "decay")
    additive = False
    exact_unmerge = True

    def __init__(self, base_layer: nn.Module, **quantization: object) -> None:
        super().__init__(base_layer, **quantization)
        self.variant: dict[str, str] = {}
        self.side: dict[str, str] = {}
        self.start: dict[str, float] = {}
        self.decay: dict[str, bool] = {}

    def update_layer(self, adapter_name: str, config: LormaConfig, rank: int, alpha: float) -> None:
        self.variant[adapter_name], self.side[adapter_name] = config.variant, config.side
        self.decay[adapter_name] = config.decay
        factors = getattr(self, self.prefix + "B")
        if adapter_name in factors:  # an adapter of another variant may take this one's place
            del factors[adapter_name]
        super().update_layer(adapter_name, config, rank, alpha)
        if config.variant == "pi":
            c = self.start[adapter_name] = pi_corner(self.scaling[adapter_name])
            self.scaling[adapter_name] = self.unit_scaling[adapter_name] = c**-2
        if not config.decay:
            teach_trainer()

    def make_parameters(self, config: LormaConfig, rank: int) -> dict[str, Tensor]:
        n = self.out_features if config.side == "pre" else self.in_features
        noise = 0.0 if config.init_weights else 0.5 / math.sqrt(n)  # for tests: S not the identity
        if config.variant == "complete":
            return {"A": torch.randn(n, n) * noise if noise else torch.zeros(n, n)}
        if config.variant == "pi":
            B, A = pi_start(n, rank, config.scaling(rank, config.lora_alpha))
            return {"A": A + noise * torch.randn_like(A), "B": B}
        B, A = torch.zeros(n, rank), torch.empty(rank, n)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return {"A": A, "B": B + noise * torch.randn_like(B)}

    def decays(self, adapter: str) -> bool:
        return self.decay[adapter]

    def values(self, adapter: str) -> list[Tensor]:
        """(B', A', d) for pi, (s B, A) for plus, (A,) for complete, scale included, in fp32 or better."""
        A, scale = self.parameter("A", adapter), self.scaling[adapter]
        dtype = torch.promote_types(A.dtype, torch.float32)
        if self.variant[adapter] == "complete":  # no scale of its own, but one that `set_scale` changed
            return [A.to(dtype) * (scale / self.unit_scaling[adapter])]
        B = self.parameter("B", adapter)
        if self.variant[adapter] == "plus":
            return [B.to(dtype) * scale, A.to(dtype)]
        return [value.to(dtype) for value in pi_deviation(B, A, self.start[adapter], scale)]

    def deviate(self, z: Tensor, adapter: str, bias: Tensor | None = None) -> Tensor:
        """z + D (z - bias) for z (..., n), in z's dtype; dropout on what D sees."""
        variant, (first, *rest) = self.variant[adapter], self.values(adapter)
        seen = full = z.to(first.dtype)
        bias = None if bias is None else bias.to(full)
        p = self.dropout_p[adapter] if self.training else 0.0
        if bias is not None and (p or variant != "plus"):
            seen, bias = full - bias, None
        seen = dropout(seen, p) if p else seen
        if variant == "plus":
            change = low_rank_product(seen, first, *rest, bias)
        elif variant == "complete":
            change = linear(seen, first)
        else:
            seen = seen.reshape(-1, z.shape[-1])
            form = choose_form(len(seen), z.shape[-1], len(rest[0]), None, torch.is_grad_enabled())
            change = multiply(seen, first, *rest, form).view(full.shape)
        return (full + change).to(z.dtype)

    def folds(self, x: Tensor, adapter: str) -> bool:
        """Whether S goes into the weight for this input: many rows, and a plain layer whose weight can be read here."""
        if self.variant[adapter] != "pi" or x.dtype not in (torch.float32, torch.float64):
            return False
        if not self.is_plain(x, adapter):
            return False
        n, other = self.out_features, self.in_features
        if self.side[adapter] == "post":
            n, other = other, n
        return choose_form(x.numel() // x.shape[-1], n, self.r[adapter], other, torch.is_grad_enabled()) == "fold"

    def adapted_forward(self, x: Tensor, adapters: list[str], *args: object, **kwargs: object) -> Tensor:
        device = x.device.type
        if len(adapters) == 1 and not args and not kwargs and self.folds(x, adapters[0]):
            weight, side = self.get_base_layer().weight, self.side[adapters[0]]
            weight = weight.T if self.transposed else weight
            rows = x.reshape(-1, x.shape[-1])
            result = folded_linear(rows, weight, self.base_layer.bias, *self.values(adapters[0]), side)
            return result.view(*x.shape[:-1], self.out_features)
        for adapter in reversed(adapters):  # W S1 S2 x: the last one meets x first
            if self.side[adapter] == "post":
                with torch.autocast(device, enabled=False):
                    x = self.deviate(x, adapter)
        result = self.base_layer(x, *args, **kwargs)
        bias = getattr(self.get_base_layer(), "bias", None)
        for adapter in adapters:
            if self.side[adapter] == "pre":
                with torch.autocast(device, enabled=False):
                    result = self.deviate(result, adapter, bias)
        return result

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight as (out, in), dequantised."""
        weight = self.get_base_weight().to(dtype)
        return weight.T if self.transposed else weight

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (r, in), B (out, r) of the LoRA that equals a plus adapter on the present weight, scale included.

        Raises: ConfigError for the other variants, whose update has full rank.
        """
        if self.variant[adapter] != "plus":
            raise ConfigError(f"variant {self.variant[adapter]!r} has an update of full rank: only 'plus' is a LoRA")
        B, A = self.values(adapter)
        W = self.base_weight(B.dtype)
        return (A @ W, B) if self.side[adapter] == "pre" else (A, W @ B)

    def delta_weight(self, adapter: str) -> Tensor:
        """W' - W for the weight as it is now, (out, in)."""
        if self.variant[adapter] == "plus":
            A, B = self.lora_factors(adapter)
            return B @ A
        first, *rest = self.values(adapter)
        W, side = self.base_weight(first.dtype), self.side[adapter]
        if self.variant[adapter] == "pi":
            return fold(W, torch.zeros_like(W), first, *rest, side)
        return first @ W if side == "pre" else W @ first

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.variant.get(adapter_name, "plus") == "plus"  # of full rank otherwise


LormaModel = register_adapter(
    "lorma",
    LormaConfig,
    {nn.Linear: LormaLinear, Conv1D: LormaLinear},
    tags={"identity_at_init", "mergeable", "exact_unmerge", "mixed_batch", "conv1d"},
)

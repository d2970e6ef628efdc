"""NormalFloat quantisation in blocks, the blocks' largest magnitudes quantised once more.

    W ~ levels[code] * absmax        one absmax a block of B0 elements of the flattened weight (out, in)
    absmax ~ offset + scale * code' / (2^b0 - 1)        one scale for B1 absmax, one offset (fp32) a matrix

`levels` are 2^b quantiles of the normal distribution between its 1 - p and p, p = 0.9677083, the middle one 0, divided
by the largest: 2^(b-1) positive, 2^(b-1) - 1 negative. A weight takes b + b0 / B0 + b1 / (B0 B1) bits, b1 those of the
scale's type. Source: QLoRA (Dettmers et al. 2023) for the levels, LQ-LoRA (Guo et al. 2024) for b and B as choices.
Differs: codes are chosen with the absmax as it is decoded; only the last block is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.errors import ConfigError
from ._quantised_linear import QuantisedLinear, as_raw, pack, packed_bytes, unpack

BITS = (2, 3, 4, 8)
BLOCK_SIZES = (16, 32, 64)
ABSMAX_BLOCK_SIZES = (16, 64, 256)
SCALE_DTYPES = ("bfloat16", "float16", "float32")
END_PROBABILITY = 0.9677083


@dataclass(frozen=True)
class NormalFloat:
    """One way to quantise a matrix. Raises ConfigError for a number that is not in the paper's lists."""

    bits: int = 4
    absmax_bits: int = 8
    block_size: int = 64
    absmax_block_size: int = 256
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            check_listed(name, getattr(self, name), allowed)

    @property
    def bits_per_parameter(self) -> float:
        blocks = self.block_size * self.absmax_block_size
        return self.bits + self.absmax_bits / self.block_size + 8 * self.dtype.itemsize / blocks

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.scale_dtype)

    def sizes(self, count: int) -> tuple[int, int, int]:
        """Elements (whole blocks), blocks, blocks of blocks."""
        blocks = -(-count // self.block_size)
        return blocks * self.block_size, blocks, -(-blocks // self.absmax_block_size)

    def storage_bytes(self, count: int) -> int:
        """Of a matrix with so many elements: bits_per_parameter where nothing is padded, and 4 bytes of offset."""
        elements, blocks, scales = self.sizes(count)
        codes = packed_bytes(elements, self.bits) + packed_bytes(blocks, self.absmax_bits)
        return codes + scales * self.dtype.itemsize + 4


CHOICES: dict[str, Sequence[Any]] = {
    "bits": BITS,
    "absmax_bits": BITS,
    "block_size": BLOCK_SIZES,
    "absmax_block_size": ABSMAX_BLOCK_SIZES,
    "scale_dtype": SCALE_DTYPES,
}


def check_listed(name: str, given: object, allowed: Sequence[Any]) -> None:
    if given not in allowed or isinstance(given, bool):
        near = ""
        if isinstance(given, (int, float)) and all(isinstance(value, int) for value in allowed):
            near = f"; nearest: {min(allowed, key=lambda value: abs(value - given))}"
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {given!r}{near}")


def candidates(**lists: Sequence[Any]) -> list[NormalFloat]:
    """All combinations of the given lists, the paper's for those not given: 432 in all."""
    return [
        NormalFloat(**dict(zip(CHOICES, values, strict=True)))
        for values in product(*({**CHOICES, **lists}[name] for name in CHOICES))
    ]


@cache
def levels(bits: int) -> Tensor:
    """(2^bits,), rising from -1 or above to 1, one of them 0."""
    half = 2 ** (bits - 1)

    def quantiles(count: int) -> Tensor:
        p = torch.linspace(END_PROBABILITY, 0.5, count + 1, dtype=torch.float64)[:-1]
        return math.sqrt(2.0) * torch.erfinv(2 * p - 1)

    values = torch.cat([-quantiles(half - 1), torch.zeros(1, dtype=torch.float64), quantiles(half).flip(0)])
    return (values / values.max()).float()


def encode(x: Tensor, absmax: Tensor, bits: int) -> Tensor:
    """Codes (blocks, B0), int64, of the nearest levels; absmax (blocks,). A block of zeros has the code of 0."""
    table = levels(bits).to(x.device)
    safe = torch.where(absmax > 0, absmax, math.inf)[:, None]
    return torch.bucketize(x / safe, (table[1:] + table[:-1]) / 2)


def decode(codes: Tensor, absmax: Tensor, bits: int) -> Tensor:
    return levels(bits).to(absmax.device)[codes.long()] * absmax[:, None]


def encode_absmax(absmax: Tensor, form: NormalFloat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (blocks,), scales (ceil(blocks / B1),) in the scale's type, offset ()."""
    offset, top = absmax.min(), 2**form.absmax_bits - 1
    above = pad(absmax - offset, (0, -len(absmax) % form.absmax_block_size)).view(-1, form.absmax_block_size)
    scales = above.amax(1).to(form.dtype)
    if not torch.isfinite(scales).all():
        raise ConfigError(f"weights are too large for scales in {form.scale_dtype}: choose bfloat16 or float32")
    wide = scales.float()[:, None]
    codes = (above / torch.where(wide > 0, wide, math.inf) * top).round().clamp(0, top)
    return codes.flatten()[: len(absmax)].to(torch.uint8), scales, offset


def decode_absmax(codes: Tensor, scales: Tensor, offset: Tensor, form: NormalFloat) -> Tensor:
    wide = scales.float().repeat_interleave(form.absmax_block_size)[: len(codes)]
    return offset + wide * codes / (2**form.absmax_bits - 1)


class Quantised(NamedTuple):
    """What is stored: codes (blocks, B0), the absmax' codes (blocks,), scales, offset; all that `dequantise` needs."""

    codes: Tensor
    absmax_codes: Tensor
    scales: Tensor
    offset: Tensor


def quantise(weight: Tensor, form: NormalFloat) -> Quantised:
    """A matrix (out, in), fp32, in any shape."""
    x = weight.detach().float().flatten()
    x = pad(x, (0, -len(x) % form.block_size)).view(-1, form.block_size)
    if not torch.isfinite(x).all():
        raise ConfigError("the weight to quantise holds values that are not finite")
    parts = encode_absmax(x.abs().amax(1), form)
    return Quantised(encode(x, decode_absmax(*parts, form), form.bits), *parts)


def dequantise(parts: Quantised, form: NormalFloat, shape: Sequence[int]) -> Tensor:
    """fp32, of the given shape."""
    absmax = decode_absmax(parts.absmax_codes, parts.scales, parts.offset, form)
    return decode(parts.codes, absmax, form.bits).flatten()[: math.prod(shape)].view(*shape)


class NormalFloatLinear(QuantisedLinear):
    """A linear layer whose weight is stored as this file describes."""

    kind = "normal_float"

    def __init__(self, in_features: int, out_features: int, transposed: bool = False, **form: Any) -> None:
        super().__init__(in_features, out_features, transposed)
        self.form = NormalFloat(**form)
        self.elements, self.blocks, scales = self.form.sizes(in_features * out_features)
        raw = torch.int32 if self.form.dtype is torch.float32 else torch.int16
        self.register_buffer("codes", torch.zeros(packed_bytes(self.elements, self.form.bits), dtype=torch.uint8))
        absmax = packed_bytes(self.blocks, self.form.absmax_bits)
        self.register_buffer("absmax", torch.zeros(absmax, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(scales, dtype=raw))
        self.register_buffer("offset", torch.zeros(1, dtype=torch.int32))

    def settings(self) -> dict[str, Any]:
        return {**asdict(self.form), "transposed": self.transposed}

    def fill(self, parts: Quantised) -> NormalFloatLinear:
        self.codes = pack(parts.codes.flatten(), self.form.bits)
        self.absmax = pack(parts.absmax_codes, self.form.absmax_bits)
        self.scales, self.offset = as_raw(parts.scales), as_raw(parts.offset.view(1))
        return self

    def parts(self) -> Quantised:
        codes = unpack(self.codes, self.form.bits, self.elements).view(self.blocks, -1)
        absmax = unpack(self.absmax, self.form.absmax_bits, self.blocks)
        return Quantised(codes, absmax, self.scales.view(self.form.dtype), self.offset.view(torch.float32)[0])

    def decode(self) -> Tensor:
        return dequantise(self.parts(), self.form, (self.out_features, self.in_features))

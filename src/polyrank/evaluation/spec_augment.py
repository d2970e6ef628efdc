"""SpecAugment masks for test-time augmentation: one band of time and one band of frequency set to zero.

Width w = floor(u * fraction * size), first position floor(v * (size - u * fraction * size)), u and v uniform in [0, 1):
one time mask, then one frequency mask, the same for every row of the batch.

Source: Park et al. 2019 (SpecAugment), without time warping; the masks' fractions are those of Letzelter et al. 2025.
Differs: `size` along time is the longest row without its padding, where a mask tells it (Whisper's features are always
padded to 30 s: most masks would fall on silence that the encoder does not see).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.errors import ConfigError

LIGHT, MEDIUM, STRONG = (0.2, 0.3), (0.4, 0.6), (0.6, 0.9)
"""(time, frequency) fractions of the published comparison."""


def draw_band(size: int, fraction: float, generator: torch.Generator | None = None) -> tuple[int, int]:
    """First and last-but-one position of a band of a dimension: 0 <= first <= end <= size, end - first < fraction size.

    Raises: ConfigError for a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"the fraction of a SpecAugment mask must be in [0, 1], got {fraction}")
    u, v = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    width = u * fraction * size
    first = math.floor(v * (size - width))
    return first, first + math.floor(width)


def spec_augment(
    features: Tensor,
    time_fraction: float,
    frequency_fraction: float,
    *,
    time_axis: int = -1,
    length: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A copy of log-mel features with one band of time and one of frequency set to 0.

    Args:
        features: (rows, mel, time), or (rows, time, mel) with time_axis -2; Whisper and Qwen2-Audio have the former.
        time_fraction, frequency_fraction: upper bounds of the bands' widths, as shares of their dimension.
        length: frames of the longest row; default: all.
        generator: of the random numbers; default: torch's own, on the CPU.
    Raises: ConfigError for features of another shape, an axis that is not one of the last two, a bad fraction.
    """
    if features.dim() != 3 or time_axis not in (-1, -2):
        raise ConfigError(
            f"SpecAugment takes features (rows, mel, time), or time_axis -2, got a shape of {tuple(features.shape)} "
            f"and time_axis {time_axis}"
        )
    masked = features.clone()
    rows = masked if time_axis == -1 else masked.transpose(1, 2)
    first, end = draw_band(rows.shape[2] if length is None else length, time_fraction, generator)
    rows[:, :, first:end] = 0
    first, end = draw_band(rows.shape[1], frequency_fraction, generator)
    rows[:, first:end, :] = 0
    return masked

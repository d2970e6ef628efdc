"""LoRMA against building the adapted weight at each call, as released, and PEFT's LoRA: one layer, both passes.

The released way turns the rows of B A by a gather with a kept index table, multiplies the square matrix with the
weight, and applies the product; for "plus" it adds the identity instead of turning.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from _adapter_layers import (
    arguments,
    at_most,
    base_layer,
    compare,
    finish,
    injection,
    lora,
    peft_layer,
    shapes,
    worst,
)
from peft import LoraConfig
from torch import nn

from polyrank.adapters.lorma import LormaConfig

RANK = 8
TOKENS = [16, 64, 256, 1024, 2048]
LARGE_TOKENS = [64, 256, 2048]
NOISE = 1.03  # two sides that do the same work differ by this much from run to run


class Released(nn.Module):
    """y = (S W) x + bias or (W S) x + bias, S (n, n) formed at each call."""

    def __init__(self, shape: tuple[int, int], variant: str, side: str) -> None:
        super().__init__()
        self.base, self.variant, self.side = base_layer(shape), variant, side
        n = shape[1] if side == "pre" else shape[0]
        self.A, self.B = nn.Parameter(torch.randn(RANK, n) * 0.1), nn.Parameter(torch.randn(n, RANK) * 0.1)
        position = torch.arange(n)
        if variant == "pi":
            self.register_buffer("index", (position[None, :] - position[:, None]) % n)
        else:
            self.register_buffer("identity", torch.eye(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        M = self.B @ self.A
        S = M.gather(1, self.index) * 0.5 if self.variant == "pi" else self.identity + 0.5 * M
        weight = S @ self.base.weight if self.side == "pre" else self.base.weight @ S
        return nn.functional.linear(x, weight, self.base.bias)


def sides(shape: tuple[int, int], variant: str, side: str) -> dict[str, nn.Module]:
    ours = LormaConfig(r=RANK, lora_alpha=RANK, variant=variant, side=side, init_weights=False)
    return {
        "polyrank LoRMA": peft_layer(shape, ours),
        "released LoRMA": Released(shape, variant, side),
        f"PEFT LoRA r={RANK}": lora(shape, RANK),
        "no adapter": base_layer(shape),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv, "lorma", __doc__.splitlines()[0])
    started, rows, few, many = time.perf_counter(), [], [], []
    for name, shape, rounds in shapes(args):
        for variant, side in (("pi", "pre"), ("pi", "post"), ("plus", "pre"), ("plus", "post")):
            layers = sides(shape, variant, side)
            for tokens in args.tokens or (TOKENS if name == "768" else LARGE_TOKENS):
                settings = {"variant": variant, "side": side, "r": RANK}
                new = compare(layers, "polyrank LoRMA", shape, tokens, rounds, settings)
                ratio = next(row.figures["ours_over_this"] for row in new if row.method == "released LoRMA")
                few += [ratio] if tokens <= 256 else []
                many.append(ratio)
                rows += new
    targets = {
        f"at least 1.5 times faster than building the weight at 256 tokens or fewer{worst(few, inverse=True)}": (
            at_most(few, 1 / 1.5)
        ),
        f"never slower (share of its time){worst(many)}": at_most(many, NOISE),
    }
    if not args.skip_injection:
        names = ["c_attn", "c_proj", "c_fc"]
        configs = {
            "polyrank LoRMA": lambda: LormaConfig(target_modules=names),
            "PEFT LoRA": lambda: LoraConfig(target_modules=names),
        }
        new = list(injection(configs))
        rows += new
        growth = new[0].figures["growth"]
        targets[f"time per adapter does not grow over 60: x {growth:.2f}"] = growth <= 1.1
    return finish("lorma", rows, args, started, targets)


if __name__ == "__main__":
    raise SystemExit(main())

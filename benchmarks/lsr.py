"""LSR against the released way of computing it, PEFT's LoKr and PEFT's LoRA: one layer, forward and backward.

The released way forms both Kronecker sums term by term (torch.kron) at each call and then applies two linear maps.
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
from peft import LoKrConfig, LoraConfig
from torch import nn

from polyrank.adapters.lsr import LsrConfig, near_square

GRID = [(t, r) for r in (2, 4, 8) for t in (1, 4, 16)]
LARGE_GRID = [(1, 8), (16, 2), (4, 4)]
TOKENS = [2048]
NOISE = 1.03  # two sides that do the same work differ by this much from run to run


class Released(nn.Module):
    """y = W x + s (sum_i B1_i (x) B2_i) (sum_i A1_i (x) A2_i) x; for the other mode the products are summed."""

    def __init__(self, shape: tuple[int, int], terms: int, rank: int, mode: str) -> None:
        super().__init__()
        self.base, self.mode = base_layer(shape), mode
        (k1, k2), (d1, d2) = near_square(shape[0]), near_square(shape[1])
        sizes = [(terms, rank, k1), (terms, rank, k2), (terms, d1, rank), (terms, d2, rank)]
        self.A1, self.A2, self.B1, self.B2 = (nn.Parameter(torch.randn(size) * 0.1) for size in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = [torch.kron(a, b) for a, b in zip(self.A1, self.A2, strict=True)]
        right = [torch.kron(a, b) for a, b in zip(self.B1, self.B2, strict=True)]
        if self.mode == "product_of_sums":
            A, B = torch.stack(left).sum(0), torch.stack(right).sum(0)
            return self.base(x) + (x @ A.T @ B.T) * 0.5
        weight = sum(b @ a for a, b in zip(left, right, strict=True))
        return self.base(x) + (x @ weight.T) * 0.5


def sides(shape: tuple[int, int], terms: int, rank: int, mode: str) -> dict[str, nn.Module]:
    ours = LsrConfig(r=rank, num_terms=terms, mode=mode, lora_alpha=rank / 2, init_weights=False)
    lokr = LoKrConfig(r=rank, alpha=rank, decompose_both=True, init_weights=False)
    return {
        "polyrank LSR": peft_layer(shape, ours),
        "released LSR": Released(shape, terms, rank, mode),
        "PEFT LoKr": peft_layer(shape, lokr),
        f"PEFT LoRA r={rank}": lora(shape, rank),
        "no adapter": base_layer(shape),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv, "lsr", __doc__.splitlines()[0])
    started, rows = time.perf_counter(), []
    ratios: dict[str, list[float]] = {name: [] for name in ("released", "lokr", "lokr, t=1", "lora")}
    for name, shape, rounds in shapes(args):
        grid = [(t, r, "product_of_sums") for t, r in (GRID if name == "768" else LARGE_GRID)]
        grid += [(t, r, "sum_of_products") for t, r in ([(4, 2), (16, 2), (4, 8)] if name == "768" else [])]
        for tokens in args.tokens or TOKENS:
            for t, r, mode in grid:
                settings = {"t": t, "r": r, "mode": mode}
                new = compare(sides(shape, t, r, mode), "polyrank LSR", shape, tokens, rounds, settings)
                found = {row.method: row.figures["ours_over_this"] for row in new}
                ratios["released"].append(found["released LSR"])
                ratios["lokr"].append(found["PEFT LoKr"])
                if t == 1:
                    ratios["lokr, t=1"].append(found["PEFT LoKr"])
                if (t, r) == (1, 8):
                    ratios["lora"].append(found["PEFT LoRA r=8"])
                rows += new
    equal = worst(ratios["lokr, t=1"], inverse=True).removeprefix(": ").removesuffix(" at worst")
    targets = {
        f"at least as fast as the released way at every (t, r){worst(ratios['released'])}": (
            at_most(ratios["released"], NOISE)
        ),
        f"at least 1.5 times faster than LoKr at every (t, r){worst(ratios['lokr'], inverse=True)}"
        + (f" ({equal} at t=1, where the two are equal)" if equal else ""): at_most(ratios["lokr"], 1 / 1.5),
        f"at most 1.25 times LoRA's time at t=1, r=8{worst(ratios['lora'])}": at_most(ratios["lora"], 1.25),
    }
    if not args.skip_injection:
        names = ["c_attn", "c_proj", "c_fc"]
        configs = {
            "polyrank LSR": lambda: LsrConfig(target_modules=names),
            "PEFT LoRA": lambda: LoraConfig(target_modules=names),
        }
        new = list(injection(configs))
        rows += new
        growth = new[0].figures["growth"]
        targets[f"time per adapter does not grow over 60: x {growth:.2f}"] = growth <= 1.1
    return finish("lsr", rows, args, started, targets)


if __name__ == "__main__":
    raise SystemExit(main())

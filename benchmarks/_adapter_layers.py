"""One adapted layer, forward and backward, side by side with its peers; and the injection of many adapters."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from _measure import interleaved, medians, peak_bytes
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from polyrank.core.records import Metric, Row, new_record, write_record

SHAPES = {"768": (768, 768), "11008": (4096, 11008)}
METRICS = {
    "time_ms": Metric(unit="ms", better="lower", label="forward + backward", role="cost"),
    "peak_mib": Metric(unit="MiB", better="lower", label="peak memory", role="cost"),
    "ours_over_this": Metric(better="lower", label="polyrank's time / this one's"),
    "first_ten_ms": Metric(unit="ms", better="lower", label="injection, first ten"),
    "last_ten_ms": Metric(unit="ms", better="lower", label="injection, last ten"),
    "growth": Metric(better="lower", label="last ten / first ten"),
}


def base_layer(shape: tuple[int, int]) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*shape).requires_grad_(False)


def peft_layer(shape: tuple[int, int], config: PeftConfig) -> nn.Module:
    """A Linear adapted by PEFT or polyrank, as a user gets it."""
    config.target_modules = {"0"}
    return get_peft_model(nn.Sequential(base_layer(shape)), config).base_model.model.train()


def step(module: nn.Module, tokens: int, features: tuple[int, int]) -> Callable[[], None]:
    """Forward and backward of a layer in the middle of a network: the input has a gradient too."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, features[0], generator=generator).requires_grad_()
    g = torch.randn(tokens, features[1], generator=generator)

    def run() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(g)

    return run


def compare(
    sides: Mapping[str, nn.Module],
    ours: str,
    shape: tuple[int, int],
    tokens: int,
    rounds: int,
    settings: Mapping[str, object],
) -> list[Row]:
    """Rows of one comparison, printed as they come: time, peak memory, and our time over each side's."""
    steps = {name: step(module, tokens, shape) for name, module in sides.items()}
    times = medians(interleaved(steps, rounds=rounds))
    rows = []
    for name, run in steps.items():
        figures = {
            "time_ms": times[name] * 1e3,
            "peak_mib": peak_bytes(run) / 2**20,
            "ours_over_this": times[ours] / times[name],
        }
        where = {"layer": f"{shape[0]}->{shape[1]}", "tokens": tokens, **settings}
        rows.append(Row(method=name, figures=figures, settings=where))
        words = " ".join(f"{key}={value}" for key, value in where.items())
        print(
            f"{words:<58} {name:<16} {figures['time_ms']:9.1f} ms {figures['peak_mib']:8.1f} MiB   "
            f"ours / this {figures['ours_over_this']:.2f}",
            flush=True,
        )
    return rows


def injection(configs: Mapping[str, Callable[[], PeftConfig]], count: int = 60) -> Iterator[Row]:
    """Time of each of `count` `add_adapter` calls on one 12-layer GPT-2 of width 32: do they get slower?"""
    for name, config in configs.items():
        torch.manual_seed(0)
        sizes = GPT2Config(vocab_size=64, n_embd=32, n_layer=12, n_head=2, bos_token_id=0, eos_token_id=0)
        times = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(GPT2LMHeadModel(sizes), config())
            for number in range(count):
                gc.collect()
                start = time.perf_counter()
                model.add_adapter(f"adapter{number}", config())
                times.append(time.perf_counter() - start)
        first, last = statistics.median(times[:10]) * 1e3, statistics.median(times[-10:]) * 1e3
        figures = {"first_ten_ms": first, "last_ten_ms": last, "growth": last / first}
        print(f"{count} adapters: {name:<16} first ten {first:.1f} ms, last ten {last:.1f} ms, x {last / first:.2f}")
        yield Row(method=name, figures=figures, settings={"layer": "injection"})


def lora(shape: tuple[int, int], rank: int) -> nn.Module:
    """PEFT's LoRA with a B that is not zero."""
    return peft_layer(shape, LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False))


def arguments(argv: Sequence[str] | None, name: str, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"polyrank bench {name}", description=description)
    parser.add_argument("--layer", choices=[*SHAPES, "all"], default="all", help="768->768, 4096->11008 or both")
    parser.add_argument("--tokens", type=int, nargs="+", help="rows of the input; default: those of the benchmark")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds for the small layer (5 for the large one)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-injection", action="store_true")
    parser.add_argument("--output", type=Path, help=f"default: results/bench-{name}.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    return args


def shapes(args: argparse.Namespace) -> Iterator[tuple[str, tuple[int, int], int]]:
    """(name, shape, rounds) of the layers asked for."""
    for name, shape in SHAPES.items():
        if args.layer in (name, "all"):
            yield name, shape, args.rounds if name == "768" else min(args.rounds, 5)


def verdict(met: bool | None) -> str:
    """What is said of a target: met, missed or not measured."""
    return "not measured" if met is None else "met" if met else "missed"


def at_most(ratios: Sequence[float], limit: float) -> bool | None:
    """Whether the largest ratio lies within the limit; None where there is no ratio."""
    return max(ratios) <= limit if ratios else None


def worst(ratios: Sequence[float], inverse: bool = False) -> str:
    """The largest ratio (or one over it) in words, for the text of a target; empty where there is none."""
    return f": {1 / max(ratios) if inverse else max(ratios):.2f} at worst" if ratios else ""


def finish(
    name: str, rows: list[Row], args: argparse.Namespace, started: float, targets: Mapping[str, bool | None]
) -> int:
    """Write the record and say of each target whether it was met; None: nothing that it speaks of was measured."""
    for target, met in targets.items():
        print(f"{verdict(met).upper() if met is False else verdict(met)}  {target}")
    record = new_record(
        f"bench-{name}",
        "bench",
        METRICS,
        rows,
        config=vars(args),
        time_s=time.perf_counter() - started,
        notes=[f"{verdict(met)}: {target}" for target, met in targets.items()],
    )
    print(write_record(record, args.output), file=sys.stderr)
    return 0

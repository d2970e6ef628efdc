"""A training step of every method against PEFT's LoRA: time and memory, one small Llama, all linear layers adapted.

Methods, options and sizes are those of recipe methods/table: each has as nearly as can be the parameters of LoRA r=8.
A step is forward, backward and optimiser step, with the method's own optimiser and losses. Memory is what the model and
the optimiser hold, and the peak of a step's allocations above it. Rounds are interleaved, medians are compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import interleaved, medians, peak_bytes
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import polyrank  # noqa: F401  registers the adapter methods
from polyrank.core.records import Metric, Row, new_record, write_record
from polyrank.recipes._frame.compose import check_overrides, compose
from polyrank.recipes._methods.budget import adapter_config, matched_method
from polyrank.recipes._methods.entry import MethodEntry
from polyrank.recipes._methods.parts import initialise, optimizer_arguments, trainer_class
from polyrank.recipes._methods.preparation import Place, base_trainer, prepare
from polyrank.training.memory import resident_bytes

METRICS = {
    "time_ms": Metric("ms", "lower", "a step", "cost"),
    "time_over_lora": Metric("", "lower", "time over LoRA's", "quality"),
    "memory_bytes": Metric("bytes", "lower", "peak memory", "cost"),
    "memory_over_lora": Metric("", "lower", "memory over LoRA's"),
    "trainable_parameters": Metric("", None, "trainable parameters"),
}
STEPS = 1000
"""Of the run that a step is taken from: enough for the schedules of all methods."""
COSTLY = 1.5
"""Times LoRA's step from which on a method's page says why."""


@dataclass
class Side:
    """One method: its step, and what it trains."""

    method: MethodEntry
    step: Callable[[], None]
    trainer: Any

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)

    def memory_bytes(self) -> int:
        return resident_bytes(self.trainer.model, self.trainer.optimizer) + peak_bytes(self.step)


def base_model(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=width, intermediate_size=8 * width // 3 // 8 * 8, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 64, max_position_embeddings=256,
        )
    )  # fmt: skip


def make_side(table: Any, method: MethodEntry, base: LlamaForCausalLM, rows: list[dict[str, Any]], folder: str) -> Side:
    """The method on its base, the optimiser made, one step taken."""

    def collate(chosen: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([row[key] for row in chosen]) for key in rows[0]}

    class Given(Place):
        def batches(self, count: int = 1, size: int = 1) -> list[dict[str, Any]]:
            return [collate(rows)]

    method = matched_method(table, base, method)
    adapter = adapter_config(method, table.model, head=False, num_steps=STEPS)
    model = prepare(method, base, adapter, Given(Path(folder, method.name), STEPS, rows, None))
    initialise(method.initialiser, model, rows, collate, seed=0)
    kind, more = trainer_class(method.losses, base_trainer(model), "generation")
    more |= optimizer_arguments(method.optimizer, model, 1e-4, 0.0)
    arguments = TrainingArguments(output_dir=folder, learning_rate=1e-4, report_to=[], use_cpu=True)
    trainer = kind(model=model, args=arguments, **more)
    trainer.create_optimizer()
    trainer.state.global_step = trainer.state.max_steps = STEPS  # the end of a run: all scheduled losses are on
    batch = collate(rows)

    def step() -> None:
        model.train()
        trainer.compute_loss(model, dict(batch)).backward()
        trainer.optimizer.step()
        model.zero_grad(set_to_none=True)

    step()
    return Side(method, step, trainer)


def measure(args: argparse.Namespace) -> list[Row]:
    """One row for each method, LoRA first, printed as they come."""
    table = compose(check_overrides(["recipe=methods/table"])).settings
    names = ["lora", *(name for name in args.methods or table.methods if name != "lora")]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 2048, (args.batch, args.length), generator=generator)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for name in names:
            torch.manual_seed(0)
            sides[name] = make_side(table, table.methods[name], base_model(args.width, args.layers), rows, folder)
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        times = medians(interleaved({name: side.step for name, side in sides.items()}, args.rounds, clock=clock))
        memory = {name: side.memory_bytes() for name, side in sides.items()}
    found = []
    for name, side in sides.items():
        figures = {
            "time_ms": times[name] * 1e3,
            "time_over_lora": times[name] / times["lora"],
            "memory_bytes": memory[name],
            "memory_over_lora": memory[name] / memory["lora"],
            "trainable_parameters": side.parameters,
        }
        option = side.method.match or "r"
        size = f"{option}={side.method.options.get(option)}"
        found.append(Row(side.method.label, figures, settings={"size": size}))
        print(
            f"{side.method.label:<12} {figures['time_ms']:8.1f} ms  x {figures['time_over_lora']:.2f}   "
            f"{memory[name] / 2**20:7.1f} MiB  x {figures['memory_over_lora']:.2f}   {side.parameters:,} parameters",
            flush=True,
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="polyrank bench methods", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="names of conf/method; default: all of recipe methods/table")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, steadier on a machine in use"
    )
    parser.add_argument("--output", type=Path, help="default: results/bench-methods.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    rows = measure(args)
    costly = [f"{row.method} x {row.figures['time_over_lora']:.2f}" for row in rows[1:]
              if row.figures["time_over_lora"] > COSTLY]  # fmt: skip
    notes = [f"More than {COSTLY} times LoRA's step: {', '.join(costly) or 'none'}."]
    print("\n".join(notes))
    record = new_record(
        "bench-methods", "bench", METRICS, rows, config=vars(args), time_s=time.perf_counter() - started, notes=notes
    )
    print(write_record(record, args.output), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

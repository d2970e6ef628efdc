"""The whole toy experiment (data, training, evaluation, K = 1 and K = 2) against the one-example-at-a-time loop.

The peer's side, in own words after the LoRA-MCL project's toy code: sequences drawn token by token; stock PEFT LoRA
adapters, one active at a time; one forward for each sequence and hypothesis, all graphs kept for one backward of the
mean of the minima; evaluation of 1 000 held-out sequences one by one. (That code trains nothing for K = 2 with stock
PEFT, which freezes the adapters that are not active; here all are kept trainable, as it means to.)

Both sides are timed by slices in interleaved rounds: drawing, steps, evaluation. The medians are then added up over 501
steps of 128 sequences and an evaluation of 1 000 held-out sequences under every hypothesis every 10 steps (52 of them):
`speedup`, the same work on both sides. Each side does something more of its own: the peer a full pass over the training
data before step 0, polyrank a last evaluation on 10 000 sequences; `speedup_as_run` has both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from polyrank.core.records import Metric, Row, new_record, write_record
from polyrank.data.markov import MarkovDataset
from polyrank.recipes._markov.model import TARGETS, MarkovConfig
from polyrank.recipes._markov.training import ArmTraining, train

from ._measure import interleaved

METRICS = {
    "draw_s": Metric("s", "lower", "drawing the training data"),
    "step_s": Metric("s", "lower", "one optimiser step"),
    "evaluation_s": Metric("s", "lower", "one evaluation"),
    "total_s": Metric("s", "lower", "whole training"),
    "first_pass_s": Metric("s", "lower", "pass over the training data before step 0"),
    "final_s": Metric("s", "lower", "last evaluation, on the larger sample"),
    "measured_total_s": Metric("s", "lower", "whole training, run in full"),
    "speedup": Metric("x", "higher", "times faster, same work"),
    "speedup_as_run": Metric("x", "higher", "times faster, each side as it is run"),
}


class OneByOne:
    """The peer's side for one K. Every method runs a slice and is timed from outside."""

    def __init__(self, config: MarkovConfig, k: int) -> None:
        torch.manual_seed(0)
        architecture = GPTNeoConfig(
            vocab_size=2,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            attention_types=[[["local"], config.num_layers]],
            window_size=config.window_size,
            max_position_embeddings=1024,
            resid_dropout=0.0,
            embed_dropout=0.0,
            attention_dropout=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
        lora = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
        self.config, self.names = config, [f"lora{i}" for i in range(k)]
        self.model = get_peft_model(GPTNeoForCausalLM(architecture), lora, adapter_name="lora0")
        for name in self.names[1:]:
            self.model.add_adapter(name, lora)
        self.adapters = [p for name, p in self.model.named_parameters() if "lora_" in name]
        for parameter in self.adapters:
            parameter.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(self.adapters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=1e-3)

    def draw(self, num: int) -> torch.Tensor:
        """Sequences, token by token."""
        chains, rows = self.config.chains, []
        for _ in range(num):
            chain = chains[np.random.randint(len(chains))]  # noqa: NPY002 (as the peer draws)
            row = [np.random.choice(2)]  # noqa: NPY002
            while len(row) < self.config.sequence_length:
                row.append(np.random.choice(2, p=chain[row[-1]]))  # noqa: NPY002
            rows.append(torch.tensor(row))
        return torch.stack(rows)

    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """(K, B), one forward for each entry."""
        stacked = []
        for name in self.names:
            self.model.set_adapter(name)
            for parameter in self.adapters:
                parameter.requires_grad_(True)
            rows = [self.model(input_ids=row[None], labels=row[None]).loss for row in tokens]
            stacked.append(torch.stack(rows))
        return torch.stack(stacked)

    def step(self, tokens: torch.Tensor) -> None:
        self.model.train()
        self.losses(tokens).amin(0).mean().backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    @torch.no_grad()
    def evaluate(self, tokens: torch.Tensor) -> float:
        self.model.eval()
        return float(self.losses(tokens).amin(0).mean())


def measure(
    config: MarkovConfig, k: int, rounds: int, rows: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Median times of both sides, each scaled from its slice to the whole: {side: {draw_s, step_s, evaluation_s}}."""
    peer, ours = OneByOne(config, k), ArmTraining(config, k, seed=0)
    tokens = ours.held_out
    for number in range(11):  # past the start: the hypotheses have parted
        ours.step(number)
    ours.evaluate()
    number = 11

    def our_steps() -> None:
        nonlocal number
        for _ in range(5):
            ours.step(number % config.num_steps)
            number += 1

    size = config.num_steps * config.batch_size
    slices: dict[str, tuple[Any, float]] = {
        "peer draw_s": (lambda: peer.draw(64), size / 64),
        "peer step_s": (lambda: peer.step(tokens[: config.batch_size]), 1.0),
        "peer evaluation_s": (lambda: peer.evaluate(tokens[:rows]), len(tokens) / rows),
        "ours draw_s": (lambda: MarkovDataset(config.chains, size, config.sequence_length), 1.0),
        "ours step_s": (our_steps, 1 / 5),
        "ours evaluation_s": (ours.evaluate, 1.0),
    }
    times = interleaved({name: run for name, (run, _) in slices.items()}, rounds=rounds, clock=clock)
    result: dict[str, dict[str, float]] = {"peer": {}, "ours": {}}
    for name, (_, factor) in slices.items():
        side, figure = name.split(" ")
        result[side][figure] = statistics.median(times[name]) * factor
    evaluations = len(range(0, config.num_steps, config.eval_every)) + 1
    for figures in result.values():
        evaluation_s = evaluations * figures["evaluation_s"]
        figures["total_s"] = figures["draw_s"] + config.num_steps * figures["step_s"] + evaluation_s
    forward_s = result["peer"]["evaluation_s"] / len(tokens) * size
    result["peer"]["first_pass_s"] = result["peer"]["draw_s"] + forward_s
    result["ours"]["final_s"] = result["ours"]["evaluation_s"] * config.num_final / len(tokens)
    return result


def compare(config: MarkovConfig, threads: int, options: argparse.Namespace, clock: Callable[[], float]) -> list[Row]:
    """The rows of one number of threads: both sides for each K, then for the whole experiment."""
    rows, names = [], {"peer": "one example at a time", "ours": "polyrank"}
    sums = {"peer": {"total_s": 0.0, "first_pass_s": 0.0}, "ours": {"total_s": 0.0, "final_s": 0.0}}
    for k in config.hypotheses:
        measured = measure(config, k, options.rounds, options.rows, clock)
        for side, figures in measured.items():
            for figure in sums[side]:
                sums[side][figure] += figures[figure]
        if options.full:
            measured["ours"]["measured_total_s"] = train(config, k, 0)[1].time_s
        for side, figures in measured.items():
            rows.append(Row(names[side], figures, None, {"K": str(k), "threads": threads}))
    peer, ours = sums["peer"], sums["ours"]
    speedup = {
        "speedup": peer["total_s"] / ours["total_s"],
        "speedup_as_run": sum(peer.values()) / sum(ours.values()),
    }
    whole = {"K": "1 and 2", "threads": threads}
    return [*rows, Row(names["peer"], peer, None, whole), Row(names["ours"], {**ours, **speedup}, None, whole)]


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write results/bench-markov.json (results/scratch/ from a dirty tree)."""
    parser = argparse.ArgumentParser(prog="polyrank bench markov", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each slice (default 5)")
    parser.add_argument("--rows", type=int, default=50, help="sequences of the peer's evaluation slice (default 50)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="torch threads (default: 1, then 2)")
    parser.add_argument("--cpu-clock", action="store_true", help="processor time, for a shared machine and one thread")
    parser.add_argument("--full", action="store_true", help="also run polyrank's whole experiment, as a check")
    parser.add_argument("--output", default=None, help="result file (default: bench-markov.json of the results folder)")
    options = parser.parse_args(argv)
    if options.cpu_clock and options.threads != [1]:
        parser.error("--cpu-clock adds up the time of all threads; use it with --threads 1")
    clock = time.process_time if options.cpu_clock else time.perf_counter
    started, config = time.perf_counter(), MarkovConfig()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        rows += compare(config, threads, options, clock)
    record = new_record(
        "bench-markov",
        "bench",
        METRICS,
        rows,
        config={**vars(options), "steps": config.num_steps},
        time_s=time.perf_counter() - started,
        notes=[
            "total_s is added up from medians of timed slices, for both sides alike: draw_s + 501 step_s + 52"
            " evaluation_s. The peer's draw_s is timed on 64 sequences, its step_s on whole steps of 128, its"
            f" evaluation_s on {options.rows} of the 1 000 sequences under each of the K hypotheses, and scaled up.",
            "first_pass_s (the peer's pass over the training data before step 0: drawing and a forward for each"
            " sequence and hypothesis, from the same slices) and final_s (polyrank's last evaluation, on 10 000"
            " sequences, from evaluation_s) are in speedup_as_run only.",
        ],
    )
    for row in rows:
        figures = {key: round(value, 4) for key, value in row.figures.items()}
        print(f"{row.method:24s} K={row.settings['K']:8s} threads={row.settings['threads']}", figures)
    print("written:", write_record(record, options.output))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

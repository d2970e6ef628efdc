"""The toy experiment of LoRA-MCL: a mixture of Markov chains, one hypothesis against several, beside exact theory.

A random GPT-Neo is frozen; K LoRA hypotheses on its attention learn sequences that come from one of two chains. One
hypothesis converges to the average chain, two by winner-takes-all to the two chains. Losses and matrices are held
against exact values (`analysis.markov_theory`).

Source: LoRA-MCL (arXiv 2507.10419), the toy experiment; model, data and hyperparameters as in its released code.
Differs from that code: both hypotheses are really trained; the cosine schedule knows the number of steps; learned and
true matrices are matched by least error; matrices are averaged over all contexts (after a single token the best
prediction is the plain average of the chains, not the weighted one); lines are exact and of the data's own start;
seeds are honoured; batches go through the model at once; the final figures come from a sample ten times larger;
activation and attention run as one operation each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ConfigError
from ..core.files import append_json_line, atomic_write, parse_json, read_bytes, read_json_lines
from ..core.records import new_record, record_to_json
from ._frame.registry import recipes
from ._markov.model import MarkovConfig
from ._markov.report import METRICS, Theory, comparison_table, draw_figures, explain, result_row, write_markov_page
from ._markov.training import Arm, OnStep, train

__all__ = ["MarkovConfig", "run", "run_demo"]

QUICK: dict[str, Any] = {"num_steps": 120, "num_evaluation": 400, "num_final": 2000, "learning_rate": 2e-4}
"""What `run_demo(quick=True)` changes: a quarter of the steps, twice as large. The losses are not yet at their end."""


@recipes.decorator("markov")
def run(config: MarkovConfig, run_dir: Path) -> None:
    """Train every K under every seed, then write figures, table, page and result.

    `run_dir` gets arms/ (one JSON a training, so that a killed run goes on with the next), adapters/ (the model of each
    arm), metrics.jsonl, loss.png, transition_matrices.png, report.html and result.json.
    """
    started = time.perf_counter()
    theory, arms = Theory.of(config), []
    with one_thread(), _progress(config) as on_step_of:
        for seed in config.seeds:
            for k in config.hypotheses:
                arms.append(_arm(config, k, seed, run_dir, on_step_of(k, seed)))
    _finish(config, theory, arms, run_dir, time.perf_counter() - started)


def _arm(config: MarkovConfig, k: int, seed: int, run_dir: Path, on_step: OnStep) -> Arm:
    """One arm, from its file if it is done."""
    file = run_dir / "arms" / f"seed-{seed}-k-{k}.json"
    if file.exists():
        return Arm(**parse_json(read_bytes(file)))

    _forget(run_dir / "metrics.jsonl", seed, k)

    def note(step: int, measured: dict[str, Any] | None) -> None:
        if measured is not None:
            hidden = () if config.log_transition_matrices_during_training else ("matrices", "readout")
            shown = {key: value for key, value in measured.items() if key not in hidden}
            append_json_line(run_dir / "metrics.jsonl", {"seed": seed, "hypotheses": k, **shown})
        on_step(step, measured)

    model, arm = train(config, k, seed, note)
    folder = run_dir / "adapters" / f"seed-{seed}-k-{k}"
    model.save_pretrained(str(folder))
    atomic_write(file, json.dumps(asdict(arm)))
    return arm


def _forget(metrics: Path, seed: int, k: int) -> None:
    """Drop the lines that a killed training of this arm has left."""
    if metrics.exists():
        lines = [line for line in read_json_lines(metrics) if (line["seed"], line["hypotheses"]) != (seed, k)]
        atomic_write(metrics, "".join(json.dumps(line) + "\n" for line in lines))


def _finish(config: MarkovConfig, theory: Theory, arms: Sequence[Arm], run_dir: Path, time_s: float) -> dict[str, Any]:
    """Figures, page and result file of finished arms."""
    figures = draw_figures(config, theory, arms, run_dir)
    page = write_markov_page(config, theory, arms, figures, run_dir / "report.html")
    rows = [result_row(config, theory, arm) for arm in arms]
    lines = theory.lines(config)
    record = new_record(
        "markov",
        "run",
        METRICS,
        rows,
        config=asdict(config),
        time_s=time_s,
        details={
            "exact": {"mle": lines.mle, "limited": lines.limited, "wta": lines.wta, "band": list(lines.band or ())},
            "final": [{"K": arm.hypotheses, "seed": arm.seed, **asdict(arm.final)} for arm in arms],
        },
        notes=explain(config, theory, config.seeds[0])[1:],
    )
    atomic_write(run_dir / "result.json", record_to_json(record))
    return {"figures": list(figures.values()), "page": page, "rows": rows, "result": run_dir / "result.json"}


@contextmanager
def _progress(config: MarkovConfig) -> Iterator[Any]:
    """A bar for each training on standard error. Yields (K, seed) -> callback for `train`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(file=sys.stderr)) as bars:

        def on_step_of(k: int, seed: int) -> OnStep:
            name = "one hypothesis" if k == 1 else f"{k} hypotheses"
            if len(config.seeds) > 1:
                name += f", seed {seed}"
            bar = bars.add_task(name, total=config.num_steps, loss="")

            def on_step(step: int, measured: dict[str, Any] | None) -> None:
                bars.update(bar, completed=step)
                if measured is not None:
                    bars.update(bar, loss=f"held-out loss {measured['wta']:.4f}")

            return on_step

        yield on_step_of


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block on one thread: a model of width 64 gains nothing from more, and loses much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_demo(out_dir: Path, seed: int = 1235, quick: bool = False) -> dict[str, Any]:
    """The main job in small: transition1, one hypothesis against two, with figures, a table and a page in `out_dir`.

    Args: quick: with the settings of `QUICK`.
    Returns: {"figures": [Path], "page": Path, "result": Path, "header": [str], "table": [[str]], "notes": [str],
        "rows": [records.Row]}; the progress bars go to standard error, nothing to standard output.
    Raises: ConfigError for a seed that is no whole number >= 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed must be a whole number >= 0, got {seed!r}")
    config = MarkovConfig(seeds=[seed], **(QUICK if quick else {}))
    started = time.perf_counter()
    theory, out_dir = Theory.of(config), Path(out_dir)
    with one_thread(), _progress(config) as on_step_of:
        arms = [train(config, k, seed, on_step_of(k, seed))[1] for k in config.hypotheses]
    written = _finish(config, theory, arms, out_dir, time.perf_counter() - started)
    header, table = comparison_table(config, theory, arms)
    return {**written, "header": header, "table": table, "notes": explain(config, theory, seed)}

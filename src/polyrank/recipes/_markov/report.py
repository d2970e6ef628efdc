"""What the toy experiment is held against, and how its outcome is shown: exact levels, figures, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from ...analysis.markov_theory import MarkovMixture, largest_reachable_probability
from ...core.records import Metric, Row
from ...report.markov_figures import Curve, Lines, loss_figure, matrix_figure, save_png, write_page
from .model import MarkovConfig, build_base
from .training import Arm

METRICS = {
    "wta": Metric("nats/token", "lower", "winner's loss (knows the answer)"),
    "mixture": Metric("nats/token", "lower", "uniform-mixture NLL"),
    "above_optimum": Metric("nats/token", "lower", "winner's loss above the exact optimum"),
    "standard_error": Metric("nats/token", None, "standard error of the winner's loss, from the held-out sequences"),
    "matrix_error": Metric("", "lower", "largest error of a matrix entry"),
    "matrix_error_all": Metric("", None, "the same, entries a frozen head cannot reach included"),
    "reachable": Metric("", None, "largest probability that the head can express"),
    "smallest_win_share": Metric("", None, "smallest share of wins"),
    "trainable_parameters": Metric("", None, "trainable parameters", role="cost"),
    "time_s": Metric("s", None, "training and evaluation", role="cost"),
}


@dataclass(frozen=True)
class Theory:
    """Exact values for a configuration. Attributes: mixture (start as configured), stationary (the paper's lines)."""

    mixture: MarkovMixture
    stationary: MarkovMixture
    memory: int

    @classmethod
    def of(cls, config: MarkovConfig) -> Theory:
        same = {"chains": config.chains, "length": config.sequence_length}
        return cls(MarkovMixture(**same, start=config.start), MarkovMixture(**same, start="stationary"), config.memory)

    def target_matrices(self, config: MarkovConfig, k: int) -> np.ndarray | None:
        """(K, 2, 2) first-order chains that K hypotheses should show; None where the theory names none (K != M)."""
        if k == 1:
            return self.mixture.pbar[None]
        if k != len(config.chains):
            return None
        epsilon = config.epsilon if config.mode == "relaxed-wta" else 0.0
        if epsilon == 0.0:
            return config.chains
        return self.mixture.fit_hypotheses(config.chains, epsilon)

    def target_loss(self, config: MarkovConfig, k: int) -> float:
        """Best winner's loss, nats per token: memory-limited for K = 1, else that of first-order hypotheses."""
        if k == 1:
            return self.mixture.limited_memory_loss(self.memory)
        epsilon = config.epsilon if config.mode == "relaxed-wta" else 0.0
        if k == len(config.chains):
            return self.mixture.winner_loss(self.mixture.fit_hypotheses(config.chains, epsilon))
        return self.mixture.winner_loss(self.mixture.best_hypotheses(k, epsilon))

    def lines(self, config: MarkovConfig) -> Lines:
        """What the loss figure shows."""
        relaxed = config.mode == "relaxed-wta" and config.epsilon > 0 and max(config.hypotheses) > 1
        return Lines(
            mle=self.mixture.mle,
            limited=self.mixture.limited_memory_loss(self.memory),
            memory=self.memory,
            wta=self.mixture.wta_at_chains,
            relaxed=self.target_loss(config, len(config.chains)) if relaxed else None,
            band=(self.stationary.lower, self.stationary.mean_entropy_rate),
        )


def match_chains(matrices: Any, targets: Any) -> list[int]:
    """For each target (M, 2, 2) the learned matrix (K >= M, 2, 2) that stands for it: least total absolute error."""
    matrices, targets = np.asarray(matrices, dtype=float), np.asarray(targets, dtype=float)
    cost = np.abs(matrices[:, None] - targets[None]).sum(axis=(2, 3))
    choices = permutations(range(len(matrices)), len(targets))
    return list(min(choices, key=lambda chosen: sum(cost[k, m] for m, k in enumerate(chosen))))


def reachable(config: MarkovConfig, seed: int) -> float:
    """Largest probability that the output can express: 1 with a trained head, else the frozen head's bound."""
    if config.train_head:
        return 1.0
    return largest_reachable_probability(build_base(config, seed).lm_head.weight.detach().double().numpy())


def matrix_errors(matrices: Any, targets: Any, bound: float) -> tuple[float, float]:
    """Largest absolute error over matched entries: in rows whose probabilities are all within `bound`, and in all."""
    order, targets = match_chains(matrices, targets), np.asarray(targets)
    errors = np.abs(np.asarray(matrices)[order] - targets)
    within = errors[targets.max(axis=2) <= bound]
    return (float(within.max()) if within.size else math.nan), float(errors.max())


def result_row(config: MarkovConfig, theory: Theory, arm: Arm) -> Row:
    """The figures of one arm for a result file."""
    final, k = arm.final, arm.hypotheses
    bound, targets = reachable(config, arm.seed), theory.target_matrices(config, k)
    errors = matrix_errors(final.matrices, targets, bound) if targets is not None else (math.nan, math.nan)
    figures = {
        "wta": final.wta,
        "mixture": final.mixture,
        "above_optimum": final.wta - theory.target_loss(config, k),
        "standard_error": final.standard_error,
        "matrix_error": errors[0],
        "matrix_error_all": errors[1],
        "reachable": bound,
        "smallest_win_share": min(final.wins),
        "trainable_parameters": arm.trainable_parameters,
        "time_s": arm.time_s,
    }
    settings = {
        "chains": ", ".join(f"({p:g}, {q:g})" for p, q in config.transitions),
        "K": k,
        "rank": config.rank_of(k),
        "head": "trained" if config.train_head else "frozen",
    }
    return Row(method_name(config, k), figures, arm.seed, settings)


def method_name(config: MarkovConfig, k: int) -> str:
    if k == 1:
        return "LoRA-MLE (K=1)"
    suffix = f", epsilon={config.epsilon:g}" if config.mode == "relaxed-wta" else ""
    return f"LoRA-MCL (K={k}, {config.mode}{suffix})"


def draw_figures(config: MarkovConfig, theory: Theory, arms: Sequence[Arm], folder: Path) -> dict[str, Path]:
    """The two figures of the experiment as PNG files. Returns caption -> file."""
    curves = []
    for colour, k in enumerate(config.hypotheses):
        own = [arm for arm in arms if arm.hypotheses == k]
        steps = [entry["step"] for entry in own[0].history]
        label = "one hypothesis (MLE)" if k == 1 else f"K = {k}, winner's loss (MCL)"
        curves.append(Curve(label, steps, [[entry["wta"] for entry in arm.history] for arm in own], colour))
        if k > 1:
            mixture = [[entry["mixture"] for entry in arm.history] for arm in own]
            curves.append(Curve(f"K = {k}, uniform mixture (a likelihood)", steps, mixture, colour, thin=True))
    seeds = f"{len(config.seeds)} seeds" if len(config.seeds) > 1 else f"seed {config.seeds[0]}"
    chains = ", ".join(f"(p, q) = ({p:g}, {q:g})" for p, q in config.transitions)
    title = f"Mixture of {len(config.chains)} Markov chains, {chains}; {seeds}"
    losses = save_png(loss_figure(curves, theory.lines(config), title), folder / "loss.png")

    first = [arm for arm in arms if arm.seed == config.seeds[0]]
    several = next((arm for arm in first if arm.hypotheses == len(config.chains) and arm.hypotheses > 1), None)
    plain = next((arm for arm in first if arm.hypotheses == 1), None)
    learned, exact, relaxed = [], [], []
    if several is not None:
        order = match_chains(several.final.matrices, config.chains)
        for m, k in enumerate(order):
            learned.append((f"MCL, hypothesis {k}", several.final.matrices[k]))
            exact.append((f"true chain $P_{m + 1}$", config.chains[m]))
        targets = theory.target_matrices(config, several.hypotheses)
        if targets is not None and config.mode == "relaxed-wta":
            relaxed = [(rf"relaxed optimum, $\epsilon$ = {config.epsilon:g}", target) for target in targets]
    if plain is not None:
        learned.append(("MLE, one hypothesis", plain.final.matrices[0]))
        exact.append((r"weighted average $\bar{P}$", theory.mixture.pbar))
    figures = {"Held-out loss against training steps, with the exact levels.": losses}
    if learned:
        rows = [("learned", learned), ("exact", exact)] + ([("exact", relaxed)] if relaxed else [])
        grid = matrix_figure(rows, f"Transition matrices, seed {config.seeds[0]}")
        caption = "Learned transition matrices (mean prediction after each state) above the exact ones."
        figures[caption] = save_png(grid, folder / "transition_matrices.png")
    return figures


def comparison_table(config: MarkovConfig, theory: Theory, arms: Sequence[Arm]) -> tuple[list[str], list[list[str]]]:
    """Measured against exact values, for people: (header, rows of text)."""
    mixture, stationary = theory.mixture, theory.stationary
    header = ["", "measured", "exact", "what the exact value is"]
    rows = [
        ["MLE line", "", f"{mixture.mle:.4f}", f"entropy of the mixture, {config.start} start"],
        ["MCL band", "", f"{mixture.lower:.4f} .. {mixture.upper:.4f}", f"{config.start} start (this data)"],
        [
            "MCL band",
            "",
            f"{stationary.lower:.4f} .. {stationary.mean_entropy_rate:.4f}",
            "stationary start (the paper's)",
        ],
    ]
    for arm in arms:
        k, final = arm.hypotheses, arm.final
        level = f"best loss with memory {theory.memory}" if k == 1 else "optimum of first-order hypotheses"
        name = method_name(config, k) + (f", seed {arm.seed}" if len(config.seeds) > 1 else "")
        target = f"{theory.target_loss(config, k):.4f}"
        rows.append([name, f"{final.wta:.4f} ± {final.standard_error:.4f}", target, level])
        if k > 1:
            rows.append(["  as a uniform mixture", f"{final.mixture:.4f}", f"{mixture.mle:.4f}", "a proper likelihood"])
            shares = ", ".join(f"{share:.3f}" for share in final.wins)
            rows.append(["  shares of wins", shares, f"{1 / len(config.chains):.3f} each", "shares of the true chains"])
        targets = theory.target_matrices(config, k)
        if targets is None:
            continue
        what = "P-bar" if k == 1 else ("relaxed fixed point" if config.mode == "relaxed-wta" else "true chain")
        for m, chosen in enumerate(match_chains(final.matrices, targets)):
            name = f"  matrix of hypothesis {chosen}"
            rows.append(
                [name, _matrix(final.matrices[chosen]), _matrix(targets[m]), what + (f" {m + 1}" if k > 1 else "")]
            )
    return header, rows


def _matrix(matrix: Any) -> str:
    return " / ".join(" ".join(f"{value:.3f}" for value in row) for row in np.asarray(matrix))


def explain(config: MarkovConfig, theory: Theory, seed: int) -> list[str]:
    """Sentences that belong beside the figures: what limits the numbers."""
    mixture = theory.mixture
    text = [
        f"Each sequence of {config.sequence_length} tokens comes from one of {len(config.chains)} Markov chains. One"
        f" hypothesis learns their average; several, trained by winner-takes-all, take one chain each.",
        f"The winner's loss knows which hypothesis is right, so it is no likelihood. The uniform mixture of the"
        f" hypotheses is one, and may be held against the entropy of the data, {mixture.mle:.4f} nats per token.",
        f"The model sees the last {theory.memory} tokens; the best loss with that memory is"
        f" {mixture.limited_memory_loss(theory.memory):.4f}.",
        f"The table is measured on {config.num_final} held-out sequences; behind ± stands the standard error that"
        f" leaves. The curves are measured on {config.num_evaluation} others.",
    ]
    bound = reachable(config, seed)
    beyond = sorted({float(row.max()) for chain in config.chains for row in chain if row.max() > bound}, reverse=True)
    if beyond:
        values = ", ".join(f"{value:g}" for value in beyond)
        text.append(
            f"The output head is frozen at its random values: no probability above {bound:.3f} can be expressed, so"
            f" entries of {values} cannot be met. With train_head=true they can."
        )
    if config.mode == "relaxed-wta" and config.epsilon > 0:
        text.append(
            "Relaxed training draws each hypothesis towards the others on purpose: its optimum is the relaxed fixed"
            " point of the table, not the true chains, and its winner's loss lies above the band."
        )
    return text


def write_markov_page(
    config: MarkovConfig, theory: Theory, arms: Sequence[Arm], figures: dict[str, Path], path: Path
) -> Path:
    """The HTML page with table and figures."""
    header, rows = comparison_table(config, theory, arms)
    return write_page(
        path, "LoRA-MCL on a mixture of Markov chains", explain(config, theory, config.seeds[0]), header, rows, figures
    )

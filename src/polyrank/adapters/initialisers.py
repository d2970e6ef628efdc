"""Initial values from data for PEFT's stock LoRA layers, where PEFT's own deviate from the papers.

LoRA-GA: G (out, in) = mean gradient of W over a few batches = U S V^T. A and B take r of the first 2r singular vectors
each, with disjoint indices ("ArB2r": A = V[:, :r]^T, B = U[:, r:2r]), both scaled alike ("stable": out^(1/4) /
sqrt(gamma)), and W <- W - s B A keeps the function. With unit scale the first step of gradient descent is then along
the best rank-2r approximation of G.

EVA: A = the r strongest right-singular vectors of the layer's inputs X (tokens, in), B = 0; ranks are redistributed
over the layers, sum r_new = sum r, by ranking all components of all layers.

Source: Wang et al. 2024, LoRA-GA (arXiv 2407.05000); Paischer et al. 2024, EVA (arXiv 2410.07170).
Differs from PEFT 0.21: its LoRA-GA multiplies B by the gradient's singular values and leaves A alone, so that the start
depends on the loss's scale; here both get the paper's scale. Its EVA subtracts a running mean and ranks by the share of
all variance; here the inputs are not centred and the score is the paper's, unless asked otherwise. Batches of any
size count, a number of batches ends what does not converge, and a rotating subspace counts as converged.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.errors import ConfigError, DataError, check_choice
from ._base import AdapterLayer
from ._lora_layers import lora_layers, method_name

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")
SCORES = ("paper", "variance_ratio")

_log = logging.getLogger("polyrank")
Batch = Mapping[str, torch.Tensor]


# -- LoRA-GA ------------------------------------------------------------------------------------------------------


def base_gradients(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[torch.nn.Module, Batch], torch.Tensor] | None = None,
    adapter: str = "default",
) -> dict[str, torch.Tensor]:
    """Mean gradient of each adapted base weight over the batches, (out, in), fp32 or better, on the CPU.

    Adapters are disabled and dropout is off. A gradient is moved away as soon as it is there, so that the device holds
    one at a time.

    Args: loss: a mean over the batch; default `model(**batch).loss`.
    Raises: ConfigError for tied weights and quantised ones; DataError without batches.
    """
    layers = lora_layers(model, adapter, "LoRA-GA")
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    if len({id(weight) for weight in weights.values()}) < len(weights):
        raise ConfigError("two adapted layers share one weight: LoRA-GA would correct it twice")
    if odd := [name for name, weight in weights.items() if not weight.is_floating_point()]:
        raise ConfigError(f"LoRA-GA needs weights in floating point; {odd[0]!r} is quantised")
    sums: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[torch.Tensor], None]:
        def moved(weight: torch.Tensor) -> None:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            gradient = weight.grad.detach().to("cpu", dtype)
            weight.grad = None
            sums[name] = sums[name] + gradient if name in sums else gradient

        return moved

    count = 0
    with _only_trainable(model, list(weights.values())), _without_adapters(model):
        handles = [weight.register_post_accumulate_grad_hook(keep(name)) for name, weight in weights.items()]
        try:
            for count, batch in enumerate(batches, start=1):  # noqa: B007
                (loss(model, batch) if loss else model(**batch).loss).backward()
        finally:
            for handle in handles:
                handle.remove()
    if not count:
        raise DataError("no batch to take gradients from")
    return {name: _rows_out(layers[name], total / count) for name, total in sums.items()}


def lora_ga_factors(
    gradient: torch.Tensor, rank: int, direction: str = "ArB2r", seed: int = 0, exact: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) with orthonormal rows and B (out, r) with orthonormal columns from a gradient (out, in).

    Args: exact: a full decomposition; default: where a side has at most 1,024. Otherwise randomised, with a seed.
    Raises: ConfigError unless 2 r <= min(in, out).
    """
    check_choice("direction", direction, DIRECTIONS)
    if 2 * rank > min(gradient.shape):
        raise ConfigError(f"LoRA-GA needs 2 r <= min(in, out), got r = {rank} for {tuple(gradient.shape)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if exact or (exact is None and min(gradient.shape) <= 1024):
            U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
        else:
            U, _, V = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape), niter=4)
            Vh = V.T
        order = torch.randperm(2 * rank)
    indices = {
        "ArB2r": (range(rank), range(rank, 2 * rank)),
        "A2rBr": (range(rank, 2 * rank), range(rank)),
        "ArBr": (range(1, 2 * rank, 2), range(0, 2 * rank, 2)),
        "random": (order[:rank].tolist(), order[rank:].tolist()),
    }[direction]
    return Vh[list(indices[0])], U[:, list(indices[1])]


@torch.no_grad()
def initialise_lora_ga(
    model: torch.nn.Module,
    gradients: Mapping[str, torch.Tensor],
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
    norm_clip: bool = False,
    seed: int = 0,
    adapter: str = "default",
) -> dict[str, float]:
    """Write LoRA-GA's A and B into the adapter and take s B A out of the base weights.

    The base weights change. To have an adapter for the untouched base, save it now and again after training:
    `model.save_pretrained(final, path_initial_model_for_weight_conversion=initial)` writes the difference, of rank 2r.

    Args:
        gradients: from `base_gradients`.
        scale: "stable"; "weight_svd" (mean square root of W's r largest singular values over s); "gd_scale" (both over
            s); "unit".
        norm_clip: shrink both where an entry of s B A exceeds the largest entry of W.
    Returns: by layer, the norm of what the weight's own precision rounded away (0 in exact arithmetic).
    """
    check_choice("scale", scale, SCALES)
    layers = lora_layers(model, adapter, "LoRA-GA")
    start = str(getattr(getattr(model, "peft_config", {}).get(adapter), "init_lora_weights", "")).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "eva", "lora_ga")):
        raise ConfigError(f"LoRA-GA does not combine with init_lora_weights={start!r}: each sets A and B its own way")
    if missing := sorted(layers.keys() - gradients.keys()):
        raise ConfigError(f"no gradient for layer {missing[0]!r} (and {len(missing) - 1} more)")
    lost = {}
    for name, layer in layers.items():
        weight, s = layer.get_base_layer().weight, layer.scaling[adapter]
        rank, W = layer.r[adapter], _rows_out(layer, weight.detach().to(gradients[name].dtype))
        A, B = (f.to(W.device) for f in lora_ga_factors(gradients[name], rank, direction, seed))
        factor = {"stable": W.shape[0] ** 0.25 / math.sqrt(gamma), "gd_scale": 1.0 / s, "unit": 1.0}.get(scale)
        if factor is None:
            factor = float((torch.linalg.svdvals(W)[:rank] / s).sqrt().mean())
        if norm_clip:
            largest = float((s * factor**2 * (B @ A)).abs().max() / W.abs().max())
            factor /= math.sqrt(max(1.0, largest))
        for target, value in ((layer.lora_A[adapter], A), (layer.lora_B[adapter], B)):
            target.weight.copy_(factor * value)
        product = layer.lora_B[adapter].weight.to(W.dtype) @ layer.lora_A[adapter].weight.to(W.dtype)
        corrected = W - s * product
        weight.copy_(_rows_out(layer, corrected))
        lost[name] = float((_rows_out(layer, weight.detach().to(W.dtype)) - corrected).norm())
    return lost


# -- EVA ----------------------------------------------------------------------------------------------------------


@dataclass
class ActivationSpectrum:
    """The k strongest right-singular vectors of all rows seen so far, by incremental truncated SVD.

    Attributes: vectors (k, in), values (k,): of the rows, centred by their mean if asked for; rows: M; total: sum of
        all squared singular values, the discarded ones too; converged, after the last update.
    """

    k: int
    tau: float = 0.99
    center: bool = False
    rows: int = 0
    converged: bool = False
    values: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    vectors: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    squares: float = 0.0

    @property
    def total(self) -> float:
        return self.squares - (self.rows * float(self.mean.square().sum()) if self.center else 0.0)

    def update(self, rows: torch.Tensor) -> None:
        """Take in rows (tokens, in); any number of them."""
        if not len(rows):
            return
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.squares += float(rows.square().sum())
        mean, n, m = rows.mean(0), self.rows, len(rows)
        parts = [rows - mean if self.center else rows]
        if n:
            parts.insert(0, self.values[:, None] * self.vectors)
            if self.center:  # what the old and the new mean differ by is one more row
                parts.append(math.sqrt(n * m / (n + m)) * (self.mean - mean)[None])
        self.mean = (n * self.mean + m * mean) / (n + m) if n else mean
        self.rows = n + m
        _, values, vectors = torch.linalg.svd(torch.cat(parts), full_matrices=False)
        before, self.values, self.vectors = self.vectors, values[: self.k], vectors[: self.k]
        self.converged = before.shape == self.vectors.shape and self._stands_still(before)

    def _stands_still(self, before: torch.Tensor) -> bool:
        """Each component stays where it was, or all of them turn inside one subspace."""
        cosines = before @ self.vectors.T
        componentwise = cosines.diagonal().abs().min() >= self.tau
        return bool(componentwise or torch.linalg.svdvals(cosines).min() >= self.tau)

    def scores(self, score: str = "paper") -> torch.Tensor:
        """(k,): sigma^2 / ((M - 1) sum sigma), or sigma^2 over the total ("variance_ratio", the released code's)."""
        check_choice("score", score, SCORES)
        squares = self.values.square()
        if score == "variance_ratio":
            return squares / max(self.total, torch.finfo(squares.dtype).tiny)
        return squares / (max(1, self.rows - 1) * self.values.sum().clamp_min(torch.finfo(squares.dtype).tiny))


def redistribute(scores: Mapping[str, torch.Tensor], budget: int) -> dict[str, int]:
    """Ranks by layer: how many of its components are among the `budget` best of all layers; they sum to the budget."""
    ranked = sorted(((float(s), name, j) for name, row in scores.items() for j, s in enumerate(row)), reverse=True)
    ranks = dict.fromkeys(scores, 0)
    for _, name, _ in ranked[:budget]:
        ranks[name] += 1
    return ranks


@torch.no_grad()
def activation_spectra(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    components: Mapping[str, int],
    center: bool = False,
    tau: float = 0.99,
    use_labels: bool = True,
    maximum_batches: int = 200,
) -> dict[str, ActivationSpectrum]:
    """Spectra of the inputs of modules, streamed: the batches are cycled until all have converged.

    Padding (attention_mask 0) and, with `use_labels`, tokens without a label (-100) are left out. Modules that are
    given the very same tensor (queries, keys, values) share one spectrum.

    Args: components: k by module name. maximum_batches: where to stop, with a warning that names what did not converge.
    """
    if not len(batches):
        raise DataError("no batch to take activations from")
    spectra = {name: ActivationSpectrum(k, tau, center) for name, k in components.items()}
    collector = _Collector(spectra, use_labels)
    handles = [model.get_submodule(n).register_forward_pre_hook(collector.hook(n), with_kwargs=True) for n in spectra]
    try:
        with _without_adapters(model):
            for batch in itertools.islice(itertools.cycle(batches), max(1, maximum_batches)):
                collector.start(batch)
                model(**batch)
                if all(spectrum.converged for spectrum in spectra.values()):
                    break
            else:
                late = [name for name, spectrum in spectra.items() if not spectrum.converged]
                _log.warning("EVA: %d layers not converged after %d batches: %s", len(late), maximum_batches, late[:3])
    finally:
        for handle in handles:
            handle.remove()
    return spectra


def initialise_eva(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    center: bool = False,
    score: str = "paper",
    maximum_batches: int = 200,
    adapter: str = "default",
) -> dict[str, int]:
    """EVA's A, ranks and alphas for a model made with LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(...)).

    rho, tau, the label mask and whether alpha follows the rank are the config's; PEFT itself writes the values
    (`peft.initialize_lora_eva_weights`), the rank_pattern and the alpha_pattern, and takes out layers of rank 0.
    DyLoRA, ALLoRA and CoDyRA get EVA's A, the strongest direction first, and keep their ranks.

    Args: center, score: True and "variance_ratio" are the released code's choice.
    Returns: the new rank of each layer.
    """
    from peft import initialize_lora_eva_weights

    check_choice("score", score, SCORES)
    if method_name(model, adapter) in ("DYLORA", "ALLORA", "CODYRA"):
        return _own_layers_eva(model, batches, center, maximum_batches, adapter)
    layers, config = lora_layers(model, adapter, "EVA"), model.peft_config[adapter]
    if config.init_lora_weights != "eva":
        raise ConfigError(f'EVA needs LoraConfig(init_lora_weights="eva"), got {config.init_lora_weights!r}')
    settings = config.eva_config
    if settings.whiten:
        raise ConfigError("whitening divides by small singular values and is not offered here: use PEFT's own EVA")
    components = {name: round(layer.r[adapter] * settings.rho) for name, layer in layers.items()}
    spectra = activation_spectra(
        model, batches, components, center, settings.tau, settings.use_label_mask, maximum_batches
    )
    budget = sum(layer.r[adapter] for layer in layers.values())
    ranks = redistribute({name: spectrum.scores(score) for name, spectrum in spectra.items()}, budget)
    values = {name: spectra[name].vectors[:rank].contiguous() for name, rank in ranks.items()}
    initialize_lora_eva_weights(model, eva_state_dict=values, adapter_name=adapter, show_progress_bar=False)
    return ranks


@torch.no_grad()
def _own_layers_eva(
    model: torch.nn.Module, batches: Sequence[Batch], center: bool, maximum_batches: int, adapter: str
) -> dict[str, int]:
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, AdapterLayer) and m.has_adapter(adapter)}
    ranks = {name: layer.r[adapter] for name, layer in adapted.items()}
    spectra = activation_spectra(model, batches, ranks, center, maximum_batches=maximum_batches)
    for name, layer in adapted.items():
        vectors = spectra[name].vectors
        layer.parameter("A", adapter)[: len(vectors)] = vectors.to(layer.parameter("A", adapter))
    return ranks


class _Collector:
    """Feeds layer inputs to their spectra; modules given one tensor object share the first one's."""

    def __init__(self, spectra: dict[str, ActivationSpectrum], use_labels: bool) -> None:
        self.spectra, self.use_labels = spectra, use_labels
        self.mask: torch.Tensor | None = None
        self.fed: list[tuple[torch.Tensor, ActivationSpectrum]] = []

    def start(self, batch: Batch) -> None:
        self.fed.clear()
        self.mask = batch.get("attention_mask")
        labels = batch.get("labels") if self.use_labels else None
        if labels is not None and labels.ndim == 2:
            known = labels != -100
            self.mask = known if self.mask is None else known & self.mask.bool()

    def hook(self, name: str) -> Callable[..., None]:
        def take(_module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            spectrum = self.spectra[name]
            for tensor, known in self.fed:
                if tensor is x and known.k == spectrum.k:
                    self.spectra[name] = known
                    return
            self.fed.append((x, spectrum))
            fits = self.mask is not None and x.ndim == 3 and self.mask.shape == x.shape[:2]
            spectrum.update(x[self.mask.bool()] if fits else x.flatten(0, -2))

        return take


def _rows_out(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A weight as (out, in), or back: GPT-2's Conv1D stores (in, out)."""
    return weight.T if type(layer.get_base_layer()).__name__ == "Conv1D" else weight


@contextmanager
def _without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """The base model in eval mode."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def _only_trainable(model: torch.nn.Module, weights: list[torch.Tensor]) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

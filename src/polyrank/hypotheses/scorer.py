"""How likely each hypothesis is for an input: a small head on frozen features, trained on who won.

    c        (B, d)  mean of the frozen base model's last hidden state over the prompt (never over the target)
    gamma_k  = sigmoid(f_k(c))                        probability that hypothesis k wins, (B, K)
    loss     = mean_b sum_k BCE(gamma_kb, [k won b])
    pi_k     = gamma_k / sum_j gamma_j                weights of the hypotheses, (B, K)

With these weights the K hypotheses are a model that can be used without knowing the answer: the hypothesis of the
highest score, or the mixture sum_k pi_k p_k. The oracle figures of winner-takes-all need the reference.

Source: Letzelter et al. 2023, "Resilient Multiple Choice Learning" (the scoring heads and their loss).
Differs: the head reads frozen features of the base model, so that it can also be trained after the adapters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import CheckpointError, ConfigError, DataError
from ..core.files import atomic_write, parse_json
from .config import MclConfig
from .layer import MclLayer
from .step import score_hypotheses

FILE_NAME = "hypothesis_scorer.safetensors"
_FORMAT = "polyrank-hypothesis-scorer-1"


class HypothesisScorer(nn.Module):
    """gamma(c): LayerNorm, then a linear map or one hidden layer, to one logit a hypothesis.

    Args:
        num_features: d, width of the pooled features.
        num_hypotheses: K.
        hidden: width of the hidden layer; 0 for a linear head.
    """

    def __init__(self, num_features: int, num_hypotheses: int, hidden: int = 0) -> None:
        super().__init__()
        for name, value, least in (
            ("num_features", num_features, 1),
            ("num_hypotheses", num_hypotheses, 1),
            ("hidden", hidden, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an integer >= {least}, got {value!r}")
        self.num_features, self.num_hypotheses, self.hidden = num_features, num_hypotheses, hidden
        self.norm = nn.LayerNorm(num_features)
        self.body = nn.Sequential(nn.Linear(num_features, hidden), nn.GELU()) if hidden else nn.Identity()
        self.head = nn.Linear(hidden or num_features, num_hypotheses)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of gamma, (B, K), fp32, for features (B, d)."""
        return self.head(self.body(self.norm(features.to(self.head.weight.dtype))))

    def loss(self, features: Tensor, won: Tensor) -> Tensor:
        """Scalar: BCE summed over hypotheses, mean over the rows that have a winner.

        Args: features (B, d); won (B, K), 1 where the hypothesis won (shares where there are ties), all 0 for a row
            without a finite loss, which is left out.
        """
        rows = won.sum(dim=1) > 0
        if not bool(rows.any()):
            return self(features).sum() * 0.0
        logits = self(features[rows])
        return F.binary_cross_entropy_with_logits(logits, won[rows].to(logits.dtype), reduction="none").sum(1).mean()

    def scores(self, features: Tensor) -> Tensor:
        """gamma, (B, K), each in (0, 1)."""
        return torch.sigmoid(self(features))

    def log_weights(self, features: Tensor) -> Tensor:
        """log pi, (B, K), normalised over the hypotheses."""
        return log_weights(self(features))

    def save(self, folder: str | Path) -> Path:
        """Write `hypothesis_scorer.safetensors` into a folder, whole or not at all."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        shape = {"num_features": self.num_features, "num_hypotheses": self.num_hypotheses, "hidden": self.hidden}
        return atomic_write(Path(folder) / FILE_NAME, save(state, {"format": _FORMAT, "shape": json.dumps(shape)}))

    @classmethod
    def load(cls, folder: str | Path, num_hypotheses: int | None = None) -> HypothesisScorer:
        """The scorer that `save` wrote into a folder.

        Raises: CheckpointError where the file is missing, truncated, foreign, or made for another K.
        """
        path = Path(folder) / FILE_NAME
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise CheckpointError(f"{path} is no hypothesis scorer (format {metadata.get('format')!r})")
                with torch.device("meta"):  # nothing is made for sizes that the file only claims
                    scorer = cls(**parse_json(metadata["shape"]))
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
                scorer.load_state_dict(tensors, assign=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; this adapter was saved without a scorer") from None
        except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is truncated or damaged: {str(error).splitlines()[0]}") from None
        if num_hypotheses is not None and scorer.num_hypotheses != num_hypotheses:
            raise CheckpointError(f"{path} scores {scorer.num_hypotheses} hypotheses, the model has {num_hypotheses}")
        return scorer


def log_weights(logits: Tensor) -> Tensor:
    """log pi_k = log gamma_k - log sum_j gamma_j from the logits of gamma, (..., K) -> (..., K)."""
    return torch.log_softmax(F.logsigmoid(logits), dim=-1)


def winners_of(losses: Tensor) -> Tensor:
    """(B, K): 1 for the winner of each row of `losses` (K, B), equal shares for ties, zeros where none is finite."""
    losses = torch.where(losses.isfinite(), losses, torch.inf)
    best = (losses == losses.amin(dim=0)) & losses.isfinite()
    return (best / best.sum(dim=0).clamp_min(1)).T


def prompt_mask(inputs: Mapping[str, Any], length: int) -> Tensor:
    """(B, length) bool: the attended positions before the first one whose token is predicted.

    Position 0 always counts as prompt of a causal model: nothing predicts it. Without labels all attended positions do.
    """
    labels, attention = inputs.get("labels"), inputs.get("attention_mask")
    example = labels if labels is not None else attention
    if example is None:
        example = next(value for value in inputs.values() if isinstance(value, Tensor))
    mask = torch.ones(example.shape[0], length, dtype=torch.bool, device=example.device)
    if attention is not None and attention.ndim == 2 and attention.shape[1] == length:
        mask &= attention.bool()
    if labels is not None and labels.ndim == 2 and labels.shape[1] == length:
        predicted = (labels != -100) & mask
        started = predicted.cumsum(dim=1) > 0
        first_token = mask & (mask.cumsum(dim=1) == 1)
        mask = (mask & ~started) | first_token
    return mask


@contextmanager
def base_path(model: nn.Module) -> Iterator[None]:
    """Run a block through the base model alone, without touching what requires gradients."""
    layers = [module for module in model.modules() if isinstance(module, MclLayer)]
    before = [layer._disable_adapters for layer in layers]
    if any(layer.merged for layer in layers):
        raise ConfigError("frozen features cannot be read while a hypothesis is merged; unmerge it first")
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


@torch.no_grad()
def pooled_features(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """c: masked mean of the base model's last hidden state over the prompt, (B, d), fp32.

    Args:
        model: a PeftModel with MCL adapters, or the adapted transformers model itself. Encoder-decoders are read at the
            encoder's output. Dropout is off, whatever the mode.
        inputs: a batch as the model takes it. With labels, only what lies before the first predicted token is read.
    Raises: DataError for inputs or models from which no hidden state of shape (B, T, d) comes.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_encoder_decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    body = base.get_encoder() if is_encoder_decoder else getattr(base, getattr(base, "base_model_prefix", ""), None)
    if body is None:
        raise DataError(f"{type(base).__name__} has no body whose hidden states could be pooled")
    passed = {name: value for name, value in inputs.items() if name != "labels" and not name.startswith("decoder_")}
    was_training = {module for module in body.modules() if module.training}
    body.eval()
    try:
        with base_path(model):
            states = body(**passed).last_hidden_state
    finally:
        for module in was_training:
            module.training = True
    if states.ndim != 3:
        raise DataError(f"hidden states of shape {tuple(states.shape)} cannot be pooled; expected (B, T, d)")
    mask = prompt_mask({**inputs, "labels": None} if is_encoder_decoder else inputs, states.shape[1])
    weights = mask.to(torch.float32) / mask.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.einsum("bt,btd->bd", weights, states.float())


def fit_scorer(
    model: nn.Module,
    scorer: HypothesisScorer,
    batches: Iterable[Mapping[str, Any]],
    config: MclConfig,
    *,
    num_steps: int = 500,
    learning_rate: float = 1e-3,
    rows_per_step: int = 64,
    seed: int = 0,
) -> float:
    """Train a scorer after the hypotheses: features and winners are computed once, then the head alone is fitted.

    Args: batches: as the model takes them, with labels; config: of the hypotheses; seed: of the order of rows.
    Returns: the last step's loss, nats. Raises: DataError without a single row that has a winner.
    """
    features, won = [], []
    was_training = model.training
    model.eval()
    for batch in batches:
        features.append(pooled_features(model, batch))
        won.append(winners_of(score_hypotheses(model, batch, config=config).losses))
    model.train(was_training)
    c, w = (torch.cat(parts) if parts else torch.zeros(0, 1) for parts in (features, won))
    c, w = c[w.sum(dim=1) > 0], w[w.sum(dim=1) > 0]
    if not len(c):
        raise DataError("no row has a winner to train the scorer on")
    scorer.to(c.device).train()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        rows = torch.randint(len(c), (min(rows_per_step, len(c)),), generator=generator).to(c.device)
        loss = scorer.loss(c[rows], w[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss)


def calibration(scores: Tensor, won: Tensor, num_bins: int = 10) -> dict[str, Any]:
    """How far the scores can be believed, over all pairs (row, hypothesis).

    Args: scores (N, K) gamma in [0, 1]; won (N, K) in [0, 1], ties shared; num_bins: equal widths.
    Returns: ece (mean |mean score - share won| of the bins, weighted by their counts), brier (mean squared error),
        top1_accuracy (wins of the highest score), bins: (mean score, share won, count) of each bin that is not empty.
    """
    if scores.shape != won.shape or scores.ndim != 2 or not len(scores):
        raise DataError(f"scores and won must both be (N, K), N >= 1; got {tuple(scores.shape)}, {tuple(won.shape)}")
    gamma, event = scores.double().flatten(), won.double().flatten()
    index = (gamma * num_bins).long().clamp(0, num_bins - 1)
    bins = []
    for i in range(num_bins):
        inside = index == i
        if count := int(inside.sum()):
            bins.append((float(gamma[inside].mean()), float(event[inside].mean()), count))
    top = won.double().gather(1, scores.argmax(dim=1, keepdim=True))
    return {
        "ece": sum(abs(mean - share) * count for mean, share, count in bins) / len(gamma),
        "brier": float(((gamma - event) ** 2).mean()),
        "top1_accuracy": float(top.mean()),
        "bins": bins,
    }

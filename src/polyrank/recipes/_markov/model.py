"""The toy's model: a small random language model, frozen, with K low-rank hypotheses; and how it is read.

GPT-Neo, vocabulary 2, all layers with local attention of `window_size` tokens: with 2 layers of window 5 a prediction
sees the last 9 tokens. The base stays at its random initialisation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import GPTNeoConfig, GPTNeoForCausalLM, SchedulerType
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from ...core.errors import ConfigError, check_choice
from ...core.seeding import derive_seed, preserved_torch_rng
from ...data.markov import STARTS
from ...hypotheses import MclConfig, Routing, route
from ...hypotheses.activations import fused_activations
from ...objectives import MODES, SCHEDULES, check_epsilon, mixture_nll

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
_COUNTS = (
    "num_steps",
    "batch_size",
    "eval_every",
    "num_evaluation",
    "num_final",
    "window_size",
    "num_layers",
    "num_heads",
    "rank",
)


@dataclass
class MarkovConfig:
    """Two (or more) Markov chains, one model with one hypothesis against one with several.

    Raises (on construction): ConfigError for a value out of range, an unknown name, more than 8 hypotheses.
    """

    transitions: list[list[float]] = field(
        default_factory=lambda: [[0.2, 0.9], [0.8, 0.25]],
        metadata={"help": "One [p, q] for each chain: the probabilities of leaving state 0 and state 1."},
    )
    sequence_length: int = field(default=32, metadata={"help": "T, tokens of a sequence."})
    start: str = field(default="uniform", metadata={"help": f"Distribution of the first token: {', '.join(STARTS)}."})
    hypotheses: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "One training for each K."})
    seeds: list[int] = field(default_factory=lambda: [1235], metadata={"help": "One set of trainings for each."})
    mode: str = field(default="wta", metadata={"help": f"Who learns from a sequence: {', '.join(MODES)}."})
    epsilon: float = field(default=0.1, metadata={"help": "relaxed-wta: weight that the losers share."})
    initial_temperature: float = field(default=1.0, metadata={"help": "annealed-wta: T0."})
    final_temperature: float = field(default=1e-6, metadata={"help": "annealed-wta: hard from here on."})
    temperature_decay: float = field(default=0.999, metadata={"help": "annealed-wta: factor for one step or epoch."})
    temperature_schedule: str = field(default="global_step", metadata={"help": "global_step or epoch."})
    annealing_on: str = field(default="token_mean", metadata={"help": "token_mean or sequence_sum."})
    num_steps: int = field(default=501, metadata={"help": "Optimiser steps; every sequence is seen once."})
    batch_size: int = field(default=128, metadata={"help": "Sequences of a step."})
    eval_every: int = field(default=10, metadata={"help": "Steps between evaluations."})
    num_evaluation: int = field(default=1000, metadata={"help": "Held-out sequences of the curve, drawn once."})
    num_final: int = field(default=10_000, metadata={"help": "Held-out sequences of the final figures, drawn once."})
    window_size: int = field(default=5, metadata={"help": "Tokens that a layer's attention sees."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the model."})
    num_layers: int = field(default=2, metadata={"help": "Layers, all with local attention."})
    num_heads: int = field(default=2, metadata={"help": "Attention heads."})
    rank: int = field(default=64, metadata={"help": "Rank of each hypothesis."})
    lora_alpha: float = field(default=64, metadata={"help": "Scale numerator at `rank`; scaled along with it."})
    divide_rank_mcl: bool = field(default=False, metadata={"help": "K > 1: rank / K for each hypothesis."})
    multiply_rank_1_hyp: bool = field(default=False, metadata={"help": "K = 1: rank times the largest K."})
    train_head: bool = field(default=False, metadata={"help": "Train the output head too, shared by the hypotheses."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    weight_decay: float = 1e-3
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Any scheduler name of transformers."})
    warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up."})
    normalize_loss_by_T: bool = field(
        default=False, metadata={"help": "Divide the training loss by T - 1 once more, as the LoRA-MCL project does."}
    )
    log_transition_matrices_during_training: bool = field(
        default=False, metadata={"help": "Write the matrices of each evaluation to metrics.jsonl too."}
    )

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("start", self.start, STARTS)
        check_choice("temperature_schedule", self.temperature_schedule, (*SCHEDULES, "epoch_number"))
        if not self.transitions or any(len(pair) != 2 or not all(0 < p < 1 for p in pair) for pair in self.transitions):
            raise ConfigError(f"transitions must be [p, q] pairs of numbers in (0, 1), got {self.transitions!r}")
        if not self.hypotheses or any(not 1 <= k <= 8 for k in self.hypotheses):
            raise ConfigError(f"hypotheses must be a list of numbers from 1 to 8, got {self.hypotheses!r}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds must be a list of different whole numbers, got {self.seeds!r}")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        check_choice("lr_scheduler_type", self.lr_scheduler_type, [str(name.value) for name in SchedulerType])
        if not 2 <= self.sequence_length <= 1024:
            raise ConfigError(f"sequence_length must lie in [2, 1024], got {self.sequence_length!r}")
        if self.hidden_size < 1 or self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.mode == "relaxed-wta":
            for k in self.hypotheses:
                check_epsilon(self.epsilon, k)

    @property
    def chains(self) -> np.ndarray:
        """(M, 2, 2) true transition matrices."""
        return np.array([[[1 - p, p], [q, 1 - q]] for p, q in self.transitions])

    @property
    def memory(self) -> int:
        """Tokens that a prediction can see: each layer looks back window_size - 1 tokens further."""
        return self.num_layers * (self.window_size - 1) + 1

    def rank_of(self, k: int) -> int:
        """Rank of each of K hypotheses."""
        if k > 1:
            return max(1, self.rank // k) if self.divide_rank_mcl else self.rank
        return self.rank * max(self.hypotheses) if self.multiply_rank_1_hyp else self.rank

    def mode_of(self, k: int) -> str:
        """One hypothesis is plain training, whatever the mode."""
        return self.mode if k > 1 else "wta"


class WindowedAttention(GPTNeoSelfAttention):
    """GPT-Neo's local attention through torch's fused kernel, its mask applied inside; equal up to rounding."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        rows, columns = query.shape[-2], key.shape[-2]
        seen = self.bias[:, :, columns - rows : columns, :columns]
        if attention_mask is not None:  # rows with padding
            seen = seen & attention_mask
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=1.0), None


def build_base(config: MarkovConfig, seed: int) -> GPTNeoForCausalLM:
    """The random base model of a seed: the same for every K."""
    architecture = GPTNeoConfig(
        vocab_size=2,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        attention_types=[[["local"], config.num_layers]],
        window_size=config.window_size,
        max_position_embeddings=1024,
        activation_function="gelu_new",
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
    )
    with preserved_torch_rng():
        torch.manual_seed(derive_seed(seed, "markov", "base"))
        base = GPTNeoForCausalLM(architecture)
    base.config._attn_implementation = "sdpa"  # masks are boolean, and none is made where nothing is padded
    for block in base.transformer.h:
        block.attn.attention.__class__ = WindowedAttention
    if config.train_head:  # a head of its own, of the same values: the input embedding stays frozen
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
        base.config.tie_word_embeddings = False
    return base


def build_model(config: MarkovConfig, k: int, seed: int) -> Any:
    """A PeftModel with K hypotheses on the random base of this seed."""
    base, rank = build_base(config, seed), config.rank_of(k)
    adapter = MclConfig(
        num_hypotheses=k,
        mode=config.mode_of(k),
        epsilon=config.epsilon,
        initial_temperature=config.initial_temperature,
        final_temperature=config.final_temperature,
        temperature_decay=config.temperature_decay,
        temperature_schedule=config.temperature_schedule,
        annealing_on=config.annealing_on,
        r=rank,
        lora_alpha=config.lora_alpha * rank / config.rank,
        target_modules=TARGETS,
        modules_to_save=["lm_head"] if config.train_head else None,
    )
    with preserved_torch_rng():
        torch.manual_seed(derive_seed(seed, "markov", "adapter", k))
        return get_peft_model(base, adapter)


@torch.no_grad()
def predict(model: Any, num_hypotheses: int, tokens: Tensor, rows_at_a_time: int = 128) -> Tensor:
    """Log-probabilities of the next token after every token: tokens (N, T) -> (K, N, T, V), fp32."""
    was_training = model.training
    model.eval()
    each = []
    for k in range(num_hypotheses):
        with route(model, Routing.single(k)), fused_activations(model):
            logits = [model(input_ids=batch).logits for batch in tokens.split(rows_at_a_time)]
        each.append(torch.log_softmax(torch.cat(logits).float(), dim=-1))
    model.train(was_training)
    return torch.stack(each)


@dataclass
class Evaluation:
    """What K hypotheses say about held-out sequences. All losses in nats per predicted token.

    Attributes:
        wta: mean over sequences of the best hypothesis' loss; standard_error of that mean.
        hypothesis: (K,) mean loss of each.
        mixture: NLL of the uniform mixture, a proper likelihood; wins: (K,) shares, ties shared.
        matrices: (K, 2, 2) mean prediction after each state, over all contexts of the sequences that a hypothesis wins
            (of all sequences if it wins none).
        readout: (K, 2, 2) prediction after one single token.
    """

    wta: float
    standard_error: float
    hypothesis: list[float]
    mixture: float
    wins: list[float]
    matrices: list[list[list[float]]]
    readout: list[list[list[float]]]


def evaluate(model: Any, num_hypotheses: int, tokens: Tensor) -> Evaluation:
    """Evaluate K hypotheses on sequences (N, T)."""
    first = predict(model, num_hypotheses, torch.tensor([[0], [1]]))
    return summarise(predict(model, num_hypotheses, tokens), tokens, first)


def summarise(log_p: Tensor, tokens: Tensor, first: Tensor) -> Evaluation:
    """From log-probabilities (K, N, T, 2) on tokens (N, T), and those after the single tokens 0 and 1 (K, 2, 1, 2)."""
    k, _, length, _ = log_p.shape
    sums = -log_p[:, :, :-1].gather(-1, tokens[None, :, 1:, None].expand(k, -1, -1, -1)).squeeze(-1).sum(-1).double()
    losses = sums / (length - 1)
    least = losses.amin(0)
    best = (losses == least).double()
    share = best / best.sum(0)
    weight = torch.where(share.sum(1, keepdim=True) > 0, share, 1.0)
    visits = torch.nn.functional.one_hot(tokens[:, :-1], 2).double()
    rows = torch.einsum("kn,nti,kntj->kij", weight, visits, log_p[:, :, :-1].exp().double())
    mass = torch.einsum("kn,nti->ki", weight, visits)
    return Evaluation(
        wta=float(least.mean()),
        standard_error=float(least.std(correction=0)) / len(least) ** 0.5,
        hypothesis=losses.mean(1).tolist(),
        mixture=float(mixture_nll(sums).mean()) / (length - 1),
        wins=share.mean(1).tolist(),
        matrices=(rows / mass.unsqueeze(-1).clamp_min(1e-300)).tolist(),
        readout=first[:, :, 0].exp().tolist(),
    )

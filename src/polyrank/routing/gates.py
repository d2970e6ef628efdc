"""The mathematics of LoRA-MoE: gates over K low-rank experts for each token, and how evenly they are used.

x (..., in); router R (K, in), b (K); A (K, r, in), B (K, out, r); s = lora_alpha / r (or / sqrt(r)).

    p = softmax(R x + b)                                   router probabilities, (..., K)
    dense:   g = p
    sparse:  g_e = p_e / (sum of the k largest p) for these k, else 0
    y = W x + s sum_e g_e B_e A_e x

Source: the LoRA-MoE baseline of Letzelter et al. 2025 (LoRA-MCL); Shazeer et al. 2017 for the sparse gates; Fedus et
al. 2021, Eq. 4-6, for the balance loss, over k choices as in Mixtral.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot


def router_probabilities(x: Tensor, router: Tensor, bias: Tensor) -> Tensor:
    """softmax(R x + b), (..., in) -> (..., K), in fp32 or better whatever autocast says."""
    dtype = torch.promote_types(router.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(dtype), router.to(dtype), bias.to(dtype)).softmax(-1)


def sparse_gates(probabilities: Tensor, top_k: int) -> Tensor:
    """The k largest of K probabilities (..., K), divided by their sum; the others 0."""
    values, experts = probabilities.topk(top_k, dim=-1)
    gates = values / values.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, experts, gates)


def drawn_gates(gates: Tensor) -> Tensor:
    """One expert for each token, drawn by its gates: (..., K) one-hot. Its mean over draws is `gates`."""
    drawn = torch.multinomial(gates.flatten(0, -2), 1).view(gates.shape[:-1])
    return one_hot(drawn, gates.shape[-1]).to(gates.dtype)


def expert_sum(x: Tensor, A: Tensor, B: Tensor, gates: Tensor, scale: float) -> Tensor:
    """s sum_e g_e B_e A_e x, (..., in) -> (..., out): two matrix products for all experts together.

    Experts whose gate is 0 are computed on too: K r is small beside the layer, and gathering tokens costs more.
    """
    experts, rank, _ = A.shape
    h = linear(x, A.flatten(0, 1)).unflatten(-1, (experts, rank))
    h = (h * (gates * scale)[..., None]).to(h.dtype).flatten(-2)
    return linear(h, B.transpose(0, 1).flatten(1))


def load_balance(probabilities: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    """K sum_e f_e P_e: how unevenly one layer uses its experts.

    f_e: tokens among whose k choices e is, as a share of all tokens; P_e: mean probability of e. It is k where all
    are used alike and K where every token chooses the same expert with certainty (at k = 1). Gradients flow through P.

    Args:
        probabilities: (tokens, K). mask: (tokens,), 0 for padding.
    Returns: scalar, fp32 or better.
    """
    experts = probabilities.shape[-1]
    chosen = one_hot(probabilities.detach().topk(top_k, dim=-1).indices, experts).sum(-2).to(probabilities.dtype)
    weights = torch.ones_like(probabilities[:, 0]) if mask is None else mask.to(probabilities)
    shares = torch.stack([chosen, probabilities]).mul(weights[:, None]).sum(1) / weights.sum().clamp(min=1)
    return experts * (shares[0] * shares[1]).sum()

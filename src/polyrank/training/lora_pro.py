"""LoRA-Pro: gradients of A and B adjusted so that the step of W' = W + s B A comes closest to the full gradient's.

A (..., r, in), B (..., out, r), g = dL/dW' (never formed by backward), g_A = s B^T g, g_B = s g A^T. A change
(h_A, h_B) moves W' by g~ = s B h_A + s h_B A. The least squares solution of g~ = g is, for any X (..., r, r),

    h_A = 1/s^2 (B^T B)^-1 g_A + X A,      h_B = 1/s^2 (I - P_B) g_B (A A^T)^-1 - B X,     P_B = B (B^T B)^-1 B^T

and g~ = P_B g + g P_A - P_B g P_A whatever X. X is chosen so that h stays closest to (g_A, g_B):

    B^T B X + X A A^T = -1/s^2 (B^T B)^-1 g_A A^T        (Sylvester; both sides diagonalised, divided by l_i + m_j)

Where B = 0 (LoRA's start): h_A = 0, h_B = 1/s^2 g_B (A A^T)^-1; the same with sides exchanged where A = 0.

AdamW, moments="full": moments of g~ itself, two tensors of the full (out, in) size for each matrix, as full tuning has;
the normalised direction g' = m / (sqrt(v) + eps) is projected again. moments="factor", which is ours: moments of h_A
and h_B, of the factors' size; the step is then no longer the projection of a normalised direction.

Source: Wang et al. 2024, LoRA-Pro: Are Low-Rank Adapters Properly Optimized? (arXiv 2407.18242), Theorems 2.1 to 2.3.
Differs: the scale is each layer's own (the release fixes 2 whatever the model has); damping is relative to the mean
eigenvalue; pairs are found by layer, not by their place in a list; bias correction counts from 1; moments are fp32.
The learning rate is on the scale of full fine-tuning (2e-5), not of LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..adapters._lora_layers import method_name
from ..core.errors import CheckpointError, ConfigError, check_choice

MOMENTS = ("full", "factor")
_SIDES = (("lora_A", "lora_B"), ("polyrank_mcl_A", "polyrank_mcl_B"))
Pair = tuple[torch.Tensor, torch.Tensor]


def adjusted_gradients(
    A: torch.Tensor,
    B: torch.Tensor,
    g_A: torch.Tensor,
    g_B: torch.Tensor,
    scale: float,
    damping: float = 0.0,
    X: torch.Tensor | None = None,
) -> Pair:
    """h_A (..., r, in) and h_B (..., out, r): the closed form above, for each leading index on its own.

    Args:
        damping: added to the diagonals of B^T B and A A^T, in units of their mean eigenvalue.
        X: any (..., r, r); None takes the solution of the Sylvester equation.
    """
    A_gram, B_gram = A @ A.mT, B.mT @ B
    A_inverse, B_inverse = _inverse(A_gram, damping), _inverse(B_gram, damping)
    B_part = B_inverse @ g_A / scale**2
    A_part = (g_B - B @ (B_inverse @ (B.mT @ g_B))) @ A_inverse / scale**2
    if X is None:
        X = sylvester(B_gram, A_gram, -B_part @ A.mT)
    h_A, h_B = B_part + X @ A, A_part - B @ X
    B_is_zero, A_is_zero = (_trace(gram) == 0 for gram in (B_gram, A_gram))
    if bool((A_is_zero | B_is_zero).any()):
        h_A = torch.where(B_is_zero, torch.zeros_like(h_A), torch.where(A_is_zero, B_part, h_A))
        only_A = g_B @ A_inverse / scale**2
        h_B = torch.where(B_is_zero, only_A, torch.where(A_is_zero, torch.zeros_like(h_B), h_B))
    return h_A, h_B


def sylvester(P: torch.Tensor, Q: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """X with P X + X Q = C, for symmetric P, Q (..., r, r) without negative eigenvalues; 0 where both vanish."""
    p, U = torch.linalg.eigh(P)
    q, V = torch.linalg.eigh(Q)
    sums = p.clamp_min(0).unsqueeze(-1) + q.clamp_min(0).unsqueeze(-2)
    solved = torch.where(sums > 0, (U.mT @ C @ V) / sums.where(sums > 0, 1.0), 0.0)
    return U @ solved @ V.mT


def implied_update(A: torch.Tensor, B: torch.Tensor, h_A: torch.Tensor, h_B: torch.Tensor, scale: float):
    """g~ (..., out, in): the change of W' to first order when A moves by h_A and B by h_B."""
    return scale * (B @ h_A + h_B @ A)


def lora_pairs(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter, torch.nn.Parameter, float]]:
    """(name, A, B, scale) of every trainable pair of LoRA factors: PEFT's LoRA, and LoRA-MCL's stacked ones.

    Raises: ConfigError for DoRA and for one factor that is trained without the other.
    """
    for module_name, layer in model.named_modules():
        for sides in _SIDES:
            if not all(hasattr(layer, side) for side in sides) or not hasattr(layer, "scaling"):
                continue
            for adapter in getattr(layer, sides[0]):
                A, B = (
                    getattr(getattr(layer, side)[adapter], "weight", getattr(layer, side)[adapter]) for side in sides
                )
                name = f"{module_name} [{adapter}]"
                if A.requires_grad != B.requires_grad:
                    raise ConfigError(f"{name}: LoRA-Pro needs both factors trainable")
                if adapter in getattr(layer, "lora_magnitude_vector", {}):
                    raise ConfigError(f"{name}: LoRA-Pro does not combine with DoRA, whose weight is no sum W + s B A")
                if A.requires_grad:
                    if A.ndim - 2 not in (0, 1) or A.ndim != B.ndim:
                        raise ConfigError(
                            f"{name}: factors of shapes {tuple(A.shape)}, {tuple(B.shape)} are no matrices"
                        )
                    yield name, A, B, float(layer.scaling[adapter])


def lora_pro_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for the optimisers below: one for each pair (A, B), one for whatever else is trained.

    Whatever else: heads, biases, and LoRA on embeddings, whose gradients are sparse rows.

    Raises: ConfigError if the model has no trainable LoRA factors, with the reason where its method is known.
    """
    groups: list[dict[str, Any]] = []
    paired: set[int] = set()
    for name, A, B, scale in lora_pairs(model):
        groups.append({"params": [A, B], "lora_scale": scale, "lora_name": name})
        paired |= {id(A), id(B)}
    if not groups:
        raise ConfigError(f"{_pair(model)} needs LoRA factors A and B; the model has none that are trained")
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in paired]
    return groups + ([{"params": rest, "lora_scale": None, "lora_name": ""}] if rest else [])


_OTHERS = {
    "DYLORA": "its factors are cut to another rank, with another scale, at every step",
    "ALLORA": "it changes the gradients of A and B itself",
    "CODYRA": "its gates between B and A are trained with them",
    "LORMA": "it multiplies the weight instead of adding to it",
    "SARA": "it trains entries of the weight itself",
    "L4Q": "its update is quantised together with the weight",
}


def _pair(model: torch.nn.Module) -> str:
    """LoRA-Pro, and why it does not go with the adapter that the model has."""
    adapter = next(iter(getattr(model, "peft_config", {})), None)
    if adapter is None:
        return "LoRA-Pro"
    name = method_name(model, adapter)
    return f"LoRA-Pro does not combine with {name} ({_OTHERS.get(name, 'its update is no product of two factors')}): it"


class _LoraPro(torch.optim.Optimizer):
    """What both variants share: a model or groups in, pairs of a common dtype, states that come back as saved."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        lr, damping = defaults["lr"], defaults["damping"]
        if not (lr >= 0.0 and math.isfinite(lr)) or not 0.0 <= damping < 1.0:
            raise ConfigError(f"need 0 <= lr and 0 <= damping < 1, got lr={lr!r} and damping={damping!r}")
        groups = lora_pro_groups(params) if isinstance(params, torch.nn.Module) else list(params)
        if not groups or not all(isinstance(group, dict) and "lora_scale" in group for group in groups):
            raise ConfigError(f"{type(self).__name__} takes a model, or lora_pro_groups(model)")
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["lora_scale"] is None:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_plain(parameter, group)
            elif any(parameter.grad is not None for parameter in group["params"]):
                self._step_pair(*group["params"], group)
        return loss

    def _step_plain(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _step_pair(self, A: torch.Tensor, B: torch.Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that moments keep their dtype (torch casts them to the parameter's)."""
        scales = [group["lora_scale"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        loaded = [group["lora_scale"] for group in self.param_groups]
        if loaded != scales:
            raise CheckpointError(f"the saved optimiser belongs to an adapter of other scales: {loaded}, not {scales}")
        order = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(order, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    self.state[parameter][key] = value.to(parameter.device, copy=True)

    def _decay(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            for parameter in parameters:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])


class LoraProSGD(_LoraPro):
    """A -= lr h_A, B -= lr h_B; other parameters by plain gradient descent.

    Args:
        params: a model, or `lora_pro_groups(model)`.
        lr: on the scale of full fine-tuning.
        weight_decay: decoupled; it moves W' outside the method's analysis.
        damping: in units of the mean eigenvalue of B^T B and of A A^T.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, damping: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "damping": damping})

    def _step_plain(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        self._decay([parameter], group)
        parameter.add_(parameter.grad, alpha=-group["lr"])

    def _step_pair(self, A: torch.Tensor, B: torch.Tensor, group: dict[str, Any]) -> None:
        h_A, h_B = adjusted_gradients(*_working(A, B), group["lora_scale"], group["damping"])
        self._decay([A, B], group)
        A.sub_((group["lr"] * h_A).to(A.dtype))
        B.sub_((group["lr"] * h_B).to(B.dtype))


class LoraProAdamW(_LoraPro):
    """Adam on the implied update of W'; other parameters by plain AdamW.

    Args:
        params: a model, or `lora_pro_groups(model)`.
        moments: "full" (of g~, the paper's; 2 out in numbers for each matrix) or "factor" (of h_A and h_B, ours).
        weight_decay, damping: as in `LoraProSGD`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-8,
        moments: str = "full",
    ) -> None:
        check_choice("moments", moments, MOMENTS)
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"betas must lie in [0, 1), got {betas!r}")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "damping": damping}
        super().__init__(params, {**defaults, "moments": moments})

    def _step_plain(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        self._decay([parameter], group)
        direction = self._direction(parameter, parameter.grad, group)
        parameter.sub_((group["lr"] * direction).to(parameter.dtype))

    def _step_pair(self, A: torch.Tensor, B: torch.Tensor, group: dict[str, Any]) -> None:
        a, b, g_A, g_B = _working(A, B)
        scale, damping = group["lora_scale"], group["damping"]
        h_A, h_B = adjusted_gradients(a, b, g_A, g_B, scale, damping)
        if group["moments"] == "full":
            g = self._direction(A, implied_update(a, b, h_A, h_B, scale), group).to(a.dtype)
            h_A, h_B = adjusted_gradients(a, b, scale * b.mT @ g, scale * g @ a.mT, scale, damping)
        else:
            h_A, h_B = self._direction(A, h_A, group), self._direction(B, h_B, group)
        self._decay([A, B], group)
        A.sub_((group["lr"] * h_A).to(A.dtype))
        B.sub_((group["lr"] * h_B).to(B.dtype))

    def _direction(self, owner: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]):
        """m / (sqrt(v) + eps) with bias correction; the moments are kept under `owner`, in fp32 or better."""
        dtype = torch.promote_types(owner.dtype, torch.float32)
        gradient, state = gradient.to(dtype), self.state[owner]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        (first, second), step = group["betas"], float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(group["eps"])
        return state["exp_avg"] / (1 - first**step) / root


def _working(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B and their gradients in float64 (B^T B squares the condition number), float32 where a device has no more."""
    dtype = torch.float32 if A.device.type == "mps" else torch.float64
    g_A, g_B = (torch.zeros_like(p) if p.grad is None else p.grad for p in (A, B))
    return A.to(dtype), B.to(dtype), g_A.to(dtype), g_B.to(dtype)


def _trace(gram: torch.Tensor) -> torch.Tensor:
    """(..., 1, 1)."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _inverse(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Of a symmetric matrix with relative damping; of the identity where it is zero (its result is not used then)."""
    r = gram.shape[-1]
    identity = torch.eye(r, dtype=gram.dtype, device=gram.device)
    trace = _trace(gram)
    damped = torch.where(trace > 0, gram + damping * trace / r * identity, identity)
    return torch.linalg.pinv(damped, hermitian=True)

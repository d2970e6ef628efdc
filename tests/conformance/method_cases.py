"""What the conformance tests run: every registered method, each with one or several configurations.

A method that needs no more than its defaults needs no entry here: `cases` gives it one case with the default
configuration. To try more of a method, give it a list in CASES. Only fields that differ from the default are written;
the harness adds `target_modules`, `task_type` and `init_weights=False` (random values, so that the adapter does
something) where a test needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import plain_lora  # noqa: F401  (registers the control method)

import polyrank
from polyrank.adapters import AdapterConfig, AdapterMethod, adapters


@dataclass(frozen=True)
class Case:
    """One configuration of one method. `options` are the fields of its config that differ from the defaults."""

    method: str
    name: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method}-{self.name}"

    @property
    def entry(self) -> AdapterMethod:
        return adapters.get(self.method)

    @property
    def tags(self) -> frozenset[str]:
        return self.entry.tags

    def config(self, **fields: Any) -> AdapterConfig:
        """The case's config with further fields; what the caller passes wins over the case's own options."""
        return self.entry.config(**{**self.options, **fields})


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "plain_lora": {
        "default": {},
        "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True},
        "patterns": {"r": 4, "rank_pattern": {"1": 2, "q_proj": 2, "lin0": 3}, "alpha_pattern": {"lin1": 2}},
    },
    "mcl": {
        "default": {},
        "single": {"num_hypotheses": 1},
        "five": {"num_hypotheses": 5, "r": 2, "lora_alpha": 4, "use_rslora": True},
    },
    "lsr": {
        # PEFT's tests train by SGD with rates up to 0.5: LSR's own scale of 4096 makes that diverge
        "default": {"lora_alpha": 16},
        "sum_of_products": {"mode": "sum_of_products", "r": 2, "num_terms": 3, "lora_alpha": 16},
        "one_term": {"num_terms": 1, "r": 4, "lora_alpha": 16},
        "stabilised": {"r": 2, "num_terms": 2, "lora_alpha": 16, "use_rslora": True},
    },
    "lorma": {
        "default": {},
        "pi_post": {"variant": "pi", "side": "post"},
        "plus_pre": {"variant": "plus", "side": "pre"},
        "plus_post": {"variant": "plus", "side": "post"},
        "complete_pre": {"variant": "complete", "side": "pre"},
        "complete_post": {"variant": "complete", "side": "post"},
    },
    "dylora": {
        # seed 0 draws the largest rank first: PEFT's tests that stay in training mode see the rank of eval mode
        "default": {},
        "frozen": {"mode": "frozen", "r": 4, "lora_alpha": 8},
        "constant_scale": {"constant_scale": True, "mask_step": True, "use_rslora": True, "min_rank": 2},
    },
    "codyra": {"default": {}, "pruning": {"r": 4, "total_steps": 4, "dense_ratio": 0.0, "max_kappa": 0.01}},
    "sara": {
        # a threshold for the weights of real models selects next to nothing of a tiny random layer
        "default": {"density": 0.3},
        "threshold": {"threshold": 0.1, "penalty_layers": 0, "reselect_at": 0.0},
    },
    "allora": {"default": {}, "eta_2": {"eta_squared": 4.0, "r": 4}},
    "l4q": {
        # 128 inputs a group are more than a tiny layer has; 2 divides the inputs of all of them
        "default": {"group_size": None},
        "groups": {"group_size": 2, "bits": 3, "lora_alpha": 2.0, "lsq_gradient_scale": True},
    },
    "moe": {
        "default": {},
        "sparse": {"num_experts": 4, "top_k": 2, "r": 4, "use_rslora": True},
        "one": {"num_experts": 1},
    },
}
"""Registry name -> name of the case -> fields of the config. The first case of a method gets PEFT's whole suite."""

_OTHER_BASE = "loads the adapter onto a base with other random weights, which SaRA's checksum refuses"
_GREEDY = "asks that each adapter of PEFT's stacked on it changes greedily decoded tokens: chance in a tiny model"

_ROUTED_MERGE = "merges the adapter: a router that mixes experts by the input has no weight to merge"

NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "sara": {
        "test_ignore_mismatched_sizes_with_scalar_modules_to_save": _OTHER_BASE,
        "test_load_does_not_overwrite_similarly_named_sibling": _OTHER_BASE,
        "test_loading_model_requires_grad_set_correctly": _OTHER_BASE,
        "test_loading_model_with_modules_to_save_requires_grad_set_correctly": _OTHER_BASE,
        "test_decoder_model": _GREEDY,
    },
    "codyra": {"test_decoder_model": _GREEDY},
    "moe": {
        "test_mixed_adapter_batches_merged_raises": _ROUTED_MERGE,
        "test_decoder_model": _ROUTED_MERGE,
        "test_mixed_adapter_batches_multiple_modules_to_save": (
            "without a seed, holds log-probabilities near 0 of logits near 20 to 1e-5 in fp32: a product of 9 rows and "
            "one of 3 round differently"
        ),
    },
}
"""Registry name -> name of a test of PEFT's suite -> why this method cannot and need not pass it."""


def methods() -> list[str]:
    """Every registered method, by name."""
    assert polyrank.adapters is adapters
    return adapters.names()


def cases(method: str) -> list[Case]:
    """The configurations of one method, the first being the one that PEFT's whole suite runs."""
    return [Case(method, name, options) for name, options in CASES.get(method, {"default": {}}).items()]


def all_cases(*tags: str) -> list[Case]:
    """The cases of all methods that carry every given tag."""
    return [case for method in methods() for case in cases(method) if set(tags) <= case.tags]

"""Which hypothesis each row of a batch goes through, made explicit and shared by all adapted layers of a model.

A `Router` hangs on every MCL layer of one model and holds the `Routing` in force. Code that runs the model enters
`route(model, routing)`; outside of it every row goes through the router's default hypothesis. Rows are counted at the
model's entrance: a layer that sees a multiple of them (beams, or rows flattened together with their tokens) gives each
routed row its consecutive share. Checkpointed blocks are recomputed during backward, after the block has been left:
their function is bound to the routing of the forward pass, so that recomputation goes through the same hypotheses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core.errors import ConfigError

Segment = tuple[int, int, int]  # hypothesis, first row, row after the last


@dataclass(frozen=True)
class Routing:
    """Rows to hypotheses, in one of two forms; make one with the class methods.

    Attributes:
        segments: runs of consecutive rows of one hypothesis, covering all rows in order (the fast form).
        index: hypothesis of each row, int64 of shape (rows,), where rows are in no order (also the form for
            torch.compile, since it is no constant of the compiled code).
        num_rows: number of rows that the routing speaks of; None means any number, all of one hypothesis.
        kernels: what `decoding.prepare` laid out for layers, used where no gradient is asked for.
    """

    segments: tuple[Segment, ...] = ()
    index: torch.Tensor | None = None
    num_rows: int | None = None
    kernels: Mapping[nn.Module, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def single(cls, hypothesis: int) -> Routing:
        """Every row through one hypothesis."""
        return cls(segments=((hypothesis, 0, 0),))

    @classmethod
    def all_hypotheses(cls, num_hypotheses: int, batch: int) -> Routing:
        """K-major rows: the whole batch through hypothesis 0, then through 1, ... (K * batch rows)."""
        return cls(tuple((k, k * batch, (k + 1) * batch) for k in range(num_hypotheses)), None, num_hypotheses * batch)

    @classmethod
    def rows(cls, hypotheses: Sequence[int]) -> Routing:
        """Hypothesis of each row, as Python integers; neighbours of one hypothesis become one segment."""
        segments: list[Segment] = []
        for row, k in enumerate(hypotheses):
            if segments and segments[-1][0] == k:
                segments[-1] = (k, segments[-1][1], row + 1)
            else:
                segments.append((int(k), row, row + 1))
        return cls(tuple(segments), None, len(hypotheses))

    @classmethod
    def indexed(cls, hypotheses: torch.Tensor) -> Routing:
        """Hypothesis of each row as an int64 tensor of shape (rows,)."""
        return cls((), hypotheses, hypotheses.numel())

    @property
    def is_single(self) -> bool:
        return self.num_rows is None

    def spread(self, entries: int) -> tuple[Segment, ...]:
        """The segments in units of a layer's first dimension (rows, rows x beams, or rows x tokens flattened).

        Raises: ConfigError where `entries` is no multiple of the routed rows.
        """
        if self.num_rows is None:
            return ((self.segments[0][0], 0, entries),)
        factor = self._factor(entries)
        return tuple((k, start * factor, stop * factor) for k, start, stop in self.segments)

    def spread_index(self, entries: int) -> torch.Tensor:
        """Hypothesis of each of a layer's entries, int64 of shape (entries,)."""
        assert self.index is not None
        factor = self._factor(entries)
        return self.index if factor == 1 else self.index.repeat_interleave(factor)

    def _factor(self, entries: int) -> int:
        assert self.num_rows is not None
        if self.num_rows == 0 or entries % self.num_rows:
            raise ConfigError(
                f"the routing speaks of {self.num_rows} rows, but an adapted layer received {entries}, which is no "
                "multiple of it; route a batch of the size that the model receives"
            )
        return entries // self.num_rows


@dataclass
class Router:
    """The routing in force for one model. `hypothesis` is the default, `current` what a block has set.

    `folding`: whether layers may fold an update into the weight where that is faster, equal up to rounding (scoring);
    elsewhere a call without a graph gives bit by bit what a call with one gives. `asked`: whether the routing in force
    was chosen, by `set_default` or `use`; `warned`: whether it was said that training without a choice trains one.
    """

    hypothesis: int = 0
    current: Routing = field(default_factory=lambda: Routing.single(0))
    merged: int | None = None
    folding: bool = False
    asked: bool = False
    warned: bool = False

    def set_default(self, hypothesis: int) -> None:
        self.check(hypothesis)
        self.hypothesis = hypothesis
        self.current, self.asked = Routing.single(hypothesis), True

    def check(self, hypothesis: int | None) -> None:
        """Raise ConfigError where another hypothesis than this one is merged into the weights."""
        if self.merged is not None and hypothesis != self.merged:
            raise ConfigError(f"hypothesis {self.merged} is merged into the base weights; unmerge it first")

    def warn_unasked(self) -> None:
        """Say once a model that only the default hypothesis is trained, where nobody asked for it."""
        if self.asked or self.warned or torch.compiler.is_compiling():
            return
        self.warned = True
        warnings.warn(
            f"only hypothesis {self.hypothesis} is trained: this call computes a gradient without `labels`, so that "
            "the hypotheses do not compete. Pass `labels` to the model and use its loss, or train with MclTrainer; "
            "pass `hypothesis_idx`, or call `set_hypothesis`, where one hypothesis is meant",
            UserWarning,
            stacklevel=3,
        )

    @contextmanager
    def use(self, routing: Routing) -> Iterator[None]:
        """Put a routing in force, and the former one back on the way out, whatever happens."""
        self.check(routing.segments[0][0] if routing.is_single else None)
        before, asked = self.current, self.asked
        self.current, self.asked = routing, True
        try:
            yield
        finally:
            self.current, self.asked = before, asked


def find_router(model: nn.Module) -> Router:
    """The router of a model's MCL layers. Raises ConfigError for a model that has none."""
    for module in model.modules():
        router = getattr(module, "router", None)
        if isinstance(router, Router):
            return router
    raise ConfigError(f"{type(model).__name__} has no LoRA-MCL adapter; add one with get_peft_model(model, MclConfig)")


def unordered_layers(model: nn.Module) -> list[str]:
    """Names of the MCL layers that lie among experts, which see tokens in an order of their own.

    Rows of several hypotheses cannot be told apart there, so that these layers refuse any routing but a single one.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "router", None), Router) and "experts" in name.split(".")
    ]


@contextmanager
def route(model: nn.Module, routing: Routing | int) -> Iterator[None]:
    """Run the model inside this block with the given routing (an integer: every row through that hypothesis)."""
    router = find_router(model)
    bind_checkpoints(model, router)
    with router.use(Routing.single(routing) if isinstance(routing, int) else routing):
        yield


class BoundCheckpoint:
    """A module's checkpointing function that carries the routing of the forward pass into the recomputation."""

    def __init__(self, checkpoint: Any, router: Router) -> None:
        self.checkpoint, self.router = checkpoint, router

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        routing = self.router.current

        def routed(*inner: Any, **inner_kwargs: Any) -> Any:
            with self.router.use(routing):
                return function(*inner, **inner_kwargs)

        return self.checkpoint(routed, *args, **kwargs)


def bind_checkpoints(model: nn.Module, router: Router) -> None:
    """Make every checkpointed block of a transformers model recompute with the routing of its forward pass.

    Also marks the adapted layers that lie among experts, for them to refuse rows of several hypotheses.
    """
    for name, module in model.named_modules():
        if isinstance(getattr(module, "router", None), Router):
            module.unordered = "experts" in name.split(".")
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, BoundCheckpoint):
                module._gradient_checkpointing_func = BoundCheckpoint(function, router)

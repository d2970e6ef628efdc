"""How many optimiser steps a run takes: one count, as transformers' Trainer makes it."""

from __future__ import annotations


def optimizer_steps(rows: int, *, epochs: int, batch_size: int, accumulation: int = 1, processes: int = 1) -> int:
    """Optimiser steps of `epochs` passes over `rows` rows.

    Args: batch_size: rows of one forward pass of one process; accumulation: forward passes of one step. An epoch's last
        step may be smaller; no step goes over an epoch's end.
    """
    return epochs * -(-rows // (batch_size * accumulation * processes))

"""Shared by the benchmarks: interleaved timing of several sides, and the peak of what they allocate."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from polyrank.training.memory import AllocationPeak


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warmup: int = 1,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Wall times of each side, in seconds: every round runs each side once, so that drifts hit all alike.

    Args: rounds: timed runs of each side; warmup: untimed ones before. Every other round goes backwards. clock:
        `time.process_time` gives a steadier picture on a machine that others use too (one thread only).
    Returns: side -> `rounds` times.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warmup, rounds):
        order = list(sides.items())
        for name, run in order if number % 2 == 0 else reversed(order):
            gc.collect()
            _wait(device)
            start = clock()
            run()
            _wait(device)
            if number >= 0:
                times[name].append(clock() - start)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is: the ratio of the medians."""
    return statistics.median(times[slow]) / statistics.median(times[fast])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes that `run` had allocated at a time, above what was there before it began (see `AllocationPeak`)."""
    with AllocationPeak(device) as peak:
        run()
    return peak.bytes

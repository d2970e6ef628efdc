"""Most bytes that a piece of work had allocated at a time, on a CPU or a GPU."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch


class AllocationPeak:
    """`with AllocationPeak() as peak: work()`, then `peak.bytes`: above what was allocated before it began.

    On a CPU every allocation and release of torch's allocator is recorded (by its profiler, which slows the work down)
    and summed; scratch memory inside an operator counts, memory of the process outside torch does not.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.on_gpu = device.startswith("cuda")
        self.bytes = 0
        self._before = 0
        self._profile: Any = None

    def __enter__(self) -> AllocationPeak:
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would tell standard error of every start
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        now = 0
        for _, change in changes:
            now += change
            self.bytes = max(self.bytes, now)


def resident_bytes(model: torch.nn.Module, optimizer: Any = None) -> int:
    """Bytes of a model's parameters and buffers and of an optimiser's state, shared storages once."""
    tensors = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

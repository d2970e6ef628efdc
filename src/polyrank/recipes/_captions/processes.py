"""One run in several processes (torchrun, accelerate launch): all train, the first prepares the data, keeps the adapter
and decodes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ...core.errors import ConfigError


def num_processes() -> int:
    """How many processes the run was started in."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    """Whether this is the process that writes files."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process goes through the block alone, then the others: they find the files that it left.

    Raises: ConfigError where accelerate is to split the model between processes.
    """
    if num_processes() == 1:
        yield
        return
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ConfigError(f"{name}: recipes keep the whole adapter in every process; use DDP (--multi_gpu)")
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


def part() -> None:
    """Return when every process has come here; from then on each goes its own way.

    Their connection is ended while all are there: gloo can wait for ever for one that has left.
    """
    if num_processes() > 1:
        import torch.distributed as dist
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        if dist.is_initialized():
            dist.destroy_process_group()


def check_can_build(what: str) -> None:
    """Raises: ConfigError in one of several processes, where no base model can be trained first."""
    if num_processes() > 1:
        raise ConfigError(f"{what} is built and trained first, in one process: run the recipe without a launcher once")

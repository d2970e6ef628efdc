"""Two ranks (gloo) give the gradient of one process, for every mode, however many passes each rank needs."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from polyrank.hypotheses.step import StepOptions, winner_step

from .tiny_models import gpt2, gradients, naive_step, text_batch, with_hypotheses

CASES = [
    ("wta", StepOptions(), False),
    ("wta", StepOptions(guess=torch.tensor([0, 1, 2])), False),
    ("wta", StepOptions(lean=True), False),
    ("wta", StepOptions(mixed_rows=False), False),
    ("wta", StepOptions(), True),
    ("relaxed-wta", StepOptions(), False),
    ("relaxed-wta", StepOptions(lean=True), True),
    ("annealed-wta", StepOptions(max_rows_per_pass=1), False),
    ("mean", StepOptions(), False),
]


def batches(masked):
    batch = text_batch()
    if masked:
        batch["labels"][:3] = -100  # rank 0 has nothing to learn
    return batch


def model_and_config(mode):
    torch.manual_seed(0)
    return with_hypotheses(gpt2(), mode=mode, epsilon=0.1)


def rank_main(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for case, (mode, options, masked) in enumerate(CASES):
        model, config = model_and_config(mode)
        wrapped = DistributedDataParallel(model, find_unused_parameters=case % 2 == 1)
        batch = batches(masked)
        items = int((batch["labels"][:, 1:] != -100).sum())
        part = {key: value[3 * rank : 3 * rank + 3] for key, value in batch.items()}
        for _ in range(2):  # a second step: nothing may be left over from the first
            model.zero_grad(set_to_none=True)
            winner_step(
                wrapped,
                part,
                config=config,
                temperature=0.3,
                num_items_in_batch=items,
                options=options,
                generator=torch.Generator().manual_seed(0),
                backward=lambda loss: (2 * loss).backward(),  # the wrapper averages over ranks
                no_sync=wrapped.no_sync,
            )
        save_file(gradients(model), f"{folder}/{rank}-{case}.safetensors")
    dist.barrier()
    os._exit(0)  # gloo's own way out can wait for ever for a peer that has gone already (seen once, all files written)


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # where a new process finds this module
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(rank_main, args=(port, str(tmp_path)), nprocs=2)
    for case, (mode, _, masked) in enumerate(CASES):
        model, config = model_and_config(mode)
        batch = batches(masked)
        items = int((batch["labels"][:, 1:] != -100).sum())
        naive_step(model, batch, config, temperature=0.3, num_items=items)
        for rank in range(2):
            given = load_file(tmp_path / f"{rank}-{case}.safetensors")
            for name, expected in gradients(model).items():
                torch.testing.assert_close(given[name], expected, rtol=0, atol=1e-12, msg=f"{CASES[case]}: {name}")

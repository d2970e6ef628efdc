"""LSR and LoRMA under transformers' Trainer: two processes (gloo) learn what one does, with and without extras."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from polyrank.adapters.lorma import LormaConfig
from polyrank.adapters.lsr import LsrConfig

name, folder, rows, extra = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
configs = {
    "lsr": LsrConfig(lora_alpha=16, target_modules=["c_attn", "c_proj"]),
    "pi": LormaConfig(r=2, lora_alpha=2, target_modules=["c_attn", "c_proj"]),
    "plus": LormaConfig(r=2, variant="plus", side="post", target_modules=["c_attn", "c_proj"]),
}

class Rows(Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, i):
        ids = torch.randint(0, 30, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}

torch.manual_seed(0)
base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0,
                                  embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
model = get_peft_model(base, configs[name])
args = TrainingArguments(folder, per_device_train_batch_size=rows, max_steps=4, learning_rate=1e-2, use_cpu=True,
                         report_to=[], save_strategy="no", logging_steps=4, seed=0, data_seed=0, weight_decay=0.1,
                         gradient_checkpointing="checkpointing" in extra, bf16="bf16" in extra, disable_tqdm=True,
                         lr_scheduler_type="constant", ddp_find_unused_parameters=False, max_grad_norm=0.0)
class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(Rows())
trainer = InOrder(model=model, args=args, train_dataset=Rows())
trainer.train()
if trainer.is_world_process_zero():
    values = {n: p.detach().double().sum().item() for n, p in model.named_parameters() if p.requires_grad}
    loss = [e["loss"] for e in trainer.state.log_history if "loss" in e][-1]
    print("RESULT" + json.dumps({"loss": loss, "values": values}), flush=True)
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    os._exit(0)  # gloo's own way out now and then ends in std::terminate, or waits for ever
"""


def run(run_program, tmp_path: Path, name: str, processes: int, extra: str) -> dict:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, str(script), name, str(tmp_path / f"out{processes}"), str(8 // processes), extra]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    done = run_program(command, tmp_path / "log", timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lsr", "pi", "plus"])
def test_two_processes_learn_what_one_learns(name, tmp_path, run_program):
    """8 rows a step, on one process or 4 + 4 on two: the same parameters to fp32 rounding over four Adam steps."""
    one, two = (run(run_program, tmp_path, name, processes, "") for processes in (1, 2))
    assert two["values"].keys() == one["values"].keys()
    for key, value in one["values"].items():
        assert two["values"][key] == pytest.approx(value, rel=1e-3, abs=1e-3), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lsr", "pi", "plus"])
def test_gradient_checkpointing_and_bf16(name, tmp_path, run_program):
    """Checkpointing changes no number; bf16 autocast trains to nearly the same loss (bf16 has 8 bits: 2 %)."""
    plain, checkpointed = (run(run_program, tmp_path, name, 1, extra) for extra in ("", "checkpointing"))
    for key, value in plain["values"].items():
        assert checkpointed["values"][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    half = run(run_program, tmp_path, name, 1, "bf16 checkpointing")
    assert half["loss"] == pytest.approx(plain["loss"], rel=0.02)

"""Two processes (gloo, CPU, through accelerate): the losses of one process, and what happens when one is killed.

Ranks are children of a process that has imported all; they get what torchrun and `accelerate launch` would put into
their environment, and leave by the interpreter's own way out, so that one that hangs there is seen. No agent watches
them: what the survivor does is its own doing.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _fault_kills import LIMIT_S, end_group, fork, interpreters_way_out

MODELS = ("mcl", "lsr", "lorma")
WRAPPERS = ("ddp", "fsdp2")
STEPS, SAVE_EVERY, ROWS = 8, 3, 8
DIES_AT = 5
TOLERANCE = 1e-6


def import_everything() -> None:
    """Import, once, what the ranks need, and compute nothing."""
    import peft  # noqa: F401
    import torch
    import torch.distributed.fsdp
    import transformers
    import transformers.trainer
    from accelerate.utils import fsdp_utils  # noqa: F401

    from polyrank import LormaConfig, LsrConfig, MclConfig, MclTrainer  # noqa: F401

    torch.set_num_threads(1)
    transformers.LlamaForCausalLM  # noqa: B018
    gc.collect()
    gc.freeze()


def train(model: str, wrapper: str | None, folder: Path, *, world: int, resume: bool, die: int | None) -> None:
    """One rank's training; writes its losses, and rank 0 the adapter's parameters."""
    import torch
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor
    from transformers import Trainer, TrainingArguments

    from polyrank import MclTrainer
    from polyrank.hypotheses.checkpoint import newest_complete

    if wrapper == "fsdp2":
        allow_fsdp_on_cpu()
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=ROWS // world,
        max_steps=STEPS,
        save_steps=SAVE_EVERY,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        data_seed=0,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False if world > 1 else None,
        fsdp=True if wrapper == "fsdp2" else None,
        fsdp_config={"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"} if wrapper == "fsdp2" else None,
    )

    class Dying(MclTrainer if model == "mcl" else Trainer):  # type: ignore[misc]
        def training_step(self, *given: Any, **more: Any) -> Any:
            if self.state.global_step + 1 == die:
                (folder / "died").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().training_step(*given, **more)

    trainer = Dying(model=adapted(model), args=args, train_dataset=rows())
    last = newest_complete(folder) if resume else None
    trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {"resumed_from": last.name if last else None, "losses": [entry["loss"] for entry in logged]}
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    found["sharded"] = all(isinstance(p, DTensor) for p in trained)
    parameters = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone().contiguous()
        for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        if p.requires_grad
    }
    if trainer.is_world_process_zero():
        save_file(parameters, folder / "parameters.safetensors")
        (folder / "found.json").write_text(json.dumps(found))
    if world > 1:
        torch.distributed.barrier()


def allow_fsdp_on_cpu() -> None:
    """Let accelerate take the FSDP plugin that it is given: on a CPU it forgets it, without a word, and takes DDP."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def start(state: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as its own code does elsewhere

    AcceleratorState.__init__ = start


def adapted(model: str) -> Any:
    """A Llama of two layers with an adapter; the same in every process. LoRA-MCL's hypotheses start apart: ties would
    be drawn by each rank for itself."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from polyrank import LormaConfig, LsrConfig, MclConfig

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **shape))
    targets = ["q_proj", "v_proj", "down_proj"]
    configs: dict[str, Callable[[], Any]] = {
        "mcl": lambda: MclConfig(r=2, num_hypotheses=2, mode="relaxed-wta", init_weights=False, target_modules=targets),
        "lsr": lambda: LsrConfig(lora_alpha=16, target_modules=targets),
        "lorma": lambda: LormaConfig(r=2, target_modules=targets),
    }
    return get_peft_model(base, configs[model]())


def rows() -> list[dict[str, Any]]:
    import torch

    draws = [torch.randint(1, 64, (12,), generator=torch.Generator().manual_seed(i)) for i in range(ROWS * STEPS)]
    return [{"input_ids": ids, "labels": ids} for ids in draws]


# -- in the parent ------------------------------------------------------------------------------------------------


def compare(model: str, wrapper: str, folder: Path, one: Path) -> dict[str, Any]:
    """Two ranks against one process: the largest difference of a step's loss, and of a parameter at the end."""
    ended = launch(model, wrapper, folder, world=2)
    found: dict[str, Any] = {"model": model, "wrapper": wrapper, "statuses": ended["statuses"]}
    if any(ended["statuses"]):
        return found | {"error": last_error(folder / "log.0")}
    losses = [json.loads((place / "found.json").read_text())["losses"] for place in (one, folder)]
    found["steps"] = len(losses[1])
    found["sharded"] = json.loads((folder / "found.json").read_text())["sharded"]
    found["largest_loss_difference"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
    found["largest_parameter_difference"] = _largest(one, folder)
    found["within_tolerance"] = found["largest_loss_difference"] <= TOLERANCE
    return found


def kill_one_rank(model: str, wrapper: str, folder: Path, whole: Path) -> dict[str, Any]:
    """Rank 1 is killed in the middle; how rank 0 ends, and whether both go on to the same end."""
    ended = launch(model, wrapper, folder, world=2, die=DIES_AT)
    found: dict[str, Any] = {
        "model": model,
        "wrapper": wrapper,
        "killed_at_step": DIES_AT,
        "statuses": ended["statuses"],
        "survivor_seconds": ended["survivor_s"],
        "survivor_error": last_error(folder / "log.0"),
    }
    again = launch(model, wrapper, folder, world=2, resume=True)
    found["resumed_statuses"] = again["statuses"]
    if any(again["statuses"]):
        return found | {"error": last_error(folder / "log.0")}
    result = json.loads((folder / "found.json").read_text())
    difference = _largest(whole, folder)
    return found | {
        "resumed_from": result["resumed_from"],
        "largest_parameter_difference": difference,
        "bit_identical": difference == 0.0,
    }


def launch(
    model: str, wrapper: str | None, folder: Path, *, world: int, resume: bool = False, die: int | None = None
) -> dict[str, Any]:
    """Start the ranks and wait for them. Returns statuses, and seconds from a rank's death to the end of the other."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> None:
        if world > 1:
            environment = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            os.environ.update({key: str(value) for key, value in environment.items()})
        dies = die if number == world - 1 else None
        train(model, wrapper, folder, world=world, resume=resume, die=dies)

    def log(number: int) -> Path:
        path = folder / f"log.{number}"
        path.unlink(missing_ok=True)
        return path

    # a rank that lost the other ends as its user would see it; gloo now and then waits for ever where all end well
    leave = os._exit if die is None else interpreters_way_out
    children = [fork(lambda n=n: rank(n), log(n), leave) for n in range(world)]
    ends, statuses = _ends(children)
    survivor = round(ends[0] - ends[-1], 2) if die is not None else None
    return {"statuses": statuses, "survivor_s": survivor}


def _ends(children: list[int]) -> tuple[list[float], list[int]]:
    """When each child ended, and its status. Raises TimeoutError past the limit, all of them ended."""
    ends: dict[int, float] = {}
    limit = time.monotonic() + LIMIT_S
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    ends[child], statuses[child] = time.monotonic(), os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            for child in children:
                end_group(child)
            raise TimeoutError(f"ranks did not end within {LIMIT_S:.0f} s")
        time.sleep(0.01)
    return [ends[child] for child in children], [statuses[child] for child in children]


def last_error(log: Path) -> str:
    """The error that a rank ended with: the last line of its traceback, addresses and files left out."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if re.match(r"[A-Za-z_.]+(Error)?: ", line)]
    text = lines[-1] if lines else log.read_text(errors="replace").strip().splitlines()[-1:]
    return re.sub(r"(/[\w.+-]+)+/", "", str(text))[:400]


def _largest(one: Path, two: Path) -> float:
    """The largest difference of an entry of the trained parameters."""
    from safetensors.torch import load_file

    first, second = (load_file(folder / "parameters.safetensors") for folder in (one, two))
    if first.keys() != second.keys():
        raise RuntimeError(f"other parameters: {sorted(first.keys() ^ second.keys())[:3]}")
    return max(float((first[name] - second[name]).abs().max()) for name in first)

"""Smoke tests of an installed polyrank: run by the Python of the environment, in a folder without the repository.

One JSON line on standard output for each step: name, ok, what was seen, seconds. Status 1 where a step failed. Needs
polyrank alone; the last step reads $POLYRANK_DATA (e2e_nlg/, models/stories260k/) and is left out where it is not set.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("polyrank", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")


def versions() -> str:
    """Python and the packages that the range is about; polyrank must not come from a checkout."""
    import polyrank

    place = Path(polyrank.__file__).resolve()
    if "site-packages" not in place.parts:
        raise AssertionError(f"polyrank was imported from {place.parent}, not from an installed wheel")
    found = {name: version(name) for name in PACKAGES}
    return json.dumps({"python": ".".join(map(str, sys.version_info[:3])), **found})


def tiny_llama():
    """Two layers of width 16, random, always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=64, **sizes)).eval()


def adapted(config, folder: Path) -> str:
    """Forward, backward, one step, saved, loaded, merged: equal outputs each time."""
    import torch
    from peft import PeftModel, get_peft_model

    ids = torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(1))
    model = get_peft_model(tiny_llama(), config)
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([p for _, p in own], lr=0.02)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if not all(p.grad is not None for _, p in own):
            raise AssertionError("a parameter of the adapter has no gradient")
        optimizer.step()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss did not fall: {losses}")
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
        again = loaded(input_ids=ids).logits
        merged = loaded.merge_and_unload()(input_ids=ids).logits
    _equal("loaded", again, logits, 0.0)
    _equal("merged", merged, logits, 1e-5)
    return f"loss {losses[0]:.4f} to {losses[-1]:.4f}, {sum(p.numel() for _, p in own)} parameters"


def _equal(what: str, one, other, tolerance: float) -> None:
    error = float((one - other).abs().max() / other.abs().max())
    if not error <= tolerance:
        raise AssertionError(f"{what}: outputs differ by {error:.2e} of the largest, allowed {tolerance:.0e}")


def hypotheses() -> str:
    """LoRA-MCL: training steps through MclTrainer, folders, one text for each hypothesis, one hypothesis merged."""
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import TrainingArguments

    from polyrank import MclConfig, MclTrainer, export_hypotheses, generate_hypotheses

    config = MclConfig(num_hypotheses=3, r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ids = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row.tolist(), "labels": row.tolist(), "attention_mask": [1] * 8} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
        arguments = TrainingArguments(folder, max_steps=3, per_device_train_batch_size=2, learning_rate=0.05, **quiet)
        model = get_peft_model(tiny_llama(), config)
        MclTrainer(model=model, args=arguments, train_dataset=rows).train()
        model.eval()
        texts = generate_hypotheses(model, input_ids=ids[:2], max_new_tokens=4, min_new_tokens=4)
        model.save_pretrained(f"{folder}/adapter")
        export_hypotheses(model, f"{folder}/loras")
        loaded = PeftModel.from_pretrained(tiny_llama(), f"{folder}/adapter").eval()
        again = generate_hypotheses(loaded, input_ids=ids[:2], max_new_tokens=4, min_new_tokens=4)
        if not torch.equal(texts, again):
            raise AssertionError("the loaded adapter writes other tokens")
        if len(list(Path(f"{folder}/loras").rglob("adapter_model.safetensors"))) != 3:
            raise AssertionError("three LoRA folders were to be written")
        loaded.merge_and_unload()
    return f"tokens of shape {tuple(texts.shape)}, equal after loading"


def lora() -> str:
    """PEFT's own LoRA in the same environment: what fails here too is not ours."""
    from peft import LoraConfig

    with tempfile.TemporaryDirectory() as folder:
        return adapted(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"), Path(folder))


def lsr() -> str:
    from polyrank import LsrConfig

    config = LsrConfig(r=2, lora_alpha=64, num_terms=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        return adapted(config, Path(folder))


def command(*arguments: str) -> str:
    """One command line, in this process. Returns what it wrote to standard output."""
    from polyrank.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(arguments))
    if status != 0:
        raise AssertionError(f"polyrank {' '.join(arguments)}: status {status}: {err.getvalue()[-300:].strip()}")
    return out.getvalue()


def command_line() -> str:
    """Help, lists, and recipes composed from the configurations that the wheel carries."""
    for arguments in (("--help",), ("run", "--help"), ("list", "methods", "--json")):
        if not command(*arguments).strip():
            raise AssertionError(f"polyrank {' '.join(arguments)} says nothing")
    recipes = json.loads(command("list", "recipes", "--json"))
    for recipe in ("markov/setup", "e2e/quick", "glue", "methods"):
        if "recipe:" not in command("run", f"recipe={recipe}", "--cfg", "job"):
            raise AssertionError(f"recipe={recipe} is not composed")
    return f"{len(recipes)} recipes"


def report() -> str:
    """A result file to a page: the page's template, style and script are in the wheel."""
    from polyrank.core.records import Metric, Row, new_record, write_record

    rows = [Row(name, {"score": value}, seed) for name in ("a", "b") for seed, value in enumerate((1.0, 2.0))]
    record = new_record("smoke", "run", {"score": Metric("%", "higher")}, rows)
    with tempfile.TemporaryDirectory() as folder:
        path = write_record(record, f"{folder}/smoke.json")
        command("report", str(path), "-o", f"{folder}/report.html")
        command("report", str(path), "-o", f"{folder}/report.md")
        return f"{Path(folder, 'report.html').stat().st_size} bytes"


def toy_experiment() -> str:
    """The demo's experiment, cut short: data that it makes, one hypothesis against two."""
    with tempfile.TemporaryDirectory() as folder:
        command("run", "recipe=markov/setup", "num_steps=4", "num_final=100", f"runs_dir={folder}")
        written = sorted(path.name for path in Path(folder).rglob("*") if path.is_file())
    if "result.json" not in written:
        raise AssertionError(f"no result.json among {written}")
    return f"{len(written)} files"


def real_data() -> str:
    """Restaurant descriptions on the small Llama of $POLYRANK_DATA: two steps, two inputs decoded."""
    with tempfile.TemporaryDirectory() as folder:
        few = ("num_hypotheses=2", "rank=2", "num_steps=2", "batch_size=4", "data.test_limit=2", "max_new_tokens=8")
        command("run", "recipe=e2e/quick", *few, f"runs_dir={folder}")
        (result,) = Path(folder).rglob("result.json")
        figures = json.loads(result.read_text(encoding="utf-8"))["rows"][0]["figures"]
    return f"mixture NLL {figures['mixture_nll']:.3f} nats per token"


STEPS = (versions, lora, hypotheses, lsr, command_line, report, toy_experiment, real_data)


def run(step: Callable[[], str]) -> bool:
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the steps alone
            seen, passed = step(), True
    except Exception as error:
        seen, passed = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", False
    line = {"step": step.__name__, "ok": passed, "seen": seen, "time_s": round(time.perf_counter() - start, 1)}
    print(json.dumps(line), flush=True)
    return passed


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen = [step for step in STEPS if step is not real_data or "POLYRANK_DATA" in os.environ]
    passed = [run(step) for step in chosen]
    sys.exit(0 if all(passed) else 1)

"""The tables of docs/methods/combinations.md: every pair is tried on a tiny Llama.

As a script: `python tests/conformance/combinations.py` writes them into the page.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from method_cases import CASES, cases
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from tiny_models import LLAMA
from transformers import Trainer, TrainingArguments

from polyrank.adapters import adapters
from polyrank.adapters.initialisers import base_gradients, initialise_eva, initialise_lora_ga
from polyrank.training.ba_lora import BaLoraTrainer
from polyrank.training.lora_pro import LoraProAdamW

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "combinations.md"
BEGIN, END = "<!-- begin: made by combinations.py -->\n", "<!-- end: made by combinations.py -->\n"
YES = "yes"
SPARED = "spared"
LORA = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}, "PiSSA": {"init_lora_weights": "pissa"}}
ADAPTERS = (*LORA, "LoKr", *(name for name in CASES if name in adapters and name != "plain_lora"))

Start = Callable[[PeftModel], None]


def adapted(name: str, **more: Any) -> PeftModel:
    """The tiny Llama with a fresh adapter, which leaves its function as it is."""
    shared = {"target_modules": list(LLAMA.targets), "task_type": LLAMA.task_type}
    if name in LORA:
        config = LoraConfig(r=2, lora_alpha=4, **{**shared, **LORA[name], **more})
    elif name == "LoKr":
        config = LoKrConfig(r=2, alpha=4, **shared)
    else:
        config = LLAMA.config(cases(name)[0], init_weights=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return get_peft_model(LLAMA.base(), config).eval()


def batch() -> dict[str, torch.Tensor]:
    inputs = LLAMA.inputs()
    return {**inputs, "labels": inputs["input_ids"].clone()}


def same_function(model: PeftModel) -> None:
    torch.testing.assert_close(LLAMA.outputs(model), LLAMA.outputs(LLAMA.base()), atol=1e-4, rtol=1e-4)


def lora_ga(model: PeftModel) -> None:
    initialise_lora_ga(model, base_gradients(model, [batch()]))
    same_function(model)
    assert any(bool(value.any()) for name, value in model.named_parameters() if "lora_B" in name)


def eva(model: PeftModel) -> None:
    initialise_eva(model, [batch()], maximum_batches=2)
    same_function(model)
    A = next(p for name, p in model.named_parameters() if name.endswith(("lora_A.default.weight", "_A.default")))
    torch.testing.assert_close(A @ A.T, torch.eye(len(A)), atol=1e-4, rtol=0)


def lora_pro(model: PeftModel) -> None:
    optimizer = LoraProAdamW(model, lr=1e-2)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    for seed in range(2):  # where B is zero the first step leaves A where it is
        generator = torch.Generator().manual_seed(seed)
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    assert all(torch.isfinite(p).all() and not torch.equal(p, old) for p, old in zip(trained, before, strict=True))


def arguments(folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", weight_decay=0.1,
    )  # fmt: skip


def rows() -> list[dict[str, torch.Tensor]]:
    data = batch()
    return [{key: value[i] for key, value in data.items()} for i in range(4)]


def ba_lora(model: PeftModel, optimizer: bool = False) -> None:
    """Two steps; the teacher stays the model as it was before them (the base, where the adapter starts as it)."""
    start = LLAMA.outputs(model)
    more = {"optimizer_cls_and_kwargs": (LoraProAdamW, {"model": model, "lr": 1e-3})} if optimizer else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = BaLoraTrainer(model=model, args=arguments(folder), train_dataset=rows(), recipe="generation", **more)
        trainer.train()
    torch.testing.assert_close(trainer._teacher_logits(model.train(), batch()), start, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(LLAMA.outputs(model.eval()), start, atol=1e-5)


def weight_decay(model: PeftModel) -> str:
    """Whether the Trainer's weight decay acts on the adapter (biases are never decayed)."""
    with tempfile.TemporaryDirectory() as folder:
        decayed = set(Trainer(model=model, args=arguments(folder)).get_decay_parameter_names(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return YES if trained & decayed else SPARED


def verdict(pair: Callable[[], Any]) -> str:
    """YES (or what the pair returns), or the one line with which it is refused."""
    try:
        return pair() or YES
    except ValueError as error:
        return str(error).splitlines()[0]


def adapter_pairs() -> dict[str, dict[str, str]]:
    """Adapter -> what comes beside it -> verdict."""
    table = {}
    for name in ADAPTERS:
        for_eva = {"init_lora_weights": "eva"} if "init_lora_weights" not in LORA.get(name, {}) else {}
        table[name] = {
            "LoRA-GA": verdict(lambda n=name: lora_ga(adapted(n))),
            "EVA": verdict(lambda n=name, more=for_eva: eva(adapted(n, **more))),
            "LoRA-Pro": verdict(lambda n=name: lora_pro(adapted(n))),
            "BA-LoRA": verdict(lambda n=name: ba_lora(adapted(n))),
            "weight decay": verdict(lambda n=name: weight_decay(adapted(n))),
        }
    return table


def extra_pairs() -> dict[str, dict[str, str]]:
    """What comes beside a LoRA, two at a time: first -> second -> verdict."""

    def pair(first: Start, second: Callable[[PeftModel], Any], start: Mapping[str, str]) -> None:
        model = adapted("LoRA", **start)
        first(model)
        second(model)

    by_eva = {"init_lora_weights": "eva"}
    return {
        "LoRA-GA": {
            "EVA": verdict(lambda: pair(eva, lora_ga, by_eva)),
            "LoRA-Pro": verdict(lambda: pair(lora_ga, lora_pro, {})),
            "BA-LoRA": verdict(lambda: pair(lora_ga, ba_lora, {})),
        },
        "EVA": {
            "LoRA-Pro": verdict(lambda: pair(eva, lora_pro, by_eva)),
            "BA-LoRA": verdict(lambda: pair(eva, ba_lora, by_eva)),
        },
        "LoRA-Pro": {"BA-LoRA": verdict(lambda: pair(lambda model: None, partial(ba_lora, optimizer=True), {}))},
    }


def markdown(tables: list[dict[str, dict[str, str]]]) -> str:
    """Both tables; refusals are numbered and listed below, in the words of the errors."""
    reasons: dict[str, int] = {}
    parts = []
    for table in tables:
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        lines = [f"| | {' | '.join(columns)} |", f"|:--|{':-:|' * len(columns)}"]
        for name, row in table.items():
            cells = []
            for column in columns:
                text = row.get(column, "")
                plain = text in (YES, SPARED, "")
                cells.append(text if plain else f"no ({reasons.setdefault(text, len(reasons) + 1)})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    parts.append("\n".join(f"{number}. `{text}`" for text, number in reasons.items()))
    return "\n\n".join(parts) + "\n"


def page_with(text: str, part: str) -> str:
    """The page with the part between its two marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{part}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text("utf-8"), markdown([adapter_pairs(), extra_pairs()])), encoding="utf-8")

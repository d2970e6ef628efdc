"""What the fault campaign runs: three commands of polyrank on inputs that are made here, small enough for many runs.

    mcl   polyrank run recipe=e2e method=mcl            LoRA-MCL, annealed winner-takes-all, dropout
    lsr   polyrank run recipe=data_to_text method=lsr   LSR on a GPT-2 with dropout
    gpl   polyrank gpl run                              queries, negatives, labels, a LoRA with dropout

Dropout everywhere, so that a random state that is not restored changes the weights. Checkpoints every SAVE_EVERY steps,
metrics every 10: the two fall apart, so that a resumed run has to log over a window that was cut.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path

STEPS, SAVE_EVERY = 14, 3
SYSTEMS = ("mcl", "lsr", "gpl")
TOY_DOMAIN = Path(__file__).parents[1] / "tests" / "helpers" / "toy_domain.py"


def quiet_machine() -> None:
    """One thread, no GPU, no network, for this process and its children. Before torch is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):
        os.environ[name] = "1"
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def import_everything() -> None:
    """Import, once, what the commands need, and compute nothing: a process that has computed forks badly."""
    import bm25s  # noqa: F401
    import datasets  # noqa: F401
    import faiss  # noqa: F401
    import peft  # noqa: F401
    import sentence_transformers.sentence_transformer.losses
    import sentence_transformers.sentence_transformer.trainer  # noqa: F401
    import torch
    import transformers

    import polyrank.recipes.commands
    import polyrank.recipes.data_to_text
    import polyrank.recipes.e2e
    import polyrank.recipes.gpl
    import polyrank.training.memory  # noqa: F401
    from polyrank import MclTrainer  # noqa: F401
    from polyrank.core.provenance import code_state
    from polyrank.recipes._frame.compose import check_overrides, compose
    from polyrank.retrieval import lexical  # noqa: F401

    torch.set_num_threads(1)
    for name in ("AutoTokenizer", "AutoModelForCausalLM", "AutoModel", "GPT2LMHeadModel", "BertModel", "LlamaModel"):
        getattr(transformers, name)
    code_state()
    for system in SYSTEMS:  # Hydra's grammar is read once
        arguments = command(system, Path("inputs"), Path("runs"))
        own = ["recipe=gpl"] if system == "gpl" else []
        compose(check_overrides([*own, *(text for text in arguments if "=" in text)]))
    gc.collect()
    gc.freeze()  # a child's collections then leave alone, and do not copy, what was imported here


def make_inputs(folder: Path) -> None:
    """A GPT-2 of width 16 with its tokenizer, 16 training pairs, an encoder of width 64, and 48 documents."""
    import torch

    from polyrank.recipes._text.config import Scratch
    from polyrank.recipes._text.scratch_model import build_model, build_tokenizer
    from polyrank.retrieval.corpus import Document, write_beir

    names, kinds = ["Aromi", "Blue Spice", "The Mill", "Zizzi"], ["pub", "cafe"]
    sentences = [f"{names[i % 4]} is a {kinds[i % 2]} with number {i}." for i in range(16)]
    tokenizer = build_tokenizer(sentences, 300)
    torch.manual_seed(0)
    shape = Scratch(layers=1, heads=2, width=16, context=96, vocabulary=300, num_steps=2, batch_size=4)
    build_model(shape, tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "pairs").mkdir()
    for split, count in (("train", 16), ("test", 2)):
        lines = [f'"name[{names[i % 4]}], eatType[{kinds[i % 2]}], near[{i}]","{sentences[i]}"' for i in range(count)]
        (folder / "pairs" / f"{split}.csv").write_text("mr,ref\n" + "\n".join(lines) + "\n")
    spec = importlib.util.spec_from_file_location("toy_domain", TOY_DOMAIN)
    assert spec is not None
    assert spec.loader is not None
    toy_domain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy_domain)
    toy_domain.make_encoder(folder / "encoder")
    documents = [
        Document(f"d{i}", f"old{i % 24}x0 old{i % 24}x1 old{i % 24}x2", " ".join(f"new{i % 24}x{j}" for j in range(6)))
        for i in range(48)
    ]
    (folder / "corpus").mkdir()
    write_beir(folder / "corpus", documents)


def command(system: str, inputs: Path, runs_dir: Path) -> list[str]:
    """Arguments of `polyrank` that train one system; its folder is `run_folder(system, runs_dir)`."""
    shared = [f"runs_dir={runs_dir}", "run_name=run", f"save_every={SAVE_EVERY}", "batch_size=4"]
    text = [f"model.name_or_path={inputs}/model", f"data.path={inputs}/pairs", f"num_steps={STEPS}", "model=hub"]
    text += ["max_new_tokens=4", "decode_batch_size=2", *shared]
    if system == "mcl":
        options = ["num_hypotheses=2", "rank=2", "num_decodings=1", "+method.options.lora_dropout=0.1"]
        return ["run", "recipe=e2e", "method=mcl", *text, *options]
    if system == "lsr":
        options = ["learning_rate=1e-2", "warmup_steps=2", "num_beams=1", "metrics=[bleu]", "max_length=96"]
        return ["run", "recipe=data_to_text", "method=lsr", "data=e2e_d2t", *text, *options]
    options = ["queries_per_document=1", "negatives=5", "rank=2", "lora_alpha=2", "lora_dropout=0.1", "max_length=32"]
    options += ["target_modules=all-linear", "warmup_steps=2", "learning_rate=1e-2", f"steps={STEPS}"]
    return ["gpl", "run", f"corpus={inputs}/corpus", f"encoder={inputs}/encoder", *shared, *options]


def run_folder(system: str, runs_dir: Path) -> Path:
    return runs_dir / {"mcl": "e2e", "lsr": "data_to_text", "gpl": "gpl"}[system] / "run"


def final_save(system: str) -> tuple[object, str]:
    """Where each command writes its adapter after training: an object and the name of its function."""
    if system == "mcl":
        from peft import PeftModel

        return PeftModel, "save_pretrained"
    if system == "lsr":
        from polyrank.recipes._text import training as _text_training

        return _text_training, "save_adapter"
    from polyrank.recipes._gpl import training as _gpl_training

    return _gpl_training, "save_weights"

"""What the pages of README and docs take for granted, small: models, data sets, runs, an index."""

import json
import shutil
from pathlib import Path

import search_place
import torch
from loading import load_module

from polyrank.cli import main

ROOT = Path(__file__).parents[2]


def make_hub(folder):
    """Small models for names on the hub, an adapter of one of them, and data in the formats of what is not here."""
    cli = load_module(ROOT / "tests" / "cli" / "conftest.py")
    cli.make_base(folder / "base")
    targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "r": 2}
    cli._make_adapter(folder / "base", folder / "adapter", cli.MclConfig(num_hypotheses=2, **targets))
    cli._make_adapter(folder / "base", folder / "lora", cli.LoraConfig(**targets))
    make_text_models(folder)
    make_clotho(folder / "clotho")
    make_audiocaps(folder / "clotho", folder / "audiocaps")
    make_textcaps(folder / "textcaps")
    make_webnlg(folder / "webnlg")
    pairs = [{"translation": {"en": f"a dog runs {i}", "de": f"ein Hund rennt {i}"}} for i in range(8)]
    (folder / "deen").mkdir()
    (folder / "deen" / "train.de-en.json").write_text(json.dumps(pairs))
    problems = [{"query": f"{i} eggs?", "response": f"The answer is: {i}", "type": "x"} for i in range(8)]
    (folder / "MetaMathQA-40K.json").write_text(json.dumps(problems))
    lines = {
        "GSM8K": [{"question": "How many?", "answer": f"#### {i}"} for i in range(4)],
        "MATH": [{"problem": "How many?", "solution": f"\\boxed{{{i}}}"} for i in range(4)],
    }
    for name, rows in lines.items():
        (folder / f"{name}_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "gsm8k").mkdir()
    for split in ("train", "test"):
        shutil.copy(folder / "GSM8K_test.jsonl", folder / "gsm8k" / f"{split}.jsonl")
    return folder


def make_text_models(folder):
    """A GPT-2 and a Llama of width 16 over one tokenizer, and a RoBERTa."""
    import transformers as hf

    from polyrank.recipes._text.config import Scratch
    from polyrank.recipes._text.scratch_model import build_model, build_tokenizer

    texts = ["name[Aromi], eatType[pub]\nAromi is a pub.", "How many eggs? #### 3 a dog runs\nein Hund rennt ."]
    tokenizer = build_tokenizer(texts, 300)
    torch.manual_seed(0)
    build_model(Scratch(layers=1, heads=2, width=16, context=768), tokenizer).save_pretrained(folder / "gpt2")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    hf.LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    for name in ("gpt2", "llama"):
        tokenizer.save_pretrained(folder / name)
    glue = load_module(ROOT / "tests" / "recipes" / "test_glue.py")
    config = hf.RobertaConfig(vocab_size=len(glue.WORDS) + 4, pad_token_id=1, max_position_embeddings=34, **sizes)
    hf.RobertaModel(config).save_pretrained(folder / "roberta")
    glue.save_tokenizer(folder / "roberta")


def make_clotho(folder):
    """Four clips of noise a split, in Clotho's layout."""
    import numpy as np
    import soundfile

    folder.mkdir()
    draw = np.random.default_rng(0)
    for split in ("development", "validation", "evaluation"):
        (folder / split).mkdir()
        lines = ["file_name,caption_1,caption_2"]
        for i in range(4):
            lines.append(f"{i}.wav,a sound of {i},the noise {i} makes")
            soundfile.write(folder / split / f"{i}.wav", draw.normal(size=800).astype(np.float32) * 0.1, 16_000)
        (folder / f"clotho_captions_{split}.csv").write_text("\n".join(lines) + "\n")


def make_audiocaps(clotho, folder):
    """The same clips in AudioCaps' layout."""
    for split, theirs in (("train", "development"), ("val", "validation"), ("test", "evaluation")):
        shutil.copytree(clotho / theirs, folder / "audio" / split)
        lines = ["audiocap_id,youtube_id,start_time,caption", *(f"{i},{i},0,a sound of {i}" for i in range(4))]
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")


def make_textcaps(folder):
    from PIL import Image

    (folder / "train_images").mkdir(parents=True)
    for split in ("train", "val"):
        rows = []
        for i in range(4):
            Image.effect_noise((40, 40), 60).save(folder / "train_images" / f"{split}{i}.jpg")
            rows += [{"image_id": f"{split}{i}", "caption_str": f"a sign that says {i}"}]
        (folder / f"TextCaps_0.1_{split}.json").write_text(json.dumps({"dataset_name": "textcaps", "data": rows}))


def make_webnlg(folder):
    folder.mkdir()
    for split in ("train", "test"):
        entries = [
            {
                "category": "Food",
                "modifiedtripleset": [{"subject": f"Aromi{i}", "property": "kind", "object": "pub"}],
                "lexicalisations": [{"comment": "good", "lex": f"Aromi {i} is a pub."}],
            }
            for i in range(4)
        ]
        (folder / f"{split}.json").write_text(json.dumps({"entries": [{str(j): e} for j, e in enumerate(entries)]}))


def make_retrieval(folder):
    """documents/, judged/, a run with an adapter and checkpoints, an index of it, and two readers of queries."""
    search_place.make_encoder(folder / "encoder")
    run = folder / "runs" / "gpl" / "cranfield"
    search_place.make_adapter(folder / "encoder", run / "adapter")
    for step in (10, 20):
        search_place.make_adapter(folder / "encoder", run / "checkpoints" / f"checkpoint-{step}", seed=step)
    search_place.make_data(folder / "judged")
    for name in ("documents", "my_documents"):
        (folder / name).mkdir()
        shutil.copy(folder / "judged" / "corpus.jsonl", folder / name)
    pipeline = load_module(ROOT / "tests" / "retrieval" / "test_pipeline.py")
    pipeline.tiny_t5().save_pretrained(folder / "t5")
    pipeline.tiny_tokenizer().save_pretrained(folder / "t5")
    pipeline.tiny_cross_encoder(folder / "cross-encoder")
    line = ["gpl", "index", str(folder / "documents"), "-o", str(folder / "index"), "--adapter", str(run / "adapter")]
    assert main([*line, "--both", "--quiet"]) == 0
    return folder


def make_runs(folder):
    """Runs as recipes leave them: predictions.jsonl, result.json, adapter/."""
    module = load_module(ROOT / "tests" / "recipes" / "test_evaluate_folder.py")
    for place in ("e2e/mine", "audio_captioning/one", "methods/table/NAME", "glue/table"):
        module.run_folder(folder / "runs" / place, "LoRA-MLE r=2", 0, {"beam": module.FAIR, "beam-x2": module.GOOD})
    shutil.copy(folder / "runs" / "e2e" / "mine" / "predictions.jsonl", folder)
    shutil.copytree(folder / "runs" / "e2e", folder / "results")

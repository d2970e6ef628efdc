"""A run of recipe `data_to_text` on a Llama of width 16 and eight made-up restaurants."""

import pytest

from polyrank.recipes._text.scratch_model import build_tokenizer


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """Folder with model/ (a Llama with grouped heads, its tokenizer) and e2e/ (8 inputs to learn from, 5 to write)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("text_files")
    names = ["Aromi", "Blue Spice", "The Mill", "Zizzi"]
    rows = [(names[i % 4], ["pub", "cafe"][i % 2], str(i)) for i in range(8)]
    sentences = [f"{name} is a {kind} with number {i}." for name, kind, i in rows]
    tokenizer = build_tokenizer(sentences, 300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "e2e").mkdir()
    for split, count in (("train", 8), ("test", 5)):
        chosen = list(zip(rows, sentences, strict=True))[:count]
        lines = [f'"name[{n}], eatType[{k}], near[{i}]","{text}"' for (n, k, i), text in chosen for _ in range(2)]
        (folder / "e2e" / f"{split}.csv").write_text("mr,ref\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture
def text_run(text_files, tmp_path):
    """Runs it with a method and further overrides; the run's folder."""
    from polyrank.recipes.run import run_recipe

    def run(method, *more):
        given = [
            *("recipe=data_to_text", f"runs_dir={tmp_path}/runs", "data=e2e_d2t", f"data.path={text_files}/e2e"),
            *("run_name=run", "model=hub", f"model.name_or_path={text_files}/model", f"method={method}"),
            *("model.target_modules=all-linear", "num_steps=6", "batch_size=4", "save_every=2", "warmup_steps=1"),
            *("max_length=96", "max_new_tokens=8", "decode_batch_size=5", "num_beams=2", "no_repeat_ngram_size=3"),
            *("metrics=[bleu]", "learning_rate=1e-2"),
        ]
        return run_recipe([*given, *more]).run_dir

    return run

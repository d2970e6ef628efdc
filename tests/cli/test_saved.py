"""Folders that look like plain LoRA and are not, and adapters of another base: opened as trained, or one clear line."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from polyrank import LsrConfig, MclConfig
from polyrank.cli import main
from polyrank.compression.lq_lora import LqLoraConfig, get_lq_lora_model, save_lq_lora
from polyrank.compression.pat import PatConfig, get_pat_model
from polyrank.core.errors import CheckpointError
from polyrank.recipes._commands.saved import find_adapter, load_adapter

IDS = torch.tensor([[1, 5, 7, 9, 11]])
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def base(layers=2):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=layers,
                    num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=False)
    ).eval()  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    base().save_pretrained(tmp_path / "base")
    return tmp_path


def noise(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def lq_lora(folder):
    config = LqLoraConfig(budget_bits=3.0, block_sizes=[16], absmax_bits=[8], absmax_block_sizes=[64],
                          scale_dtypes=["bfloat16"])  # fmt: skip
    model = noise(get_lq_lora_model(base(), config, LoraConfig(**LORA)))
    save_lq_lora(model, folder / "adapter")
    return model


def pat(folder):
    model = noise(get_pat_model(base(), PatConfig(total_steps=12), LoraConfig(**LORA)))
    model.save_pretrained(str(folder / "adapter"))
    return model


@pytest.mark.parametrize("make", [lq_lora, pat])
def test_a_folder_whose_base_is_another_opens_as_it_was_trained(folder, make):
    trained = make(folder)
    opened = load_adapter(find_adapter(folder / "adapter", str(folder / "base")))
    torch.testing.assert_close(opened(IDS).logits, trained(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("make", "command"), [(lq_lora, "export"), (pat, "export"), (pat, "merge")])
def test_nothing_is_made_for_a_base_that_it_does_not_belong_to(folder, make, command, capsys):
    make(folder)
    given = [command, str(folder / "adapter"), "--model", str(folder / "base"), "-o", str(folder / "out")]
    assert main(given) == 2
    assert "nothing to" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_an_lq_lora_is_merged_into_its_quantised_base(folder):
    trained = lq_lora(folder)
    given = ["merge", str(folder / "adapter"), "--model", str(folder / "base"), "-o", str(folder / "out")]
    assert main(given) == 0
    merged = LlamaForCausalLM.from_pretrained(folder / "out")
    torch.testing.assert_close(merged(IDS).logits, trained(IDS).logits, atol=1e-4, rtol=0)


CONFIGS = {
    "lora": LoraConfig(**LORA),
    "lsr": LsrConfig(target_modules=["q_proj", "v_proj"], lora_alpha=16, task_type="CAUSAL_LM"),
    "mcl": MclConfig(num_hypotheses=2, **LORA),
}


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_another_number_of_layers_is_refused(folder, name, layers):
    get_peft_model(base(), copy.deepcopy(CONFIGS[name])).save_pretrained(str(folder / "adapter"))
    base(layers).save_pretrained(folder / "other")
    assert load_adapter(find_adapter(folder / "adapter", str(folder / "base"))) is not None
    message = "no place" if layers == 1 else "lacks"
    with pytest.raises(CheckpointError, match=message):
        load_adapter(find_adapter(folder / "adapter", str(folder / "other")))

"""One layer and a two-layer Llama with random LoRA-MoE adapters, in float64."""

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from polyrank import MoeConfig
from polyrank.routing import MoeLinear

TARGETS = ["q_proj", "v_proj", "down_proj"]


class OneLayer(nn.Module):
    def __init__(self, conv1d=False):
        super().__init__()
        self.lin = Conv1D(5, 4) if conv1d else nn.Linear(4, 5)

    def forward(self, x):
        return self.lin(x)


def one_layer(conv1d=False, seed=0, **fields):
    torch.manual_seed(seed)
    base = OneLayer(conv1d).double()
    fields = {"r": 2, "lora_alpha": 6, "target_modules": ["lin"], "init_weights": False, **fields}
    model = get_peft_model(base, MoeConfig(**fields), autocast_adapter_dtype=False).double().eval()
    return model, next(m for m in model.modules() if isinstance(m, MoeLinear))


def llama(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=30, num_key_value_heads=1, max_position_embeddings=32, **sizes)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.25)
    return model.to(dtype).eval()


def adapted(base=None, seed=1, **fields):
    base = llama() if base is None else base
    torch.manual_seed(seed)
    fields = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **fields}
    return get_peft_model(base, MoeConfig(**{"init_weights": False, **fields}), autocast_adapter_dtype=False).eval()


def batch(rows=3, length=7):
    ids = torch.randint(0, 30, (rows, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

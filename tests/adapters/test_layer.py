"""What an adapted layer has by default, against LoRA written out; which layers may be replaced by their product."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from plain_lora import PlainLoraConfig, PlainLoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyrank.adapters import AdapterLayer
from polyrank.core.errors import ConfigError


class Bare(AdapterLayer):
    """A method that says its factors and nothing else; under the name of one that is registered."""

    method, prefix = PlainLoraLinear.method, PlainLoraLinear.prefix
    adapter_layer_names = PlainLoraLinear.adapter_layer_names

    def lora_factors(self, adapter):
        return self.parameter("A", adapter), self.parameter("B", adapter) * self.scaling[adapter]


def layer(base=None, **fields):
    torch.manual_seed(0)
    config = PlainLoraConfig(**{"r": 3, "lora_alpha": 6, "init_weights": False, **fields})
    made = Bare(base or nn.Linear(5, 4))
    made.set_adapter("default")
    made.update_layer("default", config.for_layer("here"), config.r, config.lora_alpha)
    return made


@pytest.mark.parametrize("base", [nn.Linear(5, 4), Conv1D(4, 5)])
def test_a_method_of_two_factors_needs_no_more_than_them(base):
    made, x = layer(base), torch.randn(2, 3, 5)
    A, B = made.parameter("A", "default"), made.parameter("B", "default")
    assert (A.shape, B.shape) == ((3, 5), (4, 3))
    assert 0 < A.abs().max() <= 5**-0.5  # Kaiming-uniform with a = sqrt(5): 1 / sqrt(in)
    expected = base(x) + 2 * x @ A.T @ B.T
    torch.testing.assert_close(made(x), expected)
    made.merge()
    torch.testing.assert_close(made(x), expected)
    assert not layer(init_weights=True).parameter("B", "default").any()
    assert made.configs["default"].layer_key == "here"


def trained(base):
    base.weight.requires_grad_(True)


def hooked(base):
    base.register_forward_hook(lambda *args: None)


def of_a_subclass(base):
    base.__class__ = type("Other", (nn.Linear,), {})


def in_half_precision(base):
    base.to(torch.bfloat16)


@pytest.mark.parametrize("change", [trained, hooked, of_a_subclass, in_half_precision, None])
def test_what_is_plain(change):
    base = nn.Linear(5, 4).requires_grad_(False)
    made, x = layer(base, lora_dropout=0.5).eval(), torch.randn(2, 5)
    assert made.is_plain(x, "default")
    assert not made.train().is_plain(x, "default")
    with torch.autocast("cpu", torch.bfloat16):
        assert not made.eval().is_plain(x, "default")
    assert not made.is_plain(x.double(), "default")
    if change is not None:
        change(base)
        assert not made.is_plain(x, "default")


def test_layers_are_found_by_adapter():
    model = get_peft_model(
        nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(5, 4)}), PlainLoraConfig(target_modules=["a"])
    )
    (name,) = PlainLoraLinear.find(model, "default")
    assert name == "base_model.model.a"
    with pytest.raises(ConfigError, match="the model has no adapter 'other' of method 'plain_lora'"):
        PlainLoraLinear.find(model, "other")

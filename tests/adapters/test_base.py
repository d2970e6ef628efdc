"""The shared base: configs that refuse nonsense, targets that must exist, scales, quantised bases' error path."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from plain_lora import PlainLoraConfig
from torch import nn

from polyrank.adapters import AdapterConfig, AdapterLayer
from polyrank.core.errors import CheckpointError, ConfigError


class Net(nn.Module):
    """layers.0, layers.1: blocks with `up` and `down`; a convolution and a tuner-like attribute name on the model."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}) for _ in range(2))
        self.conv = nn.Conv1d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.layers:
            x = block["down"](torch.relu(block["up"](x)))
        return self.head(x)


def adapt(seed=0, **fields):
    torch.manual_seed(seed)
    return get_peft_model(Net(), PlainLoraConfig(**{"target_modules": ["up", "down"], "init_weights": False, **fields}))


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, AdapterLayer)}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"r": -1}, "r must be an integer >= 1, got -1"),
        ({"r": 1.5}, "r must be an integer >= 1, got 1.5"),
        ({"r": "8"}, "r must be an integer >= 1, got '8'"),
        ({"r": True}, "r must be an integer >= 1, got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number, got None"),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must lie in \[0, 1\), got -0.1"),
        ({"rank_pattern": {"up": 0}}, r"rank_pattern\['up'\] must be an integer >= 1, got 0"),
        ({"alpha_pattern": {"up": "x"}}, r"alpha_pattern\['up'\] must be a finite number, got 'x'"),
        ({"target_modules": ".*up", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used when"),
        ({"layers_pattern": "layers"}, "When `layers_pattern` is specified, `layers_to_transform` must also be"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PlainLoraConfig(**{"target_modules": ["up"], **fields})


def test_the_base_config_is_no_method():
    with pytest.raises(ConfigError, match="AdapterConfig belongs to no registered method"):
        AdapterConfig()


def test_check_int_with_a_maximum_of_zero():
    class Bounded(PlainLoraConfig):
        def __post_init__(self):
            super().__post_init__()
            self.offset = 1
            self.check_int("offset", minimum=-1, maximum=0)

    with pytest.raises(ConfigError, match="offset must be an integer >= -1 and <= 0, got 1"):
        Bounded()


def test_one_misspelt_target_among_several_is_an_error():
    with pytest.raises(ConfigError, match=r"target_modules that match no module of the model: 'dwn' \(nearest: 'down'"):
        adapt(target_modules=["up", "dwn"])


def test_the_second_adapter_is_checked_too_and_leaves_nothing_behind():
    model = adapt()
    before = set(model.state_dict())
    with pytest.raises(ConfigError, match="'dwn'"):
        model.add_adapter("other", PlainLoraConfig(target_modules=["up", "dwn"]))
    assert set(model.peft_config) == {"default"}
    assert set(model.state_dict()) == before
    model.add_adapter("other", PlainLoraConfig(target_modules=["up", "down"]))  # adapted layers keep their names


def test_no_target_at_all_is_an_error():
    with pytest.raises(ValueError, match="not found in the base model"):
        adapt(target_modules=["nothing"])
    with pytest.raises(ValueError, match="not found in the base model"):
        adapt(target_modules=["nothing", "nowhere"])


@pytest.mark.parametrize("targets", [["layers.0.up", "down"], ["head"], ".*up", "all-linear"])
def test_targets_as_peft_takes_them(targets):
    assert layers(adapt(target_modules=targets))


def test_an_unsupported_layer_kind_is_an_error():
    with pytest.raises(
        ConfigError, match=r"Target module 'conv' of type Conv1d is not supported by method 'plain_lora'"
    ):
        adapt(target_modules=["conv"])


def test_patterns_choose_rank_and_alpha_of_a_layer():
    model = adapt(r=4, lora_alpha=8, rank_pattern={"layers.1.up": 2}, alpha_pattern={r"layers\.0\..*": 3})
    found = {
        name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for name, m in layers(model).items()
    }
    assert found == {
        "layers.0.up": (4, 3 / 4),
        "layers.0.down": (4, 3 / 4),
        "layers.1.up": (2, 8 / 2),
        "layers.1.down": (4, 8 / 4),
    }


def test_rank_stabilised_scale_survives_set_scale():
    model = adapt(r=4, lora_alpha=6, use_rslora=True)
    layer = next(iter(layers(model).values()))
    assert layer.scaling["default"] == 3.0
    layer.set_scale("default", 2.0)
    assert layer.scaling["default"] == 6.0
    layer.scale_layer(5.0)
    assert layer.scaling["default"] == 30.0
    layer.unscale_layer(5.0)
    assert layer.scaling["default"] == 6.0
    layer.unscale_layer()
    assert layer.scaling["default"] == 3.0


def test_the_base_models_attributes_are_reachable():
    """A public attribute of the tuner would hide one of the model's: `layers` once did."""
    model = adapt()
    assert model.base_model.layers is model.base_model.model.layers
    assert isinstance(model.layers, nn.ModuleList)


def test_mixed_batch_errors():
    model = adapt().eval()
    x = torch.randn(3, 4)
    with pytest.raises(ConfigError, match=r"non-existing adapter\(s\): nobody \(known: default\)"):
        model(x, adapter_names=["default", "nobody", "__base__"])
    with pytest.raises(ConfigError, match="Length of `adapter_names` should be the same as the number of inputs"):
        model(x, adapter_names=["default"])
    with pytest.raises(ConfigError, match="when the model is in training mode"):
        model.train()(x, adapter_names=["default"] * 3)
    model.eval().merge_adapter()
    with pytest.raises(ConfigError, match="please call `unmerge_adapter` first"):
        model(x, adapter_names=["default"] * 3)
    model.unmerge_adapter()
    hooks = [len(m._forward_pre_hooks) for m in layers(model).values()]
    assert not any(hooks)  # errors leave no hook behind


def test_a_layer_moved_while_merged_unmerges_in_place():
    model = adapt()
    for layer in layers(model).values():
        type(layer).exact_unmerge = True
    try:
        model.merge_adapter()
        model.to(torch.float64)
        model.unmerge_adapter()
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        torch.testing.assert_close(
            layers(model)["base_model.model.layers.0.up"].get_base_weight().float(), Net_weight()
        )
    finally:
        type(layer).exact_unmerge = False


def Net_weight():
    torch.manual_seed(0)
    return Net().layers[0]["up"].weight.data


def test_a_checkpoint_of_another_rank_is_refused(tmp_path):
    adapt(r=4).save_pretrained(tmp_path)
    config = PlainLoraConfig(target_modules=["up", "down"], r=2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(Net(), tmp_path, config=config)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    adapt().save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="is truncated or has a tail"):
        PeftModel.from_pretrained(Net(), tmp_path)

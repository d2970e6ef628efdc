"""The bridge: a real member in PEFT's enum, idempotent registration, refusals."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass

import peft
import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners import mixed
from peft.tuners.mixed import model as mixed_model
from plain_lora import PlainLoraConfig, PlainLoraLinear, PlainLoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyrank.adapters import AdapterConfig, adapters, register_adapter
from polyrank.adapters import _peft_bridge as bridge
from polyrank.core.errors import ConfigError, VersionError
from polyrank.core.registry import DuplicateNameError

LAYERS = {nn.Linear: PlainLoraLinear, Conv1D: PlainLoraLinear}
TAGS = adapters.get("plain_lora").tags


def test_the_member_is_a_real_one():
    member = bridge.peft_type("plain_lora")
    assert isinstance(member, PeftType)
    assert member is PeftType.POLYRANK_PLAIN_LORA is PeftType("POLYRANK_PLAIN_LORA") is PeftType["POLYRANK_PLAIN_LORA"]
    assert member == "POLYRANK_PLAIN_LORA"
    assert member.name == member.value == "POLYRANK_PLAIN_LORA"
    assert member in list(PeftType)
    assert "POLYRANK_PLAIN_LORA" in PeftType.__members__
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "POLYRANK_PLAIN_LORA"}
    assert {member: 1}[PeftType.POLYRANK_PLAIN_LORA] == 1


def test_the_member_is_added_once():
    before = len(PeftType)
    assert bridge.peft_type("plain_lora") is bridge.peft_type("plain_lora")
    assert len(PeftType) == before == len({member.value for member in PeftType})


def test_pefts_own_members_are_untouched():
    assert PeftType("LORA") is PeftType.LORA
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is peft.LoraConfig


def test_peft_knows_every_method():
    for name, method in adapters.items():
        kind = bridge.peft_type(name)
        assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind] is method.config
        assert peft.PEFT_TYPE_TO_TUNER_MAPPING[kind] is method.model
        assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == method.model.prefix == f"{kind.value.lower()}_"
        assert kind in mixed.COMPATIBLE_TUNER_TYPES
        assert kind in mixed_model.COMPATIBLE_TUNER_TYPES
        assert mixed_model.COMPATIBLE_TUNER_TYPES.count(kind) == 1


def test_registering_the_same_classes_again_changes_nothing():
    create, types = mixed_model.MixedModel._create_and_replace, mixed_model.COMPATIBLE_TUNER_TYPES
    assert register_adapter("plain_lora", PlainLoraConfig, LAYERS, TAGS) is PlainLoraModel
    bridge.register_method("plain_lora", PlainLoraConfig, PlainLoraModel, PlainLoraLinear, mixed=True)
    assert mixed_model.MixedModel._create_and_replace is create
    assert mixed_model.COMPATIBLE_TUNER_TYPES is types


def test_another_method_under_a_name_raises_and_breaks_nothing():
    @dataclass
    class OtherConfig(AdapterConfig):
        """Another method's config."""

    class OtherLinear(PlainLoraLinear):
        """Another method's layer."""

    before = OtherLinear.prefix
    with pytest.raises(DuplicateNameError, match="'plain_lora' is registered already, for PlainLoraConfig"):
        register_adapter("plain_lora", OtherConfig, {nn.Linear: OtherLinear}, TAGS)
    with pytest.raises(DuplicateNameError, match="'POLYRANK_PLAIN_LORA' is registered already, for PlainLoraConfig"):
        bridge.register_method("plain_lora", OtherConfig, PlainLoraModel, OtherLinear, mixed=True)
    assert OtherLinear.prefix == before
    assert OtherConfig.method == ""
    assert adapters.get("plain_lora").config is PlainLoraConfig


@pytest.mark.parametrize("name", ["plain-lora", "group/lora"])
def test_a_name_that_cannot_be_a_parameter_prefix_is_refused(name):
    with pytest.raises(ConfigError, match="must be lower_snake_case"):
        register_adapter(name, PlainLoraConfig, LAYERS, TAGS)


def test_an_unknown_tag_is_refused():
    with pytest.raises(ConfigError, match=r"unknown tags \['mergable'\] \(allowed: .*mergeable"):
        register_adapter("never", PlainLoraConfig, LAYERS, {"mergable"})
    assert "never" not in adapters


@pytest.mark.parametrize("version", ["0.20.1", "0.22.0", "0.22.1.dev0", "1.0"])
def test_an_untested_peft_is_refused(version):
    with pytest.raises(VersionError, match=rf"tested with peft >= 0.21.0, < 0.22; peft {version} is installed"):
        bridge.check_peft_version(version)


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.21.99"])
def test_tested_versions_are_taken(version):
    bridge.check_peft_version(version)


def test_importing_polyrank_on_an_untested_peft_says_so():
    code = "import importlib.metadata as m; v = m.version; m.version = lambda n: '0.9.0' if n == 'peft' else v(n)\n"
    result = subprocess.run([sys.executable, "-c", code + "import polyrank"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "VersionError: polyrank supports peft<0.22,>=0.21.0, found 0.9.0 (pip install" in result.stderr


LOAD = """
import sys, torch
from torch import nn
from peft import PeftModel
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
    def forward(self, x):
        return self.lin(x)
model = PeftModel.from_pretrained(Net(), sys.argv[1])
print(type(model.base_model).__name__)
"""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x):
        return self.lin(x)


def test_a_saved_folder_says_what_to_import(tmp_path):
    """Without the import PEFT cannot know the type; the folder's README tells, and with the import it loads."""
    method = "lsr" if "lsr" in adapters else "mcl"
    model = get_peft_model(Net(), adapters.get(method).config(target_modules=["lin"]))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.count("import polyrank") == 1
    assert readme.startswith("---\n")  # PEFT's model card is still there
    bare = subprocess.run([sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True)
    assert bare.returncode == 1
    assert f"POLYRANK_{method.upper()}" in bare.stderr
    informed = subprocess.run(
        [sys.executable, "-c", "import polyrank\n" + LOAD, tmp_path], capture_output=True, text=True
    )
    assert informed.returncode == 0, informed.stderr
    assert informed.stdout.strip() == adapters.get(method).model.__name__


def test_a_config_read_from_disk_has_our_class(tmp_path):
    PlainLoraConfig(target_modules=["lin"], r=3).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is PlainLoraConfig
    assert config.r == 3
    assert config.peft_type is PeftType.POLYRANK_PLAIN_LORA


def test_plain_lora_equals_pefts_lora():
    """The control method is LoRA: with LoRA's weights it gives LoRA's numbers."""
    torch.manual_seed(0)
    base = Net()
    lora = get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False))
    ours = get_peft_model(copy.deepcopy(base), PlainLoraConfig(r=2, target_modules=["lin"]))
    theirs, layer = lora.base_model.model.lin, ours.base_model.model.lin
    with torch.no_grad():
        layer.parameter("A", "default").copy_(theirs.lora_A["default"].weight)
        layer.parameter("B", "default").copy_(theirs.lora_B["default"].weight)
    x = torch.randn(5, 4)
    torch.testing.assert_close(ours(x), lora(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.get_delta_weight("default"), theirs.get_delta_weight("default"))

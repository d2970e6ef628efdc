"""Adapter configurations from outside: refused in one line before a tensor is made, whatever their fields hold."""

import contextlib
import json

import hostile_files as hostile
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loading import load_module
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from polyrank.adapters import adapters
from polyrank.core.claims import check_claims, hard_to_match
from polyrank.core.errors import CheckpointError, ConfigError, UserError
from polyrank.recipes._commands import saved as _saved

polyrank = hostile.polyrank
METHODS = [name for name in adapters.names() if name != "plain_lora"]
RANKS = {"huge": 10**9, "64-bit": 2**63, "googol": 10**100, "two-million": 2_000_000}
WRONG = {
    "zero": 0, "negative": -1, "half": 0.5, "text": "8", "list": [8], "object": {"r": 8}, "true": True, "empty": "",
    "nan": hostile.NAN, "infinity": hostile.INFINITY, "digits": 10**400, "html": hostile.HTML, "nested": [[[[]]]],
}  # fmt: skip
TYPED = {
    "lora_alpha": ("text", "list", "object", "true", "nan", "infinity", "digits"),
    "lora_dropout": ("negative", "text", "list", "true", "nan", "infinity"),
    "target_modules": ("half", "object", "true", "nested", "nan"),
    "rank_pattern": ("text", "list", "half", "true"),
    "alpha_pattern": ("text", "list", "half", "infinity"),
    "modules_to_save": ("half", "object", "html", "true"),
    "layers_to_transform": ("text", "object", "nested", "half"),
    "use_rslora": ("text", "zero", "list"),
    "init_weights": ("text", "half", "object"),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)  # SaRA asks for the base that it was trained on
        self.q_proj = nn.Linear(16, 16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A sound folder of each method, and LoRA's."""
    place = tmp_path_factory.mktemp("saved")
    for name in METHODS:
        get_peft_model(Net(), adapters.get(name).config(target_modules=["q_proj"], r=2)).save_pretrained(place / name)
    return place


def changed(folder, place, **changes):
    """A copy of an adapter folder with other fields; NaN and 5000 digits are written as JSON allows it or not."""
    place.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    (place / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    return str(place)


@pytest.mark.parametrize("method", METHODS)
def test_a_sound_folder_is_read_and_unknown_keys_are_no_harm(saved, tmp_path, method):
    PeftModel.from_pretrained(Net(), str(saved / method))
    strange = {"__class__": "os.system", "../../x": 1, hostile.CONTROL: hostile.HTML}
    with pytest.warns(UserWarning, match="Unexpected keyword"):
        PeftModel.from_pretrained(Net(), changed(saved / method, tmp_path / "x", **strange))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("method", METHODS)
def test_huge_ranks_are_refused_before_anything_is_made(saved, tmp_path, method, rank):
    for number, change in enumerate(({"r": RANKS[rank]}, {"rank_pattern": {"q_proj": RANKS[rank]}})):
        folder = changed(saved / method, tmp_path / str(number), **change)
        with (
            hostile.NoLargeTensors(),
            pytest.raises(CheckpointError, match=r"but no dimension of its weights is above"),
        ):
            PeftModel.from_pretrained(Net(), folder)


@pytest.mark.parametrize(("method", "field"), [("mcl", "num_hypotheses"), ("moe", "num_experts"), ("lsr", "num_terms")])
@pytest.mark.parametrize("size", RANKS)
def test_huge_numbers_of_parts(saved, tmp_path, method, field, size):
    folder = changed(saved / method, tmp_path / "x", **{field: RANKS[size]})
    with hostile.NoLargeTensors(), pytest.raises(CheckpointError, match=field):
        PeftModel.from_pretrained(Net(), folder)


def test_the_watch_over_tensors_sees_a_large_one():
    with pytest.raises(hostile.TooLarge), hostile.NoLargeTensors(limit=1000):
        torch.empty(10, 101)
    with pytest.raises(hostile.TooLarge), hostile.NoLargeTensors(limit=1000), contextlib.suppress(Exception):
        torch.zeros(101, 10)  # also where somebody catches it
    with hostile.NoLargeTensors(limit=1000):
        torch.empty(10, 100)


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "empty"])
@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_are_none(saved, tmp_path, method, kind):
    folder = changed(saved / method, tmp_path / "x", r=WRONG[kind])
    with hostile.NoLargeTensors(), pytest.raises((ConfigError, CheckpointError)) as error:
        PeftModel.from_pretrained(Net(), folder)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(("field", "kind"), [(field, kind) for field, kinds in TYPED.items() for kind in kinds])
def test_fields_of_another_type(saved, tmp_path, field, kind):
    folder = changed(saved / "mcl", tmp_path / "x", **{field: WRONG[kind]})
    with pytest.raises(UserError):
        PeftModel.from_pretrained(Net(), folder)


TYPES = ("", "LORA2", "lora", "os.system", "../LORA", hostile.HTML, hostile.CONTROL, "POLYRANK_", "X" * 10_000)
LORA_CHANGES = {
    **{f"rank-{name}": {"r": value} for name, value in RANKS.items()},
    **{f"rank-{name}": {"r": value} for name, value in WRONG.items() if name not in ("true", "half")},
    **{f"pattern-{name}": {"rank_pattern": {"q_proj": value}} for name, value in RANKS.items()},
    **{f"type-{number}": {"peft_type": value} for number, value in enumerate(TYPES)},
    **{f"type-{name}": {"peft_type": value} for name, value in WRONG.items() if name in ("list", "object", "zero")},
    "targets-number": {"target_modules": 5},
    "targets-object": {"target_modules": {"a": 1}},
    "targets-absent": {"target_modules": ["no_such_module"]},
    "targets-broken-pattern": {"target_modules": "(("},
    "targets-endless-pattern": {"target_modules": r"((\w|\.)+)+!"},
    "targets-many-wildcards": {"target_modules": ".*.*.*.*.*.*.*.*!"},
    "rank-pattern-endless": {"rank_pattern": {r"(.*)*x": 3}},
    "rank-pattern-list": {"rank_pattern": [1, 2]},
    "imports": {"megatron_config": {"a": 1}, "megatron_core": "this"},
    "initialised-from-elsewhere": {"init_lora_weights": "../../x"},
    "layers-huge": {"layers_to_transform": [10**30]},
    "saved-modules-number": {"modules_to_save": 7},
    "dropout-above-one": {"lora_dropout": 3.5},
    "bias-unknown": {"bias": "everything"},
    "virtual-tokens": {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 10**9},
    "hada": {"peft_type": "LOHA", "r": 10**9},
    "base-number": {"base_model_name_or_path": 5},
    "base-list": {"base_model_name_or_path": ["base"]},
    "base-parent": {"base_model_name_or_path": "../../../etc"},
    "base-file": {"base_model_name_or_path": "/etc/passwd"},
    "base-nul": {"base_model_name_or_path": "a\0b"},
    "base-control": {"base_model_name_or_path": hostile.CONTROL},
    "base-html": {"base_model_name_or_path": hostile.HTML},
    "base-long": {"base_model_name_or_path": "x/" * 5000},
}
COMMANDS = {
    "generate": ["generate", "lora", "--prompt", "a", "--max-new-tokens", "1"],
    "merge": ["merge", "lora", "-o", "merged"],
    "export": ["export", "lora", "-o", "loras", "--rank", "1"],
    "inspect": ["inspect", "lora", "--layers"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    load_module(hostile.TESTS / "cli" / "conftest.py").make_base(place / "base")
    (place / "sound").mkdir()
    tensors = hostile.lora_tensors(layers=2)
    save_file(tensors, place / "sound" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config["base_model_name_or_path"] = str(place / "base")
    (place / "sound" / "adapter_config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("number, case", enumerate(LORA_CHANGES))
def test_lora_configs_on_the_command_line(polyrank, made, tmp_path, monkeypatch, number, case):
    monkeypatch.chdir(tmp_path)
    changed(made / "sound", tmp_path / "lora", **LORA_CHANGES[case])
    before = hostile.tree(tmp_path)
    command = list(COMMANDS)[number % 3]
    with hostile.NoLargeTensors():
        done = polyrank(COMMANDS[command])
    hostile.check_one_line(done, (2,))
    assert hostile.tree(tmp_path) == before
    hostile.check_one_line(polyrank(COMMANDS["inspect"]))
    if case.startswith(("base", "imports")):
        assert hostile.tree(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_the_folder_that_all_of_them_were_made_from(polyrank, made, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    changed(made / "sound", tmp_path / "lora")
    done = polyrank(COMMANDS[command])
    if command == "export":
        assert "is an ordinary LoRA already" in done.err
    else:
        assert done.status == 0, done.err


BASES = {
    "none": "", "list": "[]", "number": "5", "cut": '{"model_type": "lla', "unknown": '{"model_type": "nothing"}',
    "type-number": '{"model_type": 5}', "code": '{"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}',
    "architecture-number": {"architectures": 5}, "architecture-numbers": {"architectures": [5]},
    "architecture-function": {"architectures": ["pipeline"]}, "architecture-config": {"architectures": ["LlamaConfig"]},
    "architecture-dunder": {"architectures": ["__loader__"]}, "negative": {"hidden_size": -16},
    "text": {"hidden_size": "16"}, "zero-heads": {"num_attention_heads": 0}, "other-size": {"hidden_size": 64},
    "activation": {"hidden_act": "os.system"}, "rope": {"rope_parameters": {"rope_type": "none of them"}},
}  # fmt: skip


@pytest.mark.parametrize("case", BASES)
def test_base_models_that_are_none(made, tmp_path, case):
    """`load_base` is what generate, merge, export and inspect --base open a model with."""
    for file in (made / "base").iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((made / "base" / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    change = BASES[case]
    (tmp_path / "config.json").write_text(change if isinstance(change, str) else json.dumps({**config, **change}))
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('was-run').touch()")
    with hostile.NoLargeTensors():
        hostile.either(_saved.load_base, str(tmp_path), ConfigError)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("cut", [0, 7, 100, 2000, -8])
def test_base_models_that_are_cut_off(made, tmp_path, cut):
    for file in (made / "base").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(ConfigError, match="cannot load base model"):
        _saved.load_base(str(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=10), inside, max_size=4),
    max_leaves=8,
)
FIELDS = ["r", "rank_pattern", "alpha_pattern", "target_modules", "layers_pattern", "peft_type", "megatron_config"]


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    config=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=6),
    dims=st.lists(st.integers(0, 2**62), max_size=3),
)
def test_claims_of_any_kind_are_passed_or_refused(config, dims):
    hostile.either(lambda _: check_claims("x", config, [dims]), None, CheckpointError)


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", r".*\.(q_proj|v_proj)$", r"model\.layers\.\d+\.self_attn\.(q|v)_proj", "all-linear", r"(?:.*\.)?x",
     r".*?(?:language|text).*?(?:attn|mlp).*?(?:q_proj|k_proj)", r"^(?!.*vision).*\.o_proj$"],
)  # fmt: skip
def test_patterns_that_people_use_are_allowed(pattern):
    assert not hard_to_match(pattern)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", ".*.*.*x", r"\w+\w+\w+!", "[a-z]*[a-z]*x", "(.{1,9}){1,9}", "a" * 6000, "a+" * 9]
)
def test_patterns_without_end_are_not(pattern):
    assert hard_to_match(pattern)

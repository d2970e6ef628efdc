"""Folders of the compressing methods (quantised layers, pruned models, PAT's modules) that were damaged or made up."""

import json
import shutil
from pathlib import Path

import hostile_files as hostile
import pytest
from loading import load_module
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file

from polyrank.compression._pruning_folder import PLAN, read_plan
from polyrank.compression._quantised_linear import FILE
from polyrank.compression.l4q import L4qConfig, load_quantised, save_quantised, to_integer
from polyrank.compression.loram import LoramConfig, load_pruned, prune_model, recover_adapter, save_pruned
from polyrank.compression.pat import load_pat
from polyrank.core.errors import CheckpointError, UserError

CASES = hostile.broken_weights(hostile.lora_tensors())
SOME = [name for name in CASES if name.startswith(("cut-1", "cut-6", "length", "header", "name", "noise", "flip-1"))]


@pytest.mark.parametrize("name", SOME)
def test_quantised_layers_that_are_none(tmp_path, name):
    (tmp_path / FILE).write_bytes(CASES[name][0])
    with hostile.NoLargeTensors(), pytest.raises(CheckpointError):
        load_quantised(hostile.tiny_llama(), tmp_path)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("quantised")
    model = get_peft_model(hostile.tiny_llama(), L4qConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    save_quantised(to_integer(model), folder)
    return folder


ENTRIES = {
    "huge": 10**12,
    "negative": -1,
    "text": "x",
    "null": None,
    "list": [1],
    "object": {},
    "half": 0.5,
    "path": "../../x",
}


@pytest.mark.parametrize("value", ENTRIES)
def test_quantised_layers_that_claim_something_else(quantised, tmp_path, value):
    with safe_open(quantised / FILE, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = json.loads(metadata["polyrank"])
    name, entry = next(iter(about["layers"].items()))
    for key in (*entry, "layers", "modules", "surprise"):
        changed = json.loads(metadata["polyrank"])
        place = changed if key in ("layers", "modules") else changed["layers"][name]
        place[key] = ENTRIES[value]
        save_file(tensors, tmp_path / FILE, {**metadata, "polyrank": json.dumps(changed)})
        with hostile.NoLargeTensors():
            hostile.either(lambda folder: load_quantised(hostile.tiny_llama(), folder), tmp_path, CheckpointError)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    model, plan = prune_model(hostile.tiny_llama(), LoramConfig(ratio=0.5))
    save_pruned(model, plan, folder)
    return folder


def test_the_pruned_model_itself(pruned):
    load_pruned(pruned)


@pytest.mark.parametrize("seed", range(24))
def test_a_damaged_plan(pruned, tmp_path, seed):
    damaged = load_module(Path(__file__).with_name("test_hostile_data.py")).damaged
    (tmp_path / PLAN).write_bytes(damaged((pruned / PLAN).read_bytes(), seed))
    hostile.either(read_plan, tmp_path, CheckpointError)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "5",
        '{"format": 5}',
        '{"architectures": [5]}',
        '{"model_type": "llama", "architectures": ["pipeline"]}',
    ],
)
@pytest.mark.parametrize("name", [PLAN, "config.json"])
def test_a_pruned_model_of_another_form(pruned, tmp_path, name, content):
    shutil.copytree(pruned, tmp_path / "pruned")
    (tmp_path / "pruned" / name).write_text(content)
    with pytest.raises(CheckpointError):
        load_pruned(tmp_path / "pruned")


@pytest.mark.parametrize("name", [name for name in SOME if name.startswith(("header", "length"))])
def test_an_adapter_that_cannot_be_recovered(pruned, tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(CASES[name][0])
    with pytest.raises(UserError):
        recover_adapter(tmp_path / "a", pruned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [[2], [2, 3], [1, 2, 3, 4], [3, 2, 16], [0, 0, 0]])
def test_pat_modules_of_another_shape(tmp_path, shape):
    size = 4
    for one in shape:
        size *= one
    header = {"base_model.model.sparsification.down": hostile.entry(shape, 0, size)}
    (tmp_path / "adapter_model.safetensors").write_bytes(hostile.raw(header, bytes(size)))
    (tmp_path / "adapter_config.json").write_text(json.dumps(LoraConfig(r=2).to_dict(), default=str))
    with pytest.raises(UserError):
        load_pat(hostile.tiny_llama(), tmp_path)

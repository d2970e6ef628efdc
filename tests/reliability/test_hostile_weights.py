"""Broken safetensors files: every reader says so in one line, or reads what is sound; nothing is allocated for it."""

import json
import tracemalloc

import hostile_files as hostile
import pytest
from peft import PeftModel
from safetensors.torch import save
from torch import nn

from polyrank import MclConfig, import_hypotheses
from polyrank.adapters._folders import read_header, read_weights
from polyrank.analysis.adapter_files import open_adapter
from polyrank.core.errors import CheckpointError
from polyrank.hypotheses.checkpoint import load_state
from polyrank.hypotheses.scorer import HypothesisScorer

polyrank = hostile.polyrank
CASES = hostile.broken_weights(hostile.lora_tensors())
MCL = {"peft_type": "POLYRANK_MCL", "r": 2, "lora_alpha": 2, "num_hypotheses": 2, "target_modules": ["q_proj"]}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "base"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(16, 16)


def folder_of(place, config, content):
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps(config))
    (place / "adapter_model.safetensors").write_bytes(content)
    return place


@pytest.mark.parametrize("name", CASES)
def test_broken_weights(polyrank, tmp_path, name):
    content, may_be_read = CASES[name]
    lora = folder_of(tmp_path / "lora", LORA, content)
    tracemalloc.start()
    for reader in (read_weights, open_adapter, lambda folder: read_header(folder / "adapter_model.safetensors")):
        if may_be_read:
            hostile.either(reader, lora, CheckpointError)
        else:
            with pytest.raises(CheckpointError):
                reader(lora)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20, "the header's own text may be parsed, nothing of the size that it claims"
    done = polyrank(["inspect", str(lora), "--layers"])
    hostile.check_one_line(done, (0, 2) if may_be_read else (2,))


@pytest.mark.parametrize("name", CASES)
def test_broken_weights_of_our_own_methods(tmp_path, name):
    content, may_be_read = CASES[name]
    folder = folder_of(tmp_path / "mcl", MCL, content)
    with hostile.NoLargeTensors():  # a sound file is one of LoRA's here: no shape fits, or PEFT warns of missing keys
        hostile.either(
            lambda folder: PeftModel.from_pretrained(Net(), folder), str(folder), (CheckpointError, RuntimeError)
        )
    if not may_be_read:
        with pytest.raises(CheckpointError):
            PeftModel.from_pretrained(Net(), str(folder))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("cut", "length", "header"))])
def test_broken_state_of_a_checkpoint(tmp_path, name):
    (tmp_path / "mcl_state_0.safetensors").write_bytes(CASES[name][0])
    with pytest.raises(CheckpointError):
        load_state(tmp_path, 0)


def test_the_file_that_all_of_them_were_made_from_is_read(polyrank, tmp_path):
    lora = folder_of(tmp_path / "lora", LORA, save(hostile.lora_tensors()))
    assert set(read_weights(lora)) == set(hostile.lora_tensors())
    assert polyrank(["inspect", str(lora)]).status == 0
    model = import_hypotheses(hostile.tiny_llama(), [lora, lora])
    assert isinstance(model.peft_config["default"], MclConfig)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(polyrank, tmp_path, value):
    tensors = hostile.lora_tensors()
    next(iter(tensors.values()))[0, 0] = value
    lora = folder_of(tmp_path / "lora", LORA, save(tensors))
    with pytest.raises(CheckpointError, match="not finite"):
        import_hypotheses(hostile.tiny_llama(), [lora])
    done = polyrank(["inspect", str(lora), "--json"])
    assert done.status == 0, done.err
    assert "some values are not finite (NaN or infinity)" in done.json["notes"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("cut-1", "header", "name"))])
def test_broken_scorer(tmp_path, name):
    from polyrank.hypotheses.scorer import FILE_NAME

    (tmp_path / FILE_NAME).write_bytes(CASES[name][0])
    with pytest.raises(CheckpointError):
        HypothesisScorer.load(tmp_path, 2)

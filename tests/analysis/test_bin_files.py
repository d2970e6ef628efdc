"""Old weight files: read only when asked for, tensors and nothing else; and what `polyrank inspect` makes of them."""

import io
import os
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from polyrank.analysis.bin_files import convert_bin, converted, read_bin
from polyrank.analysis.inspect import inspect_adapter, low_rank_spectrum
from polyrank.core.errors import CheckpointError, ConfigError
from polyrank.recipes._commands.inspection import inspect


def real_file():
    source = Path(os.environ.get("POLYRANK_DATA", ""), "models/lora_roberta_base_mnli/roberta_base_lora_mnli.bin")
    if not os.environ.get("POLYRANK_DATA") or not source.exists():
        pytest.skip("needs models/lora_roberta_base_mnli of the data folder")
    return source


def options(source, **given):
    defaults = {"model": None, "layers": False, "intruder": False, "top_k": 10, "epsilon": 0.5, "plot": None}
    return Namespace(**{**defaults, "source": str(source), "allow_bin": False, "quiet": True, **given})


class Runs:
    """Unpickled by an ordinary loader, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_the_real_adapter_is_converted_bit_by_bit(tmp_path):
    source = real_file()
    made = convert_bin(source, tmp_path / "adapter_model.safetensors")
    expected = torch.load(source, weights_only=True, map_location="cpu")
    seen = load_file(made)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in seen)
    assert sum(tensor.numel() for tensor in seen.values()) == 887_811


def test_the_real_adapters_own_spectra(tmp_path):
    source = real_file()
    with pytest.raises(CheckpointError, match=r"is a pickle.*never read.*--allow-bin"):
        inspect(options(source.parent))
    plot = tmp_path / "spectra.png"
    value, blocks, notes = inspect(options(source.parent, allow_bin=True, layers=True, plot=str(plot)))
    assert value["adapted_layers"] == 24
    assert any("scales are taken as 1" in note for note in notes)
    state = torch.load(source, weights_only=True, map_location="cpu")
    for layer in value["layers"]:
        A, B = (state[f"{layer['module']}.lora_{side}"].double() for side in "AB")
        values = low_rank_spectrum(A, B).tolist()
        assert layer["updates"][0]["singular_values"] == pytest.approx(values, rel=1e-9)
        assert 1.0 < layer["updates"][0]["effective_rank"] <= 8.0
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert blocks[-1] == [["plot", str(plot)]]
    assert inspect(options(source, allow_bin=True))[0]["parameters"] == 887_811


def test_a_file_that_would_run_code_is_refused(tmp_path):
    mark, file = tmp_path / "mark", tmp_path / "a.bin"
    torch.save({"a": Runs(mark)}, file)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read_bin(file)
    (tmp_path / "b.bin").write_bytes(pickle.dumps({"a": Runs(mark)}))
    with pytest.raises(CheckpointError, match=r"is no archive as torch.save writes it"):
        read_bin(tmp_path / "b.bin")
    assert not mark.exists()


def test_other_contents_are_refused(tmp_path):
    file = tmp_path / "a.bin"
    for content, message in (
        ([torch.ones(2)], "must hold a dictionary of tensors, got list"),
        ({}, "must hold a dictionary of tensors"),
        ({"a": 1}, "entry 'a' is no dense tensor"),
        ({1: torch.ones(2)}, "entry 1 is no dense tensor with a name"),
        ({"a": torch.ones(2, 2).to_sparse()}, "no dense tensor"),
    ):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=message):
            read_bin(file)
    torch.save({"a": torch.ones(1000)}, file)
    with pytest.raises(CheckpointError, match="at most 1000 are read"):
        read_bin(file, maximum_bytes=1000)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"0" * 5_000_000)
    file.write_bytes(bomb.getvalue())
    with pytest.raises(CheckpointError, match="holds 5000000 bytes; at most 1000000 are read"):
        read_bin(file, maximum_bytes=1_000_000)
    whole = tmp_path / "whole.bin"
    torch.save({"a": torch.ones(9)}, whole)
    file.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="no archive"):
        read_bin(file)
    with pytest.raises(CheckpointError, match="is not a file"):
        read_bin(tmp_path / "absent.bin")


def test_a_folder_with_safetensors_stays_as_it_is(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    torch.save({"a": torch.ones(1)}, tmp_path / "adapter_model.bin")
    with converted(tmp_path) as place:
        assert place == tmp_path
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"b": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="several old weight files"), converted(tmp_path):
        pass


@pytest.fixture
def gpt2(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=64, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, lora_alpha=64, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_intruders_of_a_saved_adapter_and_the_plot(gpt2):
    plot = gpt2 / "vectors.png"
    given = options(gpt2 / "adapter", model=str(gpt2 / "base"), intruder=True, layers=True, plot=str(plot), top_k=4)
    value, blocks, _ = inspect(given)
    seen = value["intruders"]
    assert (seen["matrices"], seen["top_k"], len(seen["layers"])) == (2, 4, 2)
    for layer in seen["layers"]:  # an update many times the base: its two directions lead, and are new
        assert layer["shape"] == (192, 64)
        assert layer["intruders"] == 2
        assert layer["effective_rank"] <= 2.0 + 1e-3
        assert min(layer["similarity"][:2]) < 0.5
    assert seen["intruders"] == 4
    assert any(row[:2] == ["left", "4"] for block in blocks for row in block)
    assert plot.stat().st_size > 10_000
    with pytest.raises(ConfigError, match="give it with --base MODEL"):
        inspect(options(gpt2 / "adapter", intruder=True))
    with pytest.raises(ConfigError, match=r"must end in .png"):
        inspect(options(gpt2 / "adapter", plot="a.pdf"))
    assert inspect_adapter(gpt2 / "adapter").layers[0].updates[0].singular_values[1] > 0

"""Pickles where weights are expected: refused everywhere, never loaded. Each would make a folder if it were."""

import json
import pickle
import shutil

import hostile_files as hostile
import numpy as np
import pytest
from peft import PeftModel, get_peft_model

from polyrank import MclConfig, import_hypotheses
from polyrank.analysis.adapter_files import open_adapter
from polyrank.core.errors import CheckpointError, ConfigError
from polyrank.recipes._commands import saved as _saved

polyrank = hostile.polyrank
KINDS = list(hostile.pickles("x"))
NAMES = ["adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt", "adapter_model.pkl", "model.safetensors"]


@pytest.fixture(autouse=True)
def _nothing_was_run(tmp_path):
    yield
    assert not (tmp_path / "was-run").exists()


def payload(tmp_path, kind):
    return hostile.pickles(tmp_path / "was-run")[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_in_an_adapter_folder(polyrank, tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / name).write_bytes(payload(tmp_path, kind))
    for reader in (open_adapter, lambda folder: import_hypotheses(hostile.tiny_llama(), [folder])):
        with pytest.raises(CheckpointError):
            reader(folder)
    commands = [
        "inspect a",
        "generate a --prompt x",
        "merge a -o m",
        "export a -o e",
        "gpl index c.jsonl -o i --adapter a",
    ]
    for command in [*commands, "gpl evaluate a --data d"]:
        done = polyrank(command.split())
        hostile.check_one_line(done, (2,))
    done = polyrank(["inspect", "a", "--allow-bin"])  # torch's weights-only loader: tensors, nothing else
    hostile.check_one_line(done, (2,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES[:3])
def test_in_a_folder_of_our_own_methods(tmp_path, name, kind):
    folder = tmp_path / "a"
    get_peft_model(hostile.tiny_llama(), MclConfig(target_modules=["q_proj"])).save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(payload(tmp_path, kind))
    # PEFT itself reads a .bin by torch's weights-only loader: tensors, nothing that the file names is called
    refused = CheckpointError if name.endswith("safetensors") else Exception
    with pytest.raises(refused):
        PeftModel.from_pretrained(hostile.tiny_llama(), str(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_in_a_base_model(tmp_path, name, kind):
    hostile.tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / name).write_bytes(payload(tmp_path, kind))
    with pytest.raises(ConfigError, match="cannot load base model"):
        _saved.load_base(str(tmp_path / "base"))


def test_in_a_tokenizer(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(payload(tmp_path, "plain"))
    with pytest.raises(ConfigError, match="no tokenizer in"):
        _saved.load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    pytest.importorskip("sentence_transformers")
    import search_place as place

    return place.make_encoder(tmp_path_factory.mktemp("encoders") / "encoder")


CODE = "import pathlib\npathlib.Path(__file__).parents[1].joinpath('was-run').mkdir()\nclass Module: pass\n"


@pytest.mark.parametrize(
    "kind", ["evil.Module", "os.system", "evil", "", 5, None, ["sentence_transformers.models.Pooling"]]
)
def test_an_encoder_that_names_code(encoder, tmp_path, kind):
    from polyrank.retrieval.dense import load_encoder

    shutil.copytree(encoder, tmp_path / "encoder")
    (tmp_path / "encoder" / "evil.py").write_text(CODE)
    file = tmp_path / "encoder" / "modules.json"
    modules = json.loads(file.read_text())
    modules[1]["type"] = kind
    file.write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match="is none of sentence-transformers' own"):
        load_encoder(str(tmp_path / "encoder"))


@pytest.mark.parametrize(
    "text", ["", "{", "5", "[5]", "[[]]", '{"a": 1}', "[{}]", '[{"type": "sentence_transformers.x.Y"}]']
)
def test_an_encoder_with_another_list_of_modules(encoder, tmp_path, text):
    from polyrank.retrieval.dense import load_encoder

    shutil.copytree(encoder, tmp_path / "encoder")
    (tmp_path / "encoder" / "modules.json").write_text(text)
    with pytest.raises(ConfigError):
        load_encoder(str(tmp_path / "encoder"))


@pytest.mark.parametrize("kind", KINDS)
def test_in_an_encoder(encoder, tmp_path, kind):
    from polyrank.retrieval.dense import load_encoder

    shutil.copytree(encoder, tmp_path / "encoder")
    weights = next((tmp_path / "encoder").rglob("model.safetensors"))
    weights.unlink()
    weights.with_name("pytorch_model.bin").write_bytes(payload(tmp_path, kind))
    with pytest.raises(ConfigError, match="cannot load an encoder"):
        load_encoder(str(tmp_path / "encoder"))


ARRAYS = {
    "object": lambda marker: np.array([hostile.Payload(marker)], dtype=object),
    "record": lambda marker: np.array([(hostile.Payload(marker),)], dtype=[("a", object)]),
}


@pytest.mark.parametrize("name", ["vectors", "offsets", "centroids", "starts", "rows"])
@pytest.mark.parametrize("kind", [*ARRAYS, "plain", "torch-zip"])
def test_in_an_index(tmp_path, name, kind):
    pytest.importorskip("faiss")
    from polyrank.retrieval.index import open_index

    index = hostile.make_index(tmp_path / "index")
    file = index.data / f"{name}.npy"
    if kind in ARRAYS:
        np.save(file, ARRAYS[kind](tmp_path / "was-run"), allow_pickle=True)
    else:
        file.write_bytes(payload(tmp_path, kind))
    with pytest.raises(CheckpointError, match="is no whole array"):
        open_index(tmp_path / "index")


def test_the_payload_does_what_it_should(tmp_path):
    """Else none of the tests above would show anything."""
    pickle.loads(hostile.pickles(tmp_path / "it-runs")["plain"])
    assert (tmp_path / "it-runs").is_dir()

"""Names, paths and links that lead out of a folder; indexes whose files do not belong together."""

import json
import os
import random
import shutil
from pathlib import Path

import hostile_files as hostile
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyrank.adapters._folders import inside, whole_folders
from polyrank.analysis.adapter_files import open_adapter
from polyrank.core.errors import CheckpointError, ConfigError, UserError
from polyrank.recipes._frame.compose import Composed
from polyrank.recipes.run import run_folder

polyrank = hostile.polyrank
NAMES = {
    "parent": "..",
    "grandparent": "../../x",
    "hidden-parent": "a/../../x",
    "absolute": "/tmp/x",
    "root": "/",
    "home": "~/x",
    "nul": "a\0b",
    "control": hostile.CONTROL,
    "line": "a\nb",
    "empty": "",
    "space": " ",
    "dots": "...",
    "long": "x" * 300,
    "option": "--fresh",
    "backslash": "..\\..\\x",
    "drive": "C:\\x",
    "html": hostile.HTML,
    "turned": "\u202ex",
    "slashes": "a//../..//x",
    "here": "./../x",
    "end": "a/..",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_runs(polyrank, tmp_path, monkeypatch, name):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    composed = Composed({"runs_dir": None, "run_name": NAMES[name]}, "markov", "markov/setup", None)
    with pytest.raises(ConfigError, match="run_name"):
        run_folder(composed, [])
    assert not list((tmp_path / "work").iterdir())


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.text(alphabet=st.sampled_from("ab./\\~\0\n -_=,+"), min_size=1, max_size=12))
def test_a_run_lies_in_its_folder_or_is_refused(name):
    composed = Composed({"runs_dir": "runs", "run_name": name}, "markov", "markov/setup", None)
    folder = hostile.either(lambda _: run_folder(composed, []), None, ConfigError)
    if folder is not None:
        here = Path("runs/markov/setup").absolute()
        assert here in Path(os.path.normpath(folder.absolute())).parents


@pytest.mark.parametrize(
    "name",
    [name for name in NAMES if name not in ("space", "dots", "home", "turned", "html", "option", "backslash", "drive")],
)
def test_names_within_an_adapter_folder(tmp_path, name):
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError):
        inside(tmp_path / "a", NAMES[name])


@pytest.mark.parametrize(
    "name", ["parent", "grandparent", "hidden-parent", "absolute", "root", "empty", "nul", "slashes", "here", "end"]
)
def test_names_of_folders_to_be_written(tmp_path, name):
    before = hostile.tree(tmp_path)
    with pytest.raises((ConfigError, ValueError)), whole_folders(tmp_path / "here", [NAMES[name]]) as (folder,):
        (folder / "x").write_text("x")
    assert not [path for path in hostile.tree(tmp_path) if path not in before and "x" in path]


LINKS = (
    "/etc/passwd",
    "/etc",
    "../secret",
    "../../../../../../etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "nowhere",
    "a.link",
)
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize("target", LINKS)
@pytest.mark.parametrize("name", FILES)
def test_links_out_of_an_adapter_folder(polyrank, tmp_path, monkeypatch, name, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("something that nobody should see")
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    (folder / "adapter_model.safetensors").write_bytes(hostile.raw({}))
    (folder / name).unlink()
    (folder / name).symlink_to("adapter_config.json" if target == "a.link" else target)
    if target == "a.link" and name == "adapter_model.safetensors":
        with pytest.raises(CheckpointError, match="no safetensors file"):
            open_adapter(folder)
    else:
        with pytest.raises(CheckpointError):
            open_adapter(folder)
    for command in (["inspect", "a"], ["merge", "a", "-o", "m"]):
        done = polyrank(command)
        hostile.check_one_line(done)
        assert "nobody should see" not in done.out + done.err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket"])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_none(polyrank, tmp_path, monkeypatch, name, kind):
    import socket

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for one in FILES:
        path = Path("a") / one
        if one != name:
            path.write_text('{"peft_type": "LORA"}')
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            socket.socket(socket.AF_UNIX).bind(str(path))
    hostile.check_one_line(polyrank(["inspect", "a"]), (2,))
    hostile.check_one_line(polyrank(["generate", "a", "--prompt", "x"]), (2,))


@pytest.mark.parametrize("name", ["parent", "absolute", "nul", "control", "long", "empty", "html", "turned"])
@pytest.mark.parametrize(
    "command",
    [
        "inspect {}",
        "report {} -o r.html",
        "evaluate {}",
        "generate {} --prompt x",
        "gpl search x --index {}",
        "gpl index {} -o out --model absent/x",
    ],
)
def test_paths_on_the_command_line(polyrank, tmp_path, monkeypatch, command, name):
    if command.startswith("gpl"):
        pytest.importorskip("faiss")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    given = {"absolute": "/etc/passwd"}.get(name, NAMES[name])
    done = polyrank([part.format(given) for part in command.split()])
    hostile.check_one_line(done, (2,))
    assert sorted(hostile.tree(tmp_path)) == ["empty"]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    pytest.importorskip("faiss")
    return hostile.make_index(tmp_path_factory.mktemp("index") / "index").folder


def altered(file, seed):
    """The file cut, flipped, longer, or with the rows of its array in another order: by seed."""
    chance = random.Random(seed)
    content = bytearray(file.read_bytes())
    match seed % 4:
        case 0:
            content = content[: chance.randrange(len(content))]
        case 1:
            content[chance.randrange(min(len(content), 128))] ^= 1 << chance.randrange(8)
        case 2:
            content += chance.randbytes(chance.randrange(1, 100))
        case 3:
            if file.suffix == ".npy":
                np.save(file, np.load(file)[::-1].copy())
                return
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "name", ["index.json", "vectors.npy", "offsets.npy", "starts.npy", "rows.npy", "centroids.npy", "documents.jsonl"]
)
def test_an_altered_index_is_refused_or_searched(polyrank, index, tmp_path, name, seed):
    from polyrank.retrieval.index import open_index

    shutil.copytree(index, tmp_path / "index")
    altered(next((tmp_path / "index").rglob(name)), seed)

    def search(folder):
        opened = open_index(folder)
        found, _ = opened.search(np.ones((1, 8)), 5)
        opened.documents([number for number in found[0] if number >= 0])

    hostile.either(search, tmp_path / "index", UserError)
    if seed < 2:
        hostile.check_one_line(polyrank(["gpl", "search", "x", "--index", str(tmp_path / "index")]), (2,))


@pytest.mark.parametrize(
    "change",
    [{"model": name} for name in ("../../x", "/etc/passwd", "a\0b", hostile.CONTROL, hostile.HTML, "", 5, ["x"])]
    + [{"dim": value} for value in (0, -1, 2**62, "8", 8.5, None)]
    + [{"adapter": "x"}, {"weights": 5}, {"surprise": 1}],
)
def test_an_index_that_names_another_encoder(polyrank, index, tmp_path, change):
    shutil.copytree(index, tmp_path / "index")
    file = tmp_path / "index" / "index.json"
    value = json.loads(file.read_text())
    value["encoder"] |= change
    file.write_text(json.dumps(value))
    hostile.check_one_line(polyrank(["gpl", "search", "x", "--index", str(tmp_path / "index")]), (2,))


def test_a_report_follows_no_hidden_folders(polyrank, tmp_path):
    """A folder of results is walked without what is hidden; a loop of links does not go on for ever."""
    results = tmp_path / "results"
    (results / ".git").mkdir(parents=True)
    (results / ".git" / "x.json").write_text("{")
    (results / "loop").symlink_to(results)
    done = polyrank(["report", str(results), "-o", str(tmp_path / "r.html")])
    hostile.check_one_line(done, (1, 2))

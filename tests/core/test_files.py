"""Files are whole or absent, and a torn last line costs that line only."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from polyrank.core import files
from polyrank.core.errors import DataError, RunError
from polyrank.core.files import append_json_line, atomic_path, atomic_write, full_disk_is_said, read_json_lines, sha256


def test_atomic_write_replaces_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "sub" / "a.txt"
    atomic_write(path, "old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failed_write_keeps_the_old_content(tmp_path):
    path = atomic_write(tmp_path / "a.txt", "old")

    def fail_half_way():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_a_run_error(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "a.txt", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match=r"the disk is full .what was there before is intact.; free some space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_kill_in_the_middle_keeps_the_old_content(tmp_path):
    path = atomic_write(tmp_path / "a.txt", "old")
    code = (
        "import os, signal, sys\n"
        "from polyrank.core.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.read_text() == "old"


def test_json_lines_round_trip(tmp_path):
    path = tmp_path / "m.jsonl"
    values = [{"step": 0, "text": "a\nb é"}, [1, None]]
    for value in values:
        append_json_line(path, value, durable=True)
    assert read_json_lines(path) == values
    assert path.read_text().count("\n") == 2


def test_every_cut_loses_at_most_the_last_line(tmp_path, caplog):
    whole = "".join(json.dumps({"step": step, "text": "é\\n"}, ensure_ascii=False) + "\n" for step in range(3)).encode()
    for cut in range(len(whole) + 1):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(whole[:cut])
        done = whole[:cut].count(b"\n")
        tail = whole[:cut].split(b"\n")[-1]
        complete = done + (tail.endswith(b"}"))
        assert [value["step"] for value in read_json_lines(path)] == list(range(complete))
        append_json_line(path, {"step": 99})
        assert [value["step"] for value in read_json_lines(path)] == [*range(complete), 99]
    assert "cut off while being written" in caplog.text


def test_a_bad_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        read_json_lines(path)


def test_nan_is_no_json_line(tmp_path):
    with pytest.raises(DataError, match="cannot write this as a JSON line"):
        append_json_line(tmp_path / "m.jsonl", {"loss": float("nan")})
    assert not (tmp_path / "m.jsonl").exists()


def test_read_only_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not write"):
        atomic_write(tmp_path / "file" / "x", "1")
    with pytest.raises(RunError, match="could not write"):
        append_json_line(tmp_path / "file" / "x", 1)


def test_folder_hash_sees_names_and_contents(tmp_path):
    digests = set()
    for name, content in (("a", "1"), ("a", "2"), ("b", "1")):
        folder = tmp_path / (name + content)
        folder.mkdir()
        (folder / name).write_text(content)
        digests.add(sha256(folder))
    assert len(digests) == 3
    with pytest.raises(DataError, match="no such file"):
        sha256(tmp_path / "absent")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_that_another_library_met_is_a_run_error(error):
    def save():
        try:
            raise error
        except Exception as first:
            raise ValueError("saving failed") from first

    with pytest.raises(RunError, match=r"could not write in run: the disk is full .* goes on from there"):
        with_a_word(save)


@pytest.mark.parametrize(
    "message",
    [
        "PytorchStreamWriter failed writing file data/0: file write failed",
        "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0",
    ],
)
def test_torchs_failure_is_a_full_disk_only_where_no_space_is_left(tmp_path, monkeypatch, message):
    def save():
        with full_disk_is_said(tmp_path):
            raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=re.escape(message)):
        save()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    with pytest.raises(RunError, match="the disk is full"):
        save()


def with_a_word(save):
    with full_disk_is_said("run"):
        save()


@pytest.mark.parametrize("error", [ValueError("something else"), RunError("mine")])
def test_other_errors_pass_as_they_are(error):
    def save():
        raise error

    with pytest.raises(type(error), match=str(error)) as raised:
        with_a_word(save)
    assert raised.value is error

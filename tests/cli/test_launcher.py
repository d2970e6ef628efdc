"""The command `polyrank` while Python still imports polyrank: Ctrl-C, a version that does not fit, what is missing."""

import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import polyrank_launcher

START = "import sys; from polyrank_launcher import main; sys.exit(main())"
WAITS = """
import signal, sys
print("importing", flush=True)
try:
    signal.pause()
except BaseException:
    pass  # as a library does that tries an import and goes on without it
"""
OLD_PEFT = """
import importlib.metadata as metadata, sys
version = metadata.version
metadata.version = lambda name: {"peft": "0.9.0"}.get(name) or version(name)
sys.argv = ["polyrank", "list", "methods", *sys.argv[1:]]
from polyrank_launcher import main
sys.exit(main())
"""


def start(tmp_path, package, *arguments):
    """The launcher, finding a package `polyrank` that consists of the given text."""
    (tmp_path / "polyrank").mkdir()
    (tmp_path / "polyrank" / "__init__.py").write_text(package)
    return subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_the_command_is_the_launcher():
    (command,) = entry_points(group="console_scripts", name="polyrank")
    assert command.load() is polyrank_launcher.main


def test_ctrl_c_during_the_import_ends_at_once_in_one_line(tmp_path):
    process = start(tmp_path, WAITS, "run", "recipe=markov/setup")
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "polyrank: interrupted\n")


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("import no_such_library", "No module named 'no_such_library' (is everything installed"),
        ("raise OSError('libtorch.so:\\n no such file')", "OSError: libtorch.so: no such file (is everything"),
    ],
)
def test_a_broken_installation_is_said_in_one_line(tmp_path, package, said):
    process = start(tmp_path, package)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"polyrank: error: {said}")


def test_debug_shows_the_traceback(tmp_path):
    process = start(tmp_path, "import no_such_library", "--debug")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" in err
    assert err.rstrip().endswith("ModuleNotFoundError: No module named 'no_such_library'")


def test_a_version_outside_is_said_in_one_line():
    done = subprocess.run([sys.executable, "-c", OLD_PEFT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "polyrank: error: polyrank supports peft<0.22,>=0.21.0, found 0.9.0 (pip install 'peft<0.22,>=0.21.0')\n"
    )


def test_ctrl_c_is_the_command_lines_own_after_the_import(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    seen = []
    monkeypatch.setattr("polyrank.cli.main", lambda: seen.append(signal.getsignal(signal.SIGINT)) or 0)
    assert polyrank_launcher.main() == 0
    assert seen == [before]

"""Versions outside the declared range are refused at import, in one line, before torch is loaded."""

import importlib.metadata
import sys

import pytest

from polyrank._requirements import check_requirements
from polyrank.core.errors import VersionError

FAKE = """
import importlib.metadata as metadata, sys
version = metadata.version
metadata.version = lambda name: {"torch": "2.7.1", "peft": "0.22.0"}.get(name) or version(name)
try:
    import polyrank
except ImportError as error:
    print(type(error).__name__, error)
print(sorted({"torch", "transformers", "peft"} & set(sys.modules)))
"""


@pytest.fixture
def installed(monkeypatch):
    """Fakes installed versions: installed(torch="1.0")."""
    version = importlib.metadata.version

    def fake(**versions):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or version(name))

    return fake


@pytest.mark.parametrize(
    ("name", "found", "supported"),
    [("torch", "2.7.1", ">=2.10"), ("transformers", "4.57.6", ">=5.10"), ("peft", "0.22.0", "<0.22,>=0.21.0"),
     ("peft", "0.20.0", "<0.22,>=0.21.0"), ("peft", "0.22.0.dev0", "<0.22,>=0.21.0"), ("torch", "unknown", ">=2.10")],
)  # fmt: skip
def test_a_version_outside_is_refused_in_one_line(installed, name, found, supported):
    installed(**{name: found})
    with pytest.raises(VersionError) as error:
        check_requirements()
    assert str(error.value) == f"polyrank supports {name}{supported}, found {found} (pip install '{name}{supported}')"


@pytest.mark.parametrize(
    ("name", "found"),
    [("torch", "2.10.0"), ("torch", "2.10.0a0+b558c98.nv25.11"), ("torch", "2.13.0+cpu"), ("peft", "0.21.9")],
)
def test_a_version_inside_is_taken(installed, name, found):
    installed(**{name: found})
    check_requirements()


def test_what_is_absent_or_an_extra_is_left_to_its_own_import(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    check_requirements()


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(VersionError, match=r"^polyrank supports Python>=3\.10, found 3\.9\.18$"):
        check_requirements()


def test_import_says_all_that_is_wrong_and_loads_nothing_first(run_program, tmp_path):
    done = run_program([sys.executable, "-c", FAKE], tmp_path, 120)
    first, second, *_ = done.stdout.splitlines()
    assert first == (
        "VersionError polyrank supports torch>=2.10, found 2.7.1; peft<0.22,>=0.21.0, found 0.22.0"
        " (pip install 'torch>=2.10' 'peft<0.22,>=0.21.0')"
    )
    assert second == "[]"

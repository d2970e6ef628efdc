"""The wheel and the source distribution: what a user needs is in them, and nothing else. Built without the network."""

import importlib
import json
import re
import subprocess
import tarfile
import zipfile
from email import message_from_string
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    """tool("distributions"): a module of tools/, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def built(tool, tmp_path_factory):
    """(wheel, sdist), from a copy of the checkout."""
    (needed,) = re.findall(r'"setuptools>=(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    try:
        enough = Version(version("setuptools")) >= Version(needed)
    except PackageNotFoundError:
        enough = False
    if not enough:
        pytest.skip(f"a build without the network needs setuptools >= {needed} in the environment")
    folder = tmp_path_factory.mktemp("distributions")
    tools = tool("distributions")
    try:
        files = tools.build(tools.copy_sources(ROOT, folder / "sources"), folder / "out")
    except subprocess.CalledProcessError:
        pytest.fail("\n".join(log.read_text() for log in (folder / "out").glob("*.log")))
    (wheel,) = (file for file in files if file.suffix == ".whl")
    (sdist,) = (file for file in files if file.suffix == ".gz")
    return wheel, sdist


def sources():
    """Every file of the package, as a path below src/."""
    found = (path.relative_to(ROOT / "src") for path in (ROOT / "src" / "polyrank").rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts} | {"polyrank_launcher.py"}


def test_the_wheel_has_every_file_of_the_package_and_no_other(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    own = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert own == sources()
    assert {"polyrank/py.typed", "polyrank/report/page.html", "polyrank/report/page.js"} <= own
    assert sum(name.endswith(".yaml") for name in own) > 50  # the recipes' configurations
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert built[0].stat().st_size < 5 << 20


def test_the_sdist_has_what_a_build_needs_and_no_tests_or_data(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    files = {name.removeprefix("src/") for name in names if name.startswith(("src/polyrank/", "src/polyrank_launcher"))}
    assert sources() <= files
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert {name.split("/")[0] for name in names} <= {
        "src", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "setup.cfg",
    }  # fmt: skip


def test_the_metadata_says_what_pip_and_an_index_ask(built, tool):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        (points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        metadata = message_from_string(wheel.read(name).decode())
        assert "polyrank = polyrank_launcher:main" in wheel.read(points).decode()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)} <= set(
        metadata.get_all("Classifier")
    )
    assert metadata["Keywords"]
    tools = tool("distributions")
    bounds = tools.lower_bounds(built[0])
    assert {"torch==2.10", "peft==0.21.0"} <= set(bounds)
    assert len(bounds) == len(tools.requirements(built[0]))


def test_an_oldest_environment_pins_every_lower_bound(built, tool):
    compatibility = tool("compatibility")
    environments = {one.name: one for one in compatibility.ENVIRONMENTS}
    oldest = compatibility.install_command(environments["oldest"], "python", built[0].parent, ["wheels"])
    assert {"torch==2.10", "peft==0.21.0", str(built[0])} <= set(oldest)
    assert "-c" not in oldest
    others = compatibility.install_command(environments["oldest-hf"], "python", built[0].parent, [])
    assert [word for word in others if word.startswith("torch")] == ["torch==2.13.0"]
    tested = compatibility.install_command(environments["tested-sdist"], "python", built[0].parent, [])
    assert str(built[1]) in tested
    assert tested[tested.index("-c") + 1].endswith("constraints.txt")


def test_the_table_of_compatibility_says_what_failed_and_what_did_not_run(tool):
    compatibility = tool("compatibility")
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    steps = [
        {"step": "versions", "ok": True, "seen": json.dumps(versions)},
        {"step": "lsr", "ok": False, "seen": "AssertionError: merged"},
    ]
    tests = {"passed": 5, "failed": 1, "skipped": 2}
    results = {
        "tested": {"steps": steps, "tests": tests, "failed": ["tests/core/test_a.py::test_b"]},
        "oldest": {"steps": [], "not_run": "no Python 3.10 on this machine"},
    }
    lines = compatibility.table(results).splitlines()
    (row,) = (line for line in lines if line.startswith("| `tested` "))
    assert row.split(" | ")[1:3] == ["3.11.7", "2.13.0"]
    assert row.endswith("| wheel | 1 of 2 | 5 of 6 |")
    assert "- `oldest` was not run: no Python 3.10 on this machine" in lines
    assert "- `newest-3.13` was not run: not tried" in lines
    assert "- `tested`, lsr: AssertionError: merged" in lines
    assert "- `tested`: `tests/core/test_a.py::test_b` failed" in lines

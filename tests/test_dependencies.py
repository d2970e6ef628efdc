"""docs/dependencies.md says why for each package that pyproject.toml names, and for no other."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")


def plain(name):
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", name.strip(), maxsplit=1)[0]).lower()


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {plain(one) for one in project["dependencies"]}
    for packages in project["optional-dependencies"].values():
        named |= {plain(one) for one in packages}
    rows = [line.split("|")[1] for line in (ROOT / "docs" / "dependencies.md").read_text().splitlines() if "|" in line]
    listed = {plain(one) for row in rows for one in row.split(",") if one.strip(" -") and one.strip() != "Package"}
    assert listed == named


def test_constraints_pin_each_of_them():
    pinned = {plain(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tested = [*project["dependencies"], *extras["dev"], *extras["retrieval"]]
    assert {plain(one) for one in tested} - pinned == set()

"""docs/dependencies.md says why for each package that pyproject.toml names, and for no other."""

import re
import sys
from importlib.metadata import PackageNotFoundError, metadata
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


LICENCES = {
    "Apache": "Apache", "MIT": r"\bMIT\b", "BSD": "BSD", "PSF": "PSF|Python Software Foundation", "MPL": "MPL|Mozilla",
    "LGPL": "LGPL|Lesser", "GPL": r"\bA?GPL|GNU (Affero )?General", "BSL": r"\bBSL\b", "Zlib": "Zlib", "CC0": "CC0",
}  # fmt: skip


def licences(text):
    """The families of licences that a text names."""
    return {name for name, pattern in LICENCES.items() if re.search(pattern, text)}


def said_by(package):
    """What the installed package's metadata says of its licence; "" where it is not installed or says nothing."""
    try:
        fields = metadata(package)
    except PackageNotFoundError:
        return ""
    classifiers = [one for one in fields.get_all("Classifier", []) if one.startswith("License ::")]
    first_line = (fields["License"] or "").split("\n")[0]  # some give the whole text here
    return fields["License-Expression"] or " ".join([first_line, *classifiers])


def test_licences_are_what_the_packages_say():
    wrong, seen = [], 0
    for line in (ROOT / "docs" / "dependencies.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or cells[0] in ("Package", "---"):
            continue
        for package in cells[0].split(", "):
            said = licences(said_by(package))
            seen += bool(said)
            if not said <= licences(cells[-1]):
                wrong.append(f"{package}: its metadata says {sorted(said)}, the page {cells[-1]!r}")
            assert "GPL" not in said, package
    assert wrong == []
    assert seen > 25


def test_the_versions_of_the_page_on_vulnerabilities_are_those_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {}
    for one in [*project["dependencies"], *(p for group in project["optional-dependencies"].values() for p in group)]:
        asked.setdefault(plain(one), set()).update(re.findall(r">=([\d.]+)", one))
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    page = (ROOT / "docs" / "vulnerabilities.md").read_text()
    pinned, bounds = page.split("## The lower bounds")
    shown = re.findall(r"^\| ([\w-]+) ([\d.]+) \|", pinned, re.M)
    assert len(shown) == 7
    assert all(f"{name}=={version}" in pins for name, version in shown)
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", bounds, re.M)
    assert len(rows) == 12
    assert [name for name, version in rows if asked[name] != {version}] == []

"""Held when polyrank is imported, before torch and PEFT are: installed packages lie in the ranges that it declares.

The ranges are those of the package's own metadata (pyproject.toml), so that they stand in one place. A package that is
absent is left to its own import; a pre-release or vendor build (2.10.0a0+nv25.11) counts as the version it leads to.
"""

from __future__ import annotations

import importlib.metadata
import sys

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from .core.errors import VersionError


def check_requirements(name: str = "polyrank") -> None:
    """Raise VersionError, one line, where Python or an installed requirement lies outside the declared range."""
    supported = importlib.metadata.metadata(name)["Requires-Python"] or ""
    python = ".".join(map(str, sys.version_info[:3]))
    wrong = [] if python in SpecifierSet(supported) else [f"Python{supported}, found {python}"]
    asked = []
    for requirement in map(Requirement, importlib.metadata.requires(name) or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not _lies_in(found, requirement.specifier):
            wrong.append(f"{requirement.name}{requirement.specifier}, found {found}")
            asked.append(f"'{requirement.name}{requirement.specifier}'")
    if wrong:
        remedy = f" (pip install {' '.join(asked)})" if asked else ""
        raise VersionError(f"{name} supports {'; '.join(wrong)}{remedy}")


def _lies_in(found: str, specifier: SpecifierSet) -> bool:
    try:
        return Version(found).base_version in specifier
    except InvalidVersion:
        return False


check_requirements()

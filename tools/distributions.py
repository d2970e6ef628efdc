"""The wheel and the source distribution, built without the network and without touching the checkout."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", "constraints.txt")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", ".peft", ".hub", ".hypothesis", "node_modules")


def copy_sources(root: Path, folder: Path, tests: bool = False) -> Path:
    """What a build reads, copied: setuptools writes build/ and *.egg-info beside its sources. Returns the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("src", *(["tests"] if tests else [])):
        shutil.copytree(root / name, folder / name, ignore=_LEFT_OUT)
    for name in FILES:
        if (root / name).exists():
            shutil.copy(root / name, folder)
    return folder


def build(sources: Path, out: Path, hooks: tuple[str, ...] = ("build_wheel", "build_sdist")) -> list[Path]:
    """Call the build backend's own hooks (PEP 517) in `sources`, in another process. Returns the files written.

    Needs the setuptools that pyproject.toml names. Raises: subprocess.CalledProcessError.
    """
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.iterdir())
    for hook in hooks:
        code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
        log = out / f"{hook}.log"
        with log.open("wb") as file:
            subprocess.run(
                [sys.executable, "-c", code, str(out)], cwd=sources, check=True, timeout=600, stdout=file, stderr=file
            )
        log.unlink()
    return sorted(set(out.iterdir()) - before)


def requirements(wheel: Path) -> list[str]:
    """The wheel's requirements that no extra asks for."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_string(file.read(name).decode()).get_all("Requires-Dist", [])
    return [field for field in fields if "extra ==" not in field]


def lower_bounds(wheel: Path) -> list[str]:
    """The oldest versions that the wheel says it works with: "torch>=2.10" -> "torch==2.10"."""
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, requirements(wheel)):
        (bound,) = (one.version for one in requirement.specifier if one.operator == ">=")
        found.append(f"{requirement.name}=={bound}")
    return found

"""Fresh environments for several Pythons and package versions: install the wheel, run the smoke tests and some tests.

    python tools/compatibility.py --work FOLDER                  every environment below, one after the other
    python tools/compatibility.py --work FOLDER --only tested    one of them
    python tools/compatibility.py --work FOLDER --page           only write the record and the page from what was run

The wheel and the source distribution are built from a copy of the checkout. Each environment is made below FOLDER, used
and removed; what it showed stays in FOLDER/<name>.json, and an environment that has such a file is not run again. The
record goes to results/ (results/scratch/ where the tree has changes), the table into docs/compatibility.md.
Run by hand: the CUDA builds of torch that the package index holds take up to 8 GB of disk each while they are used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributions import build, copy_sources, lower_bounds

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- begin: made by tools/compatibility.py -->", "<!-- end: made by tools/compatibility.py -->"
TESTS = ["tests/core", "tests/conformance/test_shared.py"]
CHOSEN = "core or (lsr and llama and (save_and_load or merged or gradients or identity))"
TOOLS = ["pytest>=8.3", "pytest-timeout>=2.3", "hypothesis>=6.100"]
SHOWN = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")


@dataclass(frozen=True)
class Environment:
    """What is installed: `python` as "3.10"; `versions` one of oldest (every lower bound of the wheel), tested
    (constraints.txt) and newest (what pip finds); `pins` on top; `source` wheel or sdist."""

    name: str
    python: str
    versions: str
    source: str = "wheel"
    pins: tuple[str, ...] = ()


ENVIRONMENTS = (
    Environment("tested", "3.11", "tested"),
    Environment("tested-sdist", "3.11", "tested", source="sdist"),
    Environment("oldest-hf", "3.11", "oldest", pins=("torch==2.13.0",)),
    Environment("newest-3.13", "3.13", "newest"),
    Environment("newest-3.12", "3.12", "newest"),
    Environment("oldest", "3.10", "oldest"),
)


def interpreters(given: list[str]) -> dict[str, str]:
    """ "3.10" -> program, from arguments like 3.10=/path/python, pythonX.Y on the path, and pyenv's folder."""
    found = {}
    for minor in ("3.10", "3.11", "3.12", "3.13"):
        installed = sorted(Path.home().glob(f".pyenv/versions/{minor}.*/bin/python"))
        program = str(installed[-1]) if installed else shutil.which(f"python{minor}")
        if program:
            found[minor] = program
    return found | dict(text.split("=", 1) for text in given)


def run(command: list[str], log: Path, timeout_s: float, cwd: Path, env: Mapping[str, str]) -> tuple[int, str]:
    """Status and standard output; everything a command starts ends with it. Standard error is added to `log`."""
    out = log.with_suffix(".out")
    with out.open("wb") as stdout, log.open("ab") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=dict(env),
            start_new_session=True,
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = 124
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return status, out.read_text(encoding="utf-8", errors="replace")


def try_environment(one: Environment, program: str | None, built: Path, work: Path, links: list[str]) -> dict[str, Any]:
    """Make, use and remove one environment. Returns what was seen; a step that fails ends it."""
    seen: dict[str, Any] = {"python": one.python, "versions": one.versions, "source": one.source, "steps": []}
    if program is None:
        return seen | {"not_run": f"no Python {one.python} on this machine"}
    folder, log = work / one.name, work / f"{one.name}.log"
    shutil.rmtree(folder, ignore_errors=True)
    python = str(folder / "bin" / "python")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1"}
    start = time.perf_counter()
    try:
        run([program, "-m", "venv", str(folder)], log, 600, work, env)
        status, text = run(install_command(one, python, built, links), log, 7200, work, env)
        seen["install_time_s"] = round(time.perf_counter() - start)
        if status != 0:
            lines = [*log.read_text(errors="replace").splitlines(), *text.splitlines()]
            errors = [line for line in lines if line.startswith("ERROR")]
            return seen | {"not_run": f"pip could not install it: {(errors or ['?'])[0][:300]}"}
        place = folder / "empty"
        place.mkdir()
        _, text = run([python, str(built / "smoke.py")], log, 3600, place, env)
        seen["steps"] = [json.loads(line) for line in text.splitlines() if line.startswith('{"step"')]
        _, text = run([python, "-m", "pytest", "-rfE", "-k", CHOSEN, *TESTS], log, 3600, built / "sources", env)
        seen["tests"] = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|errors?|skipped)", text)}
        seen["failed"] = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.M)[:20]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seen["time_s"] = round(time.perf_counter() - start)
    return seen


def install_command(one: Environment, python: str, built: Path, links: list[str]) -> list[str]:
    """pip's arguments: the wheel (or sdist), its versions, and what the tests need."""
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    pinned = {re.split("[=<>]", pin)[0] for pin in one.pins}
    bounds = [b for b in lower_bounds(wheel) if b.split("==")[0] not in pinned] if one.versions == "oldest" else []
    limits = ["-c", str(ROOT / "constraints.txt")] if one.versions == "tested" else []
    found = [word for link in links for word in ("--find-links", link)]
    what = [str(wheel if one.source == "wheel" else sdist), *bounds, *one.pins, *TOOLS]
    return [python, "-m", "pip", "install", "--no-compile", "--quiet", *found, *limits, *what]


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's table, one row for each environment, and below it what failed."""
    heads = ["environment", "Python", *SHOWN, "from", "smoke steps", "tests"]
    lines, notes = [heads, [":--"] * len(heads)], []
    for one in ENVIRONMENTS:
        seen = results.get(one.name, {"not_run": "not tried"})
        versions = json.loads(
            next((s["seen"] for s in seen.get("steps", []) if s["step"] == "versions" and s["ok"]), "{}")
        )
        row = [f"`{one.name}`", versions.get("python", one.python), *(versions.get(name, "–") for name in SHOWN)]
        lines.append([*row, one.source, *_outcome(seen)])
        if "not_run" in seen:
            notes.append(f"- `{one.name}` was not run: {seen['not_run']}")
        notes += [f"- `{one.name}`, {s['step']}: {s['seen']}" for s in seen.get("steps", []) if not s["ok"]]
        notes += [f"- `{one.name}`: `{test}` failed" for test in seen.get("failed", [])]
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([rows, "\n".join(notes)] if notes else [rows])


def _versions(seen: Mapping[str, Any]) -> dict[str, str]:
    """Package -> version, as the environment itself said; empty where it could not be imported."""
    said = [step["seen"] for step in seen.get("steps", []) if step["step"] == "versions" and step["ok"]]
    return json.loads(said[0]) if said else {}


def _outcome(seen: Mapping[str, Any]) -> tuple[str, str]:
    steps, tests = seen.get("steps", []), seen.get("tests", {})
    ran = sum(number for kind, number in tests.items() if kind != "skipped")
    smoke = f"{sum(step['ok'] for step in steps)} of {len(steps)}" if steps else "not run"
    return smoke, f"{tests.get('passed', 0)} of {ran}" if ran else "not run"


def write_results(results: Mapping[str, Mapping[str, Any]]) -> None:
    """The record, and the table between the page's two marks."""
    sys.path.insert(0, str(ROOT / "src"))
    from polyrank.core.files import atomic_write
    from polyrank.core.records import Metric, Row, new_record, write_record

    rows = []
    for name, seen in results.items():
        versions = _versions(seen)
        tests = seen.get("tests", {})
        figures = {
            "smoke_passed": sum(step["ok"] for step in seen["steps"]),
            "smoke_failed": sum(not step["ok"] for step in seen["steps"]),
            "tests_passed": tests.get("passed", 0),
            "tests_failed": sum(n for kind, n in tests.items() if kind not in ("passed", "skipped")),
        }
        settings = {key: versions[key] for key in ("python", *SHOWN) if key in versions} | {"from": seen["source"]}
        rows.append(Row(name, figures, settings=settings))
    metrics = {
        "smoke_passed": Metric("steps", "higher"),
        "smoke_failed": Metric("steps", "lower"),
        "tests_passed": Metric("tests"),
        "tests_failed": Metric("tests", "lower"),
    }
    record = new_record("compatibility", "run", metrics, rows, details={"environments": dict(results)})
    print(write_record(record, "compatibility.json", root=ROOT / "results"))
    text = PAGE.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    atomic_write(PAGE, f"{text[:start]}\n{table(results)}\n{text[end:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, logs and what was seen")
    parser.add_argument("--only", nargs="+", choices=[one.name for one in ENVIRONMENTS], metavar="NAME")
    parser.add_argument("--python", nargs="+", default=[], metavar="X.Y=PROGRAM")
    parser.add_argument("--find-links", nargs="+", default=[], metavar="FOLDER", help="wheels that are already here")
    parser.add_argument("--page", action="store_true", help="run nothing; write record and page")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not args.page:
        built = work / "built"
        if not list(built.glob("*.whl")):
            build(copy_sources(ROOT, built / "sources", tests=True), built)
            shutil.copy(ROOT / "tools" / "smoke.py", built)
        known = interpreters(args.python)
        for one in ENVIRONMENTS:
            done = work / f"{one.name}.json"
            if (args.only and one.name not in args.only) or done.exists():
                continue
            seen = try_environment(one, known.get(one.python), built, work, args.find_links)
            done.write_text(json.dumps(seen, indent=1), encoding="utf-8")
            print(one.name, *_outcome(seen), seen.get("not_run", ""), flush=True)
        return 0
    files = {one.name: work / f"{one.name}.json" for one in ENVIRONMENTS}
    write_results({name: json.loads(path.read_text()) for name, path in files.items() if path.exists()})
    return 0


if __name__ == "__main__":
    sys.exit(main())

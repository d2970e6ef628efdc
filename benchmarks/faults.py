"""The fault campaign: runs killed and resumed, two processes, disks that take no more, and the suite's own counts.

    make faults                                        all of it, then the tables of docs/reliability.md
    python benchmarks/faults.py --sections disk        one section
    python benchmarks/faults.py --sections kill_and_resume --systems mcl --points 4 --output some.json

Results go to results/reliability.json (results/scratch/ for a tree with changes) as they are found. A second call for
the same commit goes on with what is not recorded yet; after changes to the tree it starts anew, unless told to --keep.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _fault_disk as disk
import _fault_jobs as jobs
import _fault_kills as kills
import _fault_ranks as ranks

from polyrank.core.errors import PolyrankError
from polyrank.core.provenance import code_state
from polyrank.core.records import Metric, Record, Row, new_record, read_record, results_folder, write_record

ROOT = Path(__file__).parents[1]
SECTIONS = ("kill_and_resume", "two_processes", "disk", "suites")
POINTS, SEED = 40, 0
SUITE_LIMIT_S = 7200
METRICS = {
    "tried": Metric(),
    "held": Metric(better="higher"),
    "in_a_save": Metric(),
    "time_s": Metric("s"),
}


class Campaign:
    """What has been found so far, written after every finding."""

    def __init__(self, output: Path | None, keep: bool) -> None:
        code, self.started = code_state(), time.perf_counter()
        scratch = code["dirty"] or code["commit"] is None
        self.path = (output or results_folder() / ("scratch" if scratch else "") / "reliability.json").resolve()
        self.details: dict[str, Any] = {}
        if self.path.is_file():
            known = read_record(self.path)
            if keep or (not scratch and known.code.get("commit") == code["commit"]):
                self.details = dict(known.details)

    def section(self, name: str) -> Any:
        return self.details.setdefault(name, {})

    def write(self) -> Record:
        record = new_record("reliability", "bench", METRICS, rows(self.details), details=self.details)
        write_record(record, self.path)
        return record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--systems", nargs="+", choices=jobs.SYSTEMS, default=jobs.SYSTEMS)
    parser.add_argument("--models", nargs="+", choices=ranks.MODELS, default=ranks.MODELS, help="of two processes")
    parser.add_argument("--points", type=int, default=POINTS, help="kills of each system (default: %(default)s)")
    parser.add_argument("--free-bytes", nargs="+", type=int, default=disk.FREE_BYTES, help="left on a full disk")
    parser.add_argument("--output", type=Path, help="the result file")
    parser.add_argument("--keep", action="store_true", help="go on from the file whatever tree it was made from")
    parser.add_argument("--page", action="store_true", help="put the tables into docs/reliability.md")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # mounts and folders are cleared away
    jobs.quiet_machine()
    campaign = Campaign(args.output, args.keep)
    folder = Path(tempfile.mkdtemp(prefix="polyrank-faults-"))
    try:
        _run(campaign, args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record = campaign.write()
    if args.page:
        from _fault_page import write_page

        write_page(ROOT / "docs" / "reliability.md", record)
    failed = [f"{row.method} {dict(row.settings)}" for row in record.rows if row.figures["held"] < row.figures["tried"]]
    _say(f"{campaign.path}: {'all held' if not failed else 'NOT held: ' + '; '.join(failed)}")
    return 1 if failed else 0


def _run(campaign: Campaign, args: argparse.Namespace, folder: Path) -> None:
    if {"kill_and_resume", "disk"} & set(args.sections):
        jobs.import_everything()
        inputs, shared = folder / "inputs", kills.Shared()
        inputs.mkdir()
        if kills.wait(kills.fork(lambda: jobs.make_inputs(inputs), folder / "inputs.log")):
            raise RuntimeError((folder / "inputs.log").read_text()[-2000:])
        for system in args.systems:
            whole: list[kills.Whole] = []
            if "kill_and_resume" in args.sections:
                _kill_section(campaign, system, args.points, inputs, folder, shared, whole)
            if "disk" in args.sections:
                _disk_section(campaign, system, args.free_bytes, inputs, folder, shared, whole)
    if "two_processes" in args.sections:
        ranks.import_everything()
        _rank_section(campaign, args.models, folder)
    if "suites" in args.sections:
        campaign.details["suites"] = suites(folder)
        campaign.write()


def _whole(system: str, inputs: Path, folder: Path, shared: kills.Shared, made: list[kills.Whole]) -> kills.Whole:
    """The run that nothing happens to, made when it is first needed."""
    if not made:
        made.append(kills.whole_run(system, inputs, folder / system / "whole", shared))
    return made[0]


def _kill_section(
    campaign: Campaign,
    system: str,
    points: int,
    inputs: Path,
    folder: Path,
    shared: kills.Shared,
    made: list[kills.Whole],
) -> None:
    found = campaign.section("kill_and_resume").setdefault(system, {"seed": SEED, "kills": []})
    if len(found["kills"]) >= points:
        return
    whole = _whole(system, inputs, folder, shared, made)
    found |= {"steps": jobs.STEPS, "save_every": jobs.SAVE_EVERY, "cpu_s_of_a_run": round(whole.cpu_s, 2)}
    for number, point in enumerate(kills.draw(system, points, SEED, len(whole.operations))):
        if number < len(found["kills"]):
            continue
        one = kills.killed_run(system, inputs, folder / system / "killed", shared, point, whole)
        found["kills"].append(one)
        campaign.write()
        _say(f"{system} {number + 1}/{points}: {one}")


def _disk_section(
    campaign: Campaign,
    system: str,
    free_bytes: Sequence[int],
    inputs: Path,
    folder: Path,
    shared: kills.Shared,
    made: list[kills.Whole],
) -> None:
    section = campaign.section("disk")
    if not disk.can_mount(folder / "mount"):
        section["not_run"] = "mounting is not permitted on this machine"
        campaign.write()
        return
    faults = section.setdefault("faults", [])
    known = {(one["fault"], one["system"], one.get("free_bytes")) for one in faults}
    for free in free_bytes:
        if ("full disk", system, free) not in known:
            whole = _whole(system, inputs, folder, shared, made)
            faults.append(disk.full_disk(system, inputs, folder / system / f"disk{free}", shared, whole, free))
            campaign.write()
            _say(str(faults[-1]))
    if ("read-only folder", system, None) not in known:
        whole = _whole(system, inputs, folder, shared, made)
        faults.append(disk.read_only(system, inputs, folder / system / "read-only", shared, whole))
        campaign.write()
        _say(str(faults[-1]))


def _rank_section(campaign: Campaign, models: Sequence[str], folder: Path) -> None:
    section = campaign.section("two_processes")
    compared, killed = section.setdefault("compared", []), section.setdefault("killed", [])
    for model in models:
        for wrapper in ranks.WRAPPERS:
            known = [
                any((one["model"], one["wrapper"]) == (model, wrapper) for one in part) for part in (compared, killed)
            ]
            if all(known):
                continue
            place = folder / "ranks" / model
            if not (place / "one" / "found.json").is_file():
                ranks.launch(model, None, place / "one", world=1)
            result = ranks.compare(model, wrapper, place / wrapper, place / "one")
            if not known[0]:
                compared.append(result)
                campaign.write()
                _say(str(result))
            if not known[1]:
                killed.append(ranks.kill_one_rank(model, wrapper, place / f"{wrapper}-killed", place / wrapper))
                campaign.write()
                _say(str(killed[-1]))


def suites(folder: Path) -> dict[str, Any]:
    """Counts of the tests in tests/reliability, by file, from the XML that pytest writes.

    The test of the page is left out: it compares the page with this campaign, which has not ended.
    """
    report = folder / "junit.xml"
    xml = [f"--junitxml={report}", "-o", "junit_family=xunit1"]
    command = [sys.executable, "-m", "pytest", "tests/reliability", *xml, "-k", "not the_page_shows"]
    with (folder / "pytest.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            process.wait(SUITE_LIMIT_S)
        finally:
            kills.end_group(process.pid)
    counts: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("file") or case.get("classname", "").replace(".", "/") + ".py"
        one = counts.setdefault(Path(file).name, {"passed": 0, "failed": 0, "skipped": 0})
        kinds = {child.tag for child in case}
        one["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return {"folder": "tests/reliability", "files": dict(sorted(counts.items()))}


def rows(details: Mapping[str, Any]) -> list[Row]:
    """One row for each table line: how many were tried, how many held."""
    made = []
    for system, one in details.get("kill_and_resume", {}).items():
        hit = [kill for kill in one["kills"] if kill["killed"]]
        figures = {
            "tried": len(hit),
            "held": sum(not kill["differences"] for kill in hit),
            "in_a_save": sum(kill["during_save"] for kill in hit),
            "time_s": round(sum(kill["seconds_to_kill"] + kill["seconds_to_resume"] for kill in hit), 1),
        }
        made.append(Row("killed and resumed", figures, seed=one["seed"], settings={"system": system}))
    for one in details.get("two_processes", {}).get("compared", []):
        settings = {"system": one["model"], "wrapper": one["wrapper"]}
        made.append(
            Row("two processes, losses", {"tried": 1, "held": int(one.get("within_tolerance", 0))}, None, settings)
        )
    for one in details.get("two_processes", {}).get("killed", []):
        settings = {"system": one["model"], "wrapper": one["wrapper"]}
        held = (
            one["survivor_seconds"] < 60
            and (one["statuses"][0] > 0 or one["statuses"][0] == -6)
            and one.get("bit_identical", False)
        )
        made.append(Row("two processes, one killed", {"tried": 1, "held": int(held)}, None, settings))
    for one in details.get("disk", {}).get("faults", []):
        settings = {"system": one["system"], "fault": one["fault"], "free_bytes": one.get("free_bytes", 0)}
        held = one["status"] == 1 and one["says_what_to_do"] and one["checkpoint_intact"] and not one["differences"]
        made.append(Row("disk", {"tried": 1, "held": int(held and not one["traceback"])}, None, settings))
    for name, one in details.get("suites", {}).get("files", {}).items():
        figures = {"tried": one["passed"] + one["failed"], "held": one["passed"]}
        made.append(Row("tests", figures, None, {"file": name}))
    return made


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PolyrankError as error:
        sys.exit(f"faults: {error}")

"""The tables of docs/reliability.md, made from results/reliability.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyrank.core.files import atomic_write
from polyrank.core.records import Record

BEGIN, END = "<!-- begin {}: made by benchmarks/faults.py -->", "<!-- end {} -->"
NAMES = {"mcl": "LoRA-MCL", "lsr": "LSR", "gpl": "GPL", "lorma": "LoRMA", "ddp": "DDP", "fsdp2": "FSDP2"}


def write_page(path: Path, record: Record) -> None:
    """Put the tables where the page has their marks."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables(record).items():
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = f"{before}{begin}\n{table}\n{end}{after}"
    atomic_write(path, text)


def tables(record: Record) -> dict[str, str]:
    """Section -> Markdown."""
    made = {"kill_and_resume": _kills, "two_processes": _ranks, "disk": _disk, "suites": _suites}
    return {name: table(record.details.get(name, {})) for name, table in made.items()} | {"source": _source(record)}


def _kills(section: Mapping[str, Any]) -> str:
    lines = []
    for system, one in section.items():
        hit = [kill for kill in one["kills"] if kill["killed"]]
        in_step = [kill["step"] for kill in hit if not kill["during_save"] and kill["kind"] == "step"]
        elsewhere = len(hit) - len(in_step) - sum(kill["during_save"] for kill in hit)
        saves = Counter(kill["save"] for kill in hit if kill["during_save"])
        lines.append(
            [
                NAMES[system],
                len(hit),
                f"{sum(saves.values())} ({_counted(saves)})",
                f"{len(in_step)} (steps {', '.join(map(str, sorted(in_step)))})",
                elsewhere,
                sum(kill.get("again", {}).get("killed", False) for kill in hit),
                sum(kill["resumed_status"] == 0 for kill in hit),
                sum(not kill["differences"] for kill in hit),
                sum(not kill["left_over"] for kill in hit),
            ]
        )
    head = ["", "kills", "in a save", "in a step", "elsewhere", "killed again", "resumed", "bit-identical"]
    return _table([*head, "no file left over"], lines)


def _ranks(section: Mapping[str, Any]) -> str:
    compared = [
        [
            NAMES[one["model"]],
            NAMES[one["wrapper"]],
            one.get("steps", 0),
            f"{one['largest_loss_difference']:.1e}" if "largest_loss_difference" in one else "failed",
            f"{one['largest_parameter_difference']:.1e}" if "largest_parameter_difference" in one else one.get("error"),
        ]
        for one in section.get("compared", [])
    ]
    killed = [
        [
            NAMES[one["model"]],
            NAMES[one["wrapper"]],
            one["survivor_seconds"],
            one["resumed_from"] if "resumed_from" in one else one.get("error"),
            {True: "yes", False: "no"}[one.get("bit_identical", False)],
        ]
        for one in section.get("killed", [])
    ]
    head = ["", "under", "steps", "largest difference of a loss (nats)", "of a parameter at the end"]
    second = ["", "under", "the other ended after (s)", "both went on from", "same weights as not killed"]
    return f"{_table(head, compared)}\n\n{_table(second, killed)}"


def _disk(section: Mapping[str, Any]) -> str:
    if "not_run" in section:
        return f"Not run: {section['not_run']}."
    lines = [
        [
            NAMES[one["system"]],
            one["fault"] + (f", {one['free_bytes']:,} bytes left" if "free_bytes" in one else ""),
            "yes" if one["checkpoint_intact"] else "no",
            "yes" if one["says_what_to_do"] and not one["traceback"] else "no",
            "no" if one["differences"] else "yes",
        ]
        for one in section.get("faults", [])
    ]
    head = [
        "",
        "fault at the second checkpoint",
        "first checkpoint intact",
        "says what to do",
        "bit-identical when resumed",
    ]
    return _table(head, lines)


def _suites(section: Mapping[str, Any]) -> str:
    lines = [[f"`{name}`", *one.values()] for name, one in section.get("files", {}).items()]
    return _table(["tests/reliability/", "passed", "failed", "skipped"], lines)


def _source(record: Record) -> str:
    commit = record.code.get("commit") or "unknown"
    tree = " with changes" if record.dirty else ""
    names = ("python", "torch", "transformers", "peft", "accelerate")
    versions = ", ".join(f"{name} {record.versions[name]}" for name in names if name in record.versions)
    return f"Commit {commit[:10]}{tree}; {versions}; {record.device.get('cpu')}, one thread a process."


def _counted(counts: Mapping[str, int]) -> str:
    named = sorted(counts.items(), key=lambda item: (item[0] == "adapter", len(item[0]), item[0]))
    return ", ".join(f"{name} {count}" if count > 1 else name for name, count in named)


def _table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    rows = [f"| {' | '.join(str(cell) for cell in line)} |" for line in (head, ["---"] * len(head), *lines)]
    return "\n".join(rows)

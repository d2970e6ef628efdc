"""A save that meets a full disk or a read-only folder: what the command says, and what is left.

A small tmpfs that is filled up when the second checkpoint is to be written, but for a drawn number of bytes; and a bind
mount, read-only from then on, over the folder of the checkpoints (mode bits do not bind root). Both need the right to
mount; where there is none, the section says so.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _fault_jobs import SAVE_EVERY, run_folder
from _fault_kills import Shared, Whole, differences, fork, run, wait

FREE_BYTES = (0, 12_288, 40_960)
SIZE = "64m"
SAVE = 2


def can_mount(folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    if _command("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)):
        return False
    return not _command("umount", str(folder))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs at a folder, for a block."""
    folder.mkdir(parents=True, exist_ok=True)
    if _command("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)):
        raise PermissionError("mounting is not permitted")
    try:
        yield folder
    finally:
        _command("umount", "-l", str(folder))


def full_disk(system: str, inputs: Path, folder: Path, shared: Shared, whole: Whole, free_bytes: int) -> dict[str, Any]:
    """The disk has `free_bytes` left when checkpoint 2 is to be written; then there is room, and the command again."""
    with small_disk(folder) as disk:
        ballast = disk / "ballast"

        def fill() -> None:
            left = os.statvfs(disk)
            with ballast.open("wb") as file:
                file.write(b"0" * max(0, left.f_bavail * left.f_bsize - free_bytes))

        found = _fault(system, inputs, disk / "runs", shared, whole, fill, lambda: ballast.unlink(missing_ok=True))
    return {"fault": "full disk", "system": system, "free_bytes": free_bytes, **found}


def read_only(system: str, inputs: Path, folder: Path, shared: Shared, whole: Whole) -> dict[str, Any]:
    """The folder of the checkpoints becomes read-only before checkpoint 2; then writable, and the command again."""
    runs_dir = folder / "runs"

    def places() -> list[Path]:
        return [path.parent for path in run_folder(system, runs_dir).rglob(f"checkpoint-{SAVE_EVERY}")]

    def protect() -> None:
        (place,) = places()
        if _command("mount", "--bind", str(place), str(place)):
            os._exit(99)
        if _command("mount", "-o", "remount,bind,ro", str(place)):
            os._exit(99)

    def free() -> None:
        for place in places():
            _command("umount", "-l", str(place))

    try:
        found = _fault(system, inputs, runs_dir, shared, whole, protect, free)
    finally:
        free()
    return {"fault": "read-only folder", "system": system, **found}


def _fault(
    system: str,
    inputs: Path,
    runs_dir: Path,
    shared: Shared,
    whole: Whole,
    cause: Callable[[], None],
    mend: Callable[[], None],
) -> dict[str, Any]:
    runs_dir.mkdir(parents=True, exist_ok=True)
    shared.clear()

    def before_save(number: int) -> None:
        if number == SAVE:
            (runs_dir.parent / "before").write_text(_listing(_checkpoint(system, runs_dir)))
            cause()

    logs = runs_dir.parent.with_name(f"{runs_dir.parent.name}-logs")  # a full disk takes no log
    logs.mkdir(exist_ok=True)
    status = wait(fork(lambda: run(system, inputs, runs_dir, shared, before_save=before_save), logs / "first"))
    message = [line for line in (logs / "first").read_text(errors="replace").splitlines() if "polyrank: error" in line]
    kept = _checkpoint(system, runs_dir)
    intact = kept.is_dir() and (runs_dir.parent / "before").read_text() == _listing(kept)
    mend()
    shared.clear()
    again = wait(fork(lambda: run(system, inputs, runs_dir, shared), logs / "second"))
    text = message[-1].replace(str(runs_dir), "RUNS") if message else ""
    return {
        "status": status,
        "message": text.removeprefix("polyrank: error: "),
        "says_what_to_do": "again" in text,
        "traceback": "Traceback" in (logs / "first").read_text(errors="replace"),
        "checkpoint_intact": intact,
        "resumed_status": again,
        "differences": ["the command failed"] if again else differences(system, whole.runs_dir, runs_dir),
    }


def _checkpoint(system: str, runs_dir: Path) -> Path:
    """The checkpoint that was there before the fault."""
    return next(run_folder(system, runs_dir).rglob(f"checkpoint-{SAVE_EVERY}"), Path("none"))


def _listing(folder: Path) -> str:
    from polyrank.core.files import sha256

    return "\n".join(f"{path.name} {sha256(path)}" for path in sorted(folder.rglob("*")) if path.is_file())


def _command(*arguments: str) -> int:
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    return done.returncode

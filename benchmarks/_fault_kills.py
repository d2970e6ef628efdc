"""Runs that are killed with SIGKILL at points of a seeded draw, resumed by the same command, and compared to one that
was not.

Three kinds of point, spread over a system's draw:

    save   inside the writing of a checkpoint, or of the adapter at the end: the process ends itself just before or
           after the n-th file operation in it (open, write, close, move, ...), n drawn among all there are
    step   from outside, some way into a drawn optimiser step
    any    from outside, at a drawn share of the whole command's processor time

Every second run is killed a second time while it is being resumed: in its first save, or anywhere.

Everything runs in children of one process that has imported all and computed nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _fault_jobs import SAVE_EVERY, STEPS, command, final_save, run_folder

LIMIT_S = 1800.0
"""Seconds after which a child is given up; the machine may be busy with other things."""
FILE_OPERATIONS = frozenset(
    [
        *("open", "write", "writelines", "close", "flush", "fsync", "replace", "rename", "mkdir", "unlink", "remove"),
        *("rmdir", "chmod", "truncate", "mkstemp", "serialize_file", "save_file", "write_record", "write_end_of_file"),
    ]
)
TIMES = ("_s", "_memory_bytes", "runtime", "per_second")


class Shared:
    """Numbers that a child writes and its parent reads while both live."""

    NAMES = ("step", "save", "in_save", "operation")

    def __init__(self) -> None:
        self.cells = memoryview(mmap.mmap(-1, 4096)).cast("q")

    def __getitem__(self, name: str) -> int:
        return self.cells[self.NAMES.index(name)]

    def __setitem__(self, name: str, value: int) -> None:
        self.cells[self.NAMES.index(name)] = value

    def clear(self) -> None:
        for name in self.NAMES:
            self[name] = 0


@dataclass(frozen=True)
class Point:
    """Where a run is to be killed. `number`: the save (from 1) or the step (from 1); `share`: of it, in [0, 1);
    `again`: where it is to be killed once more, counted from its second start."""

    kind: str
    number: int
    share: float
    again: Point | None = None


def draw(system: str, count: int, seed: int, saves: int) -> list[Point]:
    """`count` points, two of five in a save, two in a step, one anywhere; every second with another after it."""
    chance, second = random.Random(f"{seed}-{system}"), random.Random(f"{seed}-{system}-again")
    kinds = ["save", "step", "save", "step", "any"]
    points = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        number = chance.randint(1, {"save": saves, "step": STEPS, "any": 1}[kind])
        again = Point("save" if i % 4 == 1 else "any", 1, second.random()) if i % 2 else None
        points.append(Point(kind, number, chance.random(), again))
    return points


def fork(job: Callable[[], int | None], log: Path, leave: Callable[[int], Any] = os._exit) -> int:
    """Start a child in a process group of its own, its output in a file; returns its number.

    `leave` ends it with a status: at once, or as the interpreter does (`interpreters_way_out`).
    """
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        return child
    status = 70
    try:
        os.setpgid(0, 0)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1), os.dup2(handle, 2), os.close(handle)
        sys.stdin.close()
        status = job() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        leave(status)
        os._exit(status)


def interpreters_way_out(status: int) -> None:
    """End the process as a script ends: exit handlers, modules torn down, destructors of extensions."""
    ctypes.pythonapi.Py_Exit(status)


def wait(child: int, limit_s: float = LIMIT_S) -> int:
    """Exit status of a child, negative for a signal. Past the limit its process group is ended: TimeoutError."""
    end = time.monotonic() + limit_s
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            end_group(child)
            raise TimeoutError(f"a child did not end within {limit_s:.0f} s")
        time.sleep(0.005)


def end_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def cpu_s(child: int) -> float:
    """Processor seconds that a child has used: a clock that does not run while other programs do."""
    return time.clock_gettime((~child << 3) | 2)


# -- in the child -------------------------------------------------------------------------------------------------


def run(
    system: str,
    inputs: Path,
    runs_dir: Path,
    shared: Shared,
    point: Point | None = None,
    operations: int = 0,
    before_save: Callable[[int], None] = lambda number: None,
) -> int:
    """The command, watched; ends itself in a save where the point says so (`operations`: file operations there).

    `before_save` is called with the number of each save, from 1, before it begins.
    """
    from polyrank import cli

    at = int(point.share * operations) if point is not None and point.kind == "save" else None
    counts: list[int] = []
    with _watched(
        system, runs_dir, shared, counts, (point.number, at) if point and at is not None else None, before_save
    ):
        status = cli.main(command(system, inputs, runs_dir))
    if not status:  # a disk may be full
        (runs_dir / "operations.json").write_text(json.dumps(counts))
    return status


@contextlib.contextmanager
def _watched(
    system: str,
    runs_dir: Path,
    shared: Shared,
    counts: list[int],
    killed: tuple[int, int] | None,
    before_save: Callable[[int], None],
) -> Iterator[None]:
    """Steps and saves written into `shared`; the newest checkpoint kept when training is done."""
    from transformers import Trainer

    step, checkpoint, train = Trainer.training_step, Trainer._save_checkpoint, Trainer.train
    owner, name = final_save(system)
    final = getattr(owner, name)

    def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        shared["step"] = trainer.state.global_step + 1
        return step(trainer, *args, **kwargs)

    def saving(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if shared["in_save"]:
                return original(*args, **kwargs)
            shared["save"] += 1
            before_save(shared["save"])
            shared["in_save"] = 1
            with _counted(shared, counts, killed[1] if killed and killed[0] == shared["save"] else None):
                made = original(*args, **kwargs)
            shared["in_save"] = 0
            return made

        return call

    def keeping(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        made = train(trainer, *args, **kwargs)
        kept, fresh = runs_dir / "last_checkpoint", runs_dir / "fresh"
        shutil.rmtree(kept, ignore_errors=True), shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.max_steps}", fresh)
        fresh.rename(kept)
        return made

    Trainer.training_step, Trainer._save_checkpoint, Trainer.train = training_step, saving(checkpoint), keeping
    setattr(owner, name, saving(final))
    yield  # nothing is put back: the child ends


@contextlib.contextmanager
def _counted(shared: Shared, counts: list[int], at: int | None) -> Iterator[None]:
    """Counts the file operations of a block, each twice (before, after); at number `at` the process is killed."""
    shared["operation"] = 0

    def look(frame: Any, event: str, function: Any) -> None:
        if event not in ("c_call", "c_return") or getattr(function, "__name__", "") not in FILE_OPERATIONS:
            return
        if shared["operation"] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        shared["operation"] += 1

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)
    counts.append(shared["operation"])


# -- in the parent ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """The run that was not killed: its folder, processor seconds (all; of a step), file operations of each save."""

    runs_dir: Path
    cpu_s: float
    operations: list[int]


def whole_run(system: str, inputs: Path, runs_dir: Path, shared: Shared) -> Whole:
    runs_dir.mkdir(parents=True)
    shared.clear()
    child, used = fork(lambda: run(system, inputs, runs_dir, shared), runs_dir / "log"), 0.0
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        used = cpu_s(child)
        time.sleep(0.005)
    if wait(child):
        raise RuntimeError(f"{system} failed without being killed:\n{(runs_dir / 'log').read_text()[-2000:]}")
    return Whole(runs_dir, used, json.loads((runs_dir / "operations.json").read_text()))


def killed_run(system: str, inputs: Path, runs_dir: Path, shared: Shared, point: Point, whole: Whole) -> dict[str, Any]:
    """Kill one run at the point (and again, where the point says so), resume it, compare; returns what is recorded."""
    start = time.perf_counter()
    for attempt in range(5):
        shutil.rmtree(runs_dir, ignore_errors=True)
        runs_dir.mkdir(parents=True)
        now = replace(point, share=point.share * 0.8**attempt)  # it had ended before it was killed: a little earlier
        found = _kill(system, inputs, runs_dir, shared, now, whole)
        if found["killed"]:
            break
    else:
        return found
    found["save"] = _save_name(shared["save"]) if shared["in_save"] else None
    if point.again is not None:
        found["again"] = _kill(system, inputs, runs_dir, shared, point.again, whole)
    found["seconds_to_kill"] = round(time.perf_counter() - start, 2)
    again = time.perf_counter()
    shared.clear()
    status = wait(fork(lambda: run(system, inputs, runs_dir, shared), runs_dir / "log"))
    found |= {"resumed_status": status, "seconds_to_resume": round(time.perf_counter() - again, 2)}
    found["differences"] = ["the command failed"] if status else differences(system, whole.runs_dir, runs_dir)
    found["left_over"] = left_over(system, whole.runs_dir, runs_dir)
    if status:
        found["last_line"] = (runs_dir / "log").read_text(errors="replace").strip().splitlines()[-1][:300]
    return found


def _kill(system: str, inputs: Path, runs_dir: Path, shared: Shared, point: Point, whole: Whole) -> dict[str, Any]:
    """Start the command and kill it at the point. Returns where it was; it may have ended before."""
    shared.clear()
    operations = whole.operations[point.number - 1] if point.kind == "save" else 0
    child = fork(lambda: run(system, inputs, runs_dir, shared, point, operations), runs_dir / "log")
    if point.kind != "save":
        _kill_from_outside(child, shared, point, whole)
    if wait(child) != -signal.SIGKILL:
        return {"kind": point.kind, "killed": False}
    return {"kind": point.kind, "killed": True, "step": shared["step"], "during_save": bool(shared["in_save"])}


def _kill_from_outside(child: int, shared: Shared, point: Point, whole: Whole) -> None:
    """Kill a child when it gets to the point. It may end before."""
    until = point.share * whole.cpu_s if point.kind == "any" else None
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if until is None and shared["step"] >= point.number:
            until = cpu_s(child) + point.share * 0.3 * whole.cpu_s / STEPS
        if until is not None and cpu_s(child) >= until:
            os.killpg(child, signal.SIGKILL)
            return
        time.sleep(0.0005)


def _save_name(number: int) -> str:
    steps = [*range(SAVE_EVERY, STEPS, SAVE_EVERY), STEPS]
    return f"checkpoint-{steps[number - 1]}" if number <= len(steps) else "adapter"


# -- what is compared ---------------------------------------------------------------------------------------------


def differences(system: str, whole: Path, again: Path) -> list[str]:
    """Names of what differs between a run and one that was killed and resumed; empty where nothing does."""
    found = []
    one, two = (run_folder(system, folder) for folder in (whole, again))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "mcl_state_0.safetensors", "trainer_state.json"):
        if _content(whole / "last_checkpoint" / name) != _content(again / "last_checkpoint" / name):
            found.append(f"last checkpoint: {name}")
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, two)]
    found += [f"missing: {name}" for name in names[0] if name not in names[1]]
    skipped = (".lock", "config.yaml", "finished", "README.md", "training.json", "decoding_cost.jsonl", "stage.json")
    for name in names[0]:
        path = one / name
        if path.is_file() and path.name not in skipped and name in names[1] and _content(path) != _content(two / name):
            found.append(name)
    return found


def left_over(system: str, whole: Path, again: Path) -> list[str]:
    """Files and folders that only the run that was killed has."""
    one, two = (run_folder(system, folder) for folder in (whole, again))
    return sorted(str(path.relative_to(two)) for path in two.rglob("*") if not (one / path.relative_to(two)).exists())


def _content(path: Path) -> Any:
    """Bytes of a file; of JSON and JSON lines the values, times left out; of safetensors header and tensors (the order
    of two entries of its metadata is chance)."""
    if not path.is_file():
        return None
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        return json.loads(content[8:start]), content[start:]
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    left_out = ("created", "time", "runs_dir", "code", "device", "settings", "config", "best_model_checkpoint")
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not key.endswith(TIMES) and key not in left_out}
        return {key: _timeless(item) for key, item in kept.items()}
    return [_timeless(item) for item in value] if isinstance(value, list) else value

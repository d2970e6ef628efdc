"""`polyrank run`: a folder for the run with its configuration, the recipe called, `finished` written at the end.

The folder is <runs_dir>/<recipe>/<name>, the name made from the overrides and a hash of the whole configuration: the
same command finds the same folder and goes on where it stopped. Under torchrun every process runs this, for a recipe
that says it can (`run.distributed = True`); only rank 0 writes these files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from ..core.errors import ConfigError, RunError
from ..core.files import atomic_write, full_disk_is_said, parse_json, read_bytes
from ..core.provenance import code_state, portable
from ._frame.compose import CONF, Composed, check_overrides, compose, hydra_errors, search_path, settle
from ._frame.registry import get_recipe
from ._frame.yaml_files import read_yaml

_log = logging.getLogger("polyrank")
FINISHED = "finished"


@dataclass(frozen=True)
class Finished:
    """Where a run ended. `ran` is False if it had been finished before."""

    run_dir: Path
    recipe: str
    ran: bool


def run_recipe(overrides: Sequence[str], *, config_dir: Path | None = None, fresh: bool = False) -> Finished:
    """Run one recipe: `run_recipe(["recipe=e2e", "num_steps=10"])`.

    Args:
        config_dir: a folder of one's own YAML, laid out as recipes/conf (recipe/, method/, data/, model/).
        fresh: start over; what the run's folder holds is moved to <folder>.<n>.
    Raises: ConfigError, UnknownNameError for a wrong override; whatever the recipe raises.
    """
    checked = check_overrides(overrides, config_dir)
    return execute(compose(checked, config_dir), checked, fresh=fresh)


def run_sweep(overrides: Sequence[str], *, config_dir: Path | None = None, fresh: bool = False) -> list[Finished]:
    """Run a recipe once for each combination of the values listed, through Hydra's sweepers and launchers.

    `hydra/launcher=joblib`, `hydra/launcher=submitit_slurm` and their settings go among the overrides. Every job runs,
    then the first failure is raised. Returns what ran, in the order of the combinations.
    """
    import hydra

    checked = check_overrides(overrides, config_dir, sweep=True)
    sweeps = Path("runs", "sweeps").resolve()
    sweeps.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{datetime.now():%Y-%m-%d_%H-%M-%S}-", dir=sweeps))  # one sweep's alone
    own = [
        f"hydra.sweep.dir='{folder}'",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra.job.chdir=false",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_fresh_job if fresh else _job)
    arguments, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["polyrank", "--multirun", *search_path(config_dir), *checked, *own]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing a traceback and exiting
    try:
        with hydra_errors():
            main()
    finally:
        sys.argv = arguments
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    jobs = sorted(folder.glob("job-*.json"), key=lambda file: int(file.stem.split("-")[1]))
    entries = [parse_json(read_bytes(job)) for job in jobs]
    return [Finished(Path(entry["run_dir"]), entry["recipe"], entry["ran"]) for entry in entries]


def _job(config: Any, fresh: bool = False) -> None:
    """One combination, here or in a process that a launcher started; what ran is left as a file for `run_sweep`."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    import polyrank.hypotheses  # noqa: F401  (a launcher's process has imported nothing yet)

    with hydra_errors():
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        state = HydraConfig.get()
        composed = settle(values, state.runtime.choices["recipe"])
    done = execute(composed, list(state.overrides.task), fresh=fresh)
    entry = {"run_dir": str(done.run_dir), "recipe": done.recipe, "ran": done.ran}
    atomic_write(Path(state.sweep.dir) / f"job-{state.job.num}.json", json.dumps(entry) + "\n")


def _fresh_job(config: Any) -> None:
    _job(config, fresh=True)


def execute(composed: Composed, overrides: Sequence[str], *, fresh: bool = False) -> Finished:
    """Run a composed configuration in its folder. Raises RunError if another process is running there."""
    code_state()  # what is imported now is what runs, whatever happens to the files while it does
    recipe = get_recipe(composed.recipe)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not getattr(recipe, "distributed", False):
        raise ConfigError(
            f"recipe {composed.recipe!r} runs in one process; start it without torchrun (many runs: --multirun)"
        )
    run_dir = run_folder(composed, overrides)
    first_rank = int(os.environ.get("RANK", "0")) == 0
    with _locked(run_dir, first_rank, fresh):
        if (run_dir / FINISHED).exists():
            _check_same_config(run_dir, composed)
            _log.info("%s is finished already (--fresh starts over)", run_dir)
            return Finished(run_dir, composed.recipe, ran=False)
        if first_rank:
            if (run_dir / "config.yaml").exists():
                _check_same_config(run_dir, composed)
                _log.info("going on in %s", run_dir)
            else:
                _save_config(run_dir, composed.config)
                _log.info("running in %s", run_dir)
        start = time.perf_counter()
        try:
            with full_disk_is_said(run_dir):
                recipe(composed.settings, run_dir)
        except Exception:
            if first_rank:
                with suppress(RunError):  # a full disk takes no report of itself
                    atomic_write(run_dir / "error.txt", traceback.format_exc())
            raise
        if first_rank:
            (run_dir / "error.txt").unlink(missing_ok=True)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            ended = {"finished": now, "last_sitting_s": round(time.perf_counter() - start, 3), **code_state()}
            atomic_write(run_dir / FINISHED, json.dumps(ended) + "\n")
    return Finished(run_dir, composed.recipe, ran=True)


def run_folder(composed: Composed, overrides: Sequence[str]) -> Path:
    """<runs_dir>/<recipe>/<run_name, or overrides-hash>. Raises ConfigError if run_name points out of that folder."""
    config = composed.config
    base = Path(config["runs_dir"] or "runs") / composed.choice
    name = config["run_name"]
    if name is not None:
        part = r"[A-Za-z0-9_][A-Za-z0-9._=,+-]{0,199}"
        if not re.fullmatch(rf"{part}(/{part})*", name) or ".." in name:
            raise ConfigError(f"run_name {name!r:.300} must be letters, digits and ._=,+- (with / for subfolders)")
        return base / name
    content = {key: value for key, value in config.items() if key not in ("runs_dir", "run_name")}
    digest = hashlib.sha256(json.dumps(portable(content), sort_keys=True, default=str).encode()).hexdigest()[:8]
    mine = [text.lstrip("+") for text in overrides if not re.match(r"\+*(recipe|runs_dir|run_name|hydra[./].*)=", text)]
    slug = re.sub(r"[^A-Za-z0-9._=,-]+", "-", ",".join(sorted(mine)))[:60].strip("-.,")
    return base / f"{slug or 'default'}-{digest}"


def to_yaml(config: Mapping[str, Any]) -> str:
    """The configuration as YAML, keys in their own order."""
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _save_config(run_dir: Path, config: Mapping[str, Any]) -> None:
    atomic_write(run_dir / "config.yaml", to_yaml(config))


def _check_same_config(run_dir: Path, composed: Composed) -> None:
    import yaml

    saved = read_yaml(run_dir / "config.yaml")
    if not isinstance(saved, dict):
        raise ConfigError(f"{run_dir / 'config.yaml'} is no configuration; --fresh starts over")
    asked = yaml.safe_load(to_yaml(composed.config))
    for key in ("runs_dir", "run_name"):
        saved.pop(key, None), asked.pop(key, None)
    different = sorted((key for key in saved.keys() | asked.keys() if saved.get(key) != asked.get(key)), key=str)
    if different:
        key = different[0]
        raise ConfigError(
            f"{run_dir} was made with another configuration ({key}: {saved.get(key)!r} there, {asked.get(key)!r} now);"
            f" give another run_name, or --fresh to start over"
        )


@contextmanager
def _locked(run_dir: Path, first_rank: bool, fresh: bool) -> Iterator[None]:
    """Hold the run's folder: one command at a time. The lock dies with the process, however it ends."""
    if not first_rank:
        yield
        return
    try:
        if fresh and run_dir.exists():
            with _lock(run_dir):
                _move_away(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(run_dir)
    except OSError as error:
        raise RunError(f"cannot make the run's folder {run_dir}: {(error.strerror or str(error)).lower()}") from error
    with lock:
        yield


def _lock(run_dir: Path) -> IO[str]:
    """The folder's lock file, locked until it is closed. Raises RunError if another process holds it."""
    lock = (run_dir / ".lock").open("a")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # a system without file locks
        pass
    except BlockingIOError:
        lock.close()
        raise RunError(f"another process is running in {run_dir}; wait for it, or give another run_name") from None
    return lock


def _move_away(run_dir: Path) -> None:
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(target)
    _log.info("the earlier run is now %s", target)

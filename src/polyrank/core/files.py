"""Files that are whole or absent: atomic writes, JSON lines that survive a kill, hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DataError, PolyrankError, RunError

_log = logging.getLogger("polyrank")
LONGEST_NUMBER = 300
"""Digits of a whole number: as many as a float has room for."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when it does not.

    The file is flushed to disk before it is moved; whoever reads `path` sees the old content or the new, never a part.
    Parent folders are made.

    Raises: RunError if the file cannot be written (disk full, read-only folder); the old content is then intact.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(_write_failure(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Write a whole file, or nothing. Text is UTF-8. Raises as `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def append_json_line(path: str | Path, value: Any, *, durable: bool = False) -> None:
    """Append one JSON value as a line, in a single write. A line torn by an earlier kill is removed first.

    Args:
        durable: wait until the line is on disk (survives a power cut, not only a kill).
    Raises: DataError if the value is no JSON (NaN included); RunError if the file cannot be written.
    """
    try:
        line = json.dumps(value, allow_nan=False, ensure_ascii=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot write this as a JSON line to {path}: {error}") from None
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend_last_line(path)
        before = path.stat().st_size if path.exists() else 0
        with path.open("ab", buffering=0) as file:
            written = file.write(line)
            if written != len(line):  # a disk that fills up takes a part of the line
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(file.fileno())
    except OSError as error:
        raise RunError(_write_failure(path, error)) from error


def read_json_lines(path: str | Path) -> list[Any]:
    """All values of a JSON-lines file. A last line without its newline that is no JSON was torn by a kill: it is
    dropped, and the log says so. Empty lines are skipped.

    Raises: DataError if the file is missing or a whole line is no JSON, with the line's number.
    """
    path = Path(path)
    lines = read_bytes(path).split(b"\n")
    values = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values.append(parse_json(line))
        except ValueError as error:
            if number == len(lines):
                _log.warning("%s: dropped the last line, which was cut off while being written", path)
                break
            raise DataError(f"{path}, line {number}: {error}") from None
    return values


def read_bytes(path: str | Path, maximum_bytes: int | None = None) -> bytes:
    """The content of a file. Raises DataError if it is missing, a folder, unreadable or larger than the maximum."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if maximum_bytes is not None and size > maximum_bytes:
            raise DataError(f"{path} has {size} bytes; at most {maximum_bytes} are read")
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path} cannot be read: {reason}") from None


def parse_json(text: str | bytes) -> Any:
    """JSON as the standard has it: no NaN, no Infinity, no repeated key, and no number that a float cannot hold.

    Raises: ValueError with what is wrong.
    """
    try:
        return json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite_number,
            parse_int=_whole_number,
            object_pairs_hook=_refuse_repeated_keys,
        )
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno} of line {error.lineno})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes, or of a folder: over its files' relative paths and digests, in sorted order.

    Raises: DataError if the path is missing or cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listing = "".join(f"{sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _mend_last_line(path: Path) -> None:
    """End the last line if it is whole JSON without a newline; remove it if it is a part of one."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        content = file.read()
        start = content.rfind(b"\n") + 1
        try:
            parse_json(content[start:])
        except ValueError:
            file.truncate(start)
            _log.warning("%s: dropped the last line, which was cut off while being written", path)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def _write_failure(path: Path, error: OSError) -> str:
    reason = "the disk is full" if error.errno in _FULL else (error.strerror or str(error)).lower()
    advice = "free some space" if error.errno in _FULL else "make it writable" if error.errno in _UNWRITABLE else None
    hint = f"; {advice} and run the same command again" if advice else ""
    return f"could not write {path}: {reason} (what was there before is intact){hint}"


@contextmanager
def full_disk_is_said(folder: str | Path) -> Iterator[None]:
    """Work that writes into `folder` through other libraries: what they raise on a disk that is full, or where `folder`
    may not be written, becomes a RunError.

    safetensors and torch tell a full disk from other failures by their messages alone.
    """
    try:
        yield
    except PolyrankError:
        raise
    except Exception as error:
        if _is_full_disk(error, Path(folder)):
            reason, advice = "the disk is full", "free some space"
        elif _is_unwritable(error, Path(folder)):
            reason, advice = "it is read-only, or this user may not write there", "make it writable"
        else:
            raise
        raise RunError(
            f"could not write in {folder}: {reason} (what was whole before is intact); {advice} and"
            " run the same command again, it goes on from there"
        ) from error


def _is_unwritable(error: BaseException, folder: Path) -> bool:
    """Whether the system refused to write something in this folder."""
    if not isinstance(error, OSError) or error.errno not in _UNWRITABLE or not isinstance(error.filename, (str, Path)):
        return False
    return Path(error.filename).absolute().is_relative_to(folder.absolute())


def _is_full_disk(error: BaseException | None, folder: Path) -> bool:
    """Whether this error, or one that it came from, says that no space is left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(text in str(error) for text in ("os error 28", "No space left on device")):
            return True
        if any(text in str(error) for text in ("PytorchStreamWriter failed", "inline_container.cc")):  # any failure
            return folder.exists() and shutil.disk_usage(folder).free < 1 << 20
        error = error.__cause__ or error.__context__
    return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the move itself durable, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _finite_number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _whole_number(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated!r} appears twice")
    return value

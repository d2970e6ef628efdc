"""Adapter folders from outside, checked before they are used, and folders written whole or not at all.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. Before any tensor is allocated, the header of the
safetensors file is read and compared with the file's size: names, dtypes, shapes and byte ranges have to fit together
and to cover the data exactly. Pickled weights are refused, and so are links that leave the folder (the layout of the
Hugging Face cache excepted, where a snapshot links to the blobs of the same repository).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from ..core.errors import CheckpointError, ConfigError, RunError
from ..core.files import parse_json, read_bytes

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

LARGEST_CONFIG = 16 << 20  # bytes
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors header: its dtype's name, its shape, and its bytes within the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def inside(folder: str | Path, name: str) -> Path:
    """The path of a regular file of a folder.

    Raises: CheckpointError if the name or a link leads out of the folder, or if there is no such regular file.
    """
    folder = Path(folder)
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise CheckpointError(f"{name!r} leads out of the adapter folder {folder}")
    path = folder / relative
    try:
        real, root = path.resolve(strict=True), folder.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        raise CheckpointError(f"{folder} has no readable {name}") from None
    if not real.is_relative_to(root) and not _in_hub_cache(root, real):
        raise CheckpointError(f"{path} is a link out of the adapter folder, to {real}; copy the file into the folder")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is no regular file")
    return path


def _in_hub_cache(root: Path, real: Path) -> bool:
    """Whether a file lies among the blobs of the hub repository whose snapshot holds the folder."""
    for parent in root.parents:
        if parent.name == "snapshots":
            return real.parent == parent.parent / "blobs"
    return False


def read_config(folder: str | Path) -> dict[str, Any]:
    """The adapter's configuration, a JSON object. Raises CheckpointError where it is missing or none."""
    config = read_object(folder)
    if not isinstance(config.get("peft_type"), str):
        raise CheckpointError(f"{Path(folder) / CONFIG_NAME} is no adapter configuration (no `peft_type`)")
    return config


def read_object(folder: str | Path) -> dict[str, Any]:
    """What the folder's adapter_config.json holds. Raises CheckpointError where it is missing or no JSON object."""
    _check_folder(folder)
    path = inside(folder, CONFIG_NAME)
    try:
        config = parse_json(read_bytes(path, LARGEST_CONFIG))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no adapter configuration (a JSON object)")
    return config


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """Names, dtypes, shapes and byte ranges of a safetensors file, checked against its size; no tensor is read.

    Raises: CheckpointError if the file is truncated, foreign, or says of itself what cannot be.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise CheckpointError(
                    f"{path} is no whole safetensors file: {size} bytes, of which its header would take {length}"
                    if len(start) == 8
                    else f"{path} is no safetensors file: it has {size} bytes"
                )
            content = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        header = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} is no safetensors file: its __metadata__ is no object of texts")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise CheckpointError(
                f"{path}: tensor {name!r} begins at byte {entry.start} of the data, not at {position}"
            )
        position = entry.stop
    if position != size - 8 - length:
        raise CheckpointError(
            f"{path} is truncated or has a tail: tensors take {position} bytes, {size - 8 - length} there"
        )
    return entries


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    """One header entry, if it is sound."""

    def is_size(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63

    dtype, shape, offsets = (value.get(key) if isinstance(value, dict) else None for key in _ENTRY_KEYS)
    sound = isinstance(dtype, str) and dtype in ITEM_BITS and not any("\ud800" <= sign <= "\udfff" for sign in name)
    sound = sound and isinstance(shape, list) and len(shape) <= 64 and all(map(is_size, shape))
    sound = sound and isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets))
    if not sound:
        raise CheckpointError(f"{path}: the header entry of tensor {name!r} is malformed: {str(value)[:200]}")
    start, stop = offsets
    if (stop - start) * 8 != prod(shape) * ITEM_BITS[dtype]:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} cannot take {stop - start} bytes"
        )
    return TensorEntry(dtype, tuple(shape), start, stop)


_ENTRY_KEYS = ("dtype", "shape", "data_offsets")


def read_weights(folder: str | Path, check: Callable[[Mapping[str, TensorEntry]], None] | None = None) -> dict:
    """The adapter's tensors on the CPU, by their names in the file.

    Args:
        check: is given the header first, and may raise, before anything is allocated.
    Raises: CheckpointError for a folder without a sound safetensors file, or with values that are not finite.
    """
    _check_folder(folder)
    if not _has_weights(folder):
        raise CheckpointError(f"{folder} has no {WEIGHTS_NAME}")
    path = inside(folder, WEIGHTS_NAME)
    entries = read_header(path)
    if check is not None:
        check(entries)
    try:
        tensors = load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {name!r} holds values that are not finite")
    return tensors


def read_shapes(folder: str | Path) -> list[tuple[int, ...]]:
    """Shapes of the adapter's tensors from the header alone; none where the folder has no safetensors file.

    Raises: CheckpointError for a file that is not sound, or a link out of the folder.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.exists() and not path.is_symlink():
        return []
    return [entry.shape for entry in read_header(inside(folder, WEIGHTS_NAME)).values()]


def _has_weights(folder: str | Path) -> bool:
    """Whether a folder has its safetensors file. Raises CheckpointError where it has only a pickle."""
    path = Path(folder) / WEIGHTS_NAME
    if path.exists() or path.is_symlink():
        return True
    if pickles := sorted(p.name for p in Path(folder).glob("adapter_model.*") if p.suffix in PICKLE_SUFFIXES):
        raise CheckpointError(
            f"{folder} holds {pickles[0]}, a pickle, and no {WEIGHTS_NAME}; pickles can run code and are not read. "
            "Whoever made the adapter can save it again with a current PEFT, which writes safetensors"
        )
    return False


def _check_folder(folder: str | Path) -> None:
    if "\0" in str(folder) or not Path(folder).is_dir():
        raise CheckpointError(f"{str(folder)!r} is no adapter folder: there is no such folder")


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """The tensors as a folder's safetensors file; for use within `whole_folders`."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME, {"format": "pt"})


@contextlib.contextmanager
def whole_folders(parent: str | Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Empty temporary folders, one a name, that take their places in `parent` when the block ends well.

    Nothing under `parent` changes before all of them are written and flushed; then each is moved into place. A folder
    of that name that is already there is set aside, and removed once all new ones are in place, or put back if the
    moving fails. Names are single path components.

    Raises: RunError if the disk is full or the folder cannot be written: what was there before is intact.
    """
    parent = Path(parent)
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ConfigError(f"{name!r} is no name of a folder")
        if (parent / name).is_symlink() or ((parent / name).exists() and not (parent / name).is_dir()):
            raise ConfigError(f"{parent / name} is in the way: it is no folder")
    staging: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=parent, prefix=".polyrank-"))
        fresh = [staging / name for name in names]
        for path in fresh:
            path.mkdir()
        yield fresh
        for path in fresh:
            for file in path.rglob("*"):
                _flush(file)
            _flush(path)
        _move_all(parent, fresh, staging)
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(_failure(parent, error)) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _move_all(parent: Path, fresh: list[Path], staging: Path) -> None:
    moved: list[tuple[Path, Path | None]] = []
    try:
        for path in fresh:
            target, aside = parent / path.name, None
            if target.exists():
                aside = staging / f"{path.name}.before"
                os.rename(target, aside)
            moved.append((target, aside))
            os.rename(path, target)
    except OSError:
        for target, aside in reversed(moved):
            shutil.rmtree(target, ignore_errors=True)
            if aside is not None:
                os.rename(aside, target)
        raise
    _flush(parent)


def _flush(path: Path) -> None:
    """Bring a file or a folder's entries to disk, where the system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot flush a folder
            raise
    finally:
        os.close(handle)


def _failure(path: Path, error: Exception) -> str:
    code = getattr(error, "errno", None)
    full = code in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)  # safetensors gives only the text
    reason = "the disk is full" if full else (getattr(error, "strerror", None) or str(error)).lower()
    return f"could not write to {path}: {reason} (what was there before is intact)"

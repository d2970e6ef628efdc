"""Adapter folders from outside, opened with care: safetensors only, inside the folder, shapes before contents."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..core.claims import check_claims
from ..core.errors import CheckpointError, DataError
from ..core.files import parse_json, read_bytes

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAXIMUM_CONFIG_BYTES = 1 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder whose files were checked.

    Attributes: folder; weights (the safetensors file); config (adapter_config.json, empty where there is none);
        shapes (tensor name -> shape).
    """

    folder: Path
    weights: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def tensors(self) -> Callable[[str], torch.Tensor]:
        """A function that reads one tensor, as float64, when it is asked for. Raises CheckpointError."""
        file = safe_open(self.weights, framework="pt")

        def read(name: str) -> torch.Tensor:
            try:
                return file.get_tensor(name).to(torch.float64)
            except (SafetensorError, ValueError, RuntimeError, TypeError) as error:
                raise CheckpointError(f"{self.weights}: cannot read {name!r}: {error}") from None

        return read


def open_adapter(path: str | Path) -> AdapterFiles:
    """Check an adapter folder (as PEFT saves it), or a single safetensors file, without reading any tensor.

    Raises: CheckpointError if files are missing, are pickles, lie outside the folder (through a link), or are no valid
        safetensors or JSON, or if the configuration claims what the weights cannot hold (`check_claims`).
    """
    path = Path(path)
    if path.is_dir():
        folder, weights = path, _weights_in(path)
    elif path.exists() or path.is_symlink():
        folder, weights = path.parent, path
    else:
        raise CheckpointError(f"{path}: no such file or folder")
    _check_inside(weights, folder)
    config: Any = {}
    if path.is_dir() and ((folder / CONFIG_NAME).exists() or (folder / CONFIG_NAME).is_symlink()):
        config = _read_config(folder)
    shapes = _read_shapes(weights)
    check_claims(folder, config, shapes.values())
    return AdapterFiles(folder, weights, config, shapes)


def _weights_in(folder: Path) -> Path:
    usual = folder / WEIGHTS_NAME
    if usual.is_symlink() or usual.exists():
        return usual
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder} holds several weight files ({names}) and none is {WEIGHTS_NAME}; name one")
    pickles = sorted(file for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise _pickle_refused(pickles[0])
    raise CheckpointError(f"{folder} holds no {WEIGHTS_NAME}")


def is_pickle(file: Path) -> bool:
    """Whether a file is named as torch's old weight files are."""
    return file.suffix in _PICKLES


def _pickle_refused(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is a pickle, which can run code and is never read; convert it where you trust it: "
        f"polyrank.analysis.bin_files.convert_bin(file, {WEIGHTS_NAME!r}) reads tensors and nothing else, and so does "
        "polyrank inspect --allow-bin"
    )


def _check_inside(file: Path, folder: Path) -> None:
    """A link may lead to another file of the folder, or into the blobs of the hub's cache, and nowhere else."""
    try:
        target, home = file.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        raise CheckpointError(f"{file} cannot be read: a link that leads nowhere") from None
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not target.is_relative_to(home) and target.parent != blobs:
        raise CheckpointError(f"{file} points out of its folder; an adapter folder must hold its own files")
    if not target.is_file():
        raise CheckpointError(f"{file} is not a file")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    _check_inside(file, folder)
    try:
        config = parse_json(read_bytes(file, MAXIMUM_CONFIG_BYTES))
    except DataError as error:
        raise CheckpointError(str(error)) from None
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: must be a JSON object")
    return config


def _read_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    try:
        with weights.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{weights} cannot be read: {error.strerror}") from None
    if weights.suffix in _PICKLES:
        raise _pickle_refused(weights)
    size = weights.stat().st_size
    header = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{":
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise _pickle_refused(weights)
        raise CheckpointError(f"{weights} is no safetensors file (it does not start with a header)")
    if 8 + header > size:
        raise CheckpointError(f"{weights} is cut off: its header takes {header} bytes, the file has {size}")
    try:
        with safe_open(weights, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ").strip()
        raise CheckpointError(f"{weights} is damaged or no safetensors file ({reason})") from None


def matching(patterns: Mapping[str, Any], module: str) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT reads rank_pattern and alpha_pattern.

    Raises: CheckpointError for a pattern that could take for ever to match (the file comes from outside).
    """
    for pattern, value in patterns.items():
        if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+?{]", pattern)) > 3 or len(pattern) > 500:
            raise CheckpointError(f"pattern {pattern!r:.120} is too complicated")
        try:
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module[:500]):
                return value
        except re.error as error:
            raise CheckpointError(f"pattern {pattern!r:.120} is no regular expression: {error}") from None
    return None

"""A user's own file as training data: read, checked, told what it is, split for validation.

    data = read_user_data("train.jsonl")
    train, validation = split_validation(data, share=0.1, seed=0)
    datasets.Dataset.from_list(train.rows)  # what TRL's SFTTrainer takes

The kinds of record and their columns: `user_records`. The formats: `user_tables`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError, check_choice
from .user_records import build_rows, detect_kind, drop_empty, rename, unused_columns
from .user_tables import ENDINGS, Row, ending_of, read_hub, read_table

SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class UserData:
    """Rows of one kind, and what was done to get them.

    Attributes:
        kind: chat, prompt-completion, instruction, label, score or text.
        rows: in the shape that TRL takes; one row for each completion.
        number_read: rows of the files, before any was left out and before several completions became rows.
        dropped: reason -> how many rows were left out for it.
        fingerprint: sha256 of kind and rows, the same for every file format.
        labels: the labels in sorted order; empty for other kinds.
        notes: what the reader decided by itself, a sentence each.
    """

    kind: str
    rows: list[dict[str, Any]]
    number_read: int
    dropped: dict[str, int]
    fingerprint: str
    labels: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    data_files: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def references(self) -> list[dict[str, Any]]:
        """{"prompt", "references"} for each distinct prompt, in order of first appearance: all its completions.

        A chat's prompt is what comes before its last assistant message (with its tools, where it has any).
        Raises: ConfigError for rows that have no prompt.
        """
        if self.kind not in ("chat", "prompt-completion", "instruction"):
            raise ConfigError(f"rows of kind {self.kind!r} have no prompts, and so no references")
        groups: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            prompt, completion, extra = row.get("prompt"), row.get("completion"), {}
            if self.kind == "chat":
                last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
                prompt, completion = row["messages"][:last], row["messages"][last : last + 1]
                extra = {"tools": row["tools"]} if row.get("tools") is not None else {}
            group = groups.setdefault(_json([prompt, extra]), {"prompt": prompt, "references": [], **extra})
            group["references"].append(completion)
        return list(groups.values())


def read_user_data(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    data_files: Any = None,
) -> UserData:
    """Read a file, a folder of files or a data set of the hub.

    Args:
        source: JSONL, JSON (an array or {"data": [...]}), CSV, TSV, each plain or .gz, Parquet; a folder of them (those
            named train…, validation…, test… by split, or all of them where none is so named); or a hub id.
        columns: field -> column, where the columns have other names: {"prompt": "question", "completion": "answer"}.
        split: train, validation or test; for a hub id whatever `datasets` understands.
        data_files: names of files in a folder, or what `datasets` takes for a hub id.
    Raises: DataError, ConfigError: one line that says what was given, where, and what is allowed.
    """
    rows, notes = _gather(source, split, data_files)
    renamed = rename(rows, columns)
    kept = drop_empty(renamed)
    if not kept:
        raise DataError(f"{str(source)!r}: all {len(rows)} rows are empty")
    kind = detect_kind(kept, columns)
    built = build_rows(kept, kind)
    unused = unused_columns(kept, kind)
    if unused:
        notes.append(f"columns not used: {' '.join(', '.join(map(str, unused)).split())}")
    if len(built) > len(kept):
        notes.append(f"{len(kept)} records hold {len(built)} completions: one row each")
    labels = tuple(sorted({row["label"] for row in built})) if kind == "label" else ()
    if kind == "label" and split == "train" and len(labels) < 2:
        raise DataError(f"{str(source)!r}: every row has the label {labels[0]!r}; a classifier needs two at least")
    return UserData(
        kind=kind,
        rows=built,
        number_read=len(rows),
        dropped={"empty row": len(rows) - len(kept)} if len(kept) < len(rows) else {},
        fingerprint=_fingerprint(kind, built),
        labels=labels,
        notes=tuple(notes),
        source=str(source),
        columns=dict(columns or {}),
        data_files=data_files,
    )


def split_validation(
    data: UserData,
    *,
    share: float | None = None,
    file: str | Path | None = None,
    split: str | None = None,
    seed: int = 0,
) -> tuple[UserData, UserData]:
    """(training part, validation part): a share of the rows, another file, or another split of the same source.

    A prompt lies in one part only. Of a share, all rows of one prompt (of a chat: all that begin alike, up to the first
    answer) go together, in an order that depends on the seed and the prompts alone. A file or split stays whole: the
    training rows with one of its prompts are left out, and counted.

    Raises: ConfigError unless exactly one way is given and fits; DataError where a part would be empty, or the parts
        are of two kinds, or the validation part has a label that the training part lacks.
    """
    if sum(way is not None for way in (share, file, split)) != 1:
        raise ConfigError("give one of share, file and split for the validation part")
    keys = [_prompt_key(data.kind, row) for row in data.rows]
    if share is not None:
        chosen = _choose(data, keys, share, seed)
        validation = _part(data, [row for row, key in zip(data.rows, keys, strict=True) if key in chosen])
        return _part(data, [row for row, key in zip(data.rows, keys, strict=True) if key not in chosen]), validation
    if file is not None:
        validation = read_user_data(file, columns=data.columns, split="validation")
    else:
        if Path(data.source).is_file():
            raise ConfigError(f"{data.source!r} is one file and has no splits; give share or file")
        files = data.data_files if isinstance(data.data_files, Mapping) else None
        validation = read_user_data(data.source, columns=data.columns, split=str(split), data_files=files)
    if validation.kind != data.kind:
        raise DataError(f"the validation part {validation.source!r} is of kind {validation.kind!r}, not {data.kind!r}")
    if data.labels and isinstance(data.labels[0], str) and not isinstance(validation.labels[0], str):
        rows = [row | {"label": str(row["label"])} for row in validation.rows]  # "1" alone is read as a number
        validation = dataclasses.replace(_part(validation, rows), labels=tuple(map(str, validation.labels)))
    strange = next((label for label in validation.labels if label not in data.labels), None)
    if strange is not None:
        known = ", ".join(map(repr, data.labels))
        raise DataError(f"{validation.source!r} has the label {strange!r}, which training lacks (labels: {known})")
    held = {_prompt_key(data.kind, row) for row in validation.rows}
    rows = [row for row, key in zip(data.rows, keys, strict=True) if key not in held]
    if not rows:
        raise DataError(f"every prompt of {data.source!r} is in the validation part too: nothing is left to train on")
    train = _part(data, rows)
    if len(rows) < len(data.rows):
        train.dropped["prompt also in the validation part"] = len(data.rows) - len(rows)
    return train, dataclasses.replace(validation, labels=data.labels)


def _gather(source: str | Path, split: str, data_files: Any) -> tuple[list[Row], list[str]]:
    if not isinstance(source, (str, Path)) or not str(source).strip():
        raise ConfigError(f"data must be a file, a folder or a hub id, got {source!r:.60}")
    if not isinstance(split, str) or not split:
        raise ConfigError(f"split must be a name, got {split!r:.60}")
    path = Path(source)
    if path.is_dir():
        files, notes = _folder_files(path, split, data_files)
    elif path.exists() or ending_of(path) or not _HUB_NAME.fullmatch(str(source)):
        check_choice("split", split, SPLITS)
        if data_files is not None:
            raise ConfigError(f"data_files goes with a folder or a hub id, and {str(source)!r} is a file")
        files, notes = [path], []
    else:
        return read_hub(str(source), split, data_files), []
    rows: list[Row] = []
    for file in files:
        found, decided = read_table(file)
        rows += found
        notes += decided
    return rows, notes


def _folder_files(folder: Path, split: str, data_files: Any) -> tuple[list[Path], list[str]]:
    check_choice("split", split, SPLITS)
    if data_files is not None:
        names = data_files.get(split) if isinstance(data_files, Mapping) else data_files
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"data_files must name files of {str(folder)!r} for {split!r}, got {data_files!r:.80}")
        return [folder / name for name in names], []
    found = sorted(file for file in folder.iterdir() if file.is_file() and ending_of(file) and file.name[0] != ".")
    if not found:
        raise DataError(f"{str(folder)!r} holds no data file (allowed endings: {', '.join(ENDINGS)})")
    by_split: dict[str | None, list[Path]] = {}
    for file in found:
        by_split.setdefault(_split_of(file), []).append(file)
    named = [name for name in by_split if name is not None]
    if not named and split == "train":
        return found, [f"read {', '.join(file.name for file in found)}"]
    if split not in by_split:
        raise DataError(
            f"{str(folder)!r} has no file named for {split!r} (splits by name: {', '.join(named) or 'none'})"
        )
    notes = [f"read {', '.join(file.name for file in by_split[split])}"]
    if None in by_split:
        notes.append(f"not read, named for no split: {', '.join(file.name for file in by_split[None])}")
    return by_split[split], notes


def _split_of(file: Path) -> str | None:
    word = re.split(r"[^a-z]", file.name.lower(), maxsplit=1)[0]
    return next((split for split, words in SPLITS.items() if word in words), None)


def _choose(data: UserData, keys: list[str], share: Any, seed: int) -> set[str]:
    """Prompts of the validation part: in the order of their salted hashes, while they bring the count nearer to it."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ConfigError(f"share must lie between 0 and 1, got {share!r:.40}")
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    if len(sizes) < 2:
        raise DataError(f"{data.source!r} has one prompt: no validation part can be taken from it")
    order = sorted(sizes, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "surrogatepass")).digest())
    target, count, chosen = share * len(keys), 0, set[str]()
    for key in order:
        if abs(count + sizes[key] - target) < abs(count - target) and len(chosen) < len(sizes) - 1:
            chosen.add(key)
            count += sizes[key]
    return chosen or {min(order, key=lambda key: sizes[key])}


def _prompt_key(kind: str, row: Mapping[str, Any]) -> str:
    prompt = row.get("prompt")
    if kind == "chat":
        roles = [message["role"] for message in row["messages"]]
        start = next((i for i, role in enumerate(roles) if role != "assistant"), 0)
        return _json(row["messages"][: roles.index("assistant", start)])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return _json([prompt, row.get("text"), row.get("text_pair")])


def _part(data: UserData, rows: list[dict[str, Any]]) -> UserData:
    return dataclasses.replace(data, rows=rows, dropped=dict(data.dropped), fingerprint=_fingerprint(data.kind, rows))


def _fingerprint(kind: str, rows: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256(kind.encode())
    for row in rows:
        digest.update(b"\n" + _json(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)

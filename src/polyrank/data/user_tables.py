"""Rows of a user's own file: JSONL, JSON, CSV, TSV (plain or .gz), Parquet, or a data set of the hub.

Nothing is checked here but the container: a row is a mapping from column to value, with the place it came from, for
messages. Text files are UTF-8, or UTF-16 with its mark. A CSV file may separate its fields by commas, semicolons or
tabs; the header tells which.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..core.errors import DataError, name_message
from ..core.files import parse_json, read_bytes

Row = tuple[str, dict[str, Any]]
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
ENDINGS = (*FORMATS, *(f"{ending}.gz" for ending in FORMATS if ending != ".parquet"))
_LONGEST_FILE_BYTES = 1 << 30
_LONGEST_TABLE_BYTES = 4 << 30
_SIGNS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def ending_of(path: Path) -> str | None:
    """The known ending of a file's name (".csv", ".jsonl.gz", …), or None."""
    name = path.name.lower()
    return next((ending for ending in sorted(ENDINGS, key=len, reverse=True) if name.endswith(ending)), None)


def read_table(path: Path) -> tuple[list[Row], list[str]]:
    """(where, row) of every row, and what the reader had to decide.

    Raises: DataError for an ending that is not known, and for a file that is missing, empty, damaged, too long or in
        another encoding, with the line or record where that is known.
    """
    ending = ending_of(path)
    if not path.exists():
        raise DataError(f"{str(path)!r}: no such file")
    if ending is None:
        raise DataError(f"{str(path)!r}: {name_message('file ending', ''.join(path.suffixes[-2:]), ENDINGS)}")
    if ending == ".parquet":
        return _read_parquet(path), []
    text = _decode(path, _unpack(path))
    if not text.strip():
        raise DataError(f"{str(path)!r} is empty")
    kind = ending.removesuffix(".gz")
    notes: list[str] = []
    if kind in (".csv", ".tsv"):
        rows = _read_csv(path, text, kind, notes)
    else:
        rows = _read_json(path, text, lines=kind != ".json")
    if not rows:
        raise DataError(f"{str(path)!r} holds no rows")
    return rows, notes


def read_hub(name: str, split: str, data_files: Any = None) -> list[Row]:
    """Rows of a data set of the hub (or of the cache on this disk). Code of others is never run.

    Raises: DataError with the reason that the library `datasets` gives.
    """
    from datasets import load_dataset

    try:
        table = load_dataset(name, split=split, data_files=data_files)
    except Exception as error:  # datasets raises a dozen kinds; what it says is what the user needs
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name!r} is no file or folder here, and the hub does not give it: {reason}") from error
    rows = [(f"{name!r} ({split}), row {i}", dict(row)) for i, row in enumerate(table, start=1)]
    if not rows:
        raise DataError(f"{name!r}: the split {split!r} is empty")
    return rows


def _unpack(path: Path) -> bytes:
    data = read_bytes(path, _LONGEST_FILE_BYTES)
    if path.name.lower().endswith(".gz"):
        try:
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(_LONGEST_FILE_BYTES + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{str(path)!r} is a damaged gzip file: {error}") from error
        if len(data) > _LONGEST_FILE_BYTES:
            raise DataError(f"{str(path)!r} unpacks to more than {_LONGEST_FILE_BYTES} bytes")
    elif data[:2] == b"\x1f\x8b":
        raise DataError(f"{str(path)!r} is a gzip file; its name must end in .gz")
    return data


def _decode(path: Path, data: bytes) -> str:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-16":
            raise DataError(f"{str(path)!r} is not whole UTF-16 (byte {error.start})") from error
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{str(path)!r}, line {line}: not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from error
    if "\0" in text[:4]:
        raise DataError(f"{str(path)!r} looks like UTF-16 or UTF-32 without its mark; save the file as UTF-8")
    return text


def _read_json(path: Path, text: str, lines: bool) -> list[Row]:
    """One array, {"data": [...]}, or one object a line. A file whose first line is a whole object is read by lines."""
    start = text.lstrip()
    first = start.split("\n", 1)[0]
    if start.startswith("[") or (not lines and not _is_json_object(first)) or (not lines and "\n" not in start.strip()):
        try:
            value = parse_json(text)
        except ValueError as error:
            raise DataError(f"{str(path)!r}: {error}") from None
        if isinstance(value, dict) and isinstance(value.get("data"), list):
            value = value["data"]
        elif isinstance(value, dict):
            value = [value]
        if not isinstance(value, list):
            raise DataError(f'{str(path)!r} must hold an array of objects, {{"data": [...]}} or one object a line')
        found = [(f"{str(path)!r}, record {i}", item) for i, item in enumerate(value, start=1)]
    else:
        found = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    found.append((f"{str(path)!r}, line {number}", parse_json(line)))
                except ValueError as error:
                    reason = str(error).replace(" of line 1)", ")")
                    raise DataError(f"{str(path)!r}, line {number}: {reason}") from None
    for where, item in found:
        if not isinstance(item, Mapping):
            raise DataError(f"{where}: a record must be a JSON object, not {type(item).__name__}")
    return found


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def _read_csv(path: Path, text: str, kind: str, notes: list[str]) -> list[Row]:
    usual = "\t" if kind == ".tsv" else ","
    sign = _separator(text, usual)
    if sign != usual:
        notes.append(f"{path.name}: fields are separated by {_SIGNS[sign]}")
    if sign == "\t" and '"' in text:
        return _read_tabs(path, text, notes)
    return _read_fields(path, text, sign, csv.QUOTE_MINIMAL)


def _read_tabs(path: Path, text: str, notes: list[str]) -> list[Row]:
    """Files with tabs are written with quotes around some fields, or with quotes that mean nothing. The second is so
    where every line is a whole row of several fields and the first reading finds fewer rows, or fails."""
    plain: list[Row] | None
    try:
        plain = _read_fields(path, text, "\t", csv.QUOTE_NONE)
    except DataError:
        plain = None
    try:
        quoted = _read_fields(path, text, "\t", csv.QUOTE_MINIMAL)
    except DataError:
        if plain is None:
            raise
    else:
        if plain is None or len(plain) == len(quoted) or any(len(row) == 1 for _, row in plain[:1]):
            return quoted
    notes.append(f"{path.name}: quotes are a part of the text")
    return plain


def _read_fields(path: Path, text: str, sign: str, quoting: Literal[0, 3]) -> list[Row]:
    before = csv.field_size_limit(_LONGEST_FILE_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=True, quoting=quoting)
    rows: list[Row] = []
    header: Sequence[str] = ()
    line = 1
    try:
        for cells in reader:
            where, line = f"{str(path)!r}, line {line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _check_header(where, [cell.strip() for cell in cells])
            elif len(cells) != len(header):
                raise DataError(f"{where}: {len(cells)} fields, and the header names {len(header)}")
            else:
                rows.append((where, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise DataError(f"{str(path)!r}, line {line}: {error}") from error
    finally:
        csv.field_size_limit(before)
    return rows


def _separator(text: str, usual: str) -> str:
    """The sign that cuts the header into most fields; the usual one where none is better."""
    header = re.split("[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]

    def fields(sign: str) -> int:
        return len(next(csv.reader([header], delimiter=sign), []))

    return max((usual, *(sign for sign in _SIGNS if sign != usual)), key=fields)


def _check_header(where: str, names: list[str]) -> list[str]:
    if "" in names:
        raise DataError(f"{where}: column {names.index('') + 1} of the header has no name")
    repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
    broken = next((name for name in names if "\n" in name or "\r" in name), None)
    if broken is not None:
        raise DataError(f"{where}: the header's name {broken!r:.60} holds a line break")
    if repeated is not None:
        raise DataError(f"{where}: the header names {repeated!r} twice")
    return names


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    data = read_bytes(path, _LONGEST_FILE_BYTES)
    if not data:
        raise DataError(f"{str(path)!r} is empty")
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        if size > _LONGEST_TABLE_BYTES:
            raise DataError(f"{str(path)!r} unpacks to {size} bytes; at most {_LONGEST_TABLE_BYTES} are read")
        names = file.schema_arrow.names
        repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if repeated is not None:
            raise DataError(f"{str(path)!r}: two columns are named {repeated!r}")
        found = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} is no Parquet file that can be read: {str(error).splitlines()[0]}") from error
    if not found:
        raise DataError(f"{str(path)!r} holds no rows")
    return [(f"{str(path)!r}, row {i}", row) for i, row in enumerate(found, start=1)]

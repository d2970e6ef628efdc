"""Corpora, queries and judgements: the BEIR folder, in and out; also folders of text, JSON lines and CSV.

    corpus.jsonl[.gz]     {"_id": "d1", "title": "...", "text": "..."}
    queries.jsonl[.gz]    {"_id": "q1", "text": "..."}
    qrels/test.tsv        query-id <tab> corpus-id <tab> score, with a header

A file is read line by line; only identifiers are remembered, to find one that comes twice. Bytes that are no UTF-8 and
lone surrogates become U+FFFD and are counted. Source: the folder layout of the BEIR benchmark (Thakur et al. 2021).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..core.errors import ConfigError, DataError, UserError
from ..core.files import atomic_path, atomic_write, parse_json

_log = logging.getLogger("polyrank")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")
LONGEST_LINE = 1 << 26
"""Characters of a line, or of a whole .txt or .md file."""


@dataclass(frozen=True)
class Document:
    """One document. `id` is any text that is not empty; `title` may be empty, and so may `text`."""

    id: str
    title: str
    text: str


def document_text(document: Document) -> str:
    """What is encoded and searched: the title, one space, the text; the text alone where there is no title."""
    return f"{document.title} {document.text}".strip()


def read_corpus(path: str | Path, counts: Counter[str] | None = None) -> Iterator[Document]:
    """Documents of a BEIR folder, a folder of .txt and .md files, a .jsonl or a .csv (each may end in .gz), one by one.

    JSON lines need `text` (`contents` and `content` are taken too) and may have `_id` (or `id`, `docid`) and `title`;
    a CSV has a header with the same names; without an identifier the row's number, from 0, is used. A text file's
    identifier is its path inside the folder; its title is its first line if that is a Markdown heading.

    Args:
        counts: gets "broken_text" (documents with bytes that are no UTF-8) and "empty" (documents without a word).
    Raises:
        DataError: the path is missing, holds no document, a line is malformed, an identifier is missing or repeated.
        ConfigError: a file of a kind that is not read.
    """
    counts = Counter() if counts is None else counts
    source = corpus_source(Path(path))
    seen: set[str] = set()
    for document, where in _files(source, counts) if source.is_dir() else _rows_as_documents(source, counts):
        if document.id in seen:
            raise DataError(f"{where}: the identifier {document.id!r} appears twice; identifiers must be unique")
        seen.add(document.id)
        counts["empty"] += not document_text(document)
        yield document
    if not seen:
        raise DataError(f"{path} holds no document")
    if counts["broken_text"]:
        _log.warning("%s: %d documents are not clean UTF-8; what could not be read became U+FFFD",
                     path, counts["broken_text"])  # fmt: skip


def read_queries(path: str | Path) -> dict[str, str]:
    """Query texts by identifier, from a BEIR folder or a queries file (.jsonl or .csv, as for `read_corpus`).

    Raises: DataError as `read_corpus`; ConfigError for a file of a kind that is not read.
    """
    source = _inside(Path(path), "queries")
    queries: dict[str, str] = {}
    for row, where in _rows(source, Counter()):
        identifier = _identifier(row, where, None)
        if identifier in queries:
            raise DataError(f"{where}: the identifier {identifier!r} appears twice; identifiers must be unique")
        queries[identifier] = _field(row, ("text", "query", "contents"), where)
    if not queries:
        raise DataError(f"{source} holds no query")
    return queries


def read_qrels(path: str | Path, split: str = "test") -> dict[str, dict[str, int]]:
    """Judgements: query id -> document id -> grade. From a BEIR folder (qrels/<split>.tsv) or one .tsv file.

    Both BEIR's three columns with a header and TREC's four (query, iteration, document, grade) are read.
    Raises: DataError if the file is missing, empty, a line has other columns, a grade is no whole number, or a pair is
        judged twice with different grades.
    """
    path = Path(path)
    source = path / "qrels" / f"{split}.tsv" if path.is_dir() else path
    qrels: dict[str, dict[str, int]] = {}
    with _text(source) as file:
        for number, line in enumerate(_lines(file, source), start=1):
            columns = line.rstrip("\r\n").split("\t")
            if len(columns) == 1:
                columns = line.split()
            if not columns or columns == [""] or (number == 1 and not _is_whole(columns[-1])):
                continue
            if len(columns) not in (3, 4) or not _is_whole(columns[-1]):
                raise DataError(
                    f"{source}, line {number}: expected query-id, corpus-id, score (tabs), got {line[:80]!r}"
                )
            query, document, grade = columns[0], columns[-2], int(columns[-1])
            if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
                raise DataError(f"{source}, line {number}: {query!r}, {document!r} is judged twice, differently")
    if not qrels:
        raise DataError(f"{source} holds no judgement")
    return qrels


def write_beir(
    folder: str | Path,
    corpus: Iterable[Document],
    queries: Mapping[str, str] | None = None,
    qrels: Mapping[str, Mapping[str, int]] | None = None,
    split: str = "test",
) -> Path:
    """Write a BEIR folder; each file whole or not at all.

    Raises: DataError if an identifier in the judgements holds a tab or a line break, which their table cannot carry.
    """
    folder = Path(folder)
    with atomic_path(folder / "corpus.jsonl") as part, part.open("w", encoding="utf-8", newline="\n") as file:
        for one in corpus:
            file.write(json_line({"_id": one.id, "title": one.title, "text": one.text}))
    if queries is not None:
        lines = [json_line({"_id": key, "text": text}) for key, text in queries.items()]
        atomic_write(folder / "queries.jsonl", "".join(lines))
    if qrels is not None:
        for key in (key for query, judged in qrels.items() for key in (query, *judged)):
            if any(sign in key for sign in "\t\n\r"):
                raise DataError(f"identifier {key!r} holds a tab or a line break, which qrels/{split}.tsv cannot carry")
        lines = [f"{query}\t{document}\t{grade}\n" for query, row in qrels.items() for document, grade in row.items()]
        atomic_write(folder / "qrels" / f"{split}.tsv", "query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def json_line(value: Any) -> str:
    """One JSON value as a line of UTF-8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def clean_text(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 file can hold, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def corpus_source(path: Path) -> Path:
    """The corpus file of a BEIR folder, else the path itself. Raises DataError if there is nothing."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        return next((file for name in _SUFFIXES if (file := path / f"corpus{name}").is_file()), path)
    return path


def _inside(path: Path, stem: str) -> Path:
    if not path.is_dir():
        return path
    found = next((file for name in _SUFFIXES if (file := path / f"{stem}{name}").is_file()), None)
    if found is None:
        raise DataError(f"{path} holds no {stem}.jsonl (or .jsonl.gz, .csv)")
    return found


def _files(folder: Path, counts: Counter[str]) -> Iterator[tuple[Document, str]]:
    """Every .txt and .md below a folder, in the order of their paths."""
    for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".txt", ".md") and file.is_file()):
        with _text(file) as opened:
            text = opened.read(LONGEST_LINE + 1)
        if len(text) > LONGEST_LINE:
            raise DataError(f"{file}: longer than {LONGEST_LINE} characters")
        counts["broken_text"] += "\ufffd" in text
        first, _, rest = text.lstrip("\ufeff\n ").partition("\n")
        heading = file.suffix.lower() == ".md" and first.startswith("#")
        title, body = (first.lstrip("# ").strip(), rest) if heading else ("", text)
        yield Document(file.relative_to(folder).as_posix(), title, body.strip()), str(file)


def _rows_as_documents(source: Path, counts: Counter[str]) -> Iterator[tuple[Document, str]]:
    for number, (row, where) in enumerate(_rows(source, counts)):
        title = _field(row, ("title",), where, "")
        text = _field(row, ("text", "contents", "content"), where)
        yield Document(_identifier(row, where, str(number)), title, text), where


def _rows(source: Path, counts: Counter[str]) -> Iterator[tuple[dict[str, Any], str]]:
    name = source.name.lower()
    if not name.endswith(_SUFFIXES):
        raise ConfigError(f"{source} cannot be read: allowed are a folder, {', '.join(_SUFFIXES)}")
    with _text(source) as file:
        if ".csv" in name:
            csv.field_size_limit(LONGEST_LINE)
            for number, row in enumerate(csv.DictReader(_lines(file, source)), start=1):
                yield (
                    _counted({key: value or "" for key, value in row.items() if key}, counts),
                    f"{source}, row {number}",
                )
            return
        for number, line in enumerate(_lines(file, source), start=1):
            if line.strip():
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise DataError(f"{source}, line {number}: {error}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{source}, line {number}: expected an object with _id and text, got {line[:60]!r}")
                yield _counted(row, counts), f"{source}, line {number}"


def _counted(row: dict[str, Any], counts: Counter[str]) -> dict[str, Any]:
    cleaned = {key: clean_text(value) if isinstance(value, str) else value for key, value in row.items()}
    counts["broken_text"] += any("\ufffd" in value for value in cleaned.values() if isinstance(value, str))
    return cleaned


def _identifier(row: Mapping[str, Any], where: str, default: str | None) -> str:
    for key in ("_id", "id", "docid"):
        value = row.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value:
            return value
        if value is not None:
            raise DataError(f"{where}: the identifier must be text that is not empty, got {value!r}")
    if default is None:
        raise DataError(f"{where}: no _id (allowed: _id, id, docid)")
    return default


def _field(row: Mapping[str, Any], names: Iterable[str], where: str, default: str | None = None) -> str:
    names = tuple(names)
    for name in names:
        value = row.get(name)
        if isinstance(value, str):
            return value
        if value is not None:
            raise DataError(f"{where}: {name} must be text, got {value!r:.60}")
    if default is None:
        raise DataError(f"{where}: no {names[0]} (allowed: {', '.join(names)}; there: {', '.join(map(str, row))})")
    return default


@contextmanager
def _text(path: Path) -> Iterator[IO[str]]:
    """A text file, gzip or plain, broken UTF-8 replaced. Raises DataError if it is missing or cannot be read, also
    where that shows only in the middle of it."""
    try:
        with path.open("rb") as binary:
            unpacked: Any = gzip.GzipFile(fileobj=binary) if path.suffix == ".gz" else binary
            yield io.TextIOWrapper(unpacked, encoding="utf-8", errors="replace", newline="")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:  # ValueError: a NUL in the path
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _lines(file: IO[str], source: Path) -> Iterator[str]:
    """The lines of a file, none of them without end: a few kilobytes of gzip can unpack to gigabytes."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise DataError(f"{source}, line {number}: longer than {LONGEST_LINE} characters")
        yield line


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text) is not None

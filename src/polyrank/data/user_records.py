"""What a user's rows are, told by their columns, and the same rows in the shape that TRL's SFTTrainer takes.

    columns                                   kind                rows
    messages (tools)                          chat                messages (tools)
    prompt, completion or completions         prompt-completion   prompt, completion; one row a completion
    instruction, output (input)               instruction         prompt, completion
    text (text_pair), label                   label               text (text_pair), label
    text (text_pair), score                   score               text (text_pair), score
    text                                      text                text

A row that does not fit is an error that says where it stands; a row with nothing in it is left out and counted.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

from ..core.errors import ConfigError, DataError, name_message
from ..core.files import parse_json
from .user_tables import Row

ROLES = ("system", "developer", "user", "assistant", "tool")
_NEEDED = {
    "chat": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "label": ("text", "label"),
    "score": ("text", "score"),
    "text": ("text",),
}
_OPTIONAL = {"chat": ("tools",), "instruction": ("input",), "label": ("text_pair",), "score": ("text_pair",)}
FIELDS = ("messages", "tools", "prompt", "completion", "completions", "instruction", "input", "output", "text")
FIELDS += ("text_pair", "label", "score")
_SHAPES = "messages | prompt + completion | instruction + output | text + label | text + score | text"


def rename(rows: list[Row], columns: Mapping[str, str] | None) -> list[Row]:
    """The rows with each column under the field's name that `columns` gives it.

    Raises: ConfigError for a field that is not known or one column given twice; DataError for a column not there.
    """
    if not columns:
        return rows
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns.values()):
        raise ConfigError(f"columns must map a field to a column's name, got {columns!r:.80}")
    there = dict.fromkeys(name for _, row in rows for name in row)
    for field, column in columns.items():
        if field not in FIELDS:
            raise ConfigError(name_message("field in columns", field, FIELDS))
        if column not in there:
            raise DataError(f"{_file(rows)}: {name_message('column', column, _listed(there).split(', '))}")
        if list(columns.values()).count(column) > 1:
            raise ConfigError(f"columns gives the column {column!r} to two fields")
    taken = set(columns.values())
    renamed: list[Row] = []
    for where, row in rows:
        rest = {name: value for name, value in row.items() if name not in taken and name not in columns}
        renamed.append((where, rest | {field: row[column] for field, column in columns.items() if column in row}))
    return renamed


def drop_empty(rows: list[Row]) -> list[Row]:
    """The rows that hold something: a value that is neither null nor blank text."""
    return [item for item in rows if any(not _blank(value) for value in item[1].values())]


def detect_kind(rows: list[Row], columns: Mapping[str, str] | None = None) -> str:
    """The kind that all rows share, by their columns.

    Raises: DataError where no kind fits, rows are of two kinds, or a row lacks a column (the first such row is named).
    """
    where, first = rows[0]
    kind = _kind_of(where, first, columns or {})
    allowed = [name for name in _NEEDED if all(_has(first, field) for field in _NEEDED[name])]
    for place, row in rows:
        missing = next((field for field in _NEEDED[kind] if not _has(row, field)), None)
        others = [name for name in _NEEDED if all(_has(row, field) for field in _NEEDED[name])]
        others = [name for name in others if name not in allowed and name != "text"]
        if others and (missing or kind == "text"):
            other = others[0]
            raise DataError(
                f"{place}: a row of kind {other!r} in a file of kind {kind!r} (first row); kinds do not mix"
            )
        if missing:
            column = (columns or {}).get(missing, missing)
            raise DataError(f"{place} has no column {column!r}; its columns are {_listed(row)}")
    return kind


def build_rows(rows: list[Row], kind: str) -> list[dict[str, Any]]:
    """Rows for training, checked one by one. Raises DataError for the first row that is wrong, with its place."""
    built: list[tuple[str, dict[str, Any]]] = []
    for where, row in rows:
        if kind == "chat":
            built.append((where, _chat(where, row)))
        elif kind == "prompt-completion":
            built += [(where, pair) for pair in _pairs(where, row)]
        elif kind == "instruction":
            built.append((where, _instruction(where, row)))
        else:
            built.append((where, _text(where, row, kind)))
    shape = {name: type(value) for name, value in built[0][1].items() if name in ("prompt", "text_pair")}
    for where, row in built:
        if kind in ("label", "score") and ("text_pair" in row) != ("text_pair" in shape):
            raise DataError(f"{where}: some rows have a second text (text_pair) and others have none")
        if "prompt" in shape and type(row["prompt"]) is not shape["prompt"]:
            raise DataError(f"{where}: some prompts are text and others are lists of messages; kinds do not mix")
    found = [row for _, row in built]
    if kind == "chat" and any("tools" in row for row in found):
        found = [row | {"tools": row.get("tools")} for row in found]
    if kind == "label":
        _same_type_of_label(built)
    return found


def unused_columns(rows: list[Row], kind: str) -> list[str]:
    """Columns that the kind does not read, in order of appearance."""
    used = {*_NEEDED[kind], *_OPTIONAL.get(kind, ()), *(("completions",) if kind == "prompt-completion" else ())}
    return [name for name in dict.fromkeys(name for _, row in rows for name in row) if name not in used]


def _kind_of(where: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    fits = [kind for kind, needed in _NEEDED.items() if all(_has(row, field) for field in needed)]
    asked = [kind for kind in fits if any(name in columns for name in (*_NEEDED[kind], *_OPTIONAL.get(kind, ())))]
    if len(asked) == 1:
        return asked[0]
    if len(fits) > 1 and "text" in fits:
        fits.remove("text")
    if len(fits) > 1:
        raise DataError(f"{where}: the columns fit {' and '.join(fits)}; leave out the columns of all but one")
    if fits:
        return fits[0]
    for needed in _NEEDED.values():
        there = [field for field in needed if _has(row, field)]
        lacking = [field for field in needed if field not in there]
        if there and lacking:
            raise DataError(
                f"{where} has {there[0]!r} and no column {lacking[0]!r}; its columns are {_listed(row)}"
                " (columns= renames)"
            )
    close = ((name, difflib.get_close_matches(str(name).lower(), FIELDS, n=1, cutoff=0.75)) for name in row)
    hint = next((f"; did you mean {field[0]!r} by {name!r}?" for name, field in close if field), "")
    raise DataError(
        f"{where}: the columns {_listed(row)} are no known kind of record{hint} (allowed: {_SHAPES}; columns= renames)"
    )


def _has(row: Mapping[str, Any], field: str) -> bool:
    return field in row or (field == "completion" and "completions" in row)


def _chat(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    messages = _messages(where, "messages", _from_cell(where, "messages", row["messages"]))
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError(f"{where}: 'messages' holds no assistant message: there is nothing to learn")
    if all(message["role"] == "assistant" for message in messages[: answers[-1]]):
        raise DataError(f"{where}: nothing comes before the assistant's message in 'messages'")
    return {"messages": messages} | ({"tools": row["tools"]} if row.get("tools") is not None else {})


def _pairs(where: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each completion. A text beside a list of messages becomes a message."""
    if row.get("completion") is not None and row.get("completions") is not None:
        raise DataError(f"{where} has both 'completion' and 'completions'")
    name = "completion" if row.get("completion") is not None else "completions"
    name = name if name in row else "completion"
    given = _from_cell(where, name, row[name]) if name == "completions" else row[name]
    if given is None or (isinstance(given, (str, list)) and not given):
        raise DataError(f"{where}: {name!r} is empty")
    several = isinstance(given, list) and not isinstance(given[0], Mapping)
    if name == "completions" and not several:
        raise DataError(f"{where}: 'completions' must be a list of completions, got {given!r:.60}")
    prompt = row["prompt"]
    prompt = _messages(where, "prompt", prompt) if isinstance(prompt, list) else _string(where, "prompt", prompt)
    pairs = []
    for one in given if several else [given]:
        one = _messages(where, name, one) if isinstance(one, list) else _string(where, name, one)
        if isinstance(one, list) and one[0]["role"] != "assistant":
            raise DataError(f"{where}: {name!r} must begin with an assistant message, got role {one[0]['role']!r}")
        asked = prompt
        if isinstance(one, list) and isinstance(prompt, str):
            asked = [{"role": "user", "content": prompt}]
        elif isinstance(one, str) and isinstance(prompt, list):
            one = [{"role": "assistant", "content": one}]
        pairs.append({"prompt": asked, "completion": one})
    return pairs


def _instruction(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    prompt = _string(where, "instruction", row["instruction"])
    if not _blank(row.get("input")):
        prompt = f"{prompt}\n\n{_string(where, 'input', row['input'])}"
    return {"prompt": prompt, "completion": _string(where, "output", row["output"])}


def _text(where: str, row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    built: dict[str, Any] = {"text": _string(where, "text", row["text"])}
    if kind != "text" and row.get("text_pair") is not None:
        built["text_pair"] = _string(where, "text_pair", row["text_pair"])
    if kind == "label":
        built["label"] = _label(where, row["label"])
    elif kind == "score":
        built["score"] = _score(where, row["score"])
    return built


def _messages(where: str, name: str, value: Any) -> list[dict[str, Any]]:
    """Messages, each with a role and a content; keys that are null (as Parquet fills them in) are left out."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {name!r} must be a list of messages that is not empty, got {value!r:.60}")
    messages = []
    for number, message in enumerate(value, start=1):
        place = f"{where}, message {number} of {name!r}"
        if not isinstance(message, Mapping):
            raise DataError(f"{place}: a message must have role and content, got {message!r:.60}")
        if "role" not in message:
            raise DataError(f"{place} has no 'role'; its keys are {_listed(message)}")
        if message["role"] not in ROLES:
            raise DataError(f"{place}: {name_message('role', message['role'], ROLES)}")
        kept = {key: item for key, item in message.items() if item is not None or key == "content"}
        if kept["role"] == "assistant" and kept.get("tool_calls") and _blank(kept.get("content")):
            kept["content"] = ""
        else:
            if "content" not in kept:
                raise DataError(f"{place} has no 'content'; its keys are {_listed(message)}")
            _string(place, "content", kept["content"])
        messages.append(kept)
    return messages


def _from_cell(where: str, name: str, value: Any) -> Any:
    """A list that a table's cell holds as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise DataError(f"{where}: {name!r}: {error}") from None


def _string(where: str, name: str, value: Any) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: {name!r} is empty")
    if not isinstance(value, str):
        raise DataError(f"{where}: {name!r} must be text, got {type(value).__name__} {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name!r} holds half a character (a lone surrogate), which is no text") from None
    return value


def _label(where: str, value: Any) -> str | int | bool:
    if _blank(value) or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where}: the label is missing")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, (str, int)):
        raise DataError(
            f"{where}: a label must be text or a whole number, got {value!r:.60} (a score may be any number)"
        )
    return _string(where, "label", value).strip() if isinstance(value, str) else value


def _score(where: str, value: Any) -> float:
    if _blank(value):
        raise DataError(f"{where}: the score is missing")
    try:
        if isinstance(value, (bool, list, dict)):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: 'score' must be a number, got {value!r:.60}") from None
    if not math.isfinite(number):
        raise DataError(f"{where}: 'score' must be a finite number, got {value!r:.60}")
    return number


def _same_type_of_label(built: list[Row]) -> None:
    """Labels of text that are all whole numbers become numbers; two types in one file are an error."""
    kind = type(built[0][1]["label"])
    for where, row in built:
        if type(row["label"]) is not kind:
            raise DataError(f"{where}: the label {row['label']!r:.40} is no {kind.__name__}, as those before it are")
    if kind is str and all(re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", row["label"]) for _, row in built):
        for _, row in built:
            row["label"] = int(row["label"])


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _listed(row: Mapping[str, Any]) -> str:
    names = [" ".join(str(name).split())[:40] for name in row]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"


def _file(rows: list[Row]) -> str:
    return rows[0][0].rsplit(", ", 1)[0]

"""What a run has to remember so that a prompt is read in generation as it was in training.

    chat                the tokenizer's chat template, an answer's turn opened at the end of the prompt
    prompt_completion   prompt as it stands, a space, the answer
    text                the text so far

A folder that holds a trained adapter or model keeps it as `prompt_template.json`; the chat template itself is saved by
the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.errors import CheckpointError, ConfigError, DataError
from ...core.files import atomic_write, parse_json, read_bytes
from ...data.causal_lm import IGNORED, EncodedPairs, TextPair, encode_pairs, encode_prompts

FILE = "prompt_template.json"
KINDS = ("chat", "prompt_completion", "text")
PLAIN_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""For a tokenizer that brings no chat template: `role: text`, a line each, the end token behind every answer."""

Messages = list[dict[str, Any]]


def save_template(folder: Path, kind: str) -> None:
    atomic_write(folder / FILE, json.dumps({"kind": kind}) + "\n")


def read_template(folder: Path) -> str | None:
    """The kind that a folder was trained on; None where it does not say. Raises CheckpointError for an unknown one."""
    if not (folder / FILE).is_file():
        return None
    try:
        value = parse_json(read_bytes(folder / FILE, maximum_bytes=1 << 16))
    except (DataError, ValueError) as error:
        raise CheckpointError(f"{folder / FILE} is damaged: {error}") from None
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in KINDS:
        raise CheckpointError(f"{folder / FILE} names the kind {kind!r}; known: {', '.join(KINDS)}")
    return str(kind)


def prompt_ids(tokenizer: Any, kind: str, prompts: Sequence[str | Messages]) -> list[list[int]]:
    """Ids of each prompt as the model met it in training: (prompts) lists of token ids, no padding.

    A text given to a chat model is the user's one message. Raises: DataError for a prompt of which nothing is left.
    """
    if kind != "chat":
        return encode_prompts(tokenizer, [str(prompt) for prompt in prompts])
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    return [_chat_ids(tokenizer, chat, opened=True) for chat in chats]


def template_rows(kind: str, rows: Sequence[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Kind and rows of a user's file (data/user_files.py) as `encode_rows` takes them.

    A prompt and a completion that are lists of messages are a chat whose completion alone is learned.
    Raises: ConfigError for labels and scores, which a language model does not write.
    """
    if kind in ("label", "score"):
        raise ConfigError(f"the file holds texts with a {kind}, for a classifier: see polyrank run recipe=glue")
    if kind in ("prompt-completion", "instruction"):
        if isinstance(rows[0]["prompt"], str):
            return "prompt_completion", list(rows)
        chats = [
            {**row, "messages": row["prompt"] + row["completion"], "answers_from": len(row["prompt"])} for row in rows
        ]
        return "chat", chats
    return kind, list(rows)


def encode_rows(tokenizer: Any, kind: str, rows: Sequence[dict[str, Any]], max_length: int) -> EncodedPairs:
    """Rows for the Trainer, loss on the answers alone (of plain text: on all but the first token).

    Args: rows: of one kind: {"messages": [...]}, {"prompt": str, "completion": str} or {"text": str}; a chat's
        "answers_from" is the number of messages that are read alone, none of them learned.
    Rows longer than `max_length` tokens are dropped and counted. A chat gives one row for each answer in it, with what
    stands before that answer as its prompt: exact for every chat template, at the price of reading a prefix again.

    Raises: DataError where no row is left; for a chat template that writes an answer's turn otherwise than it opens it.
    """
    if kind == "prompt_completion":
        pairs = [TextPair(str(i), row["prompt"], row["completion"]) for i, row in enumerate(rows)]
        return encode_pairs(tokenizer, pairs, max_length)
    encoded = _text_rows(tokenizer, rows) if kind == "text" else _chat_rows(tokenizer, rows)
    kept = [row for row in encoded if len(row["input_ids"]) <= max_length]
    if not kept:
        shortest = min((len(row["input_ids"]) for row in encoded), default=0)
        raise DataError(f"all {len(encoded)} rows are longer than max_length {max_length} (the shortest: {shortest})")
    return EncodedPairs(kept, len(encoded) - len(kept), max_length)


def _row(ids: list[int], start: int) -> dict[str, list[int]]:
    """One row whose first `start` tokens are read and not learned."""
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * start + ids[start:]}


def _text_rows(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[dict[str, list[int]]]:
    ids = encode_prompts(tokenizer, [row["text"] for row in rows])
    return [_row([*row, tokenizer.eos_token_id], 1) for row in ids]


def _chat_rows(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[dict[str, list[int]]]:
    encoded = []
    for row in rows:
        messages, tools = row["messages"], row.get("tools")
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or turn < row.get("answers_from", 1):
                continue
            prompt = _chat_ids(tokenizer, messages[:turn], opened=True, tools=tools)
            whole = _chat_ids(tokenizer, messages[: turn + 1], opened=False, tools=tools)
            if whole[: len(prompt)] != prompt:
                raise DataError(
                    "the tokenizer's chat template opens an answer otherwise than it writes it (a thinking part that is"
                    " left out later, for instance): such a chat cannot be learned on its answers alone"
                )
            end = tokenizer.eos_token_id
            encoded.append(_row(whole if end in whole[len(prompt) :] else [*whole, end], len(prompt)))
    if not encoded:
        raise DataError("no chat holds an answer (a message of the role 'assistant' after another message)")
    return encoded


def _chat_ids(tokenizer: Any, messages: Messages, *, opened: bool, tools: Any = None) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=opened)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = tokenizer.bos_token_id
    if tokenizer.chat_template == PLAIN_CHAT and start is not None:
        ids.insert(0, start)  # a template of the model's own says itself what a chat begins with
    return ids


def with_chat_template(tokenizer: Any) -> bool:
    """Give a tokenizer that has no chat template the plain one; returns whether it had to."""
    if tokenizer.chat_template is not None:
        return False
    tokenizer.chat_template = PLAIN_CHAT
    return True

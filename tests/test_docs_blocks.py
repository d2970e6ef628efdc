"""What README and docs tell a reader to type: command lines are parsed and their configurations composed and checked,
Python blocks are compiled, and what they import from polyrank is there."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from polyrank import cli
from polyrank.recipes._frame.compose import check_overrides, compose
from polyrank.recipes._train.command import train_overrides

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMENT = re.compile(r"\s{2,}\S.*$")


def blocks(page):
    """(language, text) of a page's fenced blocks, continuation lines joined."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page):
    """Command lines that begin with polyrank, without the words that explain them: in blocks and inline."""
    text = page.read_text()
    for language, block in blocks(page):
        if language in ("", "sh"):
            yield from (line for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines() if line.startswith("polyrank "))
    outside = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    yield from (" ".join(found.split()) for found in re.findall(r"`(polyrank [^`]+)`", outside))


def words(line):
    return shlex.split(COMMENT.sub("", line), comments=True)


def first_of_sweep(text):
    """The first value of key=a,b,c or key=[a],[b]."""
    key, _, value = text.partition("=")
    return f"{key}={re.match(r'[[][^]]*[]]|[^,]*', value)[0]}"


CASES = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in dict.fromkeys(commands(page))]
SHAPES = re.compile(r"[|…]|\.\.\.|[A-Z]+\[|WHAT|VERB|COMMAND|NAME|mine")


@pytest.mark.parametrize(("page", "line"), [case for case in CASES if not SHAPES.search(case[1])])
def test_command_lines_are_understood(page, line):
    arguments = words(line)[1:]
    if len(arguments) < 2 or arguments == ["gpl", "run"]:
        return  # a mention of the command itself
    parsed = cli._parse(arguments)
    overrides = getattr(parsed, "overrides", None)
    if overrides is None:
        return
    if arguments[:2] == ["gpl", "run"]:
        overrides = ["recipe=gpl", *overrides]
    if arguments[0] == "train":
        overrides = train_overrides(overrides)
    elif parsed.multirun:
        check_overrides(overrides, sweep=True)
        overrides = [first_of_sweep(text) for text in overrides if not text.startswith("hydra")]
    compose(check_overrides(overrides))


def python_blocks():
    for page in PAGES:
        for number, (language, text) in enumerate(blocks(page)):
            if language == "python":
                yield pytest.param(text, id=f"{page.relative_to(ROOT).as_posix()}-{number}")


@pytest.mark.parametrize("text", python_blocks())
def test_python_blocks_compile_and_what_they_import_exists(text):
    for node in ast.walk(ast.parse(text.replace(", ...)", ")"))):  # "and whatever else you give it"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "polyrank":
            module = importlib.import_module(node.module)
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"{node.module} has no {missing}"

"""What all commands owe: JSON where a script would read it, the nearest name for a misspelt one, no network."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from no_network import guard

from polyrank.cli import COMMANDS
from polyrank.core.errors import ConfigError
from polyrank.recipes._frame.compose import check_overrides, options

JSON = [
    "run recipe=markov/setup --cfg job --json",
    "train data=train.jsonl model=Qwen/Qwen3-0.6B training.max_steps=1 --json",
    "list recipes --json",
    "evaluate predictions.jsonl --metrics oracle_bleu --json",
    "generate adapter --prompt Once --max-new-tokens 2 --json",
    "export adapter -o loras --json",
    "merge adapter --hypothesis 1 -o merged --json",
    "inspect adapter --layers --json",
    "report results -o r.csv --json",
    "bench --json",
]


SMALL = {"num_steps": 4, "batch_size": 8, "num_evaluation": 20, "num_final": 30, "eval_every": 2}


@pytest.mark.parametrize("line", JSON)
def test_results_as_json_and_nothing_else_on_standard_output(polyrank, place, no_network, line):
    done = polyrank(line)
    assert done.status == 0, done.err
    assert done.json


def test_every_command_with_a_result_has_json(polyrank):
    assert {line.split()[0] for line in JSON} | {"demo", "gpl"} == set(COMMANDS)
    assert "--json" in polyrank("demo --help").out
    for verb in ("run", "evaluate", "index", "search"):
        assert "--json" in polyrank(f"gpl {verb} --help").out


def test_the_demos_examples(polyrank, place, no_network, monkeypatch):
    """With the steps of a test: as printed they take a minute and ten."""
    from polyrank.recipes import markov

    monkeypatch.setattr(markov, "QUICK", SMALL)
    for example in COMMANDS["demo"][1]:
        done = polyrank(example if "--quick" in example else f"{example} --quick --json")
        assert done.status == 0, done.err
    assert Path("runs/demo-quick/result.json").is_file()
    assert Path("runs/demo/result.json").is_file()


RECIPES = [name for name in options("recipe") if "/" not in name or name in ("markov/setup", "lorma/mrpc")]


def misspelt(name):
    """The name with its second and third letter exchanged."""
    return name[:1] + name[2] + name[1] + name[3:]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_misspelt_field_of_any_recipe_has_its_nearest_name(recipe):
    from polyrank.recipes._frame.compose import _compose, _field_keys
    from polyrank.recipes._frame.registry import config_class, get_recipe

    name = _compose([f"recipe={recipe}"], None)["recipe"]
    keys = [
        key
        for key in _field_keys(config_class(get_recipe(name)))
        if len(key) > 6 and key[1] != key[2] and "." not in key
    ]
    for key in keys[:1]:
        with pytest.raises(ConfigError, match=f"unknown key '{misspelt(key)}'; did you mean '{key}'"):
            check_overrides([f"recipe={recipe}", f"{misspelt(key)}=1"])


@pytest.mark.parametrize("group", ["recipe", "method", "model", "data"])
def test_a_misspelt_choice_of_any_group_has_its_nearest_name(group):
    for name in options(group):
        wrong = misspelt(name) if len(name) > 3 else name + "x"
        if wrong in options(group):
            continue
        with pytest.raises(ValueError, match=f"unknown {group} '{wrong}'; did you mean"):
            check_overrides([f"{group}={wrong}"])


def test_the_guard_sees_who_asks(monkeypatch):
    import socket
    import urllib.request

    asked = guard(monkeypatch)
    for address in ("http://192.0.2.1/", "http://example.invalid/"):
        with pytest.raises(OSError, match="unreachable"):
            urllib.request.urlopen(address, timeout=5)
    assert [one if isinstance(one, str) else one[0] for one in asked] == ["192.0.2.1", "example.invalid"]
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        assert len(asked) == 2


OFFLINE = """
import sys
from polyrank.cli import main
for line in {lines!r}:
    status = main(line.split())
    if status:
        sys.exit(f"{{line}}: {{status}}")
"""


@pytest.mark.slow
def test_with_the_network_switched_off(run_program, place):
    """A network namespace of its own has no way out; not even the variable that says so is set."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("unshare -rn is not permitted")
    lines = [*JSON, "run recipe=markov/setup num_steps=2"]
    program = f"import os; os.environ.pop('HF_HUB_OFFLINE', None); os.chdir({str(place)!r})\n" + OFFLINE.format(
        lines=lines
    )
    done = run_program(["unshare", "-rn", sys.executable, "-c", program], place / "printed", 300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"cosines"') == 1
    last = textwrap.dedent(done.stdout).strip().splitlines()[-1]
    assert Path(place / last / "result.json").is_file()
    assert json.loads((place / last / "finished").read_text())

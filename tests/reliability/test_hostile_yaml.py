"""YAML from elsewhere: plain values only; nothing is called, nothing grows without end, one line says what is wrong."""

from pathlib import Path

import hostile_files as hostile
import pytest

from polyrank.core.errors import CheckpointError, ConfigError, UserError
from polyrank.recipes._frame.yaml_files import read_yaml
from polyrank.recipes._gpl.search import run_settings

polyrank = hostile.polyrank
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)
REFUSED = {
    "apply": "x: !!python/object/apply:os.mkdir [was-run]",
    "apply-kwds": "x: !!python/object/apply:subprocess.check_call {args: [[mkdir, was-run]]}",
    "new": "x: !!python/object/new:os.mkdir [was-run]",
    "object": "x: !!python/object:pathlib.Path {}",
    "name": "x: !!python/name:os.system",
    "module": "x: !!python/module:this",
    "tuple": "x: !!python/tuple [1, 2]",
    "long-tag": "x: !<tag:yaml.org,2002:python/object/apply:os.mkdir> [was-run]",
    "own-tag": "x: !include /etc/passwd",
    "directive": "%TAG ! tag:yaml.org,2002:python/\n---\nx: !object/apply:os.mkdir [was-run]",
    "key": "? !!python/object/apply:os.mkdir [was-run]\n: 1",
    "bomb": BOMB,
    "itself": "x: &x [*x]",
    "key-itself": "&x {*x : 1}",
    "unknown-alias": "x: *nobody",
    "deep": "x: " + "[" * 20_000,
    "deep-maps": "x: " + "{a: " * 20_000,
    "tab": "x:\n\t- 1",
    "nul": "x: a\0b",
    "escape": "x: a\x1b[31m",
    "open-quote": 'x: "',
    "colon": "x: y: z",
    "date": "x: 2001-99-99",
    "unhashable": "[1, 2]: 3\n{a: b}: c",
    "two-documents": "x: 1\n---\nx: 2",
    "target": "x: {_target_: os.mkdir, path: was-run}",
    "target-escaped": 'x: {"\\x5ftarget\\u005f": os.mkdir}',
    "target-below": "x: [1, {y: [{_target_: os.mkdir}]}]",
    "merge-number": "x: {<<: 5}",
}
BYTES = {
    "latin": "x: caf\xe9".encode("latin-1"),
    "utf-16": "x: 1".encode("utf-16"),
    "noise": bytes(range(128, 256)),
    "large": b"x: 1\n" * (1 << 20),
}
ODD = {
    "empty": "",
    "list": "- 1\n- 2",
    "number": "5",
    "text": "only words",
    "null": "null",
    "keys": "1: 2\nnull: 3\ntrue: 4",
    "twice": "recipe: a\nrecipe: b",
    "digits": "num_steps: " + "9" * 400,
    "infinity": "num_steps: .inf",
    "nan": "learning_rate: .nan",
    "binary": "x: !!binary aGVsbG8=",
    "set": "x: !!set {a, b}",
    "recipe-path": "recipe: ../../../etc/passwd",
    "recipe-code": "recipe: os.system",
    "recipe-list": "recipe: [markov]",
    "itself": "recipe: markov\nnum_steps: ${num_steps}",
    "resolver": "recipe: markov\nnum_steps: ${oc.create:${oc.env:HOME}}",
    "no-resolver": "recipe: markov\nnum_steps: ${os.system:mkdir}",
    "defaults-path": "defaults:\n  - ../../../../../../etc/passwd\nrecipe: markov",
    "defaults-number": "defaults: 7\nrecipe: markov",
    "defaults-absolute": "defaults:\n  - /etc/passwd\nrecipe: markov",
    "html": f"recipe: markov\nnum_steps: {hostile.HTML!r}",
    "control": 'recipe: "\\e[31mmarkov\\a"',
    "unknown-key": "recipe: markov\nnum_stpes: 3",
    "runs-dir": "recipe: markov\nruns_dir: [a]",
    "run-name": "recipe: markov\nrun_name: ../../../outside",
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield
    assert not list(tmp_path.rglob("was-run"))


@pytest.mark.parametrize("name", [*REFUSED, *BYTES])
def test_a_file_that_is_refused(polyrank, tmp_path, name):
    content = BYTES[name] if name in BYTES else REFUSED[name].encode()
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "bad.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        read_yaml(tmp_path / "conf" / "recipe" / "bad.yaml")
    for line in (
        ["run", "recipe=bad", "--cfg", "job"],
        ["run", "recipe=bad", "num_steps=1"],
        ["run", "recipe=bad", "-m", "x=1,2"],
    ):
        done = polyrank([*line, "--config-dir", str(tmp_path / "conf")])
        hostile.check_one_line(done, (2,))
        assert done.out == ""
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read"):
        run_settings(tmp_path / "run" / "adapter")


@pytest.mark.parametrize("name", ODD)
def test_a_recipe_that_is_none(polyrank, tmp_path, name):
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "bad.yaml").write_text("# @package _global_\n" + ODD[name])
    done = polyrank(["run", "recipe=bad", "--config-dir", str(tmp_path / "conf")])
    hostile.check_one_line(done, (2,))
    assert not (tmp_path / "outside").exists()
    assert not list(Path.cwd().rglob("finished"))


@pytest.mark.parametrize("name", ["apply", "bomb", "deep", "latin", "empty", "list", "text", "keys", "digits"])
def test_a_run_whose_config_was_altered(polyrank, name):
    run = Path("runs/markov/setup/x")
    run.mkdir(parents=True)
    content = BYTES[name] if name in BYTES else {**ODD, **REFUSED}[name].encode()
    (run / "config.yaml").write_bytes(content)
    done = polyrank(["run", "recipe=markov/setup", "run_name=x", "num_steps=1"])
    hostile.check_one_line(done, (2,))
    assert (run / "config.yaml").read_bytes() == content
    assert not (run / "finished").exists()


def test_what_people_write_is_read(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "base: &base {r: 4, betas: [0.9, 0.99]}\nmine:\n  <<: *base\n  r: 8\nname: café\nwhen: 2001-01-01\n"
    )
    assert read_yaml(file)["mine"] == {"r": 8, "betas": [0.9, 0.99]}
    file.write_text("x: " + "".join("\n- *a" if i else "\n- &a 1" for i in range(40)))
    with pytest.raises(ConfigError, match="39 aliases; at most 30"):
        read_yaml(file)

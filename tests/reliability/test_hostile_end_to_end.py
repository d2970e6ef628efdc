"""The program itself, in a process of its own: hostile input ends it in time, with one line, inside its folder."""

import json
import sys

import hostile_files as hostile
import pytest

LORA = {"peft_type": "LORA", "r": 10**12, "target_modules": "((a|b)+)+", "base_model_name_or_path": "../base"}


@pytest.mark.slow
def test_several_commands_one_after_another(run_program, tmp_path):
    """In one process, to load torch once: each command's exit status and lines are printed as JSON."""
    place = tmp_path / "place"
    (place / "adapter").mkdir(parents=True)
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(LORA))
    (place / "adapter" / "adapter_model.safetensors").write_bytes(hostile.raw({"a": hostile.entry([2])}, bytes(8)))
    (place / "pickled").mkdir()
    (place / "pickled" / "adapter_config.json").write_text(json.dumps(LORA))
    (place / "pickled" / "adapter_model.safetensors").write_bytes(hostile.pickles(place / "was-run")["torch-zip"])
    (place / "conf" / "recipe").mkdir(parents=True)
    (place / "conf" / "recipe" / "bad.yaml").write_text("x: !!python/object/apply:os.mkdir [was-run]\n")
    (place / "results").mkdir()
    (place / "results" / "x.json").write_text('{"schema": 99, "name": "x"}')
    before = hostile.tree(tmp_path)
    lines = [
        "generate adapter --prompt x", "inspect adapter", "merge pickled -o merged", "run recipe=bad --config-dir conf",
        "report results -o r.html", "evaluate results/x.json", "run recipe=markov/setup run_name=../../outside",
    ]  # fmt: skip
    program = (
        "import sys\nfrom polyrank.cli import main\n"
        f"for line in {lines!r}:\n    sys.stderr.write(f'# {{line}}: {{main(line.split())}}\\n')\n"
    )
    command = [sys.executable, "-c", f"import os; os.chdir({str(place)!r})\n{program}"]
    done = run_program(command, tmp_path / "printed", 240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    printed = done.stderr.splitlines()
    assert [line for line in printed if line.startswith("# ")] == [f"# {line}: 2" for line in lines]
    assert sum(line.startswith("polyrank: error: ") for line in printed) == len(lines)
    after = {name: content for name, content in hostile.tree(tmp_path).items() if not name.startswith("printed")}
    assert after == before

"""The frame of runs: overrides, folders, resuming, sweeps, and one line for every mistake."""

import fcntl
import json
import os
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from polyrank.core.errors import ConfigError, RunError, UserError
from polyrank.recipes import run as frame
from polyrank.recipes._frame.compose import check_overrides, compose, describe, options
from polyrank.recipes._frame.registry import recipes
from polyrank.recipes.run import run_recipe, run_sweep


def result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


def test_a_run_saves_its_whole_config_and_the_marker(config_dir):
    done = run_recipe(["recipe=count", "num_steps=4", "method=plain", "method.r=8"], config_dir=config_dir)
    assert done.ran
    assert done.run_dir.parent == Path("runs/count")
    assert result(done.run_dir) == {"steps": 4, "rank": 8}
    assert yaml.safe_load((done.run_dir / "config.yaml").read_text()) == {
        "recipe": "count",
        "runs_dir": "runs",
        "run_name": None,
        "num_steps": 4,
        "mode": "up",
        "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]},
        "stop_at": None,
        "method": {"name": "plain", "r": 8},
        "data": {},
    }
    assert json.loads((done.run_dir / "finished").read_text())["version"]


def test_the_same_command_finds_its_folder_whatever_the_order(config_dir):
    first = run_recipe(["recipe=count", "num_steps=4", "optimizer.lr=0.5"], config_dir=config_dir)
    again = run_recipe(["optimizer.lr=0.5", "num_steps=4", "recipe=count"], config_dir=config_dir)
    assert (first.ran, again.ran, again.run_dir) == (True, False, first.run_dir)
    other = run_recipe(["recipe=count", "num_steps=4"], config_dir=config_dir)
    assert other.run_dir != first.run_dir


def test_a_failed_run_goes_on_and_leaves_its_traceback(config_dir):
    command = ["recipe=count", "num_steps=5", "stop_at=3"]
    with pytest.raises(RuntimeError, match="the lights went out"):
        run_recipe(command, config_dir=config_dir)
    (run_dir,) = Path("runs/count").iterdir()
    assert "the lights went out" in (run_dir / "error.txt").read_text()
    assert not (run_dir / "finished").exists()
    assert run_recipe(command, config_dir=config_dir).run_dir == run_dir
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert not (run_dir / "error.txt").exists()


def test_a_run_name_and_fresh(config_dir):
    done = run_recipe(["recipe=count", "run_name=mine", "runs_dir=there"], config_dir=config_dir)
    assert done.run_dir == Path("there/count/mine")
    with pytest.raises(ConfigError, match=r"made with another configuration .num_steps: 2 there, 3 now.*--fresh"):
        run_recipe(["recipe=count", "run_name=mine", "runs_dir=there", "num_steps=3"], config_dir=config_dir)
    fresh = run_recipe(
        ["recipe=count", "run_name=mine", "runs_dir=there", "num_steps=3"], config_dir=config_dir, fresh=True
    )
    assert result(fresh.run_dir)["steps"] == 3
    assert result(Path("there/count/mine.1"))["steps"] == 2


@pytest.mark.parametrize("fresh", [False, True])
def test_two_commands_cannot_share_a_folder(config_dir, fresh):
    folder = Path("runs/count/mine")
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is running in runs/count/mine"):
            run_recipe(["recipe=count", "run_name=mine"], config_dir=config_dir, fresh=fresh)
    assert folder.exists()


def test_other_ranks_run_but_do_not_write(config_dir, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    Path("runs/count/mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match="recipe 'count' runs in one process; start it without torchrun"):
        run_recipe(["recipe=count", "run_name=mine"], config_dir=config_dir)
    monkeypatch.setattr(recipes.get("count"), "distributed", True, raising=False)
    done = run_recipe(["recipe=count", "run_name=mine"], config_dir=config_dir)
    assert sorted(os.listdir(done.run_dir)) == ["metrics.jsonl", "result.json"]  # the recipe's own


def test_a_data_entry_names_its_recipe(config_dir):
    done = run_recipe(["method=plain", "data=dice"], config_dir=config_dir)
    assert done.recipe == "count"
    saved = yaml.safe_load((done.run_dir / "config.yaml").read_text())
    assert saved["data"] == {"name": "dice", "sides": 6}


def test_nested_choice_and_inheritance(config_dir):
    done = run_recipe(["recipe=count/long"], config_dir=config_dir)
    assert done.run_dir.parent == Path("runs/count/long")
    assert result(done.run_dir)["steps"] == 9
    assert sorted(options("recipe", config_dir).keys() & {"count", "count/long"}) == ["count", "count/long"]
    assert describe(options("recipe", config_dir)["count"]) == "Counts to num_steps"


def test_a_field_that_the_yaml_does_not_list_can_be_set(config_dir):
    checked = check_overrides(["recipe=count", "optimizer.lr=1", "mode=down"], config_dir)
    composed = compose(checked, config_dir)
    assert composed.settings.optimizer.lr == 1.0
    assert composed.settings.mode == "down"


def test_a_sweep_runs_each_combination_and_resumes(config_dir):
    done = run_sweep(["recipe=count", "num_steps=1,2", "optimizer.lr=0.1,0.2"], config_dir=config_dir)
    assert sorted((result(item.run_dir)["steps"]) for item in done) == [1, 1, 2, 2]
    assert len({item.run_dir for item in done}) == 4
    again = run_sweep(["recipe=count", "num_steps=2,3", "optimizer.lr=0.1"], config_dir=config_dir)
    assert [item.ran for item in again] == [False, True]


def test_two_sweeps_in_one_second_do_not_mix(config_dir, monkeypatch):
    class Frozen(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 1)

    monkeypatch.setattr("polyrank.recipes.run.datetime", Frozen)
    assert len(run_sweep(["recipe=count", "num_steps=1,2,3"], config_dir=config_dir)) == 3
    assert len(run_sweep(["recipe=count", "num_steps=1,2"], config_dir=config_dir)) == 2


def test_a_sweep_over_recipes_and_a_failing_job(config_dir):
    done = run_sweep(["recipe=count,count/long"], config_dir=config_dir)
    assert [item.run_dir.parent.as_posix() for item in done] == ["runs/count", "runs/count/long"]
    with pytest.raises(ConfigError, match="num_steps must be >= 1, got 0"):
        run_sweep(["recipe=count", "num_steps=0,1"], config_dir=config_dir)


def test_a_sweep_in_other_processes(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.chdir(tmp_path)
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = run_sweep(["recipe=markov/setup", "num_steps=1,2", *launcher])
    assert [item.ran for item in done] == [True, True]
    assert all((item.run_dir / "finished").exists() for item in done)


def test_sweep_leaves_the_process_as_it_was(config_dir, monkeypatch):
    import sys

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    arguments = sys.argv
    run_sweep(["recipe=count", "num_steps=1,2"], config_dir=config_dir)
    assert sys.argv is arguments
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert not Path("outputs").exists()


BAD = [
    (["recipe=coutn"], "unknown recipe 'coutn'; did you mean 'count'"),
    ([], "name a recipe: recipe=NAME .allowed: .*count"),
    (["method=plain"], "name a recipe: recipe=NAME"),
    (["data=lost"], "unknown default_recipe of data 'coutn'; did you mean 'count'"),
    (["recipe=count", "num_stpes=3"], "unknown key 'num_stpes'; did you mean 'num_steps'"),
    (["recipe=count", "optimizer.lrr=3"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
    (["recipe=count", "metod=plain"], "unknown key 'metod'; did you mean 'method'"),
    (["recipe=count", "method=plane"], "unknown method 'plane'; did you mean 'plain'"),
    (["recipe=count", "num_steps=three"], "num_steps must be a whole number, got 'three'"),
    (["recipe=count", "num_steps=0"], "num_steps must be >= 1, got 0"),
    (["recipe=count", "num_steps=1.5"], "num_steps must be a whole number, got 1.5"),
    (["recipe=count", "optimizer.lr=nan"], "optimizer.lr must be finite, got nan"),
    (["recipe=count", "optimizer=3"], "optimizer must be a group of key: value, got 3"),
    (["recipe=count", "optimizer.betas=[1]"], "optimizer.betas must have 2 entries, got 1"),
    (["recipe=count", "mode=upp"], "unknown mode 'upp'; did you mean 'up'"),
    (["recipe=count", "+extra=1"], "unknown field 'extra'"),
    (["recipe=count", "num_steps=1,2"], "lists several values: add --multirun"),
    (["recipe=count", "num_steps"], "cannot read 'num_steps': an override is key=value"),
    (["recipe=count", "num_steps=[1"], r"cannot read 'num_steps=\[1'"),
    (["recipe=count", "run_name=../../out"], "run_name '../../out' must be letters"),
    (["recipe=count", "run_name=/tmp/out"], "run_name '/tmp/out' must be letters"),
    (["recipe=needy"], "field 'num_steps' has no value; give num_steps=..."),
    (["recipe=broken"], "not valid YAML"),
    (["recipe=nameless"], "must say `recipe: <registered name>`"),
    (["recipe=../../etc/passwd"], "unknown recipe '../../etc/passwd'"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[" ".join(overrides) or "nothing" for overrides, _ in BAD])
def test_every_mistake_is_one_line(config_dir, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        run_recipe(overrides, config_dir=config_dir)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_a_list_that_another_value_would_override_is_refused(config_dir):
    for more in (["num_steps=1,2", "num_steps=3"], ["num_steps=3", "num_steps=1,2"], ["num_steps=1,2"] * 2):
        with pytest.raises(ConfigError, match="'num_steps' is given twice: 'num_steps=1,2' and 'num_steps="):
            run_sweep(["recipe=count", *more], config_dir=config_dir)
    assert (
        result(run_recipe(["recipe=count", "num_steps=3", "num_steps=2"], config_dir=config_dir).run_dir)["steps"] == 2
    )


def test_a_missing_value_can_be_given(config_dir):
    assert result(run_recipe(["recipe=needy", "num_steps=2"], config_dir=config_dir).run_dir)["steps"] == 2


def test_a_config_dir_that_is_none(config_dir):
    with pytest.raises(ConfigError, match="is no folder"):
        run_recipe(["recipe=count"], config_dir=config_dir / "absent")


def test_a_folder_that_cannot_be_made(config_dir):
    Path("runs").write_text("")
    with pytest.raises(RunError, match="cannot make the run's folder runs/count/"):
        run_recipe(["recipe=count"], config_dir=config_dir)


def test_the_name_is_safe_for_any_value(config_dir):
    checked = check_overrides(["recipe=count", "+method.text='a/b ../<x>|\\u00e9'"], config_dir)
    folder = frame.run_folder(compose(checked, config_dir), checked)
    assert folder.parent == Path("runs/count")
    assert set("/<>| ").isdisjoint(folder.name)

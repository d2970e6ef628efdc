"""Hydra's submitit launcher: what our Slurm entry composes to, and a sweep in a process that submitit starts."""

import json

import pytest
from hydra import compose, initialize_config_dir

from polyrank.core.records import read_record
from polyrank.recipes._frame.compose import CONF
from polyrank.recipes.run import run_sweep

submitit = pytest.importorskip("submitit", reason="hydra-submitit-launcher is not installed (polyrank[sweeps])")
pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")


def launcher(*overrides):
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose(
            "config", overrides=["recipe=e2e", "hydra/launcher=slurm", *overrides], return_hydra_config=True
        )
    return config.hydra.launcher


def test_the_slurm_entry_is_submitit_s_with_settings_of_its_own():
    config = launcher("hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=30")
    assert config["_target_"].endswith("submitit_launcher.SlurmLauncher")
    assert (config.partition, config.timeout_min, config.gpus_per_node, config.max_num_timeout) == ("gpu", 30, 1, 5)


def test_slurm_takes_every_setting():
    """The batch file that submitit makes of them; a setting that its Slurm executor does not know raises."""
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    config = launcher()
    names = {"cpus_per_task": config.cpus_per_task, "mem": f"{config.mem_gb}GB", "time": config.timeout_min}
    own = {"job_name": config.name, "array_parallelism": config.array_parallelism, "nodes": config.nodes}
    own |= {"signal_delay_s": config.signal_delay_s, "gpus_per_node": config.gpus_per_node}
    own["ntasks_per_node"] = config.tasks_per_node
    assert set(names | own) <= SlurmExecutor._valid_parameters()
    text = _make_sbatch_string(command="run", folder="/shared/%j", **names, **own)
    for line in ("--gpus-per-node=1", "--cpus-per-task=8", "--mem=64GB", "--time=720", "--job-name=polyrank"):
        assert f"#SBATCH {line}" in text
    assert "--signal=USR2@300" in text


@pytest.mark.slow
def test_a_sweep_through_submitit_s_local_executor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["num_steps=2", "batch_size=4", "num_evaluation=8", "num_final=8", "eval_every=2"]
    line = ["recipe=markov/setup", *small, "seeds=[0]", f"runs_dir={tmp_path}/runs", "hydra/launcher=submitit_local"]
    done = run_sweep([*line, "hydra.launcher.timeout_min=5"])
    assert [item.ran for item in done] == [True]
    assert (done[0].run_dir / "finished").is_file()
    assert read_record(done[0].run_dir / "result.json").rows
    log = next(tmp_path.glob("runs/sweeps/*/.submitit/*/*_log.out"))
    assert "Job completed successfully" in log.read_text()
    assert json.loads(next(tmp_path.glob("runs/sweeps/*/job-0.json")).read_text())["ran"] is True

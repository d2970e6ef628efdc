"""A small fault campaign: benchmarks/faults.py with few points, in a process that computes nothing but forks."""

import json
import os
import sys
from pathlib import Path

import pytest

from polyrank.core.records import read_record
from polyrank.hypotheses.checkpoint import is_complete, newest_complete

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "faults.py"
SYSTEMS = ("mcl", "lsr", "gpl")


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    yield
    for name in ("_fault_kills", "_fault_jobs", "_fault_page"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory, run_program):
    """Each system killed in a save and in a step, one full disk, one read-only folder, LoRA-MCL on two ranks."""
    folder = tmp_path_factory.mktemp("campaign")
    result = folder / "reliability.json"
    given = ["--sections", "kill_and_resume", "disk", "two_processes", "--points", "2", "--free-bytes", "12288"]
    command = [sys.executable, str(SCRIPT), *given, "--models", "mcl", "--output", str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_program(command, folder / "log", timeout=840, env=environment)
    assert result.is_file(), done.stderr[-3000:]
    return read_record(result).details


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_killed_and_resumed_is_the_run_that_was_not_killed(campaign, system):
    """Weights, optimiser, schedule, random states, win statistics, log and predictions: the same bits and values."""
    inside, between = campaign["kill_and_resume"][system]["kills"]
    assert inside["killed"], inside
    assert inside["during_save"], inside
    assert between["killed"], between  # from outside: on a slow machine it may fall into a save, too
    assert between["again"]["kind"] == "save"
    assert inside["differences"] == between["differences"] == [], campaign["kill_and_resume"][system]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full disk", "read-only folder"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_save_that_cannot_be_written_loses_nothing(campaign, system, fault):
    if "not_run" in campaign["disk"]:
        pytest.skip(campaign["disk"]["not_run"])
    (found,) = [one for one in campaign["disk"]["faults"] if (one["system"], one["fault"]) == (system, fault)]
    assert found["status"] == 1
    assert found["says_what_to_do"], found["message"]
    assert not found["traceback"]
    assert found["checkpoint_intact"]
    assert found["differences"] == []


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_does_and_survive_the_death_of_one(campaign, wrapper):
    (compared,) = [one for one in campaign["two_processes"]["compared"] if one["wrapper"] == wrapper]
    assert compared["largest_loss_difference"] <= 1e-6
    assert compared["sharded"] == (wrapper == "fsdp2")
    (killed,) = [one for one in campaign["two_processes"]["killed"] if one["wrapper"] == wrapper]
    status = killed["statuses"][0]
    assert status > 0 or status == -6  # gloo may end an interpreter that leaves after an error by SIGABRT
    assert killed["survivor_seconds"] < 60
    assert "another process of this training has ended" in killed["survivor_error"]
    assert killed["resumed_from"] == "checkpoint-3"
    assert killed["bit_identical"]


@pytest.mark.parametrize("content", ["", '{"epoch": 1.0, "log_hist'])
def test_a_checkpoint_whose_last_file_was_cut_off_is_passed_over(tmp_path, content):
    for number, text in ((3, json.dumps({"epoch": 0.5, "log_history": [{"loss": float("nan")}]})), (6, content)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(text)
    assert not is_complete(tmp_path / "checkpoint-6")
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-3"


def test_a_run_resumed_from_its_last_step_trains_no_further(tmp_path):
    """Killed after its last checkpoint: three steps of an epoch of four, at a constant rate, and no fourth."""
    import torch
    from transformers import Trainer, TrainingArguments

    from polyrank.recipes._frame.training_log import train_on, training_log

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, labels):
            return {"loss": (self.slope * x - labels).square().mean()}

    rows = [{"x": torch.tensor(float(i)), "labels": torch.tensor(2.0 * i)} for i in range(1, 5)]
    args = TrainingArguments(
        str(tmp_path / "training"),
        **{"per_device_train_batch_size": 1, "max_steps": 3, "save_steps": 2, "learning_rate": 0.1},
        **{"lr_scheduler_type": "constant", "use_cpu": True, "report_to": "none", "disable_tqdm": True},
    )
    slopes = []
    for _ in range(2):
        log = training_log(tmp_path / "metrics.jsonl", 3)
        trainer = Trainer(model=Line(), args=args, train_dataset=rows, callbacks=[log])
        train_on(trainer, tmp_path / "training")
        slopes.append(trainer.model.slope.item())
        assert trainer.state.global_step == 3
    assert slopes[0] == slopes[1] != 0.0
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 3]  # a line at each checkpoint


def test_what_is_compared_leaves_out_times_alone(tmp_path):
    from _fault_kills import differences

    for name, seconds, loss in (("one", 1.0, 0.5), ("two", 2.0, 0.5), ("three", 1.0, 0.25)):
        folder = tmp_path / name / "e2e" / "run"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 10, "loss": loss, "train_s": seconds}) + "\n")
    assert differences("mcl", tmp_path / "one", tmp_path / "two") == []
    assert differences("mcl", tmp_path / "one", tmp_path / "three") == ["metrics.jsonl"]


def test_the_draw_is_that_of_its_seed_and_hits_saves():
    from _fault_kills import draw

    points = draw("mcl", 20, 0, 6)
    assert points == draw("mcl", 20, 0, 6)
    assert points != draw("mcl", 20, 1, 6)
    assert [point.kind for point in points].count("save") == 8
    assert {point.number for point in points if point.kind == "save"} <= set(range(1, 7))
    assert [point.again.kind for point in points if point.again] == ["save", "any"] * 5


def test_the_page_shows_the_figures_of_the_result_file():
    from _fault_page import BEGIN, END, tables

    result, page = ROOT / "results" / "reliability.json", (ROOT / "docs" / "reliability.md").read_text()
    if not result.is_file():
        pytest.skip("no campaign has been recorded")
    for name, table in tables(read_record(result)).items():
        assert f"{BEGIN.format(name)}\n{table}\n{END.format(name)}" in page, name

"""One mistake of a user, tried in every recipe that it can be made in: the same status, before the first step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import Trainer

from polyrank.cli import main

DATA = Path(os.environ.get("POLYRANK_DATA", "../shared/data")).resolve()
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no POLYRANK_DATA: the small pretrained model is there")
RUNS = [
    "recipe=e2e/quick method=mle",
    "recipe=e2e/quick method=mcl",
    "recipe=e2e/quick method=moe",
    "recipe=data_to_text/small method=lora",
    "recipe=data_to_text/small method=lsr",
    "recipe=maths/smoke method=lora",
    "recipe=methods method=lorma_pi",
    "recipe=glue method=lora data=mrpc",
]


@pytest.fixture
def no_step(monkeypatch, tmp_path):
    """The current folder is empty, and whoever trains is told."""
    monkeypatch.setenv("POLYRANK_DATA", str(DATA))
    monkeypatch.chdir(tmp_path)

    def trained(self, *args, **kwargs):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(Trainer, "train", trained)


@pytest.mark.parametrize("line", RUNS)
def test_a_target_that_is_no_module(no_step, capsys, line):
    """Half an adapter is none: `v_projj` beside a name that is there."""
    there = "query" if line.startswith("recipe=glue") else "q_proj"
    status = main(["run", *line.split(), f"model.target_modules=[{there},v_projj]"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2, error
    assert "v_projj" in error

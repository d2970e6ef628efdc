"""NaN stays NaN in every figure, stops a run before it is saved, and is not exported."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from polyrank.core.errors import CheckpointError, RunError, UserError
from polyrank.hypotheses.checkpoint import newest_complete
from polyrank.hypotheses.export import export_hypotheses, export_hypothesis
from polyrank.hypotheses.monitor import LossMonitor
from polyrank.hypotheses.slices import stacked_parameters

NAN, INF = math.nan, math.inf


def poison(model, hypotheses=slice(None)):
    for name, parameter in model.named_parameters():
        if "mcl_B" in name:
            parameter.data[hypotheses] = NAN


class PoisonAt(TrainerCallback):
    """Makes hypotheses NaN once a step has been taken, as a divergence would."""

    def __init__(self, step, hypotheses):
        self.step, self.hypotheses = step, hypotheses

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            poison(model, self.hypotheses)


@pytest.mark.parametrize("hypotheses", [slice(None), 1], ids=["all", "one"])
def test_the_run_stops_and_the_last_finite_checkpoint_stays(make_model, make_trainer, tmp_path, hypotheses):
    trainer = make_trainer(
        make_model(), max_steps=8, save_strategy="steps", save_steps=2, mcl={"callbacks": [PoisonAt(6, hypotheses)]}
    )
    with pytest.raises(RunError, match=r"step 6: the weights of hypotheses .* are not finite") as caught:
        trainer.train()
    assert not isinstance(caught.value, UserError)
    kept = newest_complete(tmp_path / "run")
    assert kept.name == "checkpoint-4"
    assert not Path(tmp_path, "run", "checkpoint-6").exists()


def test_a_step_without_a_checkpoint_stops_too(make_model, make_trainer):
    with pytest.raises(RunError, match=r"step 3: the weights of hypotheses \[0, 1, 2\]"):
        make_trainer(make_model(), mcl={"callbacks": [PoisonAt(3, slice(None))]}).train()


@pytest.mark.parametrize("mode", ["wta", "relaxed-wta", "annealed-wta", "random-wta", "mean"])
def test_losses_are_nan_where_all_hypotheses_are(make_model, make_batch, make_trainer, mode):
    model = make_model(mode=mode)
    poison(model)
    figures = make_trainer(model).evaluate()
    for name in ("loss", "oracle_nll", "mixture_nll", "nll_0", "nll_1", "nll_2"):
        assert math.isnan(figures[f"eval_{name}"]), name
    with torch.no_grad():
        assert model.eval()(**make_batch()).loss.isnan()
    if mode != "annealed-wta":
        assert model.train()(**make_batch()).loss.isnan()


def test_the_monitor_by_hand():
    monitor = LossMonitor(2, "sequence_sum")
    monitor.add(torch.tensor([[1.0, 2.0], [3.0, NAN]]), torch.tensor([2, 2]))
    figures = monitor.figures()
    assert figures["oracle_nll"] == pytest.approx(1.5)
    assert figures["nll_0"] == pytest.approx(1.5)
    assert math.isnan(figures["nll_1"])
    again = LossMonitor(2, "sequence_sum")
    again.add(torch.tensor([[NAN], [INF]]), torch.tensor([2]))
    again.load_vector(again.as_vector() + monitor.as_vector())
    assert math.isnan(again.figures()["oracle_nll"])
    assert math.isnan(again.figures()["mixture_nll"])


def test_what_is_not_finite_is_not_exported(make_model, tmp_path):
    model = make_model()
    next(stacked_parameters(model)).data[2].view(-1)[0] = INF
    with pytest.raises(CheckpointError, match=r"hypothesis 2 is not finite \(.*lora_"):
        export_hypotheses(model, tmp_path / "all")
    assert not list(tmp_path.rglob("*.safetensors"))
    export_hypothesis(model, tmp_path / "one", 0)
    with pytest.raises(CheckpointError, match="hypothesis 2"):
        export_hypothesis(model, tmp_path / "two", 2)

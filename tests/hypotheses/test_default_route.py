"""A gradient through the default route trains one hypothesis only: it is said once, and not where it was asked for."""

from __future__ import annotations

import warnings

import pytest
import torch

from polyrank.core.errors import ConfigError

MESSAGE = "only hypothesis 0 is trained"


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def test_an_own_loop_on_the_logits_is_warned_once(make_model, make_batch):
    model = make_model().train()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**without_labels(make_batch())).logits.sum().backward()
    assert sum(MESSAGE in str(w.message) for w in seen) == 1
    moved = [p.grad for n, p in model.named_parameters() if "mcl_B" in n]
    assert all(g[0].any() and not g[1:].any() for g in moved)


def test_what_was_asked_for_is_not_warned(make_model, make_batch, make_trainer):
    batch = make_batch()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=MESSAGE)
        model = make_model().train()
        model(**batch).loss.backward()
        model(**without_labels(batch), hypothesis_idx=1).logits.sum().backward()
        with torch.no_grad():
            model(**without_labels(batch))
        model.eval()(**without_labels(batch))
        make_model(num_hypotheses=1).train()(**without_labels(batch)).logits.sum().backward()
        chosen = make_model().train()
        chosen.base_model.set_hypothesis(2)
        chosen(**without_labels(batch)).logits.sum().backward()
        make_trainer(label_smoothing_factor=0.1).train()


def test_a_loss_function_of_its_own_is_refused(make_trainer):
    with pytest.raises(ConfigError, match="compute_loss_func has no place in MclTrainer"):
        make_trainer(mcl={"compute_loss_func": lambda outputs, labels, **kwargs: outputs.logits.sum()})

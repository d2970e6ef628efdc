"""The toy experiment: tabular hypotheses against exact theory, the model, the recipe, the thresholds of a real run."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from polyrank.analysis.markov_theory import MarkovMixture, SequenceTypes, transition_matrix
from polyrank.core.errors import UserError
from polyrank.core.records import read_record
from polyrank.data.markov import MarkovDataset
from polyrank.objectives import winner_weights
from polyrank.recipes._markov import training as training
from polyrank.recipes._markov.model import build_base, build_model, predict, summarise
from polyrank.recipes._markov.report import (
    Theory,
    match_chains,
    matrix_errors,
    reachable,
)
from polyrank.recipes.markov import MarkovConfig, run, run_demo

CHAINS = {
    "transition1": np.stack([transition_matrix(0.2, 0.9), transition_matrix(0.8, 0.25)]),
    "transition2": np.stack([transition_matrix(0.7, 0.8), transition_matrix(0.8, 0.25)]),
}
SMALL = {"num_steps": 4, "batch_size": 8, "num_evaluation": 20, "num_final": 30, "eval_every": 2}


def fit_tables(chains, start, k, mode, epsilon=0.0, steps=400):
    """Train K tables of logits (K, 2, 2) by gradient descent on the winner weights, over all sequences at once."""
    mixture = MarkovMixture(chains, 32, start)
    types = SequenceTypes.of_length(32)
    counts = torch.from_numpy(types.counts).flatten(1)
    probability = torch.from_numpy(mixture.type_probabilities)
    logits = torch.randn(k, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        losses = -torch.log_softmax(logits, -1).flatten(1) @ counts.T / 31
        weights = winner_weights(losses, mode, epsilon=epsilon)
        optimiser.zero_grad()
        (weights * losses * probability).sum().backward()
        optimiser.step()
        decay.step()
    return mixture, torch.softmax(logits.detach(), -1).numpy()


@pytest.mark.parametrize("start", ["uniform", "stationary"])
@pytest.mark.parametrize("experiment", CHAINS)
class TestTabularHypotheses:
    def test_one_hypothesis_reaches_the_weighted_average(self, experiment, start):
        mixture, tables = fit_tables(CHAINS[experiment], start, 1, "wta")
        assert np.abs(tables[0] - mixture.pbar).max() < 1e-3
        assert mixture.winner_loss(tables) == pytest.approx(mixture.first_order_loss, abs=1e-6)

    def test_two_hypotheses_reach_the_winner_optimum(self, experiment, start):
        mixture, tables = fit_tables(CHAINS[experiment], start, 2, "wta")
        assert mixture.winner_loss(tables) == pytest.approx(mixture.wta_at_chains, abs=1e-3)
        matched = tables[match_chains(tables, mixture.chains)]
        # hard assignment shifts the chains themselves by up to .0005 where they overlap (transition2)
        assert np.abs(matched - mixture.chains).max() < 1e-3

    def test_relaxed_hypotheses_reach_the_relaxed_fixed_point(self, experiment, start):
        mixture, tables = fit_tables(CHAINS[experiment], start, 2, "relaxed-wta", epsilon=0.1)
        target = mixture.fit_hypotheses(mixture.chains, 0.1)
        assert np.abs(tables[match_chains(tables, target)] - target).max() < 1e-3
        assert mixture.winner_loss(tables) == pytest.approx(mixture.winner_loss(target), abs=1e-3)

    def test_without_competition_nothing_specialises(self, experiment, start):
        mixture, tables = fit_tables(CHAINS[experiment], start, 2, "mean")
        assert np.abs(tables - mixture.pbar).max() < 1e-3


def true_log_p(chains, tokens):
    return torch.from_numpy(chains).log()[:, tokens].float()


def test_summary_of_the_true_chains():
    chains = CHAINS["transition1"]
    data = MarkovDataset(chains, 200, seed=3)
    first = true_log_p(chains, torch.tensor([[0], [1]]))
    result = summarise(true_log_p(chains, data.tokens), data.tokens, first)
    tokens = data.tokens.numpy()
    nll = -np.log(chains[:, tokens[:, :-1], tokens[:, 1:]]).sum(-1)  # (2, N)
    assert result.wta == pytest.approx(nll.min(0).mean() / 31, abs=1e-6)
    assert result.standard_error == pytest.approx((nll.min(0) / 31).std() / 200**0.5, abs=1e-6)
    assert result.mixture == pytest.approx(-np.log(np.exp(-nll).mean(0)).mean() / 31, abs=1e-6)
    assert np.abs(np.array(result.matrices) - chains).max() < 1e-6
    assert np.abs(np.array(result.readout) - chains).max() < 1e-6
    best = np.array([(data.components == k).double().mean() for k in (0, 1)])
    assert result.wins == pytest.approx(best, abs=0.02)
    assert result.wta <= result.mixture <= result.wta + np.log(2) / 31


def test_a_hypothesis_without_wins_still_has_a_matrix():
    chains = np.stack([CHAINS["transition1"][0], [[0.999, 0.001], [0.001, 0.999]]])
    data = MarkovDataset(chains[:1], 50, seed=3)
    result = summarise(true_log_p(chains, data.tokens), data.tokens, true_log_p(chains, torch.tensor([[0], [1]])))
    assert result.wins == [1.0, 0.0]
    assert np.abs(np.array(result.matrices) - chains).max() < 1e-6


def test_matching_finds_the_order():
    chains = np.stack([transition_matrix(0.2, 0.9), transition_matrix(0.8, 0.25), transition_matrix(0.5, 0.5)])
    assert match_chains(chains[[2, 0, 1]], chains) == [1, 2, 0]
    assert match_chains(chains[[2, 0, 1]], chains[:2]) == [1, 2]
    learned = chains[[1, 0]].copy()
    learned[1, 1] = [0.85, 0.15]
    assert matrix_errors(learned, chains[:2], bound=0.86) == pytest.approx((0.0, 0.05))


def test_guess_is_the_likelier_chain():
    data = MarkovDataset(CHAINS["transition1"], 400, seed=1)
    guess = training.guess_winners(CHAINS["transition1"].tolist(), data.tokens)
    assert (guess == data.components).double().mean() > 0.99


def test_parameters_of_the_specified_size():
    model = build_model(MarkovConfig(), 2, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 296_448
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 65_536
    assert not any(p.requires_grad for name, p in model.named_parameters() if "polyrank_mcl" not in name)


def test_the_base_is_the_same_for_every_k_and_another_for_another_seed():
    config = MarkovConfig()
    first, again, other = (build_base(config, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_a_prediction_sees_exactly_the_memory():
    config = MarkovConfig()
    assert config.memory == 9
    model = build_model(config, 1, seed=0)
    tokens = torch.zeros(3, 20, dtype=torch.int64)
    tokens[1, 19 - 9] = 1  # ten tokens back, itself included: out of sight
    tokens[2, 19 - 8] = 1
    log_p = predict(model, 1, tokens)[0, :, 19]
    assert torch.equal(log_p[1], log_p[0])
    assert not torch.equal(log_p[2], log_p[0])


def test_attention_in_one_operation_is_gpt_neos():
    fused = build_base(MarkovConfig(), 0)
    plain = GPTNeoForCausalLM(GPTNeoConfig(**{**fused.config.to_dict(), "attn_implementation": "eager"})).eval()
    plain.load_state_dict(fused.state_dict())
    tokens = MarkovDataset(MarkovConfig().chains, 6, seed=1).tokens
    seen = torch.ones_like(tokens)
    seen[2, :7] = 0  # padding on the left
    for mask in (None, seen):
        logits = [model(tokens, attention_mask=mask).logits for model in (fused.eval(), plain)]
        kept = seen.bool() if mask is not None else ...
        assert torch.allclose(logits[0][kept], logits[1][kept], atol=1e-6)


@pytest.mark.parametrize("mode", ["wta", "relaxed-wta", "annealed-wta", "random-wta", "mean"])
def test_every_hypothesis_is_trained(mode):
    config = MarkovConfig(mode=mode, **SMALL)
    before = build_model(config, 2, seed=0).state_dict()
    model, _ = training.train(config, 2, seed=0)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "polyrank_mcl" in name}
    for name in moved:
        change = (after[name] - before[name]).abs().flatten(1).amax(1)
        assert bool((change > 0).all()), f"a hypothesis of {name} was not trained"


def test_training_repeats_itself():
    config = MarkovConfig(**SMALL)
    histories = [training.train(config, 2, seed=7)[1].history for _ in range(2)]
    assert histories[0] == histories[1]
    assert training.train(config, 2, seed=8)[1].history != histories[0]


def test_division_by_length_is_hidden_by_adam():
    plain, divided = (
        training.train(MarkovConfig(normalize_loss_by_T=flag, **SMALL), 1, seed=0)[1].final.wta
        for flag in (False, True)
    )
    assert plain != divided
    # Adam's eps = 1e-8 against gradients near 1e-4, divided by 31: a relative change of each step below 1e-2
    assert plain == pytest.approx(divided, abs=1e-4)


def test_rank_options():
    config = MarkovConfig(divide_rank_mcl=True, multiply_rank_1_hyp=True)
    assert (config.rank_of(1), config.rank_of(2)) == (128, 32)
    model = build_model(config, 2, seed=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 65_536
    assert set(model.base_model.model.transformer.h[0].attn.attention.q_proj.scaling.values()) == {1.0}


def test_a_frozen_head_cannot_pass_its_bound():
    config = MarkovConfig(**{**SMALL, "num_steps": 30, "learning_rate": 3e-2, "lr_scheduler_type": "constant"})
    model, _ = training.train(config, 1, seed=0)
    bound = reachable(config, 0)
    assert 0.80 < bound < 0.90
    highest = predict(model, 1, training.held_out_data(config, 0).tokens).exp().max()
    assert highest <= bound + 1e-6


def test_a_trained_head_is_trained_and_saved(tmp_path):
    config = MarkovConfig(train_head=True, **SMALL)
    model, _ = training.train(config, 2, seed=0)
    base = build_base(config, 0)
    head = model.base_model.model.lm_head
    assert not torch.equal(head.weight, base.lm_head.weight)
    assert torch.equal(model.base_model.model.transformer.wte.weight, base.transformer.wte.weight)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base, str(tmp_path))
    tokens = MarkovDataset(config.chains, 5).tokens
    assert torch.equal(predict(again, 2, tokens), predict(model, 2, tokens))
    assert reachable(config, 0) == 1.0


def test_run_writes_everything_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    config = MarkovConfig(log_transition_matrices_during_training=True, **SMALL)
    trained = []

    def killed(config, k, seed, on_step):
        trained.append(k)
        if trained == [1, 2]:
            on_step(0, {"step": 0, "wta": 1.0})
            raise KeyboardInterrupt
        return training.train(config, k, seed, on_step)

    monkeypatch.setattr("polyrank.recipes.markov.train", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path)
    run(config, tmp_path)
    assert trained == [1, 2, 2], "a finished arm is not trained again"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["hypotheses"], line["step"]) for line in lines] == [(k, s) for k in (1, 2) for s in (0, 2, 4)]
    assert all("matrices" in line for line in lines)
    record = read_record(tmp_path / "result.json")
    assert [row.settings["K"] for row in record.rows] == [1, 2]
    assert record.details["exact"]["mle"] == pytest.approx(0.529347, abs=1e-6)
    for name in ("loss.png", "transition_matrices.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "0.5293" in page
    assert (tmp_path / "adapters" / "seed-1235-k-2" / "adapter_model.safetensors").exists()

    monkeypatch.setattr("polyrank.recipes.markov.train", training.train)
    fresh = tmp_path / "fresh"
    run(config, fresh)
    assert [dict(row.figures, time_s=0) for row in read_record(fresh / "result.json").rows] == [
        dict(row.figures, time_s=0) for row in record.rows
    ]


def test_relaxed_and_more_hypotheses_than_chains(tmp_path):
    config = MarkovConfig(mode="relaxed-wta", epsilon=0.1, hypotheses=[2, 3], seeds=[0, 1], **SMALL)
    run(config, tmp_path)
    rows = read_record(tmp_path / "result.json").rows
    assert [(row.settings["K"], row.seed) for row in rows] == [(2, 0), (3, 0), (2, 1), (3, 1)]
    assert np.isnan(rows[1].figures["matrix_error"])
    assert "relaxed fixed point" in (tmp_path / "report.html").read_text()


def test_demo_returns_what_the_command_line_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("polyrank.recipes.markov.QUICK", SMALL)
    shown = run_demo(tmp_path, seed=3, quick=True)
    assert all(path.exists() for path in (*shown["figures"], shown["page"], shown["result"]))
    assert all(len(row) == len(shown["header"]) for row in shown["table"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2 hypotheses" in captured.err
    with pytest.raises(UserError, match="seed must be a whole number"):
        run_demo(tmp_path, seed=-1)


def test_recipes_compose():
    from polyrank.recipes._frame.compose import check_overrides, compose

    for name, transitions, mode in (("transition1", [0.2, 0.9], "wta"), ("transition2", [0.7, 0.8], "relaxed-wta")):
        settings = compose(check_overrides([f"recipe=markov/{name}", "train_head=true"])).settings
        assert (settings.transitions[0], settings.mode, settings.num_steps) == (transitions, mode, 501)
        assert settings.train_head
    assert compose(check_overrides(["recipe=markov/setup"])).settings.num_steps == 21


@pytest.mark.parametrize(
    "values, message",
    [
        ({"mode": "hard"}, "unknown mode 'hard'"),
        ({"start": "stationery"}, "did you mean 'stationary'"),
        ({"transitions": [[0.2, 1.0]]}, r"numbers in \(0, 1\)"),
        ({"hypotheses": [0]}, "numbers from 1 to 8"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"mode": "relaxed-wta", "epsilon": 0.5}, "epsilon must lie"),
        ({"hidden_size": 63}, "multiple of num_heads"),
        ({"sequence_length": 1}, "sequence_length must lie"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_bad_configurations(values, message):
    with pytest.raises(UserError, match=message):
        MarkovConfig(**values)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", [1235, 0, 1])
def test_thresholds(seed):
    """The recipe's own settings, on the held-out sequences as they are."""
    config = MarkovConfig(eval_every=100)
    theory = Theory.of(config)
    plain, two = (training.train(config, k, seed)[1].final for k in (1, 2))
    assert two.wta <= 0.512
    assert abs(plain.wta - theory.mixture.limited_memory_loss(9)) <= 0.012
    assert matrix_errors(two.matrices, config.chains, reachable(config, seed))[0] <= 0.06
    assert np.abs(np.array(plain.matrices[0]) - theory.mixture.pbar).max() <= 0.06
    assert min(two.wins) >= 0.45
    # the mixture of both is a likelihood, and better than one model of the same memory can be
    assert two.mixture < theory.mixture.limited_memory_loss(9)


@pytest.mark.slow
@pytest.mark.long
def test_a_trained_head_reaches_all_entries():
    config = MarkovConfig(eval_every=100, train_head=True)
    final = training.train(config, 2, seed=1235)[1].final
    assert matrix_errors(final.matrices, config.chains, 1.0)[1] <= 0.03

"""DyLoRA: the acceptance checks of its method page, stock LoRA at every rank as the oracle, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from polyrank.adapters.dylora import DyloraConfig, cut, draw_rank, export_rank, mask, set_rank
from polyrank.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Model(nn.Module):
    def __init__(self, sizes=(12, 10, 6)):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(sizes[0], sizes[1]), nn.Linear(sizes[1], sizes[2])

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


def adapted(base=None, seed=1, **fields):
    torch.manual_seed(seed)
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["lin0", "lin1"], "init_weights": False, **fields}
    return get_peft_model(base or Model(), DyloraConfig(**fields))


def layers(model):
    return [model.base_model.model.lin0, model.base_model.model.lin1]


def at_rank(model, rank):
    """As if this rank had been drawn."""
    for layer in layers(model):
        layer.drawn["default"] = rank
        layer.drawn_tensor["default"].fill_(rank)
    return model


def gradients(model, x):
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss.item(), [(m.parameter("A", "default").grad, m.parameter("B", "default").grad) for m in layers(model)]


def test_by_hand():
    """2 x 2, alpha = 2: rank 1 is 2 b1 a1, rank 2 is b1 a1 + b2 a2."""
    model = adapted(nn.ModuleDict({"lin0": nn.Linear(2, 2)}), r=2, lora_alpha=2, target_modules=["lin0"])
    layer = model.base_model.model["lin0"]
    layer.parameter("A", "default").data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layer.parameter("B", "default").data = torch.tensor([[1.0, 10.0], [0.0, 100.0]])
    assert torch.equal(layer.delta_weight("default"), torch.tensor([[31.0, 42.0], [300.0, 400.0]]))
    set_rank(model, 1)
    assert torch.equal(layer.delta_weight("default"), torch.tensor([[2.0, 4.0], [0.0, 0.0]]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_rank_is_stock_lora(training, rslora):
    """Check 1: forward at rank b equals PEFT's LoRA made of A[:b], B[:, :b], alpha / b; 1e-12, b = r included."""
    base, x = Model(), torch.randn(5, 12)
    model = adapted(copy.deepcopy(base), use_rslora=rslora).train(training)
    for rank in (1, 2, 3, 4):
        if training:
            at_rank(model, rank)
        else:
            set_rank(model, rank)
        config = LoraConfig(r=rank, lora_alpha=6, target_modules=["lin0", "lin1"], use_rslora=rslora)
        stock = get_peft_model(copy.deepcopy(base), config).double()
        for ours, theirs in zip(layers(model), layers(stock), strict=True):
            theirs.lora_A["default"].weight.data = ours.parameter("A", "default").data[:rank].clone()
            theirs.lora_B["default"].weight.data = ours.parameter("B", "default").data[:, :rank].clone()
        torch.testing.assert_close(model(x), stock(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_gradient_support(rank):
    """Check 2: rows from b on have no gradient; in frozen mode row b - 1 only; both modes have the same loss."""
    base, x = Model(), torch.randn(5, 12)
    losses = []
    for mode in ("normal", "frozen"):
        loss, pairs = gradients(at_rank(adapted(copy.deepcopy(base), mode=mode), rank), x)
        losses.append(loss)
        for A, B in pairs:
            trained = {rank - 1} if mode == "frozen" else set(range(rank))
            for i in range(4):
                assert bool((A[i] != 0).all()) == bool((B[:, i] != 0).all()) == (i in trained)
                assert i in trained or (not A[i].any() and not B[:, i].any())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("hold", [False, True])
def test_mask_equals_slices(hold):
    """The shape-stable form that compiled training uses: same product, same gradients."""
    A, B = torch.randn(4, 7, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    for rank in (1, 2, 3, 4):
        pairs = []
        for a, b in (cut(A, B, rank, hold), mask(A, B, torch.tensor(rank), hold)):
            pairs.append([b @ a, *torch.autograd.grad((b @ a).square().sum(), (A, B))])
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_compiled_training_takes_every_rank():
    """One graph for all ranks, with the numbers of eager training."""
    model, x = adapted(), torch.randn(5, 12)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for rank in (3, 1, 4, 2):
        at_rank(model, rank)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


# -- draws ----------------------------------------------------------------------------------------------------------


def test_draws_are_uniform():
    """Check 3: 10,000 draws; chi-square of 7 degrees of freedom below 24.3 (its 99.9 % point)."""
    config = DyloraConfig(r=8)
    counts = torch.bincount(torch.tensor([draw_rank(config, i) for i in range(10_000)]), minlength=9)
    assert counts[0] == 0
    assert len(counts) == 9
    assert ((counts[1:] - 1250) ** 2 / 1250).sum() < 24.3


def test_draws_by_weight():
    """min_rank 3, weights 1 : 0 : 3 over ranks 3, 4, 5; chi-square of 1 degree of freedom below 10.8 (99.9 %)."""
    config = DyloraConfig(r=5, min_rank=3, rank_weights=[1, 0, 3])
    counts = torch.bincount(torch.tensor([draw_rank(config, i) for i in range(10_000)]), minlength=6)
    assert counts[[0, 1, 2, 4]].sum() == 0
    assert (counts[3] - 2500) ** 2 / 2500 + (counts[5] - 7500) ** 2 / 7500 < 10.8


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_one_draw_a_step(optimiser):
    """Check 3: layers and workers of one seed agree at each step; micro-batches of a step share its rank."""
    runs = []
    for worker in (1, 2):  # other parameters and other data: the draw is from the config's seed alone
        model, seen = adapted(seed=worker), []
        step = optimiser([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(12):
            for _ in range(2):
                model(torch.randn(3, 12)).square().mean().backward()
                drawn = {layer.drawn["default"] for layer in layers(model)}
                assert len(drawn) == 1
            seen += drawn
            step.step()
            step.zero_grad()
        assert layers(model)[0].steps["default"] == 12
        runs.append(seen)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 2
    assert runs[0] == [draw_rank(DyloraConfig(r=4), i) for i in range(12)]


def test_a_resumed_run_goes_on():
    """The draw of a step is where Adam's own count says, in a model that was loaded afresh."""
    model = adapted()
    first = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for _ in range(7):
        model(torch.randn(3, 12)).square().mean().backward()
        first.step()
    again = adapted()
    second = torch.optim.AdamW(p for p in again.parameters() if p.requires_grad)
    second.load_state_dict(first.state_dict())
    again(torch.randn(3, 12)).square().mean().backward()
    second.step()
    assert layers(again)[0].steps["default"] == 8
    assert layers(again)[0].drawn["default"] == draw_rank(DyloraConfig(r=4), 8)


def test_a_layer_of_another_rank():
    """rank_pattern: a layer of rank 2 draws the same quantile of its own ranks."""
    model = adapted(rank_pattern={"lin1": 2})
    wide, narrow = layers(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(20):
        assert narrow.drawn["default"] == (wide.drawn["default"] + 1) // 2
        optimiser.step()


def test_eval_depends_on_the_chosen_rank_only():
    """Check 5: two forwards are equal whatever was drawn; the chosen rank survives saving."""
    model, x = adapted().eval(), torch.randn(5, 12)
    for rank in (1, 3):
        set_rank(model, rank)
        outputs = [at_rank(model, drawn)(x) for drawn in (1, 2, 4)]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


def test_frozen_adapter_in_training_mode():
    """An adapter that is not trained is applied at its chosen rank, also while its neighbours train."""
    model, x = at_rank(adapted(), 1), torch.randn(5, 12)
    expected = model.eval()(x)
    model.requires_grad_(False)
    assert torch.equal(model.train()(x), expected)


# -- optimiser ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["normal", "frozen"])
def test_masked_step(mode):
    """mask_step: rows not drawn keep value and moments bit for bit; without it momentum and decay move them."""
    for masked in (True, False):
        model = adapted(mode=mode, mask_step=masked)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        held = moved = 0
        for _ in range(8):
            optimiser.zero_grad()
            model(torch.randn(3, 12)).square().mean().backward()
            layer = layers(model)[0]
            A, B = layer.parameter("A", "default"), layer.parameter("B", "default")
            rank, before = layer.drawn["default"], (A.detach().clone(), B.detach().clone())
            moments = optimiser.state[A]["exp_avg"].clone() if optimiser.state[A] else torch.zeros_like(A)
            optimiser.step()
            for i in range(4):
                drawn = i == rank - 1 if mode == "frozen" else i < rank
                same = torch.equal(A[i], before[0][i]) and torch.equal(B[:, i], before[1][:, i])
                same = same and torch.equal(optimiser.state[A]["exp_avg"][i], moments[i])
                assert not (drawn and same)
                held, moved = held + (same and not drawn), moved + (not same and not drawn)
        assert (held > 0, moved > 0) == (masked, not masked)


# -- merging, export ------------------------------------------------------------------------------------------------


def test_merge_remembers_its_rank():
    """Check 6: merge at rank 2, choose rank 4, unmerge: W as it was."""
    model = adapted().eval()
    before = [layer.get_base_weight().clone() for layer in layers(model)]
    set_rank(model, 2)
    model.merge_adapter()
    set_rank(model, 4)
    model.unmerge_adapter()
    for layer, weight in zip(layers(model), before, strict=True):
        torch.testing.assert_close(layer.get_base_weight(), weight, rtol=1e-14, atol=1e-14)
        assert layer.rank["default"] == 4


def test_any_rank_as_an_ordinary_folder(tmp_path):
    """Each rank is written as plain LoRA, loaded by PEFT alone, and the model is left as it was."""
    base, x = Model(), torch.randn(5, 12)
    model = adapted(copy.deepcopy(base)).eval()
    whole = model(x)
    for rank in (1, 2, 4):
        export_rank(model, tmp_path / str(rank), rank)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(rank)).eval()
        assert loaded.peft_config["default"].peft_type == "LORA"
        assert loaded.peft_config["default"].r == rank
        set_rank(model, rank)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-12, atol=1e-12)
        set_rank(model, 4)
    assert torch.equal(model(x), whole)
    set_rank(model, 3)
    model.save_pretrained(tmp_path / "own")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "own").eval()
    assert torch.equal(loaded(x), model(x))


def fit(config_class, **fields):
    """Adapt a zero 8 x 8 layer to a planted update (singular values 8, 4, 2, 1, random bases) by Adam; A, B, target."""
    torch.manual_seed(3)
    target = torch.linalg.qr(torch.randn(8, 8))[0][:, :4] * torch.tensor([8.0, 4.0, 2.0, 1.0])
    target = target @ torch.linalg.qr(torch.randn(8, 8))[0][:4]
    base = nn.ModuleDict({"lin0": nn.Linear(8, 8, bias=False)})
    nn.init.zeros_(base["lin0"].weight)
    model = get_peft_model(base, config_class(r=4, lora_alpha=4, target_modules=["lin0"], **fields))
    layer = model.base_model.model["lin0"]
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 4000)
    for _ in range(4000):
        optimiser.zero_grad()
        (layer(torch.eye(8)).T - target).square().sum().backward()  # whitened inputs: the loss is |BA - target|^2
        optimiser.step()
        schedule.step()
    return model, target


def losses(model, target):
    found = []
    for rank in (1, 2, 3, 4):
        set_rank(model, rank)
        found.append((model.base_model.model["lin0"].delta_weight("default") - target).square().sum().item())
    return found


def least_sum(singular_values):
    """Least sum over b = 1 .. 4 of |(4 / b) B[:, :b] A[:b] - target|^2, by L-BFGS from six starts."""
    target, found = torch.diag(singular_values), []
    for seed in range(6):
        torch.manual_seed(seed)
        A, B = (0.7 * torch.randn(4, 8)).requires_grad_(), (0.7 * torch.randn(8, 4)).requires_grad_()
        optimiser = torch.optim.LBFGS([A, B], max_iter=500, line_search_fn="strong_wolfe")

        def total(A=A, B=B, optimiser=optimiser):
            optimiser.zero_grad()
            value = sum((4 / b * B[:, :b] @ A[:b] - target).square().sum() for b in (1, 2, 3, 4))
            value.backward()
            return value

        optimiser.step(total)
        found.append(total().item())
    return min(found)


@pytest.mark.parametrize("mode", ["normal", "frozen"])
def test_truncation_reaches_the_best_at_every_rank(mode):
    """Check 4 with one scale for all ranks: the loss at b is the best rank-b loss, the sum of the squared singular
    values that follow (64, 16, 4, 1), to 1 %."""
    model, target = fit(DyloraConfig, constant_scale=True, mode=mode)
    assert losses(model, target) == pytest.approx([21.0, 5.0, 1.0, 0.0], rel=0.01, abs=0.01)


def test_truncation_with_the_papers_scale():
    """Check 4 with alpha / b holds at b = 1 alone: near the best there, ahead of cut LoRA below r, but at b = 2, 3 the
    scale itself keeps it from the best.

    A component b_q a_q weighs alpha / b, so that no factors are right for two ranks at once: 1.1, 3.1 and 6.6 times
    the best loss at b = 1, 2, 3, where LoRA cut to b has 2.9, 7.3 and 11.8 times (the better of its two scales). This
    is the least sum over b that L-BFGS finds from six starts: longer training would not help.
    """
    model, target = fit(DyloraConfig)
    ours = losses(model, target)
    assert sum(ours) == pytest.approx(least_sum(torch.linalg.svdvals(target)), rel=0.01)
    plain, target = fit(LoraConfig)
    lora = plain.base_model.model["lin0"]
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    for rank, best, factor in ((1, 21.0, 1.25), (2, 5.0, 4.0), (3, 1.0, 8.0)):
        cuts = [(s * B[:, :rank] @ A[:rank] - target).square().sum().item() for s in (1.0, 4.0 / rank)]
        assert ours[rank - 1] < factor * best
        assert ours[rank - 1] < 0.6 * min(cuts)
        assert rank > 1 or min(cuts) > 2.5 * best


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mode": "forzen"}, "unknown mode 'forzen'; did you mean 'frozen'"),
        ({"min_rank": 9}, "min_rank must be an integer >= 1 and <= 8, got 9"),
        ({"inference_rank": 0}, "inference_rank must be an integer >= 1 and <= 8, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"rank_weights": [1.0]}, "rank_weights must be 8 numbers >= 0, one a rank"),
        ({"rank_weights": [0.0] * 8}, "rank_weights must be 8 numbers >= 0, one a rank"),
        ({"rank_weights": [1.0] * 8, "rank_pattern": {"x": 2}}, "rank_weights and rank_pattern exclude one another"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        DyloraConfig(**fields)


@pytest.mark.parametrize("rank", [0, 5, "2"])
def test_rank_errors(rank):
    with pytest.raises(ConfigError, match="rank must be an integer >= 1 and <= 4, got"):
        set_rank(adapted(), rank)


def test_no_such_adapter():
    with pytest.raises(ConfigError, match="the model has no adapter 'other' of method 'dylora'"):
        set_rank(adapted(), 2, "other")

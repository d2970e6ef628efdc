"""CoDyRA: the acceptance checks of its method page, the loop over tasks, forgetting, bad input."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from polyrank.adapters import export_lora
from polyrank.adapters.codyra import (
    CodyraConfig,
    active_ranks,
    component_sizes,
    continual_scores,
    masked_cross_entropy,
    merge_task,
    shrink,
)
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
    fields = {"r": 4, "target_modules": ["lin0", "lin1"], **fields}
    return get_peft_model(base or Model(), CodyraConfig(**fields))


def layers(model):
    return [m for m in model.modules() if hasattr(m, "merge_and_restart")]


def gates(model):
    return [layer.parameter("w", "default") for layer in layers(model)]


def train(model, loss, steps, lr=1e-2):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model).backward()
        optimiser.step()


# -- the update -----------------------------------------------------------------------------------------------------


def test_start_and_dense_product():
    """Check 1: the start is the base; with random B the output is that of W + B diag(w) A, to 1e-12."""
    base, x = Model(), torch.randn(5, 12)
    assert torch.equal(adapted(copy.deepcopy(base))(x), base(x))
    layer = layers(adapted(copy.deepcopy(base), init_weights=False))[0]
    A, B, w = (layer.parameter(name, "default") for name in "ABw")
    expected = x @ (base.lin0.weight + B @ torch.diag(w) @ A).T + base.lin0.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_by_hand():
    """2 x 2, r = 2: 3 b1 a1 - b2 a2."""
    layer = layers(adapted(nn.ModuleDict({"lin0": nn.Linear(2, 2)}), r=2, target_modules=["lin0"]))[0]
    values = {"A": [[1.0, 2], [3, 4]], "B": [[1.0, 10], [0, 100]], "w": [3.0, -1]}
    for name, value in values.items():
        layer.parameter(name, "default").data = torch.tensor(value)
    assert torch.equal(layer.delta_weight("default"), torch.tensor([[-27.0, -34.0], [-300.0, -400.0]]))


# -- the threshold --------------------------------------------------------------------------------------------------


def test_proximal_step_by_grid_search():
    """Check 2: shrink(w, kappa) minimises (z - w)^2 / 2 + kappa |z| over a grid, for 200 pairs."""
    grid = torch.linspace(-4, 4, 40_001)  # a step of 2e-4
    for w, kappa in zip(torch.randn(200).tolist(), torch.rand(200).tolist(), strict=True):
        best = grid[((grid - w).square() / 2 + kappa * grid.abs()).argmin()]
        assert shrink(torch.tensor(w), kappa).item() == pytest.approx(best.item(), abs=1.1e-4)


def test_proximal_step_by_hand():
    """Check 2: the page's four numbers, and the released rule, which takes 0.12 and 0.19 to 0 with kappa = 0.1."""
    w = torch.tensor([0.12, 0.05, -0.19, 0.19, 0.3])
    torch.testing.assert_close(shrink(w, 0.1), torch.tensor([0.02, 0.0, -0.09, 0.09, 0.2]))
    torch.testing.assert_close(shrink(w, 0.1, "released"), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.2]))


def test_schedule():
    """Check 3: 0 for the first half, then 50 levels that never fall, the last max_kappa, where it stays."""
    config = CodyraConfig(total_steps=500, dense_ratio=0.5, max_kappa=5e-3)
    kappas = [config.kappa(step) for step in range(1, 501)]
    assert not any(kappas[:250])
    assert kappas == sorted(kappas)
    levels = sorted(set(kappas[250:]))
    assert len(levels) == 50
    assert all(kappas[250:].count(level) == 5 for level in levels)
    torch.testing.assert_close(torch.tensor(levels), torch.linspace(0, 5e-3, 50))
    assert kappas[-1] == config.kappa(900) == 5e-3
    short = CodyraConfig(total_steps=10, max_kappa=1.0)
    assert [short.kappa(step) for step in range(1, 11)] == [0, 0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_gates_move_by_the_optimiser_and_then_the_threshold(make):
    """Check 3: until dense_ratio T a twin without threshold has the same gates; from then on they are shrunk."""
    pruned, free = (adapted(max_kappa=k, total_steps=20, dense_ratio=0.5) for k in (0.1, 0.0))
    optimisers = [make([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (pruned, free)]
    for step in range(1, 21):
        x = torch.randn(4, 12)
        for model, optimiser in zip((pruned, free), optimisers, strict=True):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
        same = all(torch.equal(*pair) for pair in zip(gates(pruned), gates(free), strict=True))
        assert same == (step <= 11)  # the first of ten levels is 0
    assert sum(w.abs().sum() for w in gates(pruned)) < sum(w.abs().sum() for w in gates(free))


def test_released_threshold_in_training():
    model = adapted(threshold="released", total_steps=2, dense_ratio=0.0, max_kappa=0.2)
    gates(model)[0].data = torch.tensor([0.3, -0.3, 0.5, 1.0])
    train(model, lambda m: m(torch.zeros(1, 12)).sum() * 0.0, 2)
    torch.testing.assert_close(gates(model)[0].detach(), torch.tensor([0.0, 0.0, 0.3, 0.8]))


def test_transformers_trainer_thresholds(tmp_path):
    """Nothing is passed to the Trainer: gates are pruned there too, and weight decay spares them."""
    from transformers import Trainer, TrainingArguments

    class WithLoss(Model):
        def forward(self, x):
            return {"loss": super().forward(x).square().mean() * 0.0}

    torch.set_default_dtype(torch.float32)
    model = adapted(WithLoss(), total_steps=4, dense_ratio=0.0, max_kappa=0.3)
    before = [w.detach().clone() for w in gates(model)]
    rows = [{"x": torch.randn(12)} for _ in range(16)]
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "weight_decay": 0.5, "learning_rate": 0.1}
    arguments = TrainingArguments(tmp_path, **settings, report_to="none", disable_tqdm=True, use_cpu=True)
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    for old, w in zip(before, gates(model), strict=True):  # kappa: 0, 0.1, 0.2, 0.3
        torch.testing.assert_close(w.detach(), shrink(old, 0.6), rtol=1e-5, atol=1e-6)


# -- rank -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """Active ranks after fitting an update of rank 2 (singular values 4, 3) on whitened inputs, r = 8, by kappa."""
    torch.set_default_dtype(torch.float64)
    found = {}
    for kappa in (0.0, 5e-3, 2e-2):
        ranks = []
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            target = torch.linalg.qr(torch.randn(10, 10, generator=generator))[0][:, :2] * torch.tensor([4.0, 3.0])
            target = target @ torch.linalg.qr(torch.randn(10, 10, generator=generator))[0][:2]
            base = nn.ModuleDict({"lin0": nn.Linear(10, 10, bias=False)})
            fields = {"r": 8, "total_steps": 1000, "max_kappa": kappa, "target_modules": ["lin0"]}
            model = adapted(base, seed=seed, **fields)
            layer = layers(model)[0]
            goal = layer.get_base_weight() + target
            train(model, lambda m, layer=layer, goal=goal: (layer(torch.eye(10)).T - goal).square().sum(), 1000)
            ranks.append(sum(active_ranks(model).values()))
            error = (layer.delta_weight("default") - target).norm() / target.norm()
        found[kappa] = ranks, error.item()
    torch.set_default_dtype(torch.float32)
    return found


def test_planted_rank(planted):
    """Check 4: kappa = 0 keeps all 8; a fixed kappa leaves 2 to 4 of them, with the update still fitted."""
    assert planted[0.0][0] == [8, 8]
    ranks, error = planted[2e-2]
    assert all(2 <= rank <= 4 for rank in ranks), ranks
    assert error < 0.1


def test_planted_rank_falls_with_kappa(planted):
    """Check 4: no seed has more active ranks at a larger kappa."""
    table = [ranks for ranks, _ in planted.values()]
    for smaller, larger in itertools.pairwise(table):
        assert all(b <= a for a, b in zip(smaller, larger, strict=True)), table


# -- tasks ----------------------------------------------------------------------------------------------------------


def test_merge_task():
    """Check 5: the merged model has the unmerged logits, as many parameters, and the next task starts at zero."""
    base, x = Model(), torch.randn(5, 12)
    model = adapted(copy.deepcopy(base), init_weights=False)
    gates(model)[0].data[1:3] = 0.0
    expected, old = model(x), gates(model)[0]
    assert active_ranks(model) == {"base_model.model.lin0": 2, "base_model.model.lin1": 4}
    assert list(merge_task(model).values()) == [2, 4]
    for layer in layers(model):  # random values again, as the config asks; zero B is what a task starts with
        layer.parameter("B", "default").data.zero_()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert gates(model)[0] is not old
    assert gates(model)[0].requires_grad
    assert active_ranks(model) == {"base_model.model.lin0": 4, "base_model.model.lin1": 4}
    plain = model.unload()
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in base.state_dict().items()}


def test_a_task_starts_with_the_weights_it_finds():
    model, x = adapted(), torch.randn(5, 12)
    train(model, lambda m: (m(x) - 1).square().mean(), 30)
    expected = model(x)
    merge_task(model)
    assert all(not layer.delta_weight("default").any() for layer in layers(model))
    assert all(layer.steps["default"] == 0 for layer in layers(model))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    train(model, lambda m: (m(x) + 1).square().mean(), 30)
    assert (model(x) + 1).square().mean() < (expected + 1).square().mean()


def test_fp32_master_of_half_precision_weights():
    """Twelve merged tasks of an update below bf16's rounding add up; without a master each would be lost."""
    base = nn.ModuleDict({"lin0": nn.Linear(2, 2, bias=False)}).bfloat16()
    base["lin0"].weight.data.fill_(1.0)
    model = get_peft_model(base, CodyraConfig(r=1, target_modules=["lin0"]))
    layer = layers(model)[0]
    for _ in range(12):
        for name, value in (("A", 1.0), ("B", 1e-3), ("w", 1.0)):
            layer.parameter(name, "default").data.fill_(value)
            assert layer.parameter(name, "default").dtype == torch.float32
        merge_task(model)
    assert layer.get_base_weight().dtype == torch.bfloat16
    assert (layer.get_base_weight().float() - 1.012).abs().max() < 2**-8  # half a step of bf16 above 1
    assert (layer.get_base_weight() > 1).all()
    torch.testing.assert_close(layer.master, torch.full((2, 2), 1.012, dtype=torch.float32))


def test_export_holds_active_ranks_only(tmp_path):
    """An ordinary LoRA folder: closed gates are gone, and a layer without any is no target."""
    base, x = Model(), torch.randn(5, 12)
    model = adapted(copy.deepcopy(base), init_weights=False).eval()
    gates(model)[0].data[:3] = 0.0
    export_lora(model, tmp_path / "three")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "three").eval()
    torch.testing.assert_close(loaded(x), model(x))
    assert loaded.base_model.model.lin0.r["default"] == 1
    gates(model)[0].data.zero_()
    export_lora(model, tmp_path / "one")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one").eval()
    assert type(loaded.base_model.model.lin0) is nn.Linear
    torch.testing.assert_close(loaded(x), model(x))
    gates(model)[1].data.zero_()
    with pytest.raises(ConfigError, match="no component left in any layer"):
        export_lora(model, tmp_path / "none")


def test_component_sizes():
    """|w| |b| |a| is the Frobenius norm of each component."""
    model = adapted(init_weights=False)
    layer = layers(model)[0]
    A, B, w = (layer.parameter(name, "default") for name in "ABw")
    expected = [torch.linalg.matrix_norm(w[q] * torch.outer(B[:, q], A[q])).item() for q in range(4)]
    assert component_sizes(model)["base_model.model.lin0"].tolist() == pytest.approx(expected)


def test_masked_cross_entropy():
    """Check 6: seen classes get a gradient of exactly 0; the loss is that over the remaining classes."""
    logits, seen = torch.randn(6, 5, requires_grad=True), torch.tensor([True, False, True, False, False])
    labels = torch.tensor([1, 3, 4, 4, 1, 3])
    loss = masked_cross_entropy(logits, labels, seen)
    rest = nn.functional.cross_entropy(logits[:, ~seen], torch.tensor([0, 1, 2, 2, 0, 1]))
    torch.testing.assert_close(loss, rest)
    loss.backward()
    assert torch.equal(logits.grad[:, seen], torch.zeros(6, 2))
    assert logits.grad[:, ~seen].abs().min() > 0
    with pytest.raises(ConfigError, match="label 2 is of a class that is left out as seen"):
        masked_cross_entropy(logits, torch.tensor([1, 2, 4, 4, 1, 3]), seen)


def test_continual_scores_by_hand():
    """Three tasks: transfer (0.2, (0.3 + 0.5) / 2), forgetting (0.9 - 0.6, 0.8 - 0.7)."""
    scores = continual_scores([[0.9, 0.2, 0.3], [0.7, 0.8, 0.5], [0.6, 0.7, 1.0]])
    expected = {"transfer": 0.3, "average": 5.7 / 9, "last": 2.3 / 3, "forgetting": 0.2}
    assert scores == pytest.approx(expected)
    with pytest.raises(ConfigError, match="scores must be a square table of 2 tasks or more"):
        continual_scores([[1.0, 2.0], [1.0]])


def two_tasks(kappa, seed):
    """Error of task 0 and of task 1 after training on 0 and then on 1; the tasks' inputs overlap in part."""
    torch.manual_seed(seed)
    base = nn.ModuleDict({"lin0": nn.Linear(12, 6, bias=False)})
    weight = base["lin0"].weight.detach().clone()
    spans = torch.linalg.qr(torch.randn(12, 12))[0]
    spans = spans[:, :7], spans[:, 5:]
    updates = [torch.outer(torch.randn(6), torch.randn(12)) / 2 for _ in range(2)]
    model = adapted(base, seed=seed, r=8, total_steps=300, max_kappa=kappa, target_modules=["lin0"])
    layer = layers(model)[0]
    errors = []
    for task in range(2):
        goals = [(s.T, s.T @ (weight + u).T) for s, u in zip(spans, updates, strict=True)]
        x, y = goals[task]
        y = y + 0.3 * torch.randn_like(y)  # noise that a full rank fits, to the other task's cost
        train(model, lambda m, x=x, y=y: (layer(x) - y).square().sum(), 300)
        merge_task(model)
        errors.append([-(layer(x) - y).square().mean().item() for x, y in goals])
    return continual_scores(errors)["forgetting"], -errors[1][1]


def test_forgetting_of_two_tasks(record_property):
    """Check 7, five seeds: reported; what is asserted is that pruning costs the new task no more than it loses."""
    found = {}
    for kappa in (0.0, 5e-2):
        runs = torch.tensor([two_tasks(kappa, seed) for seed in range(5)])
        found[kappa] = runs.mean(0).tolist()
        record_property(f"kappa={kappa}: forgetting, loss of the new task", found[kappa])
    assert found[5e-2][0] <= found[0.0][0]
    assert found[5e-2][1] <= 1.25 * found[0.0][1]


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"total_steps": 0}, "total_steps must be an integer >= 1, got 0"),
        ({"dense_ratio": 1.0}, r"dense_ratio must lie in \[0, 1\), got 1.0"),
        ({"max_kappa": -1e-3}, r"max_kappa must lie in \[0, inf\), got -0.001"),
        ({"levels": 1}, "levels must be an integer >= 2, got 1"),
        ({"threshold": "sotf"}, "unknown threshold 'sotf'; did you mean 'soft'"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        CodyraConfig(**fields)


def test_task_errors():
    model = adapted()
    with pytest.raises(ConfigError, match="the model has no adapter 'other' of method 'codyra'"):
        merge_task(model, "other")
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge the adapters before ending a task"):
        merge_task(model)


def test_math_of_the_released_rule_is_not_a_proximal_step():
    """A value between kappa and 2 kappa: the released rule is farther from the minimum of the objective."""
    w, kappa = torch.tensor(0.19), 0.1
    cost = [0.5 * (z - w) ** 2 + kappa * abs(z) for z in (shrink(w, kappa), shrink(w, kappa, "released"))]
    assert cost[0] < cost[1]
    assert math.isclose(cost[0].item(), 0.5 * 0.01 + 0.1 * 0.09)

"""SaRA: the acceptance checks of its method page against dense, masked training; saving; bad input."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from polyrank.adapters.sara import SaraConfig, checksum, nuclear_penalty, suggested_learning_rate
from polyrank.core.errors import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Model(nn.Module):
    def __init__(self, layer=nn.Linear):
        super().__init__()
        make = (lambda i, o: Conv1D(o, i)) if layer is Conv1D else layer
        self.lin0, self.lin1 = make(12, 10), make(10, 6)
        for lin in (self.lin0, self.lin1):
            nn.init.normal_(lin.weight, std=0.3)

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


def adapted(base=None, seed=1, **fields):
    torch.manual_seed(seed)
    fields = {"threshold": 0.1, "target_modules": ["lin0", "lin1"], **fields}
    return get_peft_model(base or Model(), SaraConfig(**fields))


def layers(model):
    return [m for m in model.modules() if hasattr(m, "scattered")]


def values(model):
    return [layer.parameter("values", "default") for layer in layers(model)]


def kept(model):
    return [layer.parameter("kept", "default") for layer in layers(model)]


def train(model, steps, make=torch.optim.AdamW, lr=1e-2):
    torch.manual_seed(5)
    optimiser = make(values(model), lr=lr, weight_decay=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        (model(torch.randn(8, 12)) - 1).square().mean().backward()
        optimiser.step()
    return optimiser


def masks(base, threshold=0.1):
    return [lin.weight.abs() < threshold for lin in (base.lin0, base.lin1)]


# -- start, support, gradients --------------------------------------------------------------------------------------


def test_by_hand():
    """2 x 2, threshold 0.5: the entries 0.2 and -0.4 are trained, from where they are."""
    base = nn.ModuleDict({"lin0": nn.Linear(2, 2, bias=False)})
    base["lin0"].weight.data = torch.tensor([[0.2, 1.0], [-2.0, -0.4]])
    model = adapted(base, threshold=0.5, target_modules=["lin0"])
    (v,) = values(model)
    assert v.tolist() == [0.2, -0.4]
    v.data = torch.tensor([3.0, 4.0])
    assert torch.equal(layers(model)[0](torch.eye(2)).T, torch.tensor([[3.0, 1.0], [-2.0, 4.0]]))
    torch.testing.assert_close(layers(model)[0].delta_weight("default"), torch.tensor([[2.8, 0.0], [0.0, 4.4]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
def test_start_is_the_base(layer, dtype):
    """Check 1: bit for bit, negative entries among the selected ones; merged too."""
    base, x = Model(layer).to(dtype), torch.randn(5, 12).to(dtype)
    model = adapted(copy.deepcopy(base))
    assert any((v < 0).any() for v in values(model))
    assert torch.equal(model(x), base(x))
    merged = model.merge_and_unload()
    for ours, theirs in zip(merged.parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
def test_only_selected_entries_change(layer):
    """Check 2: after 100 steps of AdamW with decay, unselected entries are the base's bits, selected ones differ."""
    base = Model(layer)
    model = adapted(copy.deepcopy(base), reselect_at=0.0)
    train(model, 100)
    merged = model.merge_and_unload()
    for ours, theirs, mask in zip((merged.lin0, merged.lin1), (base.lin0, base.lin1), masks(base), strict=True):
        assert 0 < mask.sum() < mask.numel()
        assert torch.equal(ours.weight[~mask], theirs.weight[~mask])
        assert (ours.weight[mask] != theirs.weight[mask]).all()
        assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
def test_packed_gradient_is_the_dense_one(layer):
    """Check 3: gradients of values and input to 1e-10, for a batch of sequences."""
    base = Model(layer).requires_grad_(True)
    model = adapted(copy.deepcopy(base))
    x = torch.randn(2, 3, 12, requires_grad=True)
    x_dense = x.detach().clone().requires_grad_()
    (model(x) - 1).square().sum().backward()
    (base(x_dense) - 1).square().sum().backward()
    for v, lin, mask in zip(values(model), (base.lin0, base.lin1), masks(base), strict=True):
        torch.testing.assert_close(v.grad, lin.weight.grad[mask], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, x_dense.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_trajectory_is_that_of_masked_dense_training(make):
    """Check 3: 20 steps on packed values and on dense weights with masked gradients agree to 1e-8, the penalty in the
    dense training's loss."""
    base = Model()
    model = adapted(copy.deepcopy(base), penalty=0.03, penalty_layers=0)
    dense, where = copy.deepcopy(base), masks(base)
    train(model, 20, make)
    weights, original = [dense.lin0.weight, dense.lin1.weight], [base.lin0.weight, base.lin1.weight]
    torch.manual_seed(5)
    optimiser = make(weights, lr=1e-2, weight_decay=1e-2)
    for _ in range(20):
        optimiser.zero_grad()
        norms = [torch.linalg.matrix_norm(w * mask, "nuc") for w, mask in zip(weights, where, strict=True)]
        ((dense(torch.randn(8, 12)) - 1).square().mean() + 0.03 * sum(norms) / 2).backward()
        for weight, mask in zip(weights, where, strict=True):
            weight.grad *= mask
        optimiser.step()
        for weight, mask, start in zip(weights, where, original, strict=True):
            weight.data[~mask] = start.data[~mask]
    for v, weight, mask in zip(values(model), weights, where, strict=True):
        torch.testing.assert_close(v.detach(), weight[mask].detach(), rtol=1e-8, atol=1e-8)


# -- penalty --------------------------------------------------------------------------------------------------------


def test_gradient_of_the_penalty():
    """Check 4: (U V^T) at the selected places, from a singular value decomposition, over the number of layers."""
    base = Model()
    model = adapted(copy.deepcopy(base), penalty=2.0, penalty_layers=0)
    nuclear_penalty(model).backward()
    for v, lin, mask in zip(values(model), (base.lin0, base.lin1), masks(base), strict=True):
        U, _, V = torch.linalg.svd(lin.weight * mask, full_matrices=False)
        torch.testing.assert_close(v.grad, 2.0 / 2 * (U @ V)[mask], rtol=1e-9, atol=1e-9)


def penalty_gradients(model, steps):
    """What optimiser steps add to gradients of zero, layer by layer; a rate of 0 leaves the values alone."""
    optimiser, found = torch.optim.SGD(values(model), lr=0.0), []
    for _ in range(steps):
        for v in values(model):
            v.grad = torch.zeros_like(v)
        optimiser.step()
        found.append([v.grad for v in values(model)])
    return found


def test_drawn_layers_estimate_the_penalty():
    """One layer a step: each draw has the gradient of one of the two norms, and their mean is the whole gradient."""
    (whole,) = penalty_gradients(adapted(penalty=1.0, penalty_layers=0), 1)
    draws = penalty_gradients(adapted(penalty=1.0), 200)
    counts = [0, 0]
    for first, second in draws:
        drawn = 0 if first.any() else 1
        torch.testing.assert_close((first, second)[drawn], 2 * whole[drawn])
        assert not (first, second)[1 - drawn].any()
        counts[drawn] += 1
    assert min(counts) > 60  # binomial(200, 1/2): below 61 in fewer than 1 of 10^7 runs


def test_draws_depend_on_the_step_alone():
    """Workers whose random states have parted, and a run that goes on after 7 steps, draw the same layers."""
    runs = []
    for seed in (1, 2):
        model = adapted(penalty=1.0, seed=seed)
        torch.manual_seed(seed)
        runs.append([bool(first.any()) for first, _ in penalty_gradients(model, 12)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 2
    model = adapted(penalty=1.0, reselect_at=0.0)
    optimiser = train(model, 7)
    again = adapted(penalty=1.0, reselect_at=0.0)
    second = torch.optim.AdamW(values(again))
    second.load_state_dict(optimiser.state_dict())
    for v in values(again):
        v.grad = torch.zeros_like(v)
    second.step()
    assert bool(values(again)[0].grad.any()) == runs[0][7]


def test_nuclear_norm_falls_with_the_penalty():
    """Check 4: after training it is strictly smaller for each larger penalty of 0, 0.05, 0.5."""
    base, norms = Model(), []
    for penalty in (0.0, 0.05, 0.5):
        model = adapted(copy.deepcopy(base), penalty=penalty, penalty_layers=0)
        train(model, 100)
        norms.append(sum(torch.linalg.matrix_norm(m.selected("default"), "nuc").item() for m in layers(model)))
    assert norms[0] > norms[1] > norms[2]


def language_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, attention_dropout=0.0)).double()
    fields = {"threshold": 0.01, "penalty": 3.0, "penalty_layers": 0, "target_modules": ["q_proj", "v_proj"]}
    return get_peft_model(base, SaraConfig(**fields, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_trainer_has_the_penalty_once_a_step(accumulated, smoothing, tmp_path):
    """transformers' Trainer, which makes the loss itself when it smooths labels: three steps of SGD on 4 rows, whole or
    one after the other, are those of loss + penalty in a loop."""
    ids = torch.randint(0, 11, (12, 5), generator=torch.Generator().manual_seed(4))
    model, slow = language_model(), language_model()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4 // accumulated, learning_rate=0.1,
        gradient_accumulation_steps=accumulated, label_smoothing_factor=smoothing, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    optimiser = torch.optim.SGD([v.detach().requires_grad_() for v in values(slow)], lr=0.1)
    for rows in ids.split(4):
        loss = nn.functional.cross_entropy(
            slow(rows).logits[:, :-1].reshape(-1, 11), rows[:, 1:].flatten(), label_smoothing=smoothing
        )
        gradients = torch.autograd.grad(loss + nuclear_penalty(slow), values(slow))
        for p, v, gradient in zip(optimiser.param_groups[0]["params"], values(slow), gradients, strict=True):
            p.grad = gradient
            p.data = v.data
        optimiser.step()
    for ours, theirs in zip(values(model), values(slow), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_loss_scale_does_not_reach_the_penalty():
    """A fused optimiser takes scaled gradients and divides them itself; GradScaler divides before any other's step."""
    torch.set_default_dtype(torch.float32)
    found = []
    for scaled, fused in ((False, False), (True, False), (True, True)):
        model = adapted(penalty=2.0, penalty_layers=0, seed=0)
        optimiser = torch.optim.AdamW(values(model), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for _ in range(3):
            optimiser.zero_grad()
            scaler.scale((model(torch.ones(2, 12)) - 1).square().mean()).backward()
            scaler.step(optimiser)
            scaler.update()
        found.append([v.detach().clone() for v in values(model)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_an_adapter_out_of_use_is_left_alone():
    """Held by the optimiser, but not active: no gradient, so no penalty either."""
    model = adapted(penalty=10.0, penalty_layers=0)
    model.add_adapter("other", SaraConfig(threshold=0.1, penalty=10.0, target_modules=["lin0"]))
    (other,) = [m.parameter("values", "other") for m in layers(model) if m.has_adapter("other")]
    other.requires_grad_(True)
    before = other.detach().clone()
    optimiser = torch.optim.SGD([*values(model), other], lr=0.1)
    model(torch.randn(3, 12)).square().mean().backward()
    optimiser.step()
    assert torch.equal(other, before)
    assert other.grad is None


def test_hooks_of_the_base_layer_are_called():
    """Where something is hooked on the layer, its own forward runs and the change is added."""
    model, x, seen = adapted(init_weights=False), torch.randn(5, 12), []
    expected = model(x)
    layers(model)[0].base_layer.register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(model(x), expected)
    assert seen == [1]


# -- re-selection ---------------------------------------------------------------------------------------------------


def test_reselection():
    """Check 5: at T/2 the kept ones are those still below the threshold, with moments of zero; the others are fixed."""
    model = adapted(total_steps=20)
    optimiser = train(model, 10, lr=5e-2)
    at_half = [v.detach().clone() for v in values(model)]
    for v, mask in zip(values(model), kept(model), strict=True):
        assert torch.equal(mask, v.abs() < 0.1)
        assert 0 < mask.sum() < len(mask)
        assert not optimiser.state.get(v)  # made anew, from zero, by the next step
    for _ in range(15):
        optimiser.zero_grad()
        (model(torch.randn(8, 12)) - 1).square().mean().backward()
        assert all(not v.grad[~mask].any() for v, mask in zip(values(model), kept(model), strict=True))
        optimiser.step()
    for v, mask, before in zip(values(model), kept(model), at_half, strict=True):
        assert torch.equal(v[~mask], before[~mask])
        assert (v[mask] != before[mask]).all()
        assert torch.equal(optimiser.state[v]["step"], torch.tensor(15.0).to(optimiser.state[v]["step"]))


def test_reselection_happens_once_and_is_saved(tmp_path):
    """Adam's count starts anew at the re-selection; reaching it again selects nothing. The mask is in the folder."""
    base = Model()
    model = adapted(copy.deepcopy(base), total_steps=10)
    optimiser = train(model, 5, lr=2e-2)
    before = [mask.clone() for mask in kept(model)]
    for _ in range(8):
        optimiser.zero_grad()
        (model(torch.randn(8, 12)) - 1).square().mean().backward()
        optimiser.step()
    assert any((v.abs() >= 0.1)[mask].any() for v, mask in zip(values(model), before, strict=True))
    for one, other in zip(before, kept(model), strict=True):
        assert torch.equal(one, other)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    for one, other in zip(before, kept(loaded), strict=True):
        assert torch.equal(one, other)


# -- memory, saving -------------------------------------------------------------------------------------------------


def test_memory():
    """Check 6: gradient and Adam state take 3 x 4 bytes a selected weight; nothing of the weight's size stays."""
    torch.set_default_dtype(torch.float32)
    base = nn.ModuleDict({"lin0": nn.Linear(37, 41)})
    model = adapted(base, target_modules=["lin0"], threshold=0.02)
    (v,), layer = values(model), layers(model)[0]
    optimiser = torch.optim.AdamW([v])

    def dense():
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.numel() == 37 * 41]
        return len({o.data_ptr() for o in found})

    before, saved = dense(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = layer(torch.randn(3, 37)).square().sum()
    assert {t.data_ptr() for t in saved if t.numel() == 37 * 41} <= {base["lin0"].weight.data_ptr()} | {
        layer.get_base_weight().data_ptr()
    }
    loss.backward()
    optimiser.step()
    state = [t for t in optimiser.state[v].values() if t.numel() > 1]
    assert sum(t.nbytes for t in (v.grad, *state)) == 3 * 4 * int((layer.get_base_weight().abs() < 0.02).sum())
    assert dense() == before


def test_folder_belongs_to_one_base(tmp_path):
    """Check 7: same outputs on a fresh base, bit for bit; another base, or another dtype of it, is an error."""
    base, x = Model(), torch.randn(5, 12)
    model = adapted(copy.deepcopy(base))
    train(model, 5)
    expected = model.eval()(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x), expected)
    changed = copy.deepcopy(base)
    changed.lin0.weight.data[0, 0] += 1e-9
    for other in (changed, Model(), copy.deepcopy(base).float()):
        with pytest.raises(CheckpointError, match=r"trained on other weights of 'base_model\.model\.lin0' than"):
            PeftModel.from_pretrained(other, tmp_path)


def test_merged_equals_the_edited_weight():
    """What is merged is v itself, not W + (v - W), and unmerging puts the bits back."""
    torch.set_default_dtype(torch.float32)
    model, x = adapted(), torch.randn(5, 12)
    for v in values(model):
        v.data = torch.randn_like(v) * 1e3
    expected, before = model.eval()(x), [layer.get_base_weight().clone() for layer in layers(model)]
    model.merge_adapter()
    assert torch.equal(model(x), expected)
    for layer, v in zip(layers(model), values(model), strict=True):
        assert torch.equal(layer.get_base_weight().flatten()[layer.parameter("places", "default")], v)
    model.unmerge_adapter()
    for layer, weight in zip(layers(model), before, strict=True):
        assert torch.equal(layer.get_base_weight(), weight)


# -- selection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.01, 0.25, 0.9])
def test_density(density, dtype):
    """The smallest share of each layer, whatever its scale, rounded up to whole entries."""
    base = Model().to(dtype)
    base.lin1.weight.data *= 1000
    for v, lin in zip(values(adapted(copy.deepcopy(base), density=density)), (base.lin0, base.lin1), strict=True):
        count = math.ceil(density * lin.weight.numel())
        assert len(v) == count or (dtype == torch.bfloat16 and len(v) >= count)  # ties come in together
        assert v.abs().max() == lin.weight.abs().flatten().sort().values[count - 1]


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_as_many_as_lora(rank):
    """lora_rank: r (in + out) of each layer's smallest weights, at most all of them."""
    counts = [len(v) for v in values(adapted(lora_rank=rank))]
    assert counts == [min(rank * 22, 120), min(rank * 16, 60)]


def test_suggested_learning_rate():
    assert suggested_learning_rate(2e-3) == pytest.approx(1e-3 * math.exp(-0.7))


def test_checksum_sees_every_bit():
    weight = torch.randn(3, 4)
    other = weight.clone()
    assert checksum(weight) == checksum(other)
    other[2, 3] = -other[2, 3]
    assert checksum(weight) != checksum(other)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"threshold": -1.0}, r"threshold must lie in \[0, inf\), got -1.0"),
        ({"density": 1.0}, r"density must lie in \(0, 1\), got 1.0"),
        ({"density": 0.0}, r"density must lie in \(0, 1\), got 0.0"),
        ({"penalty": "x"}, "penalty must be a finite number, got 'x'"),
        ({"penalty_layers": -1}, "penalty_layers must be an integer >= 0, got -1"),
        ({"total_steps": 0}, "total_steps must be an integer >= 1, got 0"),
        ({"reselect_at": 1.0}, r"reselect_at must lie in \[0, 1\), got 1.0"),
        ({"lora_rank": 0}, "lora_rank must be an integer >= 1, got 0"),
        ({"lora_rank": 1, "density": 0.1}, "give density or lora_rank, not both"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        SaraConfig(**fields)


def test_model_errors():
    with pytest.raises(ConfigError, match="the model has no adapter 'default' of method 'sara'"):
        nuclear_penalty(Model())
    with torch.device("meta"):
        base = nn.ModuleDict({"lin0": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match="layer 'lin0' has no weights yet"):
        adapted(base, target_modules=["lin0"])

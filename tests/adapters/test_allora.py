"""ALLoRA: the acceptance checks of its method page against dense formulas and PEFT's LoRA."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from polyrank.adapters.allora import AlloraConfig, RowScaled, row_factors, row_norms
from polyrank.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def one_layer(config, weight=None, A=None, B=None, sizes=(7, 5)):
    """A Linear layer with an adapter; A and B replaced where given."""
    torch.manual_seed(1)
    base = nn.ModuleDict({"lin0": nn.Linear(*sizes)})
    if weight is not None:
        base["lin0"].weight.data = weight.clone()
    layer = get_peft_model(base, config).double().base_model.model["lin0"]
    if A is not None:
        a, b = factors(layer)
        a.data, b.data = A.clone(), B.clone()
    return layer


def factors(layer):
    if hasattr(layer, "lora_A"):
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.parameter("A", "default"), layer.parameter("B", "default")


def allora(**fields):
    return AlloraConfig(**{"r": 3, "target_modules": ["lin0"], **fields})


def lora(**fields):
    return LoraConfig(**{"r": 3, "lora_alpha": 3, "target_modules": ["lin0"], **fields})


def gradients(layer, x, g):
    """(g_A, g_B, g_x) for the output gradient g."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(layer(x), (*factors(layer), x), g)


def test_by_hand():
    """r = 1, A = (3, 4), B = (1, 0): |M_1| = 5, eta^2 = 1/4: c = 1/sqrt(9), 1/sqrt(4)."""
    A, B = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]])
    torch.testing.assert_close(row_norms(A, B), torch.tensor([5.0, 0.0]))
    torch.testing.assert_close(row_factors(A, B, 0.25), torch.tensor([1 / 3, 1 / 2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_is_stock_lora(dtype):
    """Check 1: bit for bit PEFT's LoRA with alpha = r, training or not; merged equals unmerged."""
    A, B, x = torch.randn(3, 7), torch.randn(5, 3), torch.randn(4, 6, 7)
    ours, stock = one_layer(allora(), A=A, B=B).to(dtype), one_layer(lora(), A=A, B=B).to(dtype)
    for layer in (ours, stock):
        assert layer.scaling["default"] == 1.0
    assert torch.equal(ours(x.to(dtype)), stock(x.to(dtype)))
    with torch.no_grad():
        assert torch.equal(ours(x.to(dtype)), stock(x.to(dtype)))
    if dtype == torch.float64:
        expected = ours(x)
        ours.merge()
        torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta_squared", [1.0, 2.0, 4.0])
def test_start(eta_squared):
    """Check 2: at B = 0, g_B is eta times LoRA's and g_A is 0."""
    A, B, x, g = torch.randn(3, 7), torch.zeros(5, 3), torch.randn(4, 7), torch.randn(4, 5)
    g_A, g_B, _ = gradients(one_layer(allora(eta_squared=eta_squared), A=A, B=B), x, g)
    _, stock, _ = gradients(one_layer(lora(), A=A, B=B), x, g)
    torch.testing.assert_close(g_B, math.sqrt(eta_squared) * stock, rtol=1e-12, atol=1e-12)
    assert not g_A.any()


def test_first_sgd_step_with_eta_1_is_loras():
    """Check 2: with eta = 1 the first step of SGD is LoRA's, bit for bit."""
    A, B, x = torch.randn(3, 7), torch.zeros(5, 3), torch.randn(4, 7)
    after = []
    for config in (allora(), lora()):
        layer = one_layer(config, A=A, B=B)
        layer(x).square().sum().backward()
        torch.optim.SGD(factors(layer), lr=0.1).step()
        after.append([p.detach() for p in factors(layer)])
    for ours, stock in zip(*after, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_gradients_equal_the_dense_formulas(shape):
    """Check 3: g_A, g_B with explicit M and c to 1e-10, token by token; g_x is LoRA's, to 1e-10."""
    A, B, W = torch.randn(3, 7), torch.randn(5, 3), torch.randn(5, 7)
    x, g = torch.randn(*shape, 7), torch.randn(*shape, 5)
    found = gradients(one_layer(allora(eta_squared=2.0), W, A, B), x, g)
    c = 1 / torch.sqrt(torch.linalg.vector_norm(B @ A, dim=1) + 0.5)
    g_A, g_B = torch.zeros_like(A), torch.zeros_like(B)
    for token, delta in zip(x.reshape(-1, 7), g.reshape(-1, 5), strict=True):
        g_A += torch.outer(B.T @ (c * delta), token)
        g_B += torch.outer(c * delta, A @ token)
    stock = gradients(one_layer(lora(), W, A, B), x, g)
    for one, other in zip(found, (g_A, g_B, g @ (W + B @ A)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[2], stock[2], rtol=1e-10, atol=1e-10)
    assert (found[0] - stock[0]).abs().max() > 0.1


def test_row_selectivity():
    """Check 4: row i of B times 100 changes c_i to the closed form and no other."""
    A, B = torch.randn(3, 7), torch.randn(5, 3)
    before, norm = row_factors(A, B, 2.0), torch.linalg.vector_norm((B @ A)[1])
    B[1] *= 100
    after = row_factors(A, B, 2.0)
    torch.testing.assert_close(after[1] / before[1], torch.sqrt((norm + 0.5) / (100 * norm + 0.5)))
    others = [0, 2, 3, 4]
    assert torch.equal(after[others], before[others])


def test_cheap_norm():
    """Check 5: the norms by r x r products equal those of the dense rows to 1e-10; the factors carry no gradient."""
    A, B = torch.randn(16, 300, requires_grad=True), torch.randn(200, 16, requires_grad=True)
    torch.testing.assert_close(row_norms(A, B), torch.linalg.vector_norm(B @ A, dim=1), rtol=1e-10, atol=1e-10)
    assert not row_factors(A, B, 1.0).requires_grad


def test_eta_of_later_layers_does_not_reach_the_first():
    """Check 6: five layers; the gradients of the first are the same whatever eta the others have."""
    found = []
    for eta_squared in (1.0, 4.0, 100.0):
        torch.manual_seed(2)
        net = nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)])
        model = get_peft_model(net, allora(target_modules=[str(i) for i in range(5)], init_weights=False))
        for layer in list(model.base_model.model)[1:]:
            layer.configs["default"].eta_squared = eta_squared
        model(torch.randn(4, 6)).square().sum().backward()
        found.append([p.grad for p in factors(model.base_model.model[0])])
        last = model.base_model.model[4].parameter("B", "default").grad
        assert last.abs().max() > 0
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


@pytest.mark.parametrize("eta_squared", [4.0, 16.0])
def test_scaling_law(eta_squared):
    """Check 7: SGD steps until |B| reaches a small fixed value fall by the factor eta, within 5 %."""

    def steps(eta_squared):
        layer = one_layer(allora(eta_squared=eta_squared))
        optimiser, x, y = torch.optim.SGD(factors(layer), lr=1e-6), torch.randn(20, 7), torch.randn(20, 5)
        for count in range(1, 5000):
            optimiser.zero_grad()
            (layer(x) - y).square().sum().backward()
            optimiser.step()
            if torch.linalg.matrix_norm(factors(layer)[1]) > 1e-2:
                return count
        raise AssertionError("not reached")

    ratio = steps(1.0) / steps(eta_squared)
    assert ratio == pytest.approx(math.sqrt(eta_squared), rel=0.05)


def test_adam_hides_the_factor_of_b():
    """What the page warns of: at the start Adam's step of B is the same for every eta."""
    x, updates = torch.randn(4, 7), []
    for eta_squared in (1.0, 100.0):
        layer = one_layer(allora(eta_squared=eta_squared))
        layer(x).sum().backward()
        torch.optim.Adam(factors(layer), lr=1e-3, eps=1e-12).step()
        updates.append(factors(layer)[1].detach())
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-8, atol=0)


def test_autocast():
    """Under autocast the products run in bf16, the gradients arrive in the parameters' dtype."""
    A, B, x = torch.randn(3, 7), torch.randn(5, 3), torch.randn(4, 7)
    layer = one_layer(allora(), A=A, B=B).float()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x.float())
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in factors(layer))
    expected = one_layer(allora(), layer.get_base_weight().double(), A, B)
    expected(x).square().sum().backward()
    for ours, exact in zip(factors(layer), factors(expected), strict=True):
        assert (ours.grad - exact.grad).abs().max() < 0.05 * exact.grad.abs().max()


def test_plain_function_passes_gradcheck_without_factors():
    """With c = 1 the function is an ordinary product: torch's own numerical check of its gradients."""
    values = [torch.randn(*shape, requires_grad=True) for shape in ((2, 7), (3, 7), (5, 3))]
    assert torch.autograd.gradcheck(lambda x, A, B: RowScaled.apply(x, A, B, torch.ones(5)), values)


def test_a_scale_may_be_asked_for():
    """lora_alpha: LoRA's scale, for comparisons; M is then the scaled update."""
    A, B, x, g = torch.randn(3, 7), torch.randn(5, 3), torch.randn(4, 7), torch.randn(4, 5)
    layer = one_layer(allora(lora_alpha=6), A=A, B=B)
    stock = one_layer(lora(lora_alpha=6), A=A, B=B)
    torch.testing.assert_close(layer(x), stock(x))
    c = row_factors(A, 2 * B, 1.0)
    torch.testing.assert_close(gradients(layer, x, g)[1], c[:, None] * gradients(stock, x, g)[1])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"eta_squared": 0}, "eta_squared must be > 0, got 0"),
        ({"eta_squared": -1.0}, r"eta_squared must lie in \[0, inf\), got -1.0"),
        ({"eta_squared": math.inf}, "eta_squared must be a finite number, got inf"),
        ({"lora_alpha": "x"}, "lora_alpha must be a finite number, got 'x'"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        AlloraConfig(**fields)


def test_config_without_a_scale_copies():
    config = AlloraConfig(r=4)
    assert config.lora_alpha is None
    assert copy.deepcopy(config) == config
    assert config.for_layer("x").scaling(4, None) == 1.0

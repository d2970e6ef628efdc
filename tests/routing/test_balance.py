"""The load-balance loss: Mixtral's own function, closed forms, and what a Trainer's step makes of it."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from polyrank import record_routing
from polyrank.core.errors import ConfigError
from polyrank.routing.gates import load_balance, sparse_gates

from .tiny_mixtures import TARGETS, adapted, batch, one_layer


def test_balance_loss_is_mixtrals_for_one_layer():
    torch.manual_seed(0)
    logits, mask = torch.randn(4, 6, 5), torch.ones(4, 6)
    mask[1, 3:] = 0
    for given in (None, mask):
        expected = load_balancing_loss_func((logits.reshape(-1, 5),), 5, 2, given)
        found = load_balance(logits.softmax(-1).flatten(0, 1), 2, None if given is None else given.flatten())
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_balance_loss_closed_forms():
    even = torch.full((8, 4), 0.25)
    assert load_balance(even, 2).item() == pytest.approx(2.0)  # k where P is uniform, whatever f is
    one = torch.eye(4)[torch.zeros(8, dtype=torch.long)]
    assert load_balance(one, 1).item() == pytest.approx(4.0)  # K at full collapse
    assert load_balance(torch.eye(4).repeat(2, 1), 1).item() == pytest.approx(1.0)
    # four layers that each collapse onto another expert: 4 one by one, 1 if they were counted together
    layers = [torch.eye(4)[torch.full((8,), e)] for e in range(4)]
    assert sum(load_balance(p, 1).item() for p in layers) / 4 == pytest.approx(4.0)
    assert load_balance(torch.cat(layers), 1).item() == pytest.approx(1.0)
    assert sparse_gates(torch.tensor([[0.6, 0.3, 0.1]]), 2)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0.0])


def mixtral_mean(record, mask):
    """Layer by layer with transformers' own function, which wants logits: log p is one."""
    layers = [(p.flatten(0, -2).log(), p.shape[-1]) for _, _, p in record.passes]
    return torch.stack([load_balancing_loss_func((logits,), k, 2, mask) for logits, k in layers]).mean()


def test_a_model_is_recorded_layer_by_layer_without_its_padding():
    model = adapted(num_experts=4, top_k=2)
    inputs = batch()
    with record_routing(model) as record:
        model(**inputs)
    assert len(record.passes) == 2 * len(TARGETS)
    found = record.load_balance_loss(inputs["attention_mask"])
    assert found.item() == pytest.approx(mixtral_mean(record, inputs["attention_mask"]).item(), rel=1e-6)
    assert found.item() != pytest.approx(record.load_balance_loss().item(), rel=1e-6)
    shares = record.expert_shares()
    assert len(shares) == 6
    assert all(name.endswith(tuple(TARGETS)) for name in shares)
    assert all(value.sum().item() == pytest.approx(1.0) for value in shares.values())
    model(**inputs)
    assert len(record.passes) == 6  # nothing outside the block
    with record_routing(model) as empty:
        pass
    with pytest.raises(ConfigError, match="no router was run"):
        empty.load_balance_loss()
    dense = adapted(num_experts=4)
    with record_routing(dense) as record:
        dense(**inputs)
    with pytest.raises(ConfigError, match="a dense router has no choices to balance"):
        record.load_balance_loss()
    assert record.load_balance_loss(top_k=1) > 0


def total_gradients(model, inputs):
    with record_routing(model) as record:
        loss = model(**inputs).loss
    (loss + 0.5 * record.load_balance_loss(inputs["attention_mask"])).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_gradient_checkpointing():
    plain = total_gradients(adapted(num_experts=4, top_k=2).train(), batch())
    model = adapted(num_experts=4, top_k=2).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in total_gradients(model, batch()).items():
        torch.testing.assert_close(gradient, plain[name])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="must be non-reentrant"):
        total_gradients(model, batch())


def trained(tmp_path, accumulation, name="a", **fields):
    """One step of SGD at rate 1 over four rows: the change of each parameter, the trainer, its micro-batches."""
    from transformers import TrainingArguments, default_data_collator

    from polyrank import MoeTrainer

    model = adapted(num_experts=4, **fields)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{key: value[i] for key, value in batch(4).items()} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / name), max_steps=1, per_device_train_batch_size=4 // accumulation, optim="sgd",
        gradient_accumulation_steps=accumulation, learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0,
        logging_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    seen = []

    def collate(rows):
        seen.append(default_data_collator(rows))
        return dict(seen[-1])

    trainer = MoeTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    return {n: before[n] - p for n, p in model.named_parameters() if p.requires_grad}, trainer, seen


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_adds_the_balance_of_each_micro_batch(tmp_path, accumulation):
    change, trainer, parts = trained(tmp_path, accumulation, top_k=2, load_balance_weight=0.5)
    assert len(parts) == accumulation
    model = adapted(num_experts=4, top_k=2, load_balance_weight=0.5).train()
    model(**batch(4)).loss.backward()  # the mean over all labelled tokens, in one batch
    balances = []
    for part in parts:
        with record_routing(model) as record:
            model(**part)
        balances.append(record.load_balance_loss(part["attention_mask"]))
    (0.5 * torch.stack(balances).mean()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(change[name], parameter.grad, rtol=1e-5, atol=1e-7)  # fp32 loss
    (logged,) = [entry for entry in trainer.state.log_history if "load_balance_loss" in entry]
    assert logged["load_balance_loss"] == pytest.approx(torch.stack(balances).mean().item(), rel=1e-5)


def test_a_dense_router_trains_as_with_the_plain_trainer(tmp_path):
    change, trainer, _ = trained(tmp_path, 1)
    model = adapted(num_experts=4).train()
    model(**batch(4)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(change[name], parameter.grad)
    assert not any("load_balance_loss" in entry for entry in trainer.state.log_history)


def test_the_balance_loss_brings_a_collapsed_router_back():
    model, layer = one_layer(num_experts=4, top_k=1, r=1)
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        layer.parameter("router_bias", "default").copy_(torch.tensor([10.0, 0.0, 0.0, 0.0]))
    optimiser = torch.optim.Adam([p for n, p in model.named_parameters() if "router" in n], lr=0.1)

    def shares():
        return layer.gates(x, "default").mean(0)

    assert (shares() > 0).sum() == 1
    for _ in range(150):
        with record_routing(model) as record:
            model(x)
        optimiser.zero_grad()
        record.load_balance_loss().backward()
        optimiser.step()
    assert shares().min() > 0.1

"""PAT: the acceptance checks of its method page, saving and resuming, families, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from polyrank.compression._pat_modules import (
    SparsificationModules,
    active_loss,
    identity_loss,
    offset,
    soft_mask,
    temperature,
)
from polyrank.compression.pat import PatConfig, PatTrainer, get_pat_model, load_pat, pat_loss, shrink, sparsification
from polyrank.core.errors import CheckpointError, ConfigError

VOCABULARY = 32
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
FAMILIES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "tied": (hf.LlamaForCausalLM, hf.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {}),
    "classifier": (hf.LlamaForSequenceClassification, hf.LlamaConfig, {}),
}


def tiny(family="llama", dtype=torch.float32, eps=1e-2):
    """Random weights, an eps that matters, norms of gain other than 1."""
    cls, config, more = FAMILIES[family]
    torch.manual_seed(0)
    model = cls(config(**SIZES, **HEADS, **ENDS, **more, rms_norm_eps=eps))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0.0, 0.15)
    return model.to(dtype).eval()


def lora(**fields):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields})


def stirred(model, seed=1):
    """Every trained value random: LoRA, L0, L1, v, scale, m."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids)[0]


def modules(width=12, places=5, rank=3, target=6, mask_steps=100, **more):
    torch.manual_seed(0)
    return SparsificationModules(width, places, rank, target, mask_steps, **more)


# -- acceptance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_the_base(family, dtype):
    """Check 1: at step 0 the logits are the base's bit for bit, and the loss is finite."""
    expected = logits(tiny(family, dtype))
    model = get_pat_model(tiny(family, dtype), PatConfig(total_steps=30), lora()).eval()
    assert torch.equal(logits(model), expected)
    assert torch.equal(sparsification(model).mask(), torch.ones(32))
    loss = pat_loss(model)
    loss.backward()
    assert math.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in sparsification(model).parameters() if p.grad is not None)
    with model.disable_adapter():
        assert torch.equal(logits(stirred(model)), expected)


def test_schedule_table():
    """Check 2: M at m = +-0.1 in closed form; beta continuous at s0/2; M binary at s0."""
    s0, m = 100, torch.tensor([0.1, -0.1], dtype=torch.float64)
    for s in (0, 25, 50, 99):
        tau = 0.0 if s == 0 else 1.0 / (1.0 - math.log(s) / math.log(s0))
        beta = 0.5 - s / s0 if s < 50 else 0.0
        expected = [1.0 / (1.0 + math.exp(-tau * value)) + beta for value in (0.1, -0.1)]
        assert soft_mask(m, s, s0).tolist() == pytest.approx(expected, rel=1e-12)
        assert temperature(s, s0) == pytest.approx(tau)
    assert soft_mask(m, 0, s0).tolist() == [1.0, 1.0]
    assert offset(49, s0) == pytest.approx(0.01)
    assert offset(50, s0) == offset(51, s0) == 0.0
    assert soft_mask(torch.tensor([0.1, -0.1, 0.0]), s0, s0).tolist() == [1.0, 0.0, 0.0]
    assert temperature(1, s0) == 1.0
    assert soft_mask(m, 99, s0)[0] > 0.99


def _double_norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_small_equals_masked(family, eps, dtype, tolerance, monkeypatch):
    """Check 3: random L1, LoRA and scale; masked against shrunken model. transformers' norms compute in fp32 whatever
    the model's dtype, so for fp64 they are replaced by their formula."""
    if dtype == torch.float64:
        for name in ("llama.modeling_llama.LlamaRMSNorm", "mistral.modeling_mistral.MistralRMSNorm",
                     "qwen2.modeling_qwen2.Qwen2RMSNorm"):  # fmt: skip
            monkeypatch.setattr(f"transformers.models.{name}.forward", _double_norm)
    model = get_pat_model(tiny(family, dtype, eps), PatConfig(total_steps=30), lora()).to(dtype)
    stirred(model)
    sparsification(model).set_step(10)
    small = shrink(model)
    assert (small.config.hidden_size, small.config.head_dim) == (24, 8)
    assert (logits(small) - logits(model)).abs().max() < tolerance
    assert not small.config.tie_word_embeddings
    if family == "llama":  # without the gain's correction they differ
        with torch.no_grad():
            for name, parameter in small.named_parameters():
                if "norm" in name:
                    parameter.mul_(math.sqrt(24 / 32))
        assert (logits(small) - logits(model)).abs().max() > 1e-2


def language(seed):
    """Transition probabilities of a Markov chain."""
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator), -1)


def sample(chain, rows, seed, length=20):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, VOCABULARY, (rows, 1), generator=generator)
    for _ in range(length - 1):
        x = torch.cat([x, torch.multinomial(chain[x[:, -1]], 1, generator=generator)], 1)
    return x


def train(model, data, steps, lr, seed=0):
    """Plain AdamW; with PAT's losses and step counter where the model has them."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    has_modules = any("polyrank_pat" in name for name, _ in model.named_modules())
    model.train()
    for step in range(steps):
        batch = data[torch.randint(0, len(data), (8,), generator=generator)]
        if has_modules:
            sparsification(model).set_step(step)
        loss = model(batch, labels=batch).loss + (pat_loss(model) if has_modules else 0.0)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def pretrained():
    """A Llama that has learnt one Markov chain, and the chain."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **HEADS, **ENDS))
    return train(model, sample(language(0), 256, 2), 120, 1e-2).requires_grad_(False), language(0)


@pytest.mark.slow
def test_active_channels_after_a_run(pretrained):
    """Check 4: 300 steps; exactly N channels, the same in every module."""
    base, chain = pretrained
    model = get_pat_model(copy.deepcopy(base), PatConfig(total_steps=300, sparsity=0.5), lora())
    train(model, sample(chain, 256, 5), 300, 5e-3)
    found = sparsification(model)
    assert int(found.kept.sum()) == 16
    assert set(found.mask().tolist()) == {0.0, 1.0}
    seen = []
    body = model.base_model.model.model
    for layer in (body.embed_tokens, *(part for block in body.layers for part in (block.self_attn, block.mlp))):
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    logits(model)
    assert len(seen) == 5
    for output in seen:
        assert torch.equal(output.abs().sum((0, 1)) > 0, found.kept)


def test_active_loss():
    """Check 5: gradient sign(count - N) / d on every m, and exactly 0 at equality."""
    found = modules(width=4, target=2)
    for values, count in (([1.0, 1.0, 1.0, -1.0], 3), ([-1.0, -1.0, 1.0, -1.0], 1), ([1.0, 1.0, -1.0, -1.0], 2)):
        found.logits.data = torch.tensor(values)
        found.logits.grad = None
        loss = active_loss(found)
        loss.backward()
        assert float(loss) == abs(2 - count) / 4
        assert found.logits.grad.tolist() == [(count > 2) / 4 - (count < 2) / 4] * 4
    found.logits.data.zero_()
    assert float(active_loss(found)) == 0.5  # none is active at the start
    found.choose()
    assert float(active_loss(found)) == 0.0


def test_active_loss_leads_to_the_count():
    """Descent on it alone, from many active channels of different m, ends at N."""
    found = modules(width=12, target=5)
    found.logits.data = torch.linspace(-0.3, 1.0, 12)
    optimiser = torch.optim.SGD([found.logits], lr=0.12)
    for _ in range(200):
        optimiser.zero_grad()
        active_loss(found).backward()
        optimiser.step()
    assert int((found.logits > 0).sum()) == 5


def test_identity_loss():
    """Check 6: every module contributes, with either factor; zero for orthonormal factors; a slow loop."""
    found = modules(width=8, places=5, rank=3)
    expected = 0.0
    for i in range(5):
        for gram in (found.down[i] @ found.down[i].T, found.up[i].T @ found.up[i]):
            expected += float(torch.sqrt(((gram - torch.eye(3)) ** 2).sum()))
    before = float(identity_loss(found))
    assert before == pytest.approx(expected, rel=1e-5)
    for i in range(5):
        for factor in (found.down, found.up):
            changed = modules(width=8, places=5, rank=3)
            getattr(changed, "down" if factor is found.down else "up").data[i] += 0.5
            assert abs(float(identity_loss(changed)) - before) > 1e-3
    for i in range(5):
        q = torch.linalg.qr(torch.randn(8, 3))[0]
        found.down.data[i], found.up.data[i] = q.T, q
    assert float(identity_loss(found)) == pytest.approx(0.0, abs=1e-5)


def formulas(config, tokens):
    """Parameters, and floating-point operations of one sequence, of an untied Llama without biases."""
    d, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    attention = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    matrices = layers * (d * attention + 3 * d * config.intermediate_size)
    parameters = matrices + 2 * vocabulary * d + (2 * layers + 1) * d
    products = layers * 2 * 2 * tokens * tokens * config.num_attention_heads * config.head_dim
    return parameters, 2 * tokens * (matrices + vocabulary * d) + products


def test_size_and_operations():
    """Check 7: parameters and measured FLOPs of the small model are the formula's, and fewer than the base's."""
    base = tiny("mistral")
    model = stirred(get_pat_model(base, PatConfig(total_steps=30), lora()))
    sparsification(model).set_step(10)
    small, found = shrink(model), []
    for each in (small, tiny("mistral")):
        each.config._attn_implementation = "eager"  # the counter does not see a processor's fused kernel
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(IDS[:1])
        expected = formulas(each.config, IDS.shape[1])
        found.append((sum(p.numel() for p in each.parameters()), counter.get_total_flops()))
        assert found[-1] == expected
    assert found[0][0] < found[1][0]
    assert found[0][1] < found[1][1]


def pruned_afterwards(adapted, target):
    """LoRA merged, then the channels whose writers weigh most are kept, nothing trained any more."""
    whole = copy.deepcopy(adapted).merge_and_unload()
    energy = whole.model.embed_tokens.weight.pow(2).sum(0)
    for layer in whole.model.layers:
        energy = energy + sum(w.pow(2).sum(1) for w in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight))
    model = get_pat_model(whole, PatConfig(total_steps=30, sparsity=1 - target / 32), lora())
    sparsification(model).logits.data = energy
    sparsification(model).choose()
    return shrink(model.eval())


@pytest.mark.slow
def test_better_than_pruning_after_lora(pretrained):
    """Check 7: at equal width and steps PAT's loss is below that of LoRA pruned afterwards, mean of 5 seeds."""
    base, old = pretrained
    chain = 0.5 * old + 0.5 * language(1)
    test, losses = sample(chain, 64, 8), []
    for seed in range(5):
        data = sample(chain, 256, 100 + seed)
        torch.manual_seed(seed)
        plain = train(get_peft_model(copy.deepcopy(base), lora()), data, 60, 5e-3, seed)
        model = get_pat_model(copy.deepcopy(base), PatConfig(total_steps=60, sparsity=0.25), lora())
        models = (shrink(train(model, data, 60, 5e-3, seed)), pruned_afterwards(plain, 24))
        assert {m.config.hidden_size for m in models} == {24}
        with torch.no_grad():
            losses.append([float(m(test, labels=test).loss) for m in models])
    ours, theirs = torch.tensor(losses).mean(0)
    assert ours < theirs


# -- modules --------------------------------------------------------------------------------------------------------


def test_module_by_hand():
    """d = 2, k = 1: scale * M * (u + L1 v L0 u)."""
    found = modules(width=2, places=1, rank=1, target=1)
    found.down.data = torch.tensor([[[1.0, 2.0]]])
    found.up.data = torch.tensor([[[3.0], [-1.0]]])
    found.gain.data = torch.tensor([[0.5]])
    found.scale.data = torch.tensor([[2.0, 4.0]])
    u = torch.tensor([1.0, 1.0])  # L0 u = 3, v: 1.5, L1: (4.5, -1.5), sum: (5.5, -0.5)
    assert found(u, 0).tolist() == [11.0, -2.0]
    found.logits.data = torch.tensor([-1.0, 1.0])
    found.choose()
    assert found(u, 0).tolist() == [0.0, -2.0]
    assert found.matrix(0).tolist() == [[4 * (0 - 0.5 * 1), 4 * (1 - 0.5 * 2)]]


def test_choice_keeps_the_largest_and_lasts():
    found = modules(width=6, target=3, mask_steps=10)
    found.logits.data = torch.tensor([0.0, 0.3, -0.1, 0.3, 0.2, 0.2])
    found.set_step(9)
    assert not found.chosen
    found.set_step(10)
    assert found.kept.tolist() == [False, True, False, True, True, False]
    found.logits.data = -found.logits.data  # momentum moves m on; the choice stays
    found.set_step(11)
    assert found.mask().tolist() == [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]


# -- training, folders ----------------------------------------------------------------------------------------------


def arguments(folder, **more):
    given = {"max_steps": 9, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 4, "seed": 1}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    return hf.TrainingArguments(output_dir=str(folder), **{**given, **quiet, **more})


def rows(count=24):
    return [{"input_ids": row, "labels": row} for row in sample(language(0), count, 4)]


def test_resumed_run_ends_as_the_whole_one(tmp_path):
    """The step counter, the chosen channels and all modules survive; the checkpoint lies on either side of step s0."""
    results = []
    for name, checkpoint in (("whole", None), ("again", "checkpoint-4"), ("early", "checkpoint-2")):
        model = get_pat_model(tiny(), PatConfig(total_steps=9, sparsity=0.5), lora())
        trainer = PatTrainer(
            model, arguments(tmp_path / name, save_steps=2), train_dataset=rows(), processing_class=None
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / "whole" / checkpoint))
        results.append({n: p.detach().clone() for n, p in model.state_dict().items() if "lora_" in n or "pat" in n})
        assert int(sparsification(model).step) == 8
    for result in results[1:]:
        assert all(torch.equal(value, result[name]) for name, value in results[0].items())


def test_trainer_adds_the_losses_once_a_step(tmp_path):
    """Two micro-batches of 4 give the gradient of one batch of 8; label smoothing keeps PAT's losses."""
    gradients = []
    for accumulation in (1, 2):
        config = PatConfig(total_steps=9, active_weight=5.0, identity_weight=0.1)
        model = stirred(get_pat_model(tiny(), config, lora()))
        more = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        given = arguments(tmp_path / str(accumulation), max_grad_norm=0.0, learning_rate=0.0, **more, max_steps=4)
        seen = {}

        class Watch(hf.TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model, seen=seen, **kwargs):
                if state.global_step == 0:
                    seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        PatTrainer(model, given, train_dataset=rows(), callbacks=[Watch()]).train()
        gradients.append(seen)
    name = next(n for n in gradients[0] if n.endswith("polyrank_pat.modules_to_save.default.logits"))
    assert gradients[0][name].abs().sum() > 0
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6)
    model = stirred(get_pat_model(tiny(), PatConfig(total_steps=9), lora())).train()
    trainer = PatTrainer(model, arguments(tmp_path / "smooth", label_smoothing_factor=0.1), train_dataset=rows())
    trainer.state.max_steps, trainer.current_gradient_accumulation_steps = 9, 1
    batch = {"input_ids": IDS, "labels": IDS}
    plain = hf.Trainer.compute_loss(trainer, model, dict(batch))
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), plain + pat_loss(model))
    decayed = trainer.get_decay_parameter_names(model)
    assert not any(name.endswith((".logits", ".gain", ".scale")) for name in decayed)
    assert any(name.endswith("polyrank_pat.modules_to_save.default.down") for name in decayed)


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        model = stirred(get_pat_model(tiny(), PatConfig(total_steps=30), lora())).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sparsification(model).set_step(5)
        (model(IDS, labels=IDS).loss + pat_loss(model)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded(family, dtype, tmp_path):
    model = stirred(get_pat_model(tiny(family, dtype), PatConfig(total_steps=30), lora()))
    sparsification(model).set_step(12)
    model.save_pretrained(tmp_path / "adapter")
    again = load_pat(tiny(family, dtype), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    found = sparsification(again)
    assert (int(found.step), int(found.mask_steps), int(found.target)) == (12, 10, 24)
    assert found.down.dtype == torch.float32
    small = shrink(model)
    small.save_pretrained(tmp_path / "small")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=dtype).eval()
    assert torch.equal(logits(loaded), logits(small))
    assert loaded.dtype == dtype
    assert loaded.generate(IDS[:, :3], max_new_tokens=3).shape == (3, 6)
    expected = logits(model).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * float(expected.abs().max())  # a few roundings to 8 bits
    assert (logits(small).float() - expected).abs().max() < tolerance


def test_plain_peft_says_what_to_load_with(tmp_path):
    get_pat_model(tiny(), PatConfig(total_steps=30), lora()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="load_with_polyrank_compression_pat"):
        PeftModel.from_pretrained(tiny(), tmp_path)


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"sparsity": 0.0}, r"sparsity must lie in \(0, 1\), got 0.0"),
        ({"sparsity": 1.0}, r"sparsity must lie in \(0, 1\), got 1.0"),
        ({"total_steps": 5}, "total_steps must be an integer >= 6, got 5"),
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"multiple_of": 1.5}, "multiple_of must be an integer"),
        ({"identity_weight": -1.0}, "identity_weight must be a number >= 0"),
    ],
)
def test_bad_options(fields, match):
    with pytest.raises(ConfigError, match=match):
        PatConfig(**{"total_steps": 30, **fields})


def test_bad_models(tmp_path):
    config = PatConfig(total_steps=30)
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, **ENDS))
    with pytest.raises(ConfigError, match="width of a 'gpt2' model is tied to its heads"):
        get_pat_model(gpt2, config)
    with pytest.raises(ConfigError, match="does not know model type 'Linear'"):
        get_pat_model(torch.nn.Linear(2, 2), config)
    with pytest.raises(ConfigError, match="in multiples of 4, leaves 32"):
        get_pat_model(tiny(), PatConfig(total_steps=30, sparsity=0.05))
    with pytest.raises(ConfigError, match="a llama model cannot have 23 channels"):
        get_pat_model(tiny(), PatConfig(total_steps=30, sparsity=0.28, multiple_of=1))
    with pytest.raises(ConfigError, match="rank 33 exceeds the model's width 32"):
        get_pat_model(tiny(), PatConfig(total_steps=30, rank=33))
    with pytest.raises(ConfigError, match="cannot train 'embed_tokens'"):
        get_pat_model(tiny(), config, lora(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(ConfigError, match="cannot train 'lm_head'"):
        get_pat_model(tiny("tied"), config, lora(modules_to_save=["lm_head"]))
    model = get_pat_model(tiny(), config, lora())
    with pytest.raises(ConfigError, match="modules already"):
        get_pat_model(model.base_model.model, config, lora())
    with pytest.raises(ConfigError, match="chosen at step 10, this model was trained for 0"):
        shrink(model)
    with pytest.raises(ConfigError, match="no sparsification modules"):
        shrink(get_peft_model(tiny(), lora()))
    trainer = PatTrainer(model, arguments(tmp_path, max_steps=10), train_dataset=rows())
    with pytest.raises(ConfigError, match="the run has 10 steps, the mask alone 10"):
        trainer.train()


def test_bad_folders(tmp_path):
    with pytest.raises(CheckpointError, match="holds no PAT model"):
        load_pat(tiny(), tmp_path)
    get_peft_model(tiny(), lora()).save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="holds no PAT model"):
        load_pat(tiny(), tmp_path / "lora")
    get_pat_model(tiny(), PatConfig(total_steps=30), lora()).save_pretrained(tmp_path / "pat")
    other = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **HEADS, **ENDS, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match="has 5 modules of width 32, the base needs 3 of width 32"):
        load_pat(other, tmp_path / "pat")


# -- command line ---------------------------------------------------------------------------------------------------


def test_a_run_from_the_command_line(text_run):
    """Trained with label smoothing, shrunk, decoded with the small model; a second sitting trains nothing."""
    given = ("pat", "method.options.sparsity=0.5", "method.options.r=2")
    folder = text_run(*given)
    small = hf.AutoModelForCausalLM.from_pretrained(folder / "small")
    assert (small.config.hidden_size, small.config.head_dim) == (8, 4)
    assert {"adapter", "small", "predictions.jsonl", "result.json"} <= {path.name for path in folder.iterdir()}
    assert hf.AutoTokenizer.from_pretrained(folder / "small").vocab_size == small.config.vocab_size
    written = (folder / "predictions.jsonl").read_bytes()
    for name in ("predictions.jsonl", "finished"):
        (folder / name).unlink()
    assert text_run(*given) == folder
    assert (folder / "predictions.jsonl").read_bytes() == written
    with pytest.raises(ConfigError, match="did you mean 'sparsity'"):
        text_run("pat", "+method.options.sparsty=0.5", "run_name=other")
    with pytest.raises(ConfigError, match=r"method 'pat': sparsity must lie in \(0, 1\)"):
        text_run("pat", "method.options.sparsity=2.0", "run_name=third")

"""LoRAM: the acceptance checks of its method page, families, folders, a real model, bad input."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from polyrank.compression._pruning_folder import read_plan
from polyrank.compression._pruning_layout import units
from polyrank.compression.loram import (
    LoramConfig,
    align_pruned,
    load_pruned,
    prune_model,
    recover_adapter,
    recover_state,
    save_pruned,
)
from polyrank.core.errors import CheckpointError, ConfigError, DataError
from polyrank.recipes._methods.loram_alignment import LoramOptions, text_rows

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(3))
DATA = Path(os.environ.get("POLYRANK_DATA", "data"))
STORIES = DATA / "models" / "stories260k" / "stories260K.bin"


def randomised(model, dtype):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.25) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def llama(dtype=torch.float64, groups=2, bias=True, **more):
    more = {"intermediate_size": 24, "num_key_value_heads": groups, "attention_bias": bias, "mlp_bias": bias, **more}
    return randomised(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **ENDS, **more)), dtype)


def gpt2(dtype=torch.float64):
    config = hf.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16, **ENDS)
    return randomised(hf.GPT2LMHeadModel(config), dtype)


def roberta(dtype=torch.float64):
    config = hf.RobertaConfig(**SIZES, **ENDS, intermediate_size=24, max_position_embeddings=32)
    return randomised(hf.RobertaForMaskedLM(config), dtype)


def adapted(model, targets="all-linear", seed=5, **fields):
    """LoRA of random A and B."""
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, target_modules=targets, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    return model.eval()


def recovered(small, plan, base, tmp_path):
    """The whole model with the adapter of the small one, through folders and PEFT."""
    small.save_pretrained(tmp_path / "small")
    folder = recover_adapter(tmp_path / "small", plan, tmp_path / "large")
    return PeftModel.from_pretrained(base, folder).eval()


def silenced(model, plan, keep):
    """The model with its kept (or else its pruned) heads and neurons alone: the inputs of all others' readers are 0."""

    def silence(unit, name):
        size = unit.readers[name]
        mask = torch.zeros(unit.groups * size)
        mask.view(unit.groups, size)[list(unit.kept)] = 1.0
        return lambda layer, args: (args[0] * (mask if keep else 1.0 - mask).to(args[0]),)

    for unit in plan.units:
        for name in unit.readers:
            model.get_submodule(name).register_forward_pre_hook(silence(unit, name))
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids)[0]


# -- acceptance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["self_attn", "mlp"])
def test_block_identity(block, tmp_path, monkeypatch):
    """Check 1: with random factors and no alignment, big(x; recovered) - small(x; trained) is what the pruned neurons
    and heads add by themselves, to 1e-10 in fp64."""
    base = llama(bias=False)
    pruned, plan = prune_model(base, LoramConfig(ratio=0.5))
    small = adapted(pruned, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    lost = silenced(copy.deepcopy(base), plan, keep=False).model.layers[1]
    big = recovered(small, plan, copy.deepcopy(base), tmp_path)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    rotary = base.model.rotary_emb(x, torch.arange(7)[None])
    given = {"position_embeddings": rotary, "attention_mask": None} if block == "self_attn" else {}

    def output(layer):
        with torch.no_grad():
            found = getattr(layer, block)(x, **given)
        return found[0] if isinstance(found, tuple) else found

    layers = [model.base_model.model.model.layers[1] for model in (big, small)]
    difference = output(layers[0]) - output(layers[1])
    assert difference.abs().max() > 0.1
    torch.testing.assert_close(difference, output(lost), rtol=0, atol=1e-10)


def test_support(tmp_path):
    """Check 2: exactly 0 outside the kept indices, equal inside; gathering undoes scattering; a permutation raises."""
    base = llama()
    pruned, plan = prune_model(base, LoramConfig(ratio=0.5))
    small = adapted(pruned)
    small.save_pretrained(tmp_path / "small")
    before = load_file(tmp_path / "small" / "adapter_model.safetensors")
    after = load_file(recover_adapter(tmp_path / "small", plan, tmp_path / "large") / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    changed = 0
    for unit in plan.units:
        for names, factor, dim in ((unit.writers, "lora_B", 0), (unit.readers, "lora_A", 1)):
            for name in names:
                key = f"base_model.model.{name}.{factor}.weight"
                index = unit.rows(name) if dim == 0 else unit.columns(name)
                assert torch.equal(after[key].index_select(dim, index), before[key])
                others = torch.ones(after[key].shape[dim], dtype=torch.bool).index_fill(0, index, False)
                assert not after[key].index_select(dim, others.nonzero().squeeze(1)).any()
                other = key.replace(factor, {"lora_B": "lora_A", "lora_A": "lora_B"}[factor])
                assert torch.equal(after[other], before[other])
                changed += before[key].shape != after[key].shape
    assert changed == 14
    with pytest.raises(ConfigError, match="must ascend within"):
        prune_model(base, LoramConfig(), kept={(0, "ffn"): [3, 1, 2]})


def test_zero_update(tmp_path):
    """Check 3: with B_P = 0 the recovered model is the original bit for bit, whatever A_P."""
    base = llama(torch.float32)
    pruned, plan = prune_model(base, LoramConfig(ratio=0.5))
    small = adapted(pruned)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    expected = logits(base)
    assert torch.equal(logits(recovered(small, plan, base, tmp_path)), expected)


def test_grouped_query():
    """Check 4: with 8 query and 2 key-value heads, the rows kept are those that silencing the other group leaves used:
    changing any other row changes nothing, changing any of them changes the output."""
    base = llama(groups=2)
    _, plan = prune_model(base, LoramConfig(), kept={(0, "attention"): [1]})
    unit = plan.units[0]
    assert (unit.layer, unit.kind, unit.groups) == (0, "attention", 2)
    masked = silenced(copy.deepcopy(base), plan, keep=True)
    with torch.no_grad():
        masked.model.layers[0].self_attn.k_proj.bias.normal_()  # softmax does not see a shift of all scores
    expected = logits(masked)
    for name in unit.writers:
        layer = masked.get_submodule(name)
        used = []
        for row in range(layer.out_features):
            with torch.no_grad():
                old = layer.weight[row].clone()
                layer.weight[row] += torch.randn_like(old)
                used += [row] if not torch.equal(logits(masked), expected) else []
                layer.weight[row] = old
        assert used == unit.rows(name).tolist()
    assert unit.rows("model.layers.0.self_attn.q_proj").tolist() == list(range(16, 32))
    assert unit.columns("model.layers.0.self_attn.o_proj").tolist() == list(range(16, 32))


@pytest.mark.parametrize("build", [llama, gpt2, roberta])
@pytest.mark.parametrize("scores", ["magnitude", "random"])
def test_pruned_equals_masked(build, scores):
    """Check 5: the pruned model is the full one with the other heads and neurons silenced, 1e-10."""
    base = build()
    pruned, plan = prune_model(base, LoramConfig(ratio=0.4, scores=scores, seed=2))
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in base.parameters())
    masked = silenced(base, plan, keep=True)
    torch.testing.assert_close(logits(pruned), logits(masked), rtol=0, atol=1e-10)
    assert not torch.allclose(logits(pruned), logits(build()))


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3", "Bert"])
def test_other_families(family, tmp_path):
    """Pruned equals masked; saved and loaded; the recovered adapter fits."""
    more = {"intermediate_size": 24} | ({} if family == "Bert" else {"num_key_value_heads": 4, "head_dim": 4})
    kind = getattr(hf, f"{family}ForMaskedLM" if family == "Bert" else f"{family}ForCausalLM")
    base = randomised(kind(getattr(hf, f"{family}Config")(**SIZES, **ENDS, **more)), torch.float64)
    pruned, plan = prune_model(base, LoramConfig(ratio=0.25))
    assert plan.plain == (family != "Bert")
    expected = logits(pruned)
    torch.testing.assert_close(expected, logits(silenced(copy.deepcopy(base), plan, keep=True)), rtol=0, atol=1e-10)
    save_pruned(pruned, plan, tmp_path / "pruned")
    again, _ = load_pruned(tmp_path / "pruned", dtype=torch.float64)
    # rotary frequencies are made anew in fp32 or fp64, as the way of loading has it: 1e-7 of each
    torch.testing.assert_close(logits(again.eval()), expected, rtol=0, atol=1e-5)
    assert logits(recovered(adapted(again), plan, base, tmp_path)).isfinite().all()


def stories():
    from polyrank.data.llama2c import build_model

    model = build_model(STORIES).eval()
    model.requires_grad_(False)
    return model


def changed_stories(base):
    """Stories that the model tells, with its eight most frequent tokens exchanged: (64, 48). What it knows still helps,
    as after a prune at a high ratio it no longer does."""
    torch.manual_seed(0)
    given = {"do_sample": True, "top_k": 0, "min_new_tokens": 47, "max_new_tokens": 47}
    rows = base.generate(torch.ones(64, 1, dtype=torch.long), **given)
    exchanged = torch.arange(512)
    frequent = torch.bincount(rows[:, 1:].flatten(), minlength=512).argsort(descending=True)[:8]
    exchanged[frequent] = frequent.roll(1)
    return exchanged[rows]


@pytest.mark.skipif(not STORIES.exists(), reason="POLYRANK_DATA lacks models/stories260k")
def test_benefit_on_a_toy_task(tmp_path):
    """Check 6: whole model with the recovered adapter: lower loss than the bare whole model and, at a high ratio, than
    the small model that was trained."""
    base = stories()
    train, test = changed_stories(base).split(48)
    few = {"input_ids": train[:16], "labels": train[:16]}
    pruned, plan = prune_model(base, LoramConfig(ratio=0.75, scores="taylor"), [few])
    torch.manual_seed(0)
    small = get_peft_model(pruned, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimiser = torch.optim.AdamW([p for p in small.parameters() if p.requires_grad], lr=2e-3)
    for step in range(20):
        batch = train[8 * (step % 6) : 8 * (step % 6 + 1)]
        loss = small(batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def loss_of(model):
        with torch.no_grad():
            return float(model(test, labels=test).loss)

    bare, trained = loss_of(base), loss_of(small.eval())
    large = loss_of(recovered(small, plan, base, tmp_path))
    assert large < bare
    assert large < trained


@pytest.mark.parametrize("build", [llama, gpt2, roberta])
@pytest.mark.parametrize("pattern", ["structured", "unstructured", "semi_structured"])
def test_export_equals_manual_merge(build, pattern, tmp_path):
    """Check 7: the recovered folder loads through PEFT on the large model; forward equal to W + s B A by hand."""
    base = build()
    pruned, plan = prune_model(base, LoramConfig(ratio=0.5, pattern=pattern))
    fields = {"use_rslora": True, "rank_pattern": {"0": 2}, "exclude_modules": ["lm_head.dense"]}
    small = adapted(pruned, **fields)
    large = recovered(small, plan, copy.deepcopy(base), tmp_path)
    state = load_file(tmp_path / "large" / "adapter_model.safetensors")
    by_hand = copy.deepcopy(base)
    for key, A in state.items():
        if key.endswith("lora_A.weight"):
            layer = by_hand.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            delta = 7 / len(A) ** 0.5 * state[key.replace("lora_A", "lora_B")] @ A
            layer.weight.data += delta.T if isinstance(layer, hf.pytorch_utils.Conv1D) else delta
    torch.testing.assert_close(logits(large), logits(by_hand), rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(large.merge_and_unload()), logits(by_hand), rtol=0, atol=1e-10)


# -- alignment ------------------------------------------------------------------------------------------------------


def rows_of(ids):
    return [{"input_ids": row, "labels": row} for row in ids]


ALIGNED = {"max_steps": 20, "learning_rate": 2e-3, "use_cpu": True, "disable_tqdm": True}


@pytest.mark.skipif(not STORIES.exists(), reason="POLYRANK_DATA lacks models/stories260k")
def test_alignment(tmp_path):
    """On text that the whole model wrote: other such text becomes likelier in the pruned model, the head stays. LoRA
    trained on it for another task, then recovered, serves the whole model there."""
    base = stories()
    torch.manual_seed(1)
    ends = {"eos_token_id": None, "pad_token_id": 0}
    text = base.generate(torch.ones(80, 1, dtype=torch.long), do_sample=True, top_k=0, max_new_tokens=64, **ends)
    general, held = text.split(64)
    pruned, plan = prune_model(base, LoramConfig(ratio=0.5))
    head, mark = pruned.get_output_embeddings().weight.detach().clone(), pruned.name_or_path
    flags = [p.requires_grad for p in pruned.parameters()]

    def loss_of(model, ids):
        with torch.no_grad():
            return float(model.eval()(ids, labels=ids).loss)

    before = loss_of(pruned, held)
    assert align_pruned(pruned, plan, rows_of(general), **ALIGNED) is pruned
    assert loss_of(pruned, held) < before - 0.5
    assert torch.equal(pruned.get_output_embeddings().weight, head)
    assert (flags, mark) == ([p.requires_grad for p in pruned.parameters()], pruned.name_or_path)
    save_pruned(pruned, plan, tmp_path / "pruned")
    again, read = load_pruned(tmp_path / "pruned")
    assert (loss_of(again, held), read) == (pytest.approx(loss_of(pruned, held), abs=1e-6), plan)
    train, test = changed_stories(base).split(48)
    torch.manual_seed(0)
    small = get_peft_model(again, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimiser = torch.optim.AdamW([p for p in small.parameters() if p.requires_grad], lr=2e-3)
    for step in range(20):
        batch = train[8 * (step % 6) : 8 * (step % 6 + 1)]
        small(batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    bare = loss_of(base, test)
    assert loss_of(recovered(small, tmp_path / "pruned", base, tmp_path), test) < bare - 1.0


@pytest.mark.parametrize("pattern", ["unstructured", "semi_structured"])
def test_alignment_leaves_zeros(pattern):
    """Twenty steps of AdamW with decay move every other weight of the blocks, and no weight that was cut."""
    pruned, plan = prune_model(llama(torch.float32), LoramConfig(pattern=pattern))
    layers = [m for n, m in pruned.named_modules() if ".1." in f".{n}." and isinstance(m, torch.nn.Linear)]
    before = [layer.weight.detach().clone() for layer in layers]
    align_pruned(pruned, plan, rows_of(IDS), **ALIGNED, weight_decay=0.1)
    assert layers
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer.weight == 0, old == 0)
        assert (layer.weight != old)[old != 0].all()
        assert not layer.weight._backward_hooks


def test_alignment_mistakes():
    pruned, plan = prune_model(llama(torch.float32), LoramConfig())
    with pytest.raises(ConfigError, match="needs general text: there are no rows"):
        align_pruned(pruned, plan, [])
    with pytest.raises(ConfigError, match="before an adapter is put on it"):
        align_pruned(adapted(pruned), plan, rows_of(IDS))
    with pytest.raises(ConfigError, match="LlamaModel has no head for words"):
        align_pruned(llama(torch.float32).model, plan, rows_of(IDS))


# -- without structure ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2])
def test_unstructured_keeps_the_largest(build):
    base = build()
    pruned, _ = prune_model(base, LoramConfig(ratio=0.7, pattern="unstructured"))
    compared = 0
    for name, layer in pruned.named_modules():
        if ".1." in f".{name}." and hasattr(layer, "weight") and layer.weight.ndim == 2:
            full = base.get_submodule(name).weight
            threshold = full.abs().flatten().sort().values[round(0.7 * full.numel())]
            assert torch.equal(layer.weight, torch.where(full.abs() >= threshold, full, 0.0))
            compared += 1
    assert compared >= 4
    assert torch.equal(pruned.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_semi_structured_by_hand():
    base = llama()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[0, :8] = torch.tensor([1.0, -4.0, 3.0, 2.0, 0.5, 0.125, -0.25, 0.375])
    pruned, _ = prune_model(base, LoramConfig(pattern="semi_structured"))
    expected = [0.0, -4.0, 3.0, 0.0, 0.5, 0.0, 0.0, 0.375]
    assert pruned.model.layers[0].mlp.up_proj.weight[0, :8].tolist() == expected
    groups = pruned.model.layers[1].self_attn.q_proj.weight.view(-1, 4)
    assert ((groups != 0).sum(1) == 2).all()


def test_unstructured_layer_identity(tmp_path):
    """Layer by layer: recovered on the whole weight = trained on the masked weight + the removed weights' part."""
    base = llama()
    pruned, plan = prune_model(base, LoramConfig(ratio=0.6, pattern="unstructured"))
    small = adapted(pruned)
    large = recovered(small, plan, copy.deepcopy(base), tmp_path)
    name, x = "model.layers.1.mlp.gate_proj", torch.randn(3, 32, dtype=torch.float64)
    layers = [model.base_model.model.get_submodule(name) for model in (large, small)]
    removed = base.get_submodule(name).weight - layers[1].base_layer.weight
    with torch.no_grad():
        torch.testing.assert_close(layers[0](x) - layers[1](x), x @ removed.T, rtol=0, atol=1e-10)


# -- scores ---------------------------------------------------------------------------------------------------------


def test_scores_of_groups_by_a_slow_loop():
    base = llama()
    batch = {"input_ids": IDS, "labels": IDS}
    for scores in ("magnitude", "taylor"):
        _, plan = prune_model(base, LoramConfig(ratio=0.5, scores=scores), [batch])
        if scores == "taylor":
            probe = copy.deepcopy(base).requires_grad_(True)
            probe(**batch).loss.backward()
        layer = (probe if scores == "taylor" else base).model.layers[1].mlp
        value = []
        for j in range(24):
            parts = [(layer.gate_proj, (j,)), (layer.up_proj, (j,)), (layer.down_proj, (slice(None), j))]
            total = 0.0
            for linear, place in parts:
                w = linear.weight[place]
                total += float((w * w if scores == "magnitude" else (w * linear.weight.grad[place]).abs()).sum())
            value.append(total)
        unit = next(u for u in plan.units if (u.layer, u.kind) == (1, "ffn"))
        assert unit.kept == tuple(sorted(sorted(range(24), key=lambda j: -value[j])[:12]))
    assert all(p.grad is None for p in base.parameters())


# -- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2, roberta])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded(build, dtype, tmp_path):
    base = build(dtype)
    pruned, plan = prune_model(base, LoramConfig(ratio=0.4))
    save_pruned(pruned, plan, tmp_path / "pruned")
    again, read = load_pruned(tmp_path / "pruned", dtype=dtype)
    assert read == plan
    assert type(again).__name__ == type(pruned).__name__
    assert torch.equal(logits(again.eval()), logits(pruned))
    assert again.generate(IDS[:, :3], max_new_tokens=3).shape == (2, 6) if build is not roberta else True
    if plan.plain:
        plain = type(base).from_pretrained(tmp_path / "pruned", dtype=dtype).eval()
        assert torch.equal(logits(plain), logits(pruned))
    small = adapted(again)
    assert recovered(small, tmp_path / "pruned", base, tmp_path)(IDS)[0].dtype == dtype


def test_a_config_that_can_say_the_sizes():
    base = llama()
    pruned, plan = prune_model(base, LoramConfig(ratio=0.5))
    config = pruned.config
    assert plan.plain
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 1)
    assert (config.head_dim, config.intermediate_size, config.hidden_size) == (4, 12, 32)
    assert base.config.num_attention_heads == 8
    _, uneven = prune_model(base, LoramConfig(ratio=0.5, first_layer=1))
    assert not uneven.plain
    _, odd = prune_model(llama(groups=8), LoramConfig(ratio=0.4))  # 5 heads: Llama wants a divisor of the width
    assert not odd.plain
    assert len(odd.units[0].kept) == 5


@pytest.mark.skipif(not STORIES.exists(), reason="POLYRANK_DATA lacks models/stories260k")
def test_layers_kept_whole_on_a_real_model(tmp_path):
    """As the paper keeps the first and last layers: sizes that differ by layer, saved, loaded, generated with."""
    base = stories()
    pruned, plan = prune_model(base, LoramConfig(ratio=0.5, first_layer=1, last_layer=3))
    counts = [len(unit.kept) for unit in plan.units]
    assert counts == [4, 172, 2, 86, 2, 86, 2, 86, 4, 172]
    save_pruned(pruned, plan, tmp_path / "pruned")
    again, _ = load_pruned(tmp_path / "pruned")
    ids = torch.tensor([[1, 403, 407, 261]])
    assert torch.equal(again.eval().generate(ids, max_new_tokens=8), pruned.generate(ids, max_new_tokens=8))
    masked = silenced(base, plan, keep=True)
    torch.testing.assert_close(logits(pruned, ids), logits(masked, ids), rtol=0, atol=1e-4)


def test_modules_to_save_and_embeddings_come_along(tmp_path):
    base = llama(torch.float32)
    pruned, plan = prune_model(base, LoramConfig(ratio=0.5))
    small = adapted(pruned, ["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    with torch.no_grad():
        small.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    large = recovered(small, plan, base, tmp_path)
    head = large.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(head, small.base_model.model.lm_head.modules_to_save["default"].weight)
    ids = IDS[:1]
    torch.testing.assert_close(
        large.get_input_embeddings()(ids), small.get_input_embeddings()(ids), rtol=1e-6, atol=1e-6
    )


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"ratio": 0.0}, r"ratio must lie in \(0, 1\), got 0.0"),
        ({"ratio": 1}, r"ratio must lie in \(0, 1\), got 1"),
        ({"ratio": True}, "ratio must lie in"),
        ({"pattern": "structred"}, "did you mean 'structured'"),
        ({"scores": "tailor"}, "did you mean 'taylor'"),
        ({"kinds": ("atention",)}, "did you mean 'attention'"),
        ({"pattern": "semi_structured", "ratio": 0.9}, "groups of 4 weights keeps all or none"),
    ],
)
def test_bad_options(fields, match):
    with pytest.raises((ConfigError, ValueError), match=match):
        LoramConfig(**fields)


def test_bad_models_and_indices():
    base = llama(torch.float32)
    t5 = hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="model type 't5' are not known"):
        units(hf.T5ForConditionalGeneration(t5))
    with pytest.raises(ConfigError, match="kept: the model has no \\(5, 'ffn'\\)"):
        prune_model(base, LoramConfig(), kept={(5, "ffn"): [0]})
    with pytest.raises(ConfigError, match=r"within 0..1"):
        prune_model(base, LoramConfig(), kept={(0, "attention"): [2]})
    with pytest.raises(ConfigError, match="no layer between first_layer=9"):
        prune_model(base, LoramConfig(first_layer=9))
    with pytest.raises(ConfigError, match="needs batches"):
        prune_model(base, LoramConfig(scores="taylor"))
    with pytest.raises(ConfigError, match="no loss"):
        prune_model(base, LoramConfig(scores="taylor"), [{"input_ids": IDS}])
    with pytest.raises(ConfigError, match="needs pattern='structured'"):
        prune_model(base, LoramConfig(pattern="unstructured"), kept={(0, "ffn"): [0]})
    with pytest.raises(ConfigError, match="do not divide into groups of 5"):
        prune_model(base, LoramConfig(pattern="semi_structured", group=5))
    pruned, _ = prune_model(hf.T5ForConditionalGeneration(t5), LoramConfig(pattern="unstructured"))
    assert float((pruned.encoder.block[0].layer[0].SelfAttention.q.weight == 0).float().mean()) == 0.5


def test_adapters_of_another_pruned_model(tmp_path):
    base = llama(torch.float32)
    pruned, plan = prune_model(base, LoramConfig(ratio=0.5))
    _, other = prune_model(base, LoramConfig(ratio=0.5, scores="random"))
    _, smaller = prune_model(base, LoramConfig(ratio=0.75))
    small = adapted(pruned)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match=f"another pruned model: pruning {plan.fingerprint}"):
        recover_adapter(tmp_path / "small", other, tmp_path / "large")
    state = load_file(tmp_path / "small" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"columns, this pruning leaves 6: the adapter was trained on another"):
        recover_state(state, smaller)
    masks = [prune_model(base, LoramConfig(0.5, "unstructured", scores))[1] for scores in ("magnitude", "random")]
    assert masks[0].fingerprint != masks[1].fingerprint
    save_pruned(pruned, plan, tmp_path / "pruned")
    loaded, _ = load_pruned(tmp_path / "pruned")
    adapted(loaded).save_pretrained(tmp_path / "of_folder")
    with pytest.raises(CheckpointError, match="another pruned model"):
        recover_adapter(tmp_path / "of_folder", other, tmp_path / "large")
    recover_adapter(tmp_path / "of_folder", plan, tmp_path / "large")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        recover_adapter(tmp_path / "of_folder", plan, tmp_path / "large")
    assert read_plan(tmp_path / "pruned") == plan


def test_adapters_that_cannot_be_recovered(tmp_path):
    pruned, plan = prune_model(llama(torch.float32), LoramConfig())
    adapted(copy.deepcopy(pruned), ["q_proj"], use_dora=True).save_pretrained(tmp_path / "dora")
    with pytest.raises(ConfigError, match="is DoRA"):
        recover_adapter(tmp_path / "dora", plan, tmp_path / "large")
    adapted(copy.deepcopy(pruned), ["q_proj"], init_lora_weights="pissa").save_pretrained(tmp_path / "pissa")
    with pytest.raises(ConfigError, match="started from 'pissa'"):
        recover_adapter(tmp_path / "pissa", plan, tmp_path / "large")
    with pytest.raises(CheckpointError, match="no such file"):
        recover_adapter(tmp_path / "nothing", plan, tmp_path / "large")
    folder = tmp_path / "ia3"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="only LoRA can be recovered"):
        recover_adapter(folder, plan, tmp_path / "large")
    (folder / "loram.json").write_text('{"format": "polyrank-loram-1"}')
    with pytest.raises(CheckpointError, match="damaged"):
        read_plan(folder)
    with pytest.raises(CheckpointError, match="no pruned model"):
        load_pruned(tmp_path / "nothing")


# -- command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [["scores=taylor"], ["pattern=unstructured"]])
def test_a_run_from_the_command_line(text_run, text_files, more):
    """The adapter that is kept is one for the whole model; the run decodes with it."""
    folder = text_run("loram", *(f"method.options.{text}" for text in more))
    base = hf.AutoModelForCausalLM.from_pretrained(text_files / "model")
    large = PeftModel.from_pretrained(base, folder / "adapter")
    assert large.peft_config["default"].base_model_name_or_path == str(text_files / "model")
    pruned, plan = load_pruned(folder / "pruned")
    state = load_file(folder / "adapter_pruned" / "adapter_model.safetensors")
    recovered_state = recover_state(state, plan)
    again = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in recovered_state.items())
    assert any(value.any() for name, value in again.items() if "lora_B" in name)
    assert (folder / "result.json").is_file()
    small = PeftModel.from_pretrained(pruned, folder / "adapter_pruned")
    assert logits(small).shape == logits(large).shape
    with pytest.raises(ConfigError, match=r"method 'loram': ratio must lie in \(0, 1\)"):
        text_run("loram", "method.options.ratio=1.5", "run_name=other")


def test_an_aligned_run_from_the_command_line(text_run, text_files, tmp_path, monkeypatch):
    """What is saved in pruned/ is aligned; a run that is killed after it goes on from there."""
    more = ["method.options.align_steps=3", "method.options.align_learning_rate=1e-2", "save_every=100"]
    calls, step = [], hf.Trainer.training_step

    def dying_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # three of the alignment and one of LoRA are done
            raise InterruptedError
        return step(self, *args, **kwargs)

    monkeypatch.setattr(hf.Trainer, "training_step", dying_step)
    with pytest.raises(InterruptedError):
        text_run("loram", *more)
    aligned = {n: p.clone() for n, p in load_pruned(tmp_path / "runs/data_to_text/run/pruned")[0].named_parameters()}
    folder = text_run("loram", *more)
    assert len(calls) == 5 + 6
    plain, _ = prune_model(hf.AutoModelForCausalLM.from_pretrained(text_files / "model"), LoramConfig())
    again, _ = load_pruned(folder / "pruned")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, aligned[name])
    tied, ours, theirs = "model.embed_tokens.weight", dict(again.named_parameters()), dict(plain.named_parameters())
    assert torch.equal(ours[tied], theirs[tied])  # the head's too, which is frozen
    assert not torch.equal(ours["model.norm.weight"], theirs["model.norm.weight"])
    assert len((folder / "alignment.jsonl").read_text().splitlines()) == 1


def test_text_of_an_alignment(text_files, tmp_path):
    """Each text in pieces of the length asked for, every token with its label; a piece of one token teaches nothing."""
    tokenizer = hf.AutoTokenizer.from_pretrained(text_files / "model")
    texts = ["Zizzi is a pub with number 3.", "Aromi is a cafe."]
    (tmp_path / "texts.txt").write_text(f"{texts[0]}<|endoftext|>\n{texts[1]}\n<|endoftext|>\n")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    length = len(ids[0]) - 1
    rows = text_rows(tmp_path / "texts.txt", tokenizer, length)
    assert [row["input_ids"] for row in rows] == [ids[0][:length], ids[1]]
    assert all(row["labels"] == row["input_ids"] for row in rows)
    (tmp_path / "texts.txt").write_text(" <|endoftext|>\n")
    with pytest.raises(DataError, match=r"texts\.txt holds no text"):
        text_rows(tmp_path / "texts.txt", tokenizer, length)
    for fields in ({"align_steps": -1}, {"align_learning_rate": 0.0}, {"align_text": tmp_path / "texts.txt"}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            LoramOptions(**fields)

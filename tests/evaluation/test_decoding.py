"""One interface to all decoders: exactly K candidates, transformers' own where it has them, and a count of cost."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from polyrank.core.errors import ConfigError, DataError, UnknownNameError
from polyrank.data.llama2c_tokenizer import Llama2cVocabulary, build_tokenizer
from polyrank.evaluation.decoding import Cost, counted, decode, pad_left, to_text
from polyrank.evaluation.scoring import own_scores, reference_nll, target_nll


@pytest.fixture(scope="module")
def tokenizer():
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256)), " ", *"abcd", " a", " b", "ab"]
    return build_tokenizer(Llama2cVocabulary(pieces, [0.0] * 259 + [-float(i) for i in range(8)]), 48)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(vocab_size=267, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=48, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )  # fmt: skip
    with torch.no_grad():
        made.lm_head.weight[:259].normal_(std=0.3)
        made.lm_head.weight[2].copy_(torch.randn(16))
        made.lm_head.weight[259:].normal_()
    return made.eval()


INPUTS = ["a b", "abcd abcd", "", "d"]


@pytest.mark.parametrize(
    "method, budget", [("beam", 3), ("beam", 6), ("diverse_beam", 3), ("diverse_beam", 6), ("sample", 3)]
)
def test_every_method_gives_k_candidates_in_the_order_of_the_inputs(model, tokenizer, method, budget):
    inputs = [f"a {text}" for text in INPUTS]
    found = decode(
        model, tokenizer, inputs, method, num_candidates=3, budget=budget, max_new_tokens=7, batch_size=2, seed=0
    )
    assert [len(row) for row in found.candidates] == [3] * 4
    assert found.cost.beams == budget
    if method != "sample":
        alone = [
            decode(model, tokenizer, [text], method, num_candidates=3, budget=budget, max_new_tokens=7)
            for text in inputs
        ]
        assert [row for one in alone for row in one.candidates] == found.candidates


def test_beam_search_is_transformers_own(model, tokenizer):
    batch = tokenizer("abcd a", return_tensors="pt")
    rows = model.generate(**batch, num_beams=4, num_return_sequences=2, max_new_tokens=6, do_sample=False)
    expected = [
        " ".join(tokenizer.decode(row[batch["input_ids"].shape[1] :], skip_special_tokens=True).split()) for row in rows
    ]
    found = decode(model, tokenizer, ["abcd a"], "beam", num_candidates=2, budget=4, max_new_tokens=6)
    assert found.candidates == [expected]


def test_sampling_is_repeated_by_its_seed_and_follows_its_options(model, tokenizer):
    def call(seed, **more):
        return decode(
            model, tokenizer, INPUTS[:2], "sample", num_candidates=4, max_new_tokens=9, seed=seed, **more
        ).candidates

    assert call(0) == call(0) != call(1)
    greedy = decode(model, tokenizer, INPUTS[:2], "beam", num_candidates=1, max_new_tokens=9).candidates
    assert call(0, top_k=1) == [row * 4 for row in greedy]


def test_a_peft_model_decodes_as_its_merged_self(model, tokenizer):
    import copy

    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    more = {"num_candidates": 2, "budget": 4, "max_new_tokens": 6}
    found = decode(adapted, tokenizer, INPUTS[:2], "diverse_beam", **more)
    assert adapted.training
    merged = adapted.merge_and_unload().eval()
    assert decode(merged, tokenizer, INPUTS[:2], "diverse_beam", **more).candidates == found.candidates


def test_cost_counts_what_the_model_evaluates(model, tokenizer):
    # 3 beams: each prompt is read 3 times; then every further call evaluates one token for each of the 6 rows.
    lengths = [len(tokenizer(text).input_ids) for text in INPUTS[:2]]
    found = decode(model, tokenizer, INPUTS[:2], "beam", num_candidates=3, max_new_tokens=5, batch_size=2)
    assert found.cost.prefill_tokens == 3 * sum(lengths)
    assert 1 <= found.cost.forward_calls <= 5
    assert found.cost.decode_tokens == 6 * (found.cost.forward_calls - 1)
    assert found.cost.time_s > 0
    with counted(model) as cost:
        model(input_ids=torch.ones(2, 7, dtype=torch.long), attention_mask=torch.tensor([[0] * 3 + [1] * 4, [1] * 7]))
        model(torch.ones(5, 1, dtype=torch.long))
    assert (cost.prefill_tokens, cost.decode_tokens, cost.forward_calls) == (11, 5, 2)
    assert cost + Cost(9, 1, 1, 1, 0.5) == Cost(9, 12, 6, 3, 0.5)


def test_text_ends_at_the_first_end_token(tokenizer):
    rows = torch.tensor([[263 + 1, 2, 260, 0], [259, 259, 260, 259]])
    assert to_text(tokenizer, rows) == ["a", "a"]
    assert pad_left([[5], [6, 7]], 0)["input_ids"].tolist() == [[0, 5], [6, 7]]


@pytest.mark.parametrize(
    "method, more, error, match",
    [
        ("beams", {}, UnknownNameError, "did you mean 'beam'"),
        ("beam", {"budget": 2}, ConfigError, "got 3 and 2"),
        ("diverse_beam", {"budget": 4}, ConfigError, "multiple of num_groups 3"),
        ("sample", {"budget": 6}, ConfigError, "sampling takes a budget"),
        ("mcl", {"budget": 4}, ConfigError, "multiple of the 3 hypotheses"),
        ("beam", {"max_new_tokens": 46}, DataError, "exceed the model's context of 48"),
        ("beam", {"max_new_tokens": 0}, ConfigError, "max_new_tokens must be at least 1"),
    ],
)
def test_wrong_requests(model, tokenizer, method, more, error, match):
    with pytest.raises(error, match=match):
        decode(model, tokenizer, ["a b"], method, **{"num_candidates": 3, "max_new_tokens": 4, **more})


# --- scoring ----------------------------------------------------------------------------------------------------


def slow_nll(model, tokenizer, prompt, target):
    prompt, target = tokenizer(prompt).input_ids, [*tokenizer(target, add_special_tokens=False).input_ids, 2]
    total = 0.0
    for t, token in enumerate(target):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target[:t]])).logits[0, -1]
        total -= logits.log_softmax(-1)[token].item()
    return total, len(target)


def test_target_nll_equals_a_loop_over_tokens(model, tokenizer):
    prompts, targets = ["a b", "abcd abcd d", "c"], ["abab", "d", "b a a a c"]
    expected = [slow_nll(model, tokenizer, p, t) for p, t in zip(prompts, targets, strict=True)]
    sums, counts = target_nll(model, tokenizer, prompts, targets, batch_size=2)
    assert counts.tolist() == [n for _, n in expected]
    assert sums.tolist() == pytest.approx([s for s, _ in expected], abs=1e-4)
    scores = own_scores(model, tokenizer, prompts, [[t, "a"] for t in targets])
    assert [row[0] for row in scores] == pytest.approx([-s / n for s, n in expected], abs=1e-5)
    nll, tokens = reference_nll(model, tokenizer, prompts[:2], [["abab"], ["d", "a"]])
    assert nll[0][0] == pytest.approx([expected[0][0]], abs=1e-4)
    assert nll[1][0] == pytest.approx([expected[1][0]], abs=1e-4)
    assert tokens == [[expected[0][1]], [expected[1][1], 2]]
    with pytest.raises(DataError, match="exceed the model's context"):
        target_nll(model, tokenizer, ["a"], ["c d " * 30])
    long, count = target_nll(model, tokenizer, ["a"], ["c d " * 30], cut=True)
    whole = [*tokenizer("a").input_ids, *tokenizer("c d " * 30, add_special_tokens=False).input_ids][:48]
    with torch.no_grad():
        log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    start = len(whole) - count.item()
    steps = [-log_probs[t - 1, whole[t]].item() for t in range(start, 48)]
    assert long.item() == pytest.approx(sum(steps), abs=1e-3)
    assert own_scores(model, tokenizer, ["a"], [["c d " * 30]])[0][0] == pytest.approx(
        -sum(steps) / len(steps), abs=1e-4
    )


# --- several hypotheses ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hypotheses(model):
    import copy

    from polyrank import MclConfig

    torch.manual_seed(1)
    config = MclConfig(num_hypotheses=3, r=2, lora_alpha=8, target_modules="all-linear", init_weights=False)
    return get_peft_model(copy.deepcopy(model), config).eval()


@pytest.mark.parametrize("beams", [1, 2])
def test_candidate_k_is_what_hypothesis_k_writes_alone(hypotheses, tokenizer, beams):
    more = {"max_new_tokens": 8, "batch_size": 4}
    inputs = [f"a {text}" for text in INPUTS]
    found = decode(hypotheses, tokenizer, inputs, "mcl", num_candidates=3, budget=3 * beams, **more)
    base = hypotheses.base_model
    for k in range(3):
        base.set_hypothesis(k)
        alone = decode(hypotheses, tokenizer, inputs, "beam", num_candidates=1, budget=beams, **more)
        assert [row[k] for row in found.candidates] == [row[0] for row in alone.candidates]
    base.set_hypothesis(0)
    assert len({tuple(row) for row in zip(*found.candidates, strict=True)}) == 3
    with pytest.raises(ConfigError, match="the model has 3 hypotheses, 2 candidates were asked for"):
        decode(hypotheses, tokenizer, inputs, "mcl", num_candidates=2, **more)


def test_likelihoods_of_each_hypothesis_are_those_of_its_merged_model(hypotheses, tokenizer):
    import copy

    prompts, references = ["a b", "c"], [["abab", "d"], ["b a"]]
    nll, tokens = reference_nll(hypotheses, tokenizer, prompts, references, num_hypotheses=3)
    candidates = [["ab", "d", "a b"], ["c", "b b", "a"]]
    scores = own_scores(hypotheses, tokenizer, prompts, candidates, by_hypothesis=True)
    for k in range(3):
        single = copy.deepcopy(hypotheses)
        single.base_model.set_hypothesis(k)
        single = single.merge_and_unload()
        expected, lengths = reference_nll(single, tokenizer, prompts, references)
        assert lengths == tokens
        for row, other in zip(nll, expected, strict=True):
            assert [sums[k] for sums in row] == pytest.approx([sums[0] for sums in other], abs=1e-3)
        mine = own_scores(single, tokenizer, prompts, candidates)
        assert [row[k] for row in scores] == pytest.approx([row[k] for row in mine], abs=1e-4)


@pytest.mark.parametrize("setting", ["min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_p", "temperature"])
@pytest.mark.parametrize("adapted", [False, True])
def test_samples_follow_the_named_settings_alone(model, tokenizer, setting, adapted):
    """A model whose own generation config cuts the distribution samples as one whose config does not."""
    import copy

    plain, cut = copy.deepcopy(model), copy.deepcopy(model)
    setattr(cut.generation_config, setting, 0.02 if setting == "temperature" else 0.5)
    if adapted:
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        plain, cut = get_peft_model(plain, config), get_peft_model(cut, config)
    given = {"num_candidates": 8, "max_new_tokens": 6, "seed": 0}
    before = getattr(cut.generation_config, setting)
    written = [decode(one, tokenizer, ["a b", "c"], "sample", **given).candidates for one in (plain, cut)]
    assert written[0] == written[1]
    assert getattr(cut.generation_config, setting) == before  # the model is left as it was
    assert len(set(written[0][0])) > 1

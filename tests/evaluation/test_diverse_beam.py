"""Diverse beam search: a slow loop, stored outputs of transformers 4.50, and the limits that are plain beam search."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from polyrank.core.errors import ConfigError
from polyrank.evaluation.diverse_beam import _choose, diverse_beam_generate

PAD = 16
IDS = torch.tensor([[PAD, 3, 4, 5], [PAD, PAD, 7, 2], [9, 8, 7, 6]])
MASK = (IDS != PAD).long()


def tiny(seed):
    """Random weights that do not depend on the library's own initialisation."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=17,
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=1,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    return model.eval()


def run(model, **more):
    return diverse_beam_generate(
        model,
        input_ids=IDS,
        attention_mask=MASK,
        pad_token_id=PAD,
        suppress_tokens=[PAD],
        return_dict_in_generate=True,
        **more,
    )


STORED = json.loads(Path(__file__).with_name("diverse_beam_transformers_4_50.json").read_text())["cases"]


@pytest.mark.parametrize(
    "case", STORED, ids=lambda c: f"seed{c['seed']}-B{c['num_beams']}G{c['num_groups']}K{c['count']}"
)
def test_pooled_gives_what_transformers_4_50_gave(case):
    case = dict(case)
    ends, count = case["eos_token_id"], case.pop("count")
    expected, scores = torch.tensor(case.pop("sequences")), torch.tensor(case.pop("scores"))
    found = run(tiny(case.pop("seed")), num_return_sequences=count, **case)
    for token in ends[1:]:  # 4.50 writes the first end token whichever was chosen
        found.sequences[:, 4:][found.sequences[:, 4:] == token] = ends[0]
        expected[:, 4:][expected[:, 4:] == token] = ends[0]
    assert torch.equal(found.sequences, expected)
    torch.testing.assert_close(found.sequences_scores, scores, atol=2e-5, rtol=0)


def slow(model, prompt, *, num_beams, num_groups, diversity_penalty, eos_token_id, max_new_tokens, length_penalty):
    """One prompt, no cache, Python lists. Returns for each group its finished (score, tokens), best first."""
    size = num_beams // num_groups
    running = [[(0.0, list(prompt))] for _ in range(num_groups)]
    pools = [[] for _ in range(num_groups)]
    done = [False] * num_groups
    for step in range(1, max_new_tokens + 1):
        used = []
        for g in range(num_groups):
            if done[g]:
                continue
            extended = []
            for score, tokens in running[g]:
                logits = model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
                for token in range(logits.shape[0]):
                    if token != PAD:
                        value = score + logits[token].item() - diversity_penalty * used.count(token)
                        extended.append((value, [*tokens, token]))
            extended.sort(key=lambda item: -item[0])
            extended = extended[: (1 + len(eos_token_id)) * size]
            for rank, (value, tokens) in enumerate(extended):
                if tokens[-1] in eos_token_id and rank < size:
                    pools[g].append((value / step**length_penalty, tokens))
            pools[g] = sorted(pools[g], key=lambda item: -item[0])[:size]
            running[g] = [item for item in extended if item[1][-1] not in eos_token_id][:size]
            used += [tokens[-1] for _, tokens in running[g]]
            if len(pools[g]) == size and pools[g][-1][0] >= extended[0][0] / step**length_penalty:
                done[g] = True
        if all(done):
            break
    for g in range(num_groups):
        if not done[g]:
            pools[g] += [(value / step**length_penalty, tokens) for value, tokens in running[g]]
        pools[g] = sorted(pools[g], key=lambda item: -item[0])[:size]
    return pools


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("setting", [(4, 4, 0.5, 1.0), (6, 3, 0.8, 1.0), (6, 2, 0.0, 0.0), (6, 3, 3.0, 2.0)])
def test_both_selections_equal_the_slow_loop(seed, setting):
    num_beams, num_groups, penalty, length_penalty = setting
    model, ends = tiny(seed), [[9], [2, 12], [11], [6, 15]][seed]
    more = {
        "num_beams": num_beams,
        "num_groups": num_groups,
        "diversity_penalty": penalty,
        "length_penalty": length_penalty,
        "eos_token_id": ends,
        "max_new_tokens": 9,
    }
    apart = run(model, selection="one_per_group", **more)
    pooled = run(model, num_return_sequences=num_beams, **more)
    for i in range(3):
        prompt = IDS[i][MASK[i].bool()].tolist()
        with torch.no_grad():
            pools = slow(model, prompt, **more)
        bare = lambda row: row[4:]  # noqa: E731
        for g, pool in enumerate(pools):
            row = bare(apart.sequences[i * num_groups + g].tolist())
            expected = pool[0][1][len(prompt) :]
            assert row[: len(expected)] == expected
            assert set(row[len(expected) :]) <= {PAD}
            assert apart.sequences_scores[i * num_groups + g].item() == pytest.approx(pool[0][0], abs=1e-4)
        expected = sorted((score for pool in pools for score, _ in pool), reverse=True)
        assert pooled.sequences_scores.view(3, -1)[i].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_one_group_is_beam_search(seed, penalty):
    model = tiny(seed)
    plain = model.generate(input_ids=IDS, attention_mask=MASK, pad_token_id=PAD, suppress_tokens=[PAD], num_beams=4,
                           num_return_sequences=4, max_new_tokens=8, do_sample=False)  # fmt: skip
    found = run(model, num_beams=4, num_groups=1, diversity_penalty=penalty, num_return_sequences=4, max_new_tokens=8)
    assert torch.equal(found.sequences, plain)


@pytest.mark.parametrize("seed", range(3))
def test_without_penalty_every_group_is_beam_search_with_its_own_beams(seed):
    model = tiny(seed)
    plain = model.generate(input_ids=IDS, attention_mask=MASK, pad_token_id=PAD, suppress_tokens=[PAD], num_beams=2,
                           max_new_tokens=8, do_sample=False)  # fmt: skip
    found = run(model, num_beams=6, num_groups=3, diversity_penalty=0.0, selection="one_per_group", max_new_tokens=8)
    assert torch.equal(found.sequences, plain.repeat_interleave(3, 0))


def test_a_large_penalty_makes_the_first_words_differ():
    found = run(tiny(0), num_beams=5, num_groups=5, diversity_penalty=1e4, selection="one_per_group", max_new_tokens=1)
    for row in found.sequences[:, 4].view(3, 5).tolist():
        assert len(set(row)) == 5


def test_without_cache_and_for_an_encoder_decoder():
    model = tiny(1)
    more = {"num_beams": 6, "num_groups": 3, "diversity_penalty": 0.7, "max_new_tokens": 8}
    assert torch.equal(run(model, **more).sequences, run(model, use_cache=False, **more).sequences)
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=17, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).eval()
    with torch.no_grad():
        for parameter in t5.parameters():
            parameter.mul_(3)
    plain = t5.generate(input_ids=IDS, attention_mask=MASK, pad_token_id=PAD, num_beams=2, max_new_tokens=6)
    found = diverse_beam_generate(
        t5, input_ids=IDS, attention_mask=MASK, pad_token_id=PAD, num_beams=4, num_groups=2, diversity_penalty=0.0,
        selection="one_per_group", max_new_tokens=6,
    )  # fmt: skip
    assert torch.equal(found[::2], plain)
    assert torch.equal(found[1::2], plain)


@pytest.mark.parametrize(
    "more, match",
    [
        ({"num_groups": 4}, "num_beams 6 must be a multiple of num_groups 4"),
        ({"num_groups": 0}, "multiple of num_groups 0"),
        ({"diversity_penalty": -1.0}, "diversity_penalty must be at least 0"),
        ({"num_return_sequences": 7}, r"must be in 1..6, got 7"),
        ({"num_return_sequences": 4, "selection": "one_per_group"}, "must be 3, one for each group, got 4"),
        ({"selection": "grouped"}, "unknown selection 'grouped'"),
        ({"do_sample": True}, "does not sample"),
    ],
)
def test_wrong_settings(more, match):
    with pytest.raises(ConfigError, match=match):
        run(tiny(0), **{"num_beams": 6, "num_groups": 3, "diversity_penalty": 0.5, "max_new_tokens": 2, **more})


@pytest.mark.parametrize(("penalty", "second"), [(0.1, 0), (0.12, 1)])
def test_a_repetition_penalty_acts_on_what_the_diversity_penalty_has_left(penalty, second):
    """By hand, as transformers 4.50 orders them: log .5 = -.693, and 1.5 (-.693 - lambda) = -1.190 or -1.220 lies on
    both sides of log .3 = -1.204. The other order, -1.040 - lambda, would choose token 0 both times."""

    def repetition(rows, scores):
        return torch.where(torch.arange(3) == rows[:, :1], scores * 1.5, scores)

    log_probs = torch.tensor([0.5, 0.3, 0.2]).log().expand(1, 2, 1, 3)
    rows, zero = torch.zeros(2, 1, dtype=torch.long), torch.zeros(1, 2, 1)
    tokens, _, scores, _ = _choose(rows, log_probs, repetition, zero, zero[..., 0].bool(), None, penalty)
    assert tokens.flatten().tolist() == [0, second]
    expected = (torch.tensor(0.5).log() - penalty) * 1.5 if second == 0 else torch.tensor(0.3).log()
    torch.testing.assert_close(scores.flatten(), torch.stack([torch.tensor(0.5).log() * 1.5, expected]))

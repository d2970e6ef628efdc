"""Decoding of prepared inputs (text encoders, images, audio), against transformers' own `generate` and plain loops."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import get_peft_model

from polyrank import MclConfig, MoeConfig, route_experts
from polyrank.core.errors import ConfigError, DataError, UnknownNameError
from polyrank.evaluation.decoding import DECODERS, SAMPLERS, counted, decode, decode_inputs
from polyrank.evaluation.spec_augment import spec_augment

PAD, BOS, EOS, START, MEDIA = 0, 1, 2, 3, 39
ENDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 48, **ENDS}  # fmt: skip
FRAMES, VOCABULARY = 20, 40


class Words:
    """Token 7 is the word "w7"; special tokens are no words. Prompts are numbers."""

    pad_token_id, eos_token_id = PAD, EOS

    def decode(self, row, skip_special_tokens=True):
        return "  ".join(f"w{token}" for token in row if token > START)

    def __call__(self, texts):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def lively(model, std=0.3):
    """Random weights large enough for candidates that differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, std)
    return model.double().eval()


@pytest.fixture(scope="module", autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def llama():
    return lively(hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)))


@pytest.fixture(scope="module")
def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    return lively(hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **ENDS, decoder_start_token_id=START)), 0.7)


@pytest.fixture(scope="module")
def audio():
    """Qwen2-Audio with 8 mel bands and an encoder of 10 positions, 5 after pooling: 20 frames."""
    tower = {"num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    config = hf.Qwen2AudioConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        audio_config={**tower, "max_source_positions": FRAMES // 2, "model_type": "qwen2_audio_encoder"},
        audio_token_index=MEDIA,
    )
    return lively(hf.Qwen2AudioForConditionalGeneration(config))


@pytest.fixture(scope="module")
def image():
    """LLaVA with images of 8 x 8 in 4 patches and a class token that it drops."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**sizes, image_size=8, patch_size=4),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=MEDIA,
    )
    return lively(hf.LlavaForConditionalGeneration(config))


@pytest.fixture(scope="module")
def captioner():
    """Vision encoder and GPT-2: the decoder's prompt is its start token alone."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "add_cross_attention": True}
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**sizes, image_size=8, patch_size=4),
        hf.GPT2Config(**decoder, vocab_size=40, is_decoder=True, **ENDS),
    )
    config.decoder_start_token_id = START
    config.pad_token_id = PAD
    return lively(hf.VisionEncoderDecoderModel(config))


def prompts(media=0):
    ids = torch.tensor([[PAD, PAD, 5, *[MEDIA] * media, 6, 7], [4, 8, 5, *[MEDIA] * media, 9, 7]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def inputs_of(name):
    """Two rows for each kind of model, and how many tokens in front of the answer `generate` gives back."""
    if name == "t5":
        return {key: value.flip(1) for key, value in prompts().items()}, 1
    if name == "captioner":
        return {"pixel_values": draw(2, 3, 8, 8)}, 1
    if name == "image":
        return {**prompts(4), "pixel_values": draw(2, 3, 8, 8)}, 9
    if name == "audio":
        mask = torch.ones(2, FRAMES, dtype=torch.long)
        return {**prompts(5), "input_features": draw(2, 8, FRAMES), "feature_attention_mask": mask}, 10
    return prompts(), 5


def double(inputs):
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def text(row):
    row = row.tolist()
    row = row[: row.index(EOS)] if EOS in row else row
    return " ".join(f"w{token}" for token in row if token > START)


KINDS = ("llama", "t5", "captioner", "image", "audio")
LIMITS = {"max_new_tokens": 6, "pad_token_id": PAD, "eos_token_id": EOS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param, request.getfixturevalue(request.param)


def test_beam_search_is_transformers_own_for_every_kind_of_model(kind):
    name, model = kind
    inputs, cut = inputs_of(name)
    rows = model.generate(**double(inputs), **LIMITS, num_beams=4, num_return_sequences=2, do_sample=False)
    expected = [text(row[cut:]) for row in rows]
    found = decode_inputs(model, Words(), inputs, "beam", num_candidates=2, budget=4, max_new_tokens=6)
    assert found.candidates == [expected[:2], expected[2:]]
    assert found.candidates[0] != found.candidates[1]


@pytest.mark.parametrize("method, budget", [("diverse_beam", 6), *((name, 3) for name in ("sample", *SAMPLERS))])
def test_every_method_gives_k_candidates_for_every_kind_of_model(kind, method, budget):
    name, model = kind
    inputs, _ = inputs_of(name)
    found = decode_inputs(
        model,
        Words(),
        inputs,
        method,
        num_candidates=3,
        budget=budget,
        max_new_tokens=6,
        seed=1,
        repetition_penalty=1.1,
    )
    assert [len(row) for row in found.candidates] == [3, 3]
    assert found.cost.beams == budget
    assert not model.training


def test_prompts_and_their_encoding_give_the_same(llama):
    texts = ["5 6 7", "4 8 5 9 7"]
    for method in ("beam", "diverse_beam", "nucleus"):
        more = {"num_candidates": 2, "max_new_tokens": 6, "seed": 0}
        by_text = decode(llama, Words(), texts, method, **more)
        by_tensor = decode_inputs(llama, Words(), prompts(), method, **more)
        assert by_text.candidates == by_tensor.candidates
        assert by_text.cost.prefill_tokens == by_tensor.cost.prefill_tokens


@pytest.mark.parametrize("name", SAMPLERS)
def test_named_samplers_are_transformers_arguments(llama, name):
    arguments = {"ancestral": {}, "top_k": {"top_k": 50}, "nucleus": {"top_p": 0.95}, "typical": {"typical_p": 0.95}}
    torch.manual_seed(3)
    settings = {"top_k": 0, "top_p": 1.0, **arguments[name]}
    rows = llama.generate(**prompts(), **LIMITS, do_sample=True, num_return_sequences=4, temperature=1.0, **settings)
    found = decode_inputs(llama, Words(), prompts(), name, num_candidates=4, max_new_tokens=6, seed=3)
    assert [c for row in found.candidates for c in row] == [text(row[5:]) for row in rows]
    colder = decode_inputs(
        llama, Words(), prompts(), name, num_candidates=4, max_new_tokens=6, seed=3, temperature=1e-4
    )
    greedy = decode_inputs(llama, Words(), prompts(), "beam", num_candidates=1, max_new_tokens=6)
    assert colder.candidates == [row * 4 for row in greedy.candidates]


def test_ends_and_cleaning(llama):
    plain = decode_inputs(llama, Words(), prompts(), "beam", num_candidates=1, max_new_tokens=6).candidates
    first = int(plain[0][0].split()[1][1:])
    found = decode_inputs(
        llama,
        Words(),
        prompts(),
        "beam",
        num_candidates=1,
        max_new_tokens=6,
        eos_token_id=[EOS, first],
        clean=str.upper,
    )
    assert found.candidates[0] == [plain[0][0].split()[0].upper()]


def test_positions_of_encoders_are_counted(t5, image, audio, captioner):
    def cost(model, name, beams):
        return decode_inputs(model, Words(), inputs_of(name)[0], "beam", num_candidates=beams, max_new_tokens=2).cost

    # the encoder reads 3 + 5 tokens once; the decoder's start token is a single token like those that follow
    assert cost(t5, "t5", 3).prefill_tokens == 8
    assert cost(t5, "t5", 3).decode_tokens == 2 * 3 * 2
    # 4 patches and a class token an image
    assert cost(captioner, "captioner", 3).prefill_tokens == 2 * 5
    calls = []
    handle = audio.get_encoder(modality="audio").register_forward_hook(lambda m, a, out: calls.append(out[0].shape[:2]))
    found = cost(audio, "audio", 3).prefill_tokens
    handle.remove()
    assert found == 3 * (8 + 10) + sum(rows * length for rows, length in calls)
    with counted(image) as record:
        image(**double(inputs_of("image")[0]))
    assert record.prefill_tokens == 7 + 9 + 2 * 5


# -- augmented audio ------------------------------------------------------------------------------------------------


def test_test_time_augmentation_equals_k_calls_on_masked_features(audio):
    inputs, cut = inputs_of("audio")
    for beams in (1, 2):
        found = decode_inputs(
            audio, Words(), inputs, "tta", num_candidates=3, budget=3 * beams, max_new_tokens=6, seed=5
        )
        torch.manual_seed(5)
        expected = []
        for _ in range(3):
            masked = {**double(inputs), "input_features": spec_augment(inputs["input_features"].double(), 0.4, 0.6)}
            rows = audio.generate(**masked, **LIMITS, num_beams=beams, do_sample=False)
            expected.append([text(row[cut:]) for row in rows])
        assert found.candidates == [list(row) for row in zip(*expected, strict=True)]
    assert len(set(found.candidates[0])) > 1
    none = decode_inputs(
        audio,
        Words(),
        inputs,
        "tta",
        num_candidates=3,
        budget=6,
        max_new_tokens=6,
        time_fraction=0,
        frequency_fraction=0,
    )
    plain = decode_inputs(audio, Words(), inputs, "beam", num_candidates=1, budget=2, max_new_tokens=6)
    assert none.candidates == [row * 3 for row in plain.candidates]


def test_masks_fall_on_frames_that_are_there(audio):
    inputs, _ = inputs_of("audio")
    mask = inputs["feature_attention_mask"].clone()
    mask[:, 12:] = 0
    seen = []
    handle = audio.get_encoder(modality="audio").register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["input_features"]), with_kwargs=True
    )
    ids = torch.tensor([[5, *[MEDIA] * 3, 7]] * 2)
    short = {**inputs, "feature_attention_mask": mask, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for seed in range(5):
        decode_inputs(
            audio, Words(), short, "tta", num_candidates=4, max_new_tokens=1, seed=seed, time_fraction=1.0,
            frequency_fraction=0.0,
        )  # fmt: skip
    handle.remove()
    zero = torch.cat([(features == 0).all(1) for features in seen])
    assert zero[:, :12].any()
    assert not zero[:, 12:].any()


# -- mixtures and hypotheses ----------------------------------------------------------------------------------------


def adapted(base, config):
    import copy

    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    return model.double().eval()


def moe(base, experts=3, **more):
    fields = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_weights": False}
    return adapted(base, MoeConfig(num_experts=experts, **fields, **more))


@pytest.mark.parametrize("beams", [1, 2])
def test_one_expert_a_run_is_that_expert_merged(llama, beams):
    model = moe(llama)
    more = {"num_candidates": 3, "budget": 3 * beams, "max_new_tokens": 6}
    found = decode_inputs(model, Words(), prompts(), "moe_expert", **more)
    for e in range(3):
        single = moe(llama)
        with route_experts(single, e):
            single = single.merge_and_unload()
        alone = decode_inputs(single, Words(), prompts(), "beam", num_candidates=1, budget=beams, max_new_tokens=6)
        assert [row[e] for row in found.candidates] == [row[0] for row in alone.candidates]
    assert len(set(found.candidates[0])) == 3
    with pytest.raises(ConfigError, match="the model has 3 experts, 2 candidates were asked for"):
        decode_inputs(model, Words(), prompts(), "moe_expert", num_candidates=2, max_new_tokens=6)


def test_the_router_at_inference(llama):
    model = moe(llama)
    more = {"num_candidates": 3, "max_new_tokens": 6}

    def call(method="beam", **options):
        return decode_inputs(model, Words(), prompts(), method, **more, **options).candidates

    dense = call()
    assert call(router="dense") == call(router="sparse", router_top_k=3) == call("moe_dense") == dense
    assert call("moe_sparse") == call(router="sparse")
    assert call("moe_sparse", experts_per_token=1) == call(router="sparse", router_top_k=1)
    assert call(router="sparse") == decode_inputs(moe(llama, top_k=2), Words(), prompts(), "beam", **more).candidates
    assert call(router="sparse", router_top_k=1) != dense
    assert call("moe_stochastic", seed=0) == call("moe_stochastic", seed=0) != call("moe_stochastic", seed=1)
    assert call("diverse_beam") != dense
    with torch.no_grad():  # a router that is sure of expert 1 draws nothing else
        for name, parameter in model.named_parameters():
            if "router_bias" in name:
                parameter[1] = 90.0
    only = [row[1] for row in call("moe_expert")]
    assert call("moe_stochastic") == [[candidate] * 3 for candidate in only]


def test_stochastic_routing_draws_for_each_run(llama):
    found = decode_inputs(moe(llama), Words(), prompts(), "moe_stochastic", num_candidates=8, max_new_tokens=6, seed=0)
    assert len({*found.candidates[0]}) > 2


def test_runs_by_name_of_a_sampler(llama, audio):
    config = MclConfig(num_hypotheses=2, r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_weights=False)
    model = adapted(llama, config)
    more = {"num_candidates": 2, "max_new_tokens": 6}

    def call(**options):
        return decode_inputs(model, Words(), prompts(), "mcl", **more, **options).candidates

    assert call(sampling="nucleus", seed=0) == call(do_sample=True, top_k=0, top_p=0.95, seed=0) != call()
    assert call(sampling="ancestral", seed=0, temperature=1e-4) == call()
    assert decode_inputs(moe(llama, 2), Words(), prompts(), "moe_expert", sampling="typical", **more).candidates
    inputs = inputs_of("audio")[0]
    assert decode_inputs(audio, Words(), inputs, "tta", sampling="top_k", **more).candidates
    heard = decode_inputs(adapted(audio, config), Words(), inputs, "mcl", **more).candidates
    assert [len(row) for row in heard] == [2, 2]


@pytest.mark.parametrize(
    "method, more, error, match",
    [
        ("tta", {"budget": 4}, ConfigError, "budget 4 must be a multiple of the 3 candidates"),
        ("tta", {}, DataError, "need input_features, got attention_mask, input_ids"),
        ("moe_stochastic", {"budget": 5}, ConfigError, "budget 5 must be a multiple of the 3 candidates"),
        ("moe_expert", {"budget": 5}, ConfigError, "budget 5 must be a multiple of the 3 experts"),
        ("moe_expert", {"sampling": "nucleous"}, UnknownNameError, "did you mean 'nucleus'"),
        ("nucleus", {"budget": 6}, ConfigError, "sampling takes a budget of num_candidates"),
        ("beam", {"router": "stochastics"}, ConfigError, "did you mean 'stochastic'"),
        ("beam", {"router_top_k": 2}, ConfigError, "router_top_k 2 goes with router='sparse'"),
        ("beam", {"max_new_tokens": 44}, DataError, "exceed the model's context of 48"),
        ("nuclear", {}, UnknownNameError, "did you mean 'nucleus'"),
    ],
)
def test_wrong_requests(llama, method, more, error, match):
    model = moe(llama)
    with pytest.raises(error, match=match):
        decode_inputs(model, Words(), prompts(), method, **{"num_candidates": 3, "max_new_tokens": 4, **more})
    assert not model.training


def test_models_without_what_a_method_needs(llama, audio):
    for method in ("moe_expert", "moe_stochastic"):
        with pytest.raises(ConfigError, match="has no LoRA-MoE adapter"):
            decode_inputs(llama, Words(), prompts(), method, num_candidates=2, max_new_tokens=6)
    with pytest.raises(ConfigError, match=r"fraction of a SpecAugment mask must be in \[0, 1\], got 1.5"):
        decode_inputs(
            audio, Words(), inputs_of("audio")[0], "tta", num_candidates=2, max_new_tokens=6, time_fraction=1.5
        )
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 40}
    whisper = hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**sizes, **ENDS, num_mel_bins=8, decoder_attention_heads=2, max_source_positions=10)
    )
    with pytest.raises(ConfigError, match="Whisper's generate keeps one candidate"):
        decode_inputs(whisper, Words(), {"input_features": draw(1, 8, 20)}, num_candidates=2)


def test_the_page_names_every_method():
    lines = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text(encoding="utf-8").splitlines()
    table = lines[lines.index("| method | what runs | beams of each run | options |") + 2 :]
    named = [line.split("`")[1] for line in table[: table.index("")]]
    assert sorted(named) == DECODERS.names()


RUNS = {  # encoder passes for one input at K = 3, B = 6, as the page has them
    "t5": {"beam": 1, "diverse_beam": 1, "mcl": 1, "moe_dense": 1, "moe_stochastic": 1, "moe_expert": 3},
    "image": {"beam": 1, "diverse_beam": 1, "mcl": 1, "moe_sparse": 1, "moe_stochastic": 1, "moe_expert": 3},
    "audio": {"beam": 6, "diverse_beam": 6, "mcl": 2, "moe_dense": 6, "moe_stochastic": 2, "moe_expert": 6, "tta": 6},
}
SIZES = {"t5": (0, 8), "image": (16, 10), "audio": (18, 10)}  # prompt tokens and encoder positions of both rows


@pytest.mark.parametrize("name, method", [(name, method) for name, methods in RUNS.items() for method in methods])
def test_the_page_s_costs(name, method, request):
    targets = r".*decoder.*\.(q|v)" if name == "t5" else r".*language_model.*\.(q_proj|v_proj)"
    fields = {"r": 2, "target_modules": targets, "init_weights": False}
    model = request.getfixturevalue(name)
    if method == "mcl":
        model = adapted(model, MclConfig(num_hypotheses=3, **fields))
    elif method.startswith("moe"):
        model = adapted(model, MoeConfig(num_experts=3, **fields))
    more = {"num_candidates": 3, "budget": 6, "max_new_tokens": 4, "eos_token_id": VOCABULARY}  # nothing ends early
    cost = decode_inputs(model, Words(), inputs_of(name)[0], method, **more).cost
    prompt, encoder = SIZES[name]
    assert cost.prefill_tokens == 6 * prompt + RUNS[name][method] * encoder
    assert cost.decode_tokens == 2 * 6 * (4 if name == "t5" else 3)

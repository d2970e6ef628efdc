"""The head on sentence vectors: its features by hand, padding that changes nothing, saving, the Trainer's groups."""

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from polyrank.recipes._glue.sentence_head import (
    ApartCollator,
    SentenceClassifier,
    encode_apart,
    pair_features,
    sentence_vectors,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"))


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_vectors_and_features_by_hand():
    tokens = torch.tensor([[[3.0, 4.0], [3.0, 4.0], [9.0, -9.0]], [[0.0, 2.0], [0.0, 0.0], [0.0, 1.0]]])
    vectors = sentence_vectors(tokens, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    torch.testing.assert_close(vectors, torch.tensor([[0.6, 0.8], [0.0, 1.0]]) * 2**0.5)
    features = pair_features(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]))
    assert features.tolist() == [[2, 3, 3, -2]]


@pytest.mark.parametrize("kind, num_labels", [("regression", 1), ("single_label_classification", 3)])
def test_a_batch_equals_its_rows_one_by_one(kind, num_labels, encoder, tokenizer):
    """Loss and logits of a padded batch of pairs against a loop over single texts without padding."""
    model = SentenceClassifier.from_encoder(encoder, num_labels, kind, texts_per_row=2).eval()
    columns = [["a b", "c", "d d d a"], ["b", "a c d", "c"]]
    rows, lengths = encode_apart(columns, tokenizer, 16)
    assert lengths == [4, 5, 6]
    labels = [1.0, 2.5, 0.0] if num_labels == 1 else [1, 2, 0]
    batch = ApartCollator(tokenizer)([{**row, "labels": label} for row, label in zip(rows, labels, strict=True)])
    assert batch["input_ids"].shape == (6, 6)
    with torch.no_grad():
        output = model(**batch)
        alone = []
        for first, second in zip(*columns, strict=True):
            texts = [tokenizer(text, return_tensors="pt") for text in (first, second)]
            u, v = (model.encoder(**text).last_hidden_state.mean(1) for text in texts)
            u, v = (4 * x / x.norm() for x in (u, v))  # sqrt(16)
            alone.append(model.classifier(torch.cat([(u - v).abs(), u * v], dim=1)))
    alone = torch.cat(alone)
    torch.testing.assert_close(output.logits, alone, atol=1e-5, rtol=1e-5)
    if num_labels == 1:
        expected = ((alone[:, 0] - torch.tensor(labels)) ** 2).mean()
    else:
        expected = -alone.log_softmax(1)[range(3), labels].mean()
    torch.testing.assert_close(output.loss, expected)


def test_one_text_a_row_and_saving(encoder, tokenizer, tmp_path):
    model = SentenceClassifier.from_encoder(encoder, 2, "single_label_classification", texts_per_row=1).eval()
    assert model.classifier.in_features == 16
    batch = ApartCollator(tokenizer)(encode_apart([["a", "b c"]], tokenizer, 16)[0])
    model.save_pretrained(tmp_path / "saved")
    again = SentenceClassifier.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    saved = again.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_cut_texts_are_known(tokenizer):
    rows, lengths = encode_apart([["a b c d", "a"], ["b", "c"]], tokenizer, 4)
    assert lengths == [6, 3]
    assert [len(ids) for ids in rows[0]["input_ids"]] == [4, 3]

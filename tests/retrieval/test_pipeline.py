"""Sizes, queries, negatives, teachers and tuples, each against something worked by hand or written the slow way."""

import json
import math
import random
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from polyrank.core.errors import ConfigError, DataError
from polyrank.retrieval import teachers
from polyrank.retrieval.corpus import Document
from polyrank.retrieval.generate import GivenWork, QueryWork, cloze, crop, sample_t5, sentences, title
from polyrank.retrieval.mine import NegativeWork, united
from polyrank.retrieval.sizing import CorpusWork, queries_per_document, sample_size
from polyrank.retrieval.store import Rows
from polyrank.retrieval.teachers import CrossEncoderTeacher, FunctionTeacher, FusionTeacher, check_margins, fuse
from polyrank.retrieval.tuples import (
    LabelWork,
    TupleWork,
    check_reachable,
    draws,
    margin_range,
    pass_order,
    rescaled,
)


def rows_file(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Rows(path)


def made(work):
    """All rows of a work's parts, and its counts."""
    file, counts = BytesIO(), Counter()
    for part in range(work.num_parts):
        counts.update(work(part, file))
    return [json.loads(line) for line in file.getvalue().splitlines()], counts


@pytest.mark.parametrize(
    ("documents", "per_document"), [(100, 2500), (5183, 49), (57638, 5), (83334, 3), (10**6, 3), (1, 250_000)]
)
def test_queries_per_document(documents, per_document):
    assert queries_per_document(documents) == per_document


def test_sample_size():
    assert [sample_size(n) for n in (5183, 83_334, 10**6)] == [5183, 83_334, 83_334]
    assert (sample_size(10**6, 0), sample_size(10**6, 7), sample_size(5, 7)) == (10**6, 7, 5)
    with pytest.raises(ConfigError, match="sample_size must be -1"):
        sample_size(5, -2)
    with pytest.raises(DataError, match="no document with text"):
        queries_per_document(0)


def corpus_file(path, documents=60):
    rows = [{"_id": f"d{i}", "title": "", "text": f"word{i} text" if i % 10 else ""} for i in range(documents)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_sample_keeps_the_order_leaves_out_empty_documents_and_depends_on_the_seed(tmp_path):
    path = corpus_file(tmp_path / "c.jsonl")
    rows, counts = made(CorpusWork(path, 20, seed=0))
    numbers = [int(row["_id"][1:]) for row in rows]
    assert numbers == sorted(numbers)
    assert len(numbers) == 20
    assert counts == {"rows": 20, "empty": 6, "broken_text": 0, "not_sampled": 34}
    assert not any(number % 10 == 0 for number in numbers)
    assert [row["_id"] for row in made(CorpusWork(path, 20, seed=1))[0]] != [row["_id"] for row in rows]
    assert len(made(CorpusWork(path, 0, seed=0))[0]) == 54
    Path(path).write_text('{"_id": "a", "text": ""}\n')
    with pytest.raises(DataError, match="holds no document with text"):
        made(CorpusWork(path, -1, seed=0))


TEXT = "First sentence here . Second one follows ! Too short . Was this the fourth sentence ?"


def test_sentences_and_titles():
    assert sentences(TEXT) == ["First sentence here", "Second one follows !", "Was this the fourth sentence ?"]
    assert sentences("機械学習は面白いです。次の文も長いです。短い。") == [
        "機械学習は面白いです。",
        "次の文も長いです。",
    ]
    document = Document("d", "A title .", TEXT)
    assert title(document, 2, random.Random(0)) == ["A title", "First sentence here"]
    assert title(Document("d", "", TEXT), 1, random.Random(0)) == ["First sentence here"]
    assert [len(one.split()) for one in sentences("word " * 100_000)] == [32]


def test_cloze_and_crop_draw_from_the_document_without_repeating():
    document = Document("d", "", TEXT)
    found = cloze(document, 10, random.Random(0))
    assert sorted(found) == sorted(sentences(TEXT))
    cut = crop(document, 5, random.Random(0))
    assert len(set(cut)) == 5
    assert all(piece in TEXT and 3 <= len(piece.split()) <= 16 for piece in cut)
    assert crop(Document("d", "", "two words"), 3, random.Random(0)) == []


def test_query_rows_name_their_document_and_skipped_documents_are_counted(tmp_path):
    rows = [{"_id": "a\tb", "title": "Some title", "text": TEXT}, {"_id": "z", "title": "", "text": "x"}]
    work = QueryWork(rows_file(tmp_path / "r", rows), ["title", "cloze"], 2, seed=0, part_size=1)
    found, counts = made(work)
    assert {row["documents"][0] for row in found} == {"a\tb"}
    assert len({row["text"] for row in found}) == len(found) == counts["rows"]
    assert counts["documents_without_query"] == 1
    assert found == made(QueryWork(work.corpus, ["title", "cloze"], 2, seed=0, part_size=7))[0]  # parts do not matter


def test_given_queries_skip_and_count_positives_that_the_corpus_lacks(tmp_path):
    rows = rows_file(tmp_path / "r", [{"_id": "a", "title": "", "text": "x"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "?"}\n{"_id": "2", "text": "?"}\n')
    (tmp_path / "qrels" / "train.tsv").write_text("q\td\ts\n1\ta\t1\n1\tgone\t1\n2\tgone\t1\n")
    found, counts = made(GivenWork(rows, str(tmp_path)))
    assert found == [{"_id": "1", "text": "?", "kind": "given", "documents": ["a"]}]
    assert counts == {"rows": 1, "positives_not_in_corpus": 2, "queries_without_positive": 1}
    (tmp_path / "qrels" / "train.tsv").write_text("q\td\ts\n1\tgone\t1\n")
    with pytest.raises(DataError, match="no query has a positive"):
        made(GivenWork(rows, str(tmp_path)))


def tiny_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=1
    )
    return T5ForConditionalGeneration(config).eval()


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", "[CLS]", "[SEP]", *(f"w{i}" for i in range(35))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def test_t5_queries_depend_on_the_seed_alone(tmp_path):
    tokenizer, model = tiny_tokenizer(), tiny_t5()
    texts = ["w1 w2 w3", "w4"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = sample_t5(tokenizer, model, texts, 3, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(one) for one in found] == [3, 3]
    assert sample_t5(tokenizer, model, texts, 3, seed=5) == found
    assert sample_t5(tokenizer, model, texts, 3, seed=6) != found
    model.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    rows = rows_file(tmp_path / "r", [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)])
    work = QueryWork(rows, ["t5"], 2, seed=0, generator=str(tmp_path / "t5"))
    assert made(work)[0] == made(QueryWork(rows, ["t5"], 2, seed=0, generator=str(tmp_path / "t5")))[0]
    with pytest.raises(ConfigError, match="cannot load a generator from"):
        made(QueryWork(rows, ["t5"], 2, seed=0, generator=str(tmp_path)))
    with pytest.raises(ConfigError, match="needs a generator"):
        QueryWork(rows, ["t5"], 2, seed=0)


def place(tmp_path, documents=200, queries=30, seed=0):
    """A corpus and queries with random vectors."""
    chance = np.random.default_rng(seed)
    words = [f"word{i}" for i in range(40)]
    texts = [" ".join(chance.choice(words, 8)) for _ in range(documents)]
    corpus = rows_file(tmp_path / "c", [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)])
    asked = [
        {"_id": f"q{i}", "text": " ".join(chance.choice(words, 3)), "documents": [f"d{i}", f"d{i + 1}"]}
        for i in range(queries)
    ]
    docs = chance.standard_normal((documents, 8)).astype(np.float32)
    vectors = chance.standard_normal((queries, 8)).astype(np.float32)
    np.save(tmp_path / "d.npy", docs), np.save(tmp_path / "q.npy", vectors)
    return corpus, rows_file(tmp_path / "q", asked), (tmp_path / "d.npy", tmp_path / "q.npy"), docs, vectors


def test_negatives_equal_brute_force_and_hold_no_positive(tmp_path):
    corpus, queries, files, docs, vectors = place(tmp_path)
    work = NegativeWork(corpus, queries, {"dense": files}, bm25=True, k=10, part_size=7)
    found, counts = made(work)
    lexical = work._lexical.scores([row["text"] for row in queries])
    for number, row in enumerate(found):
        positives = {number, number + 1}
        expected = []
        for scores in (docs @ vectors[number], lexical[number]):
            order = [i for i in sorted(range(200), key=lambda i: (-scores[i], i)) if i not in positives]
            order = [i for i in order[:10] if scores is not lexical[number] or scores[i] > 0]
            expected += [f"d{i}" for i in order if f"d{i}" not in expected]
        assert row["negatives"] == expected
    assert counts["negatives"] == sum(len(row["negatives"]) for row in found)
    assert counts["rows"] == 30


def test_bm25_mines_no_document_without_a_common_word_and_no_retriever_mines_the_query_itself(tmp_path):
    texts = {"a": "blue whale", "b": "whale song", "c": "stone bridge", "d": "iron bridge", "whale": "whale oil"}
    corpus = rows_file(tmp_path / "c", [{"_id": key, "title": "", "text": text} for key, text in texts.items()])
    asked = [
        {"_id": "whale", "text": "whale", "documents": ["a"]},
        {"_id": "q", "text": "zebra", "documents": ["a"]},
        {"_id": "b", "text": "bridge", "documents": ["c"]},
    ]
    queries = rows_file(tmp_path / "q", asked)
    found, counts = made(NegativeWork(corpus, queries, {}, bm25=True, k=3))
    assert [row["negatives"] for row in found] == [["b"], [], ["d"]]
    assert counts["queries_without_negative"] == 1
    np.save(tmp_path / "v.npy", np.eye(5, dtype=np.float32))
    np.save(tmp_path / "w.npy", np.ones((3, 5), dtype=np.float32))
    dense, _ = made(NegativeWork(corpus, queries, {"d": (tmp_path / "v.npy", tmp_path / "w.npy")}, bm25=False, k=3))
    assert [row["negatives"] for row in dense] == [["b", "c", "d"], ["b", "c", "d"], ["a", "d", "whale"]]


def test_the_union_keeps_order_and_k_after_the_positives_are_out():
    assert united([[1, 2, 3, 4], [4, 5, 2]], {2}, 2) == [1, 3, 4, 5]
    assert united([[7]], {7}, 5) == []


def test_a_corpus_smaller_than_k(tmp_path):
    corpus, queries, files, _, _ = place(tmp_path, documents=3, queries=2)
    found, counts = made(NegativeWork(corpus, queries, {"dense": files}, bm25=True, k=50))
    assert [sorted(row["negatives"]) for row in found] == [["d2"], ["d0"]]
    assert counts["queries_without_negative"] == 0
    corpus, queries, files, _, _ = place(tmp_path, documents=2, queries=1)
    found, counts = made(NegativeWork(corpus, queries, {"dense": files}, bm25=False, k=50))
    assert (found[0]["negatives"], counts["queries_without_negative"]) == ([], 1)


def test_draws_are_uniform():
    negatives = [f"n{i}" for i in range(20)]
    found = Counter(negative for _, negative in draws(["p"], negatives, 20_000, 0, "q"))
    assert sum((count - 1000) ** 2 / 1000 for count in found.values()) < 44  # chi-square, 19 degrees of freedom
    assert draws(["p"], negatives, 5, 0, "q") == draws(["p"], negatives, 9, 0, "q")[:5]


def labels_of(tmp_path, passes=3, part_size=7, score=None):
    corpus, queries, files, _, _ = place(tmp_path)
    negatives = rows_file(tmp_path / "n", made(NegativeWork(corpus, queries, {"d": files}, True, 10))[0])
    calls = []

    def own(pairs):
        calls.extend(pairs)
        return [float(len(query) * 3 - len(document) + document.count("word1")) for query, document in pairs]

    teacher = FunctionTeacher(queries, corpus, score or own)
    found, counts = made(LabelWork(queries, negatives, corpus, teacher, passes, seed=0, part_size=part_size))
    return found, counts, calls, own, corpus, queries


def test_labels_are_score_differences_and_a_pair_is_scored_once(tmp_path):
    found, counts, calls, own, corpus, queries = labels_of(tmp_path)
    text = {row["_id"]: row["text"] for row in corpus}
    assert len(calls) == len(set(calls)) == counts["scored_pairs"]
    assert counts["tuples"] == 90
    for row, query in zip(found, queries, strict=True):
        assert row["query"] == query["_id"]
        for positive, negative, margin in row["draws"]:
            assert positive in query["documents"]
            high, low = own([(query["text"], text[positive]), (query["text"], text[negative])])
            assert margin == high - low


def test_labels_do_not_depend_on_the_parts(tmp_path):
    assert labels_of(tmp_path, part_size=7)[0] == labels_of(tmp_path, part_size=100)[0]


@pytest.mark.parametrize(("score", "message"), [(lambda pairs: [float("nan")] * len(pairs), "not finite"),
                                                (lambda pairs: [1.0], r"shape \(1,\) for")])  # fmt: skip
def test_a_teacher_that_gives_no_numbers(tmp_path, score, message):
    with pytest.raises(DataError, match=message):
        labels_of(tmp_path, score=score)


def test_tuples_go_pass_by_pass_and_no_query_comes_twice_in_one(tmp_path):
    labels = rows_file(
        tmp_path / "l",
        [
            {"query": f"q{i}", "draws": [[f"p{i}", f"n{t}", float(t)] for t in range(4)] if i % 5 else []}
            for i in range(10)
        ],
    )
    found, _ = made(TupleWork(labels, total=28, seed=0, part_size=5))
    assert len(found) == 28
    for number in range(4):
        part = found[number * 8 : (number + 1) * 8]
        assert len({row["query"] for row in part}) == len(part)
        assert all(row["margin"] == number and row["negative"] == f"n{number}" for row in part)
    assert {row["query"] for row in found[:8]} == {f"q{i}" for i in range(10) if i % 5}
    assert [row["query"] for row in found[:8]] != [row["query"] for row in found[8:16]]
    assert found == made(TupleWork(labels, total=28, seed=0, part_size=28))[0]
    assert sorted(pass_order([3, 1, 2], 0, 0)) == [1, 2, 3]


def test_without_a_negative_there_is_no_tuple(tmp_path):
    labels = rows_file(tmp_path / "l", [{"query": "q", "draws": []}])
    for action in (lambda: made(TupleWork(labels, 1, 0)), lambda: margin_range(labels)):
        with pytest.raises(DataError, match="no query has a negative: the corpus needs at least two documents"):
            action()


@pytest.mark.parametrize("smallest", [-4.0, 0.0])
def test_rescaling_keeps_signs_and_maps_the_ends(smallest):
    values = [smallest, smallest / 2, 0.0, 1.0, 8.0]
    found = [rescaled(value, smallest, 8.0, 1.0) for value in values]
    assert found == ([-1.0, -0.5, 0.0, 0.125, 1.0] if smallest else [0.0, 0.0, 0.0, 0.125, 1.0])
    assert [math.copysign(1, a) for a in found if a] == [math.copysign(1, b) for b in values if b]


def test_margins_that_cosines_cannot_reach_are_refused():
    check_reachable(-2.0, 2.0)
    with pytest.raises(ConfigError, match=r"margins lie in \[-1, 9.5\], but this student's scores are cosines"):
        check_reachable(-1.0, 9.5)


def loss_by_hand(query, positive, negative, labels):
    margins = (query * positive).sum(1) - (query * negative).sum(1)
    return ((margins - labels) ** 2).sum() / len(labels)


def test_the_loss_equals_its_closed_form_and_its_gradient():
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss
    from sentence_transformers.util import pairwise_cos_sim

    torch.manual_seed(0)
    q, p, n = (torch.randn(5, 4, dtype=torch.double, requires_grad=True) for _ in range(3))
    y = torch.randn(5, dtype=torch.double)
    loss = MarginMSELoss(None).compute_loss_from_embeddings([q, p, n], y)
    torch.testing.assert_close(loss, loss_by_hand(q, p, n, y), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, q)
    error = ((q * p).sum(1) - (q * n).sum(1) - y).detach()
    torch.testing.assert_close(gradient, 2 / 5 * error[:, None] * (p - n).detach(), rtol=1e-12, atol=0)
    swapped = MarginMSELoss(None).compute_loss_from_embeddings([q, n, p], -y)
    assert abs(float(swapped - loss)) < 1e-12
    own = ((q * p).sum(1) - (q * n).sum(1)).detach()
    assert float(MarginMSELoss(None).compute_loss_from_embeddings([q, p, n], own)) == 0
    cosine = MarginMSELoss(None, pairwise_cos_sim)
    scaled = cosine.compute_loss_from_embeddings([3 * q, 3 * p, 3 * n], y)
    torch.testing.assert_close(scaled, cosine.compute_loss_from_embeddings([q, p, n], y))


def test_fusion_by_hand():
    dense, lexical = np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 3.0])
    deviation = math.sqrt(2 / 3)
    expected = [0.7 * a / deviation + 0.3 * b / math.sqrt(2) for a, b in zip((-1, 0, 1), (-1, -1, 2), strict=True)]
    np.testing.assert_allclose(fuse(dense, lexical, 0.7), expected)
    np.testing.assert_allclose(fuse(dense, lexical, 0.7, True), np.array(expected) * deviation / 0.7)
    np.testing.assert_array_equal(fuse(np.ones(3), np.zeros(3), 0.7), 0)
    student = fuse(dense, np.zeros(3), 0.7, True)  # nothing lexical: margins are the dense ones
    np.testing.assert_allclose(student[2] - student[0], dense[2] - dense[0])


def test_the_fusion_teacher_standardises_over_the_whole_corpus(tmp_path):
    corpus, queries, files, docs, vectors = place(tmp_path)
    teacher = FusionTeacher(queries, corpus, files, student_scale=False, block=64)
    pairs = [(3, 5), (4, 5), (3, 150)]
    lexical = teacher._lexical.scores([row["text"] for row in queries])
    expected = [fuse(docs @ vectors[q], lexical[q], 0.7)[d] for q, d in pairs]
    np.testing.assert_allclose(teacher(pairs), expected, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"fusion weight must be in \(0, 1\], got 0"):
        FusionTeacher(queries, corpus, files, weight=0)


def tiny_cross_encoder(folder, num_labels=1):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        num_labels=num_labels,
        initializer_range=1.0,
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    from tokenizers.processors import BertProcessing

    tokenizer.backend_tokenizer.post_processor = BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    tokenizer.save_pretrained(folder)
    return str(folder)


def cross_encoder_rows(tmp_path):
    chance = random.Random(0)

    def text(length):
        return " ".join(f"w{chance.randrange(35)}" for _ in range(length))

    corpus = rows_file(tmp_path / "c", [{"_id": f"d{i}", "title": "", "text": text(5 + i)} for i in range(12)])
    return rows_file(tmp_path / "q", [{"_id": f"q{i}", "text": text(4)} for i in range(6)]), corpus


def test_the_cross_encoders_raw_logits_equal_sentence_transformers_without_its_sigmoid(tmp_path):
    from sentence_transformers import CrossEncoder

    name = tiny_cross_encoder(tmp_path / "ce")
    queries, corpus = cross_encoder_rows(tmp_path)
    pairs = [(q, d) for q in range(6) for d in range(12)]
    found = CrossEncoderTeacher(queries, corpus, name, batch_size=5)(pairs)
    peer = CrossEncoder(name, max_length=64, device="cpu")
    texts = [(queries[q]["text"], corpus[d]["text"]) for q, d in pairs]
    raw = peer.predict(texts, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    np.testing.assert_allclose(found, raw, atol=1e-5)
    squashed = peer.predict(texts, show_progress_bar=False)  # its default for one output
    np.testing.assert_allclose(squashed, 1 / (1 + np.exp(-raw)), atol=1e-5)
    check_margins(float(found.max() - found.min()), 0.0, name)
    with pytest.raises(DataError, match="does the model end in a sigmoid"):
        check_margins(float(squashed.max() - squashed.min()), 0.0, name)


def test_no_text_is_tokenised_twice(tmp_path, monkeypatch):
    name = tiny_cross_encoder(tmp_path / "ce")
    queries, corpus = cross_encoder_rows(tmp_path)
    model, tokenizer = teachers.load_cross_encoder(name)
    seen = Counter()

    class Counting:
        def __call__(self, texts, **options):
            seen.update(texts)
            return tokenizer(texts, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    monkeypatch.setattr(teachers, "load_cross_encoder", lambda name: (model, Counting()))
    teacher = CrossEncoderTeacher(queries, corpus, name)
    whole = [(q, d) for q in range(6) for d in range(12)]
    np.testing.assert_allclose(np.concatenate([teacher(whole[:36]), teacher(whole[36:])]), teacher(whole), atol=1e-5)
    del seen[queries[0]["text"]]
    counted = CrossEncoderTeacher(queries, corpus, name)
    seen.clear()
    counted(whole[:36]), counted(whole[36:])
    assert set(seen.values()) == {1}
    assert len(seen) == 18


def test_texts_are_cut_alone_and_a_pair_fits_the_model(tmp_path):
    name = tiny_cross_encoder(tmp_path / "ce")
    queries = rows_file(tmp_path / "q", [{"_id": "q", "text": "w1 " * 30}])
    corpus = rows_file(tmp_path / "c", [{"_id": "d", "title": "", "text": "w2 " * 100_000}])
    assert np.isfinite(CrossEncoderTeacher(queries, corpus, name)([(0, 0)])).all()
    tokenizer = teachers.load_cross_encoder(name)[1]
    inputs = teachers.pair_inputs(tokenizer, [5, 6], [7] * 100)
    assert inputs["input_ids"] == [3, 5, 6, 4, *[7] * 59, 4]
    assert inputs.get("token_type_ids", [0] * 4 + [1] * 60) == [0] * 4 + [1] * 60


def test_a_classifier_with_several_outputs_is_no_teacher(tmp_path):
    name = tiny_cross_encoder(tmp_path / "ce", num_labels=3)
    queries, corpus = cross_encoder_rows(tmp_path)
    with pytest.raises(ConfigError, match="has 3 outputs; a teacher has one, its score"):
        CrossEncoderTeacher(queries, corpus, name)([(0, 0)])
    with pytest.raises(ConfigError, match="cannot load a cross-encoder from"):
        CrossEncoderTeacher(queries, corpus, str(tmp_path))([(0, 0)])


def test_margins_of_logits_and_of_their_sigmoids():
    logits = np.array([10.0, 5.0, -3.0])
    margins = logits[:, None] - logits[None]
    check_margins(margins.max(), margins.min(), "stub")
    sigmoid = 1 / (1 + np.exp(-logits))
    squashed = sigmoid[:, None] - sigmoid[None]
    with pytest.raises(DataError, match=r"margins of teacher 'stub' lie in \[-0.953, 0.953\]"):
        check_margins(squashed.max(), squashed.min(), "stub")

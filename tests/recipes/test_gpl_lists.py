"""Recipe `gpl` with pairs=all: whole lists of documents, and training of the queries' side alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_domain

from polyrank.core.errors import CheckpointError, ConfigError, DataError
from polyrank.core.files import sha256
from polyrank.recipes._gpl.config import GplConfig
from polyrank.recipes._gpl.evaluation import evaluate_adapters
from polyrank.recipes._gpl.lists import ListLoss, Lists
from polyrank.recipes._gpl.search import index_corpus
from polyrank.recipes.gpl import run_gpl
from polyrank.retrieval.corpus import Document, document_text, read_corpus, write_beir
from polyrank.retrieval.dense import encode_corpus, encodes_queries_only, load_encoder
from polyrank.retrieval.search import open_searcher


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return toy_domain.make_encoder(tmp_path_factory.mktemp("encoder") / "toy")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    documents = [
        Document(f"d{i}", f"old{i % 24}x0 old{i % 24}x1 old{i % 24}x2", " ".join(f"new{i % 24}x{j}" for j in range(6)))
        for i in range(48)
    ]
    folder = write_beir(
        tmp_path_factory.mktemp("corpus"),
        documents,
        queries={"a": "old3x0 old3x1", "b": "new7x2 new7x3"},
        qrels={"a": {"d3": 1, "d27": 1}, "b": {"d7": 1}},
    )
    return folder


def config_of(corpus, encoder, **changes):
    given = {
        "queries_per_document": 1,
        "negatives": 5,
        "rank": 2,
        "lora_alpha": 2.0,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "steps": 8,
        "batch_size": 4,
        "warmup_steps": 1,
        "save_every": 4,
        "learning_rate": 1e-2,
        "max_length": 32,
    }
    return GplConfig(corpus=Path(corpus), encoder=encoder, **{**given, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus, encoder):
    return run_gpl(config_of(corpus, encoder), tmp_path_factory.mktemp("runs") / "run")


def test_offline_settings_mean_lists_and_queries_alone(corpus, encoder):
    config = config_of(corpus, encoder)
    assert config.resolved_pairs(own_teacher=False) == "all"
    assert config.trains_queries_only(own_teacher=False)
    for other in (
        config_of(corpus, encoder, teacher="cross-encoder", cross_encoder="x"),
        replace(config, queries=corpus),
    ):
        assert other.resolved_pairs(own_teacher=False) == "source"
        assert not other.trains_queries_only(own_teacher=False)


def test_labels_are_the_teachers_scores_of_every_mined_document(run):
    corpus = {row["_id"]: number for number, row in enumerate(run.prepared.corpus.rows())}
    vectors = run.prepared.documents.vectors()
    labels = list(run.prepared.labels.rows())
    queries = {row["_id"]: row for row in run.prepared.queries.rows()}
    assert [row["query"] for row in labels] == list(queries)
    for row in labels[:5]:
        assert not set(row["documents"]) & set(queries[row["query"]]["documents"])
        assert len(row["documents"]) == len(row["scores"]) >= 5
    largest = max(max(row["scores"]) - min(row["scores"]) for row in labels)
    assert run.prepared.margin == largest
    assert vectors.shape == (len(corpus), 32) or len(vectors) == len(corpus)


def test_every_pass_holds_every_query_once(run):
    rows = [row["row"] for row in run.prepared.tuples.rows()]
    size = len(run.prepared.labels.rows())
    assert len(rows) == 32
    assert len(set(rows[:size])) == min(size, 32)


def test_documents_keep_their_vectors_and_queries_move(tmp_path, run, corpus, encoder):
    assert encodes_queries_only(run.weights)
    assert not encodes_queries_only(None)
    texts = [document_text(document) for document in read_corpus(corpus)]
    base, adapted = load_encoder(encoder), load_encoder(encoder, run.weights)
    index = index_corpus(corpus, tmp_path / "index", encoder, run.weights, quiet=True)
    assert np.allclose(index._vectors, encode_corpus(base, texts), atol=1e-6)
    assert not np.allclose(encode_corpus(adapted, ["old3x0"]), encode_corpus(base, ["old3x0"]), atol=1e-4)
    adapted.disable_adapters()  # as the documentation tells users of sentence-transformers alone
    assert np.array_equal(encode_corpus(adapted, texts), encode_corpus(base, texts))
    adapted.enable_adapters()
    searcher = open_searcher(tmp_path / "index")  # from the index alone: its own copy of the adapter
    scores = encode_corpus(adapted, ["old3x0 new3x1"]) @ encode_corpus(base, texts).T
    found = searcher.search(["old3x0 new3x1"], 3)[0]
    assert [hit.score for hit in found] == pytest.approx(sorted(scores[0], reverse=True)[:3], abs=1e-5)
    assert "documents without it" in index.manifest.encoder.describe()
    assert index_corpus(corpus, tmp_path / "base", encoder, quiet=True).manifest.key != index.manifest.key


def test_evaluation_ranks_base_documents_for_adapted_queries(tmp_path, run, corpus, encoder):
    done = evaluate_adapters([run.weights], encoder, corpus, tmp_path / "out", depth=10, quiet=True)
    ranked = json.loads(next((tmp_path / "out" / "rankings").glob("adapted-*.json")).read_text())["rankings"]
    documents = list(read_corpus(corpus))
    vectors = encode_corpus(load_encoder(encoder), [document_text(document) for document in documents])
    scores = encode_corpus(load_encoder(encoder, run.weights), ["old3x0 old3x1"])[0] @ vectors.T
    best = np.argsort(-scores, kind="stable")[:10]
    assert {documents[i].id for i in best[:4]} == set(ranked["a"][:4])
    assert [system.name for system in done.systems] == ["BM25", "zero-shot", "adapted"]
    assert not list((tmp_path / "out").glob(".index*"))


def test_the_loss_is_the_mean_over_pairs_of_lists(run, encoder):
    lists = Lists(run.prepared)
    model = load_encoder(encoder)
    vectors = run.prepared.documents.vectors()
    loss = ListLoss(model, lists, vectors, cosine=False)
    rows = [0, 3, 5]
    texts = [lists.queries[lists.query[lists.tuples[number]["row"]]]["text"] for number in rows]
    value = loss([model.preprocess(texts)], torch.tensor(rows))
    query = encode_corpus(model, texts)
    expected = []
    for place, number in enumerate(rows):
        documents, scores = lists.at(number)
        error = vectors[documents] @ query[place] - scores
        expected.append(np.mean([(a - b) ** 2 for i, a in enumerate(error) for b in error[i + 1 :]]))
    assert value.item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_both_sides_with_two_documents_is_margin_mse(tmp_path, corpus, encoder):
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss

    config = config_of(corpus, encoder, side="both", documents_per_query=2, steps=4)
    done = run_gpl(config, tmp_path / "run")
    assert done.prepared.documents is None
    assert not encodes_queries_only(done.weights)
    assert {len(row["chosen"]) for row in done.prepared.tuples.rows()} == {2}
    lists, model = Lists(done.prepared), load_encoder(encoder)
    batch = lists.dataset(with_documents=True)[:4]
    features = [model.preprocess(batch[name]) for name in ("query", "document_0", "document_1")]
    margins = torch.tensor([float(scores[0] - scores[1]) for _, scores in map(lists.at, batch["label"])])
    ours = ListLoss(model, lists, None, cosine=False)(features, torch.tensor(batch["label"]))
    assert torch.allclose(ours, MarginMSELoss(model)(features, margins), rtol=1e-4)


def test_a_list_teaches_the_margins_it_holds(tmp_path, corpus, encoder):
    done = run_gpl(
        config_of(corpus, encoder, query_kinds=["title"], steps=100, rank=8, learning_rate=3e-2), tmp_path / "run"
    )
    lists, vectors = Lists(done.prepared), done.prepared.documents.vectors()

    def error(model):
        loss = ListLoss(model, lists, vectors, cosine=False)
        with torch.no_grad():
            texts = lists.dataset(False)[:40]
            return loss([model.preprocess(texts["query"])], torch.tensor(texts["label"])).item()

    assert error(load_encoder(encoder, done.weights)) < 0.5 * error(load_encoder(encoder))


def test_full_fine_tuning_of_the_queries_side(tmp_path, corpus, encoder):
    done = run_gpl(config_of(corpus, encoder, adapter="full", learning_rate=1e-3), tmp_path / "run")
    assert done.weights.name == "model"
    assert encodes_queries_only(done.weights)
    index = index_corpus(corpus, tmp_path / "index", encoder, done.weights, quiet=True)
    texts = [document_text(document) for document in read_corpus(corpus)]
    assert np.allclose(index._vectors, encode_corpus(load_encoder(encoder), texts), atol=1e-6)


def test_it_resumes_to_the_same_bytes(tmp_path, run, corpus, encoder, monkeypatch):
    from polyrank.recipes._gpl import training as _gpl_training

    real = _gpl_training.training_log

    def dying(log, steps):
        callback = real(log, steps)
        end = callback.on_step_end

        def on_step_end(args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt
            return end(args, state, control, **kwargs)

        callback.on_step_end = on_step_end
        return callback

    config = config_of(corpus, encoder)
    with monkeypatch.context() as patch:
        patch.setattr(_gpl_training, "training_log", dying)
        with pytest.raises(KeyboardInterrupt):
            run_gpl(config, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    again = run_gpl(config, tmp_path / "run")
    assert sha256(again.weights / "adapter_model.safetensors") == sha256(run.weights / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": "queries", "pairs": "source"}, "pairs must be 'all', here it is 'source'"),
        ({"documents_per_query": 4, "pairs": "retrieved"}, "documents_per_query belongs to pairs 'all'"),
        ({"side": "both", "pairs": "all"}, "give documents_per_query=8"),
    ],
)
def test_sides_and_pairs_that_do_not_go_together(tmp_path, corpus, encoder, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_gpl(config_of(corpus, encoder, **changes), tmp_path)


def test_too_few_documents_for_a_list(tmp_path, encoder):
    folder = write_beir(tmp_path / "corpus", [Document(f"d{i}", f"old{i}x0 old{i}x1 old{i}x2", "") for i in range(2)])
    with pytest.raises(DataError, match="two mined documents: the corpus needs at least three"):
        run_gpl(config_of(folder, encoder, query_kinds=["title"]), tmp_path / "run")


def test_a_mark_that_cannot_be_read(tmp_path):
    (tmp_path / "polyrank_gpl.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        encodes_queries_only(tmp_path)
    (tmp_path / "polyrank_gpl.json").write_text('{"side": "left"}')
    with pytest.raises(CheckpointError, match="must say side"):
        encodes_queries_only(tmp_path)


def test_settings_are_checked_before_anything_is_read():
    with pytest.raises(ConfigError, match="documents_per_query must be at least 2, got 1"):
        GplConfig(corpus=Path("c"), documents_per_query=1)
    with pytest.raises(ConfigError, match="pairs must be 'source'"):
        GplConfig(corpus=Path("c"), loss="qgen", pairs="all")

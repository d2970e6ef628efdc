"""Search with a tiny encoder: the ranking of plain dot products, the adapter that the index carries, refusals."""

import json
import shutil

import numpy as np
import pytest
import search_place

from polyrank.core.errors import CheckpointError, ConfigError, DataError
from polyrank.retrieval.corpus import Document, document_text, read_corpus
from polyrank.retrieval.dense import encode_corpus, load_encoder
from polyrank.retrieval.index import adapter_hash, identify
from polyrank.retrieval.index_build import build_index
from polyrank.retrieval.search import Hit, clean_query, moves, open_searcher, snippet

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """encoder/, adapter/, other/ (another adapter), data/, and the indexes base/ and adapted/."""
    folder = tmp_path_factory.mktemp("search")
    search_place.make_encoder(folder / "encoder")
    search_place.make_adapter(folder / "encoder", folder / "adapter")
    search_place.make_adapter(folder / "encoder", folder / "other", seed=2)
    search_place.make_data(folder / "data")
    index(folder, "base", None)
    index(folder, "adapted", folder / "adapter")
    return folder


def index(place, name, adapter):
    encoder = load_encoder(str(place / "encoder"), adapter)
    identity = identify(encoder, str(place / "encoder"), adapter)
    encode = lambda texts: encode_corpus(encoder, texts)  # noqa: E731
    return build_index(read_corpus(place / "data"), encode, place / name, identity, adapter=adapter)


@pytest.mark.parametrize("name", ["base", "adapted"])
def test_finds_what_dot_products_find(place, name):
    adapter = place / "adapter" if name == "adapted" else None
    encoder = load_encoder(str(place / "encoder"), adapter)
    documents = list(read_corpus(place / "data"))
    queries = ["ships anchor", "the moon"]
    scores = encode_corpus(encoder, queries) @ encode_corpus(encoder, list(map(document_text, documents))).T
    seen = open_searcher(place / name).search(queries, 5)
    for row, hits in zip(scores, seen, strict=True):
        assert [hit.id for hit in hits] == [documents[i].id for i in np.argsort(-row, kind="stable")[:5]]
        np.testing.assert_allclose([hit.score for hit in hits], -np.sort(-row)[:5], atol=1e-5)
        assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]


def test_base_and_adapted_rankings_differ(place):
    seen = [open_searcher(place / name).search(["ships anchor"], 12)[0] for name in ("base", "adapted")]
    assert [hit.id for hit in seen[0]] != [hit.id for hit in seen[1]]
    assert {hit.id for hit in seen[0]} == {hit.id for hit in seen[1]}


def test_the_index_carries_its_adapter(place, tmp_path):
    shutil.copytree(place / "adapted", tmp_path / "moved")
    moved = open_searcher(tmp_path / "moved")
    assert moved.search(["bread"], 3) == open_searcher(place / "adapted").search(["bread"], 3)
    assert adapter_hash(moved.index.adapter) == adapter_hash(place / "adapter")
    assert open_searcher(place / "adapted", adapter=place / "adapter").search(["bread"], 1)


def test_an_encoder_that_did_not_make_the_index_is_refused(place, tmp_path):
    search_place.make_encoder(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"adapted was built by .* with adapter \w{8} .*, not by .* with adapter"):
        open_searcher(place / "adapted", adapter=place / "other")
    with pytest.raises(CheckpointError, match=r"with no adapter .*, not by .* with adapter"):
        open_searcher(place / "base", adapter=place / "adapter")
    config = place / "adapted" / "index.json"
    copied = tmp_path / "altered"
    shutil.copytree(place / "adapted", copied)
    assert config.exists()
    (file,) = copied.glob("data-*/adapter/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 400}))  # not among the weights
    with pytest.raises(CheckpointError, match="was built by"):
        open_searcher(copied)
    with pytest.raises(DataError, match="adapter_config"):
        adapter_hash(tmp_path)


@pytest.mark.parametrize(("query", "k"), [("", 5), (" \n\x00\t ", 5), ("x", 0), ("x", 1001)])
def test_mistakes(place, query, k):
    with pytest.raises(ConfigError, match=r"the query is empty|k must be 1 to 1000"):
        open_searcher(place / "base").search(["fine", query], k)


def test_queries_are_cleaned():
    assert clean_query("  a\tb\x00c\n d ") == "a b c d"
    assert clean_query("z\udc80") == "z\ufffd"


def test_odd_queries_are_answered(place):
    searcher = open_searcher(place / "base")
    document = document_text(next(iter(read_corpus(place / "data"))))
    for query in ("文書", "word " * 2000, document, "<script>"):
        assert len(searcher.search([query], 100)[0]) == 12
    assert searcher.search([document], 1)[0][0].id == "ships-0"
    assert searcher.latency_ms(["ships", "stars"]) > 0


def test_snippets():
    assert snippet("A wing", "A wing . in a slipstream") == "in a slipstream"
    assert snippet("A wing", "A wing") == "A wing"
    assert snippet("", "x" * 299 + " yy z") == "x" * 299 + " …"
    assert len(snippet("t", "word " * 100_000)) < 310


def test_moves():
    hits = lambda *ids: [Hit(rank, one, "", "", 0.0) for rank, one in enumerate(ids, 1)]  # noqa: E731
    assert moves(hits("a", "b", "c"), hits("c", "b", "x", "a")) == {"c": 2, "b": 0, "x": None, "a": -3}


def test_a_corpus_of_a_folder_of_text(place, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# The ship\n\nsail anchor")
    (tmp_path / "docs" / "b.txt").write_bytes(b"bread \xff flour")
    encoder = load_encoder(str(place / "encoder"))
    encode = lambda texts: encode_corpus(encoder, texts)  # noqa: E731
    built = build_index(
        read_corpus(tmp_path / "docs"), encode, tmp_path / "index", identify(encoder, str(place / "encoder"))
    )
    expected = [Document("a.md", "The ship", "sail anchor"), Document("b.txt", "", "bread \ufffd flour")]
    assert built.documents([0, 1]) == expected

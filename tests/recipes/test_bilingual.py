"""Recipe image_captioning/bilingual on a handful of images, and the figures by language."""

import gzip

import pytest

from polyrank.core.errors import DataError
from polyrank.core.files import read_json_lines
from polyrank.core.records import read_record
from polyrank.recipes._captions.bilingual import BilingualData, bilingual_parts
from polyrank.recipes._captions.languages import LanguageGuess, of_language, win_shares_by_language, written_shares
from polyrank.recipes.run import run_recipe

THINGS = [("dog", "Hund"), ("cat", "Katze"), ("car", "Auto"), ("boat", "Boot"), ("tree", "Baum")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bilingual")
    (folder / "task2").mkdir()
    for split, images in (("train", 40), ("test_2016", 4)):
        for number, lang in enumerate(("en", "de")):
            for i in range(1, 6):
                start = ("the photo shows a", "das Bild zeigt ein")[number]
                lines = [f"{start} {THINGS[k % 5][number]} {k % 8} {i}\n" for k in range(images)]
                (folder / "task2" / f"{split}.{i}.{lang}.gz").write_bytes(gzip.compress("".join(lines).encode()))
    return folder


@pytest.mark.parametrize("method", ["mle", "mcl"])
def test_a_run_from_captions_to_result(files, tmp_path, method):
    done = run_recipe([
        *("recipe=image_captioning/bilingual", f"method={method}", f"runs_dir={tmp_path}", f"cache_dir={files}/cache"),
        *(f"data.path={files}", "data.codebook.size=4", "data.codebook.levels=2", "data.codebook.width=6"),
        *("model.small.layers=1", "model.small.width=16", "model.small.heads=2", "model.small.feed_forward=24"),
        *("model.small.vocabulary=300", "model.small.num_steps=3", "model.small.batch_size=8"),
        "model.small.bf16=false",
        *("num_steps=4", "batch_size=4", "max_new_tokens=6", "decode_batch_size=3", "num_decodings=2", "rank=2"),
        "speakers=tfidf",
    ])  # fmt: skip
    record = read_record(done.run_dir / "result.json")
    assert len(record.rows) == 2
    figures, details = record.rows[0].figures, record.details["decodings"]
    name = next(iter(details))
    assert {"oracle_bleu_en", "oracle_bleu_de", "both_languages"} <= figures.keys()
    lines = read_json_lines(done.run_dir / "predictions.jsonl")
    assert lines[0]["meta"]["languages"] == ["en", "en", "de", "de"]
    assert len(lines[0]["references"]) == 4
    assert lines[0]["input"].startswith("<v0_")
    assert set(details[name]["written_shares"]) == {"en", "de"}
    if method == "mcl":
        shares = details[name]["win_shares_by_language"]
        assert all(sum(row) == pytest.approx(1) for row in shares.values())
        assert 0.5 <= figures["win_purity"] <= 1
    else:
        assert "win_purity" not in figures


def test_half_of_the_adapters_captions_are_german_and_no_caption_is_used_twice(files, tmp_path):
    from polyrank.data.visual_words import Codebook

    parts = bilingual_parts(BilingualData(path=files, codebook=Codebook(2, 4, 6)), tmp_path)
    assert len(parts.base) == 20 * 2 + 2 * 2  # 20 images, two English captions left, of two images the German too
    assert sum("-de-" in pair.id for pair in parts.base) == 4
    german = [pair for pair in parts.adapter if "-de-" in pair.id]
    assert len(parts.adapter) == 20 * 2
    assert len(german) == 20
    assert not {p.id.rsplit("-", 2)[0] for p in parts.base} & {p.id.rsplit("-", 2)[0] for p in parts.adapter}
    described = {f"{i}" for i in (1, 2, 3)}
    assert not {pair.target.split()[-1] for pair in parts.base + parts.adapter} & described
    again = bilingual_parts(BilingualData(path=files, codebook=Codebook(2, 4, 6)), tmp_path)  # from the cache
    assert again == parts


RECORDS = [
    {"id": "a", "candidates": ["a dog", "ein Hund"], "references": ["the dog", "der Hund"],
     "nll": [[1.0, 2.0], [5.0, 3.0]], "meta": {"languages": ["en", "de"]}},
    {"id": "b", "candidates": ["a cat", "a dog"], "references": ["the cat", "die Katze"],
     "nll": [[2.0, 1.0], [4.0, 4.0]], "meta": {"languages": ["en", "de"]}},
]  # fmt: skip
TEXTS = {"en": ["a dog the cat"], "de": ["ein Hund die Katze der"]}


def test_win_shares_by_hand():
    """English: one win each. German: hypothesis 1 wins a, and b is a tie."""
    assert win_shares_by_language(RECORDS) == {"en": [0.5, 0.5], "de": [0.25, 0.75]}


def test_languages_are_told_by_words():
    guess = LanguageGuess(TEXTS)
    assert [guess(text) for text in ("A cat.", "die Katze", "xyz", "")] == ["en", "de", None, None]
    assert written_shares(RECORDS, guess) == {"en": [1.0, 0.5], "de": [0.0, 0.5]}
    with pytest.raises(DataError, match="at least two languages"):
        LanguageGuess({"en": ["a"], "de": [""]})


def test_references_of_one_language_and_their_absence():
    assert [record["references"] for record in of_language(RECORDS, "de")] == [["der Hund"], ["die Katze"]]
    with pytest.raises(DataError, match="id 'a' has no reference in language 'fr'"):
        of_language(RECORDS, "fr")

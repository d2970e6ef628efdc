"""Multi30k, WMT14 with extra references, ALMA's JSON: what is read, and every way in which files can be broken."""

import gzip
import json
import os
from pathlib import Path

import pytest

from polyrank.core.errors import ConfigError, DataError
from polyrank.data import alma, multi30k, wmt
from polyrank.data.e2e import MultiReference

DATA = Path(os.environ.get("POLYRANK_DATA", "data"))


def write_captions(folder, split="train", images=3, change=lambda name, lines: lines):
    (folder / "task2").mkdir(parents=True, exist_ok=True)
    for lang in ("en", "de"):
        for i in range(1, 6):
            name = f"{split}.{i}.{lang}"
            lines = change(name, [f"{lang} caption {i} of image {k}" for k in range(images)])
            (folder / "task2" / f"{name}.gz").write_bytes(gzip.compress("".join(f"{x}\n" for x in lines).encode()))
    return folder


def test_line_k_of_every_file_is_image_k(tmp_path):
    images = multi30k.read_captions(write_captions(tmp_path))
    assert [image.id for image in images] == ["train-00000", "train-00001", "train-00002"]
    assert images[1].captions["en"] == tuple(f"en caption {i} of image 1" for i in range(1, 6))
    assert images[2].captions["de"][4] == "de caption 5 of image 2"


def test_files_of_different_length_are_refused(tmp_path):
    write_captions(tmp_path, change=lambda name, lines: lines[:-1] if name == "train.3.de" else lines)
    with pytest.raises(DataError, match=r"train\.3\.de\.gz' has 2 lines and 'train\.1\.en\.gz' 3"):
        multi30k.read_captions(tmp_path)


def test_an_empty_caption_is_named(tmp_path):
    write_captions(tmp_path, change=lambda name, lines: [lines[0], " ", ""] if name == "train.2.en" else lines)
    with pytest.raises(DataError, match=r"train\.2\.en\.gz': 2 of 3 captions are empty \(first: line 2\)"):
        multi30k.read_captions(tmp_path)


def test_an_unknown_split_and_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="test_2016"):
        multi30k.read_captions(tmp_path, "test_2106")
    with pytest.raises(DataError, match=r"holds no captions train\.1\.en"):
        multi30k.read_captions(tmp_path)


def test_translations_are_paired_by_line(tmp_path):
    (tmp_path / "task1").mkdir()
    (tmp_path / "task1" / "val.en").write_text("one  two\n\nthree\n", encoding="utf-8")
    (tmp_path / "task1" / "val.de").write_text("eins zwei\nzwei\ndrei\n", encoding="utf-8")
    pairs = multi30k.read_translations(tmp_path, "val")
    assert pairs == [
        MultiReference("val-00000", "one two", ("eins zwei",)),
        MultiReference("val-00002", "three", ("drei",)),
    ]
    with pytest.raises(ConfigError, match="both 'de'"):
        multi30k.read_translations(tmp_path, "val", "de", "de")


@pytest.mark.skipif(not (DATA / "multi30k").is_dir(), reason="POLYRANK_DATA has no multi30k")
def test_the_real_multi30k():
    images = multi30k.read_captions(DATA / "multi30k", "val")
    assert len(images) == 1014
    assert all(len(set(image.captions)) == 2 for image in images)
    assert len(multi30k.read_translations(DATA / "multi30k", "test_2016_flickr")) == 1000


EXTRA = "S-1\tgood day\nT-1\tguten Tag\nR1-1\tTag\nR2-1\tGrüß Gott\nS-7\tno\nT-7\tnein\nR1-7\tnö\nR2-7\tkein\n"


def test_extra_references_by_id(tmp_path):
    file = tmp_path / "refs.gz"
    file.write_bytes(gzip.compress(EXTRA.encode()))
    first, second = wmt.read_extra_references(file)
    assert first == MultiReference("wmt14-0001", "good day", ("Tag", "Grüß Gott"))
    assert second.references == ("nö", "kein")
    assert wmt.read_extra_references(file, official=True)[1].references == ("nein", "nö", "kein")


@pytest.mark.parametrize(
    "text, message",
    [
        (EXTRA.replace("R2-7\tkein\n", ""), "reference R2 is missing for 1 of 2 ids .first: 7"),
        (EXTRA.replace("S-1\tgood day\n", ""), "the source S is missing for 1 of 2 ids"),
        (EXTRA + "R2-7\tnicht\n", "line 9: R2-7 appears twice"),
        (EXTRA.replace("R1-1\tTag", "R1-1\t "), "line 3: expected S-<i>"),
        (EXTRA.replace("R1-1\tTag", "Q1-1\tTag"), "line 3: expected S-<i>"),
        ("S-1\tgood day\n", "holds no reference"),
        ("", "holds no sentences"),
    ],
)
def test_broken_extra_references(tmp_path, text, message):
    (tmp_path / "refs").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        wmt.read_extra_references(tmp_path / "refs")


@pytest.mark.skipif(not (DATA / "wmt14_multiref").is_dir(), reason="POLYRANK_DATA has no wmt14_multiref")
def test_the_real_ten_references():
    examples = wmt.read_extra_references(DATA / "wmt14_multiref" / "wmt14-en-de.extra_refs.gz")
    assert len(examples) == 500
    assert {len(example.references) for example in examples} == {10}


def test_alma_json_and_prompt(tmp_path):
    file = tmp_path / "train.de-en.json"
    pairs = [{"translation": {"de": "Guten Tag.", "en": "Good day."}}, {"translation": {"de": "Nein.", "en": "No."}}]
    file.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    lines = alma.read_alma(file)
    assert lines[0] == MultiReference("train-000000", "Good day.", ("Guten Tag.",))
    file.write_text(json.dumps(pairs), encoding="utf-8")
    assert alma.read_alma(file) == lines
    pair = alma.as_pairs(alma.as_prompts(lines))[1]
    assert pair.prompt == "Translate this from English to German:\nEnglish: No.\nGerman:"
    assert pair.target == "Nein."


@pytest.mark.parametrize(
    "record, message",
    [
        ({"en": "a", "de": "b"}, "record 1: expected"),
        ({"translation": {"en": "a"}}, "has no field 'de'; its fields are en"),
        ({"translation": {"en": "a", "de": " "}}, "'de' must be text that is not empty"),
    ],
)
def test_broken_alma_records(tmp_path, record, message):
    (tmp_path / "x.json").write_text(json.dumps([record]), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        alma.read_alma(tmp_path / "x.json")


@pytest.mark.parametrize("template", ["{sorce}", "{}", "no source", "{source} {source}", "{source"])
def test_a_prompt_template_holds_the_source_once(template):
    with pytest.raises(ConfigError, match="prompt template"):
        alma.check_translation_prompt(template)

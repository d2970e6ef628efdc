"""TextCaps' JSON, photographs with metadata, images that do not open."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from polyrank.core.errors import DataError
from polyrank.data.images import CaptionedPhoto, open_image, read_photos, read_textcaps, usable_photos

DATA = Path(os.environ.get("POLYRANK_DATA", "data"))


def textcaps(folder, records, split="train"):
    (folder / f"TextCaps_0.1_{split}.json").write_text(json.dumps({"dataset_name": "textcaps", "data": records}))
    return folder


def test_captions_are_gathered_by_image_and_repeated_ones_count_once(tmp_path):
    (tmp_path / "train_images").mkdir()
    (tmp_path / "train_images" / "b.png").touch()
    rows = [("a", "a sign"), ("b", "a cup"), ("a", "a stop sign"), ("a", "a sign")]
    found = read_textcaps(textcaps(tmp_path, [{"image_id": i, "caption_str": c} for i, c in rows]), "train")
    assert found == [
        CaptionedPhoto("a", tmp_path / "train_images" / "a.jpg", ("a sign", "a stop sign")),
        CaptionedPhoto("b", tmp_path / "train_images" / "b.png", ("a cup",)),
    ]


@pytest.mark.parametrize(
    "records, message",
    [
        ([], "no records under 'data'"),
        ([{"caption_str": "x"}], "record 1 has no field 'image_id'"),
        ([{"image_id": "a", "caption_str": "x"}, {"image_id": "b", "caption_str": " "}], "'caption_str' must be"),
        ([{"image_id": "a"}], "record 1 has no field 'caption_str'"),
        (["a"], "record 1: a record must be a JSON object"),
    ],
)  # fmt: skip
def test_broken_textcaps(tmp_path, records, message):
    with pytest.raises(DataError, match=message):
        read_textcaps(textcaps(tmp_path, records), "train")


def test_images_that_do_not_open_are_named_once(tmp_path):
    photos = []
    for name in ("good", "torn", "text", "none"):
        path = tmp_path / f"{name}.png"
        Image.effect_noise((64, 64), 50).save(path)
        photos.append(CaptionedPhoto(name, path, ("x",)))
    photos[1].path.write_bytes(photos[1].path.read_bytes()[:900])
    photos[2].path.write_text("no image")
    photos[3].path.unlink()
    skipped = tmp_path / "skipped.jsonl"
    assert [p.id for p in usable_photos(photos, skipped)] == ["good"]
    lines = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["torn", "text", "none"]
    assert "does not open as an image" in lines[0]["reason"]
    assert "no such file" in lines[2]["reason"]
    photos[0].path.unlink()
    assert [p.id for p in usable_photos(photos, skipped)] == ["good"]  # read from the file, not looked at anew
    with pytest.raises(DataError, match="none of the 3 images opens"):
        usable_photos(photos[1:], tmp_path / "other.jsonl")


def test_an_image_of_any_mode_becomes_rgb(tmp_path):
    Image.new("LA", (3, 2)).save(tmp_path / "x.png")
    image = open_image(tmp_path / "x.png")
    assert image.mode == "RGB"
    assert image.size == (3, 2)


@pytest.mark.skipif(not (DATA / "dreambooth_thumbs").is_dir(), reason="POLYRANK_DATA has no dreambooth_thumbs")
def test_the_real_photographs(tmp_path):
    photos = read_photos(DATA / "dreambooth_thumbs", "test")
    assert len(photos) == 30
    assert usable_photos(photos, tmp_path / "skipped.jsonl") == photos
    with pytest.raises(DataError, match="no image of split 'dev'"):
        read_photos(DATA / "dreambooth_thumbs", "dev")

"""Recipes audio_captioning and image_captioning on tiny models of the real classes: sounds and images made here."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from polyrank.core.errors import ConfigError, DataError
from polyrank.core.files import read_json_lines
from polyrank.core.records import read_record
from polyrank.evaluation.metrics import read_predictions
from polyrank.recipes._captions.media import CaptionRows, MediaCoder, MediaExample, caption_nll, clean_caption
from polyrank.recipes.run import run_recipe

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("h5py")
SMALL = ["model.small.width=16", "model.small.heads=2", "model.small.num_steps=2", "model.small.vocabulary=300",
         "num_steps=3", "batch_size=2", "rank=2", "num_hypotheses=2", "max_new_tokens=5", "decode_batch_size=2",
         "metrics=[oracle_rouge_l]", "num_decodings=1", "save_every=2", "run_name=run", "speakers=tfidf"]  # fmt: skip


@pytest.fixture(scope="module")
def clotho(tmp_path_factory):
    """Clotho's layout: six clips (stereo, 8 kHz, one of zero length, one that is no sound), two for the test."""
    folder = tmp_path_factory.mktemp("clotho")
    draw = np.random.default_rng(0)
    for split, names in (("development", "abcdef"), ("evaluation", "xy")):
        (folder / split).mkdir()
        lines = ["file_name,caption_1,caption_2"]
        for i, name in enumerate(names):
            lines.append(f"{name}.wav,a sound of {name},the noise {name} makes")
            samples = draw.normal(size=(800 + 100 * i, 2)).astype(np.float32) * 0.1
            soundfile.write(folder / split / f"{name}.wav", samples, 8_000 if i % 2 else 16_000)
        (folder / f"clotho_captions_{split}.csv").write_text("\n".join(lines) + "\n")
    (folder / "development" / "c.wav").write_bytes(b"no sound")
    soundfile.write(folder / "development" / "d.wav", np.zeros((0, 1), np.float32), 16_000)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven photographs, one of which does not open."""
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for i in range(7):
        split = "test" if i < 2 else "train"
        Image.effect_noise((40 + i, 50 - i), 60).save(folder / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "caption": f"a photo of thing {i}", "split": split}))
    (folder / "4.png").write_bytes(b"no image")
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def audio(clotho, runs_dir, *more):
    return ["recipe=audio_captioning/small", "data=clotho", f"data.path={clotho}", "data.validation=null",
            "data.max_seconds=1", "model.small.seconds=1", f"runs_dir={runs_dir}", f"cache_dir={clotho}/cache", *SMALL,
            *more]  # fmt: skip


def image(photos, runs_dir, *more):
    return ["recipe=image_captioning/small", f"data.path={photos}", f"runs_dir={runs_dir}", f"cache_dir={photos}/cache",
            *SMALL, *more]  # fmt: skip


@pytest.mark.parametrize("method", ["mle", "mcl", "mcl_relaxed", "moe"])
def test_audio_from_files_to_result(clotho, tmp_path, method):
    decodings = ["num_decodings=null", "decodings=[{name: a, method: moe_expert}]"] if method == "moe" else []
    done = run_recipe(audio(clotho, tmp_path, f"method={method}", *decodings))
    record = read_record(done.run_dir / "result.json")
    assert record.details["skipped_sounds"] == {"train": 2, "test": 0}
    name = "clotho_dev_resample_mean_raw_ident_raw.hdf"
    skipped = read_json_lines(clotho / "cache" / "packs" / f"{name}.skipped.jsonl")
    assert [item["fname"] for item in skipped] == ["c.wav", "d.wav"]
    rows = read_predictions(done.run_dir)
    assert [row.id for row in rows] == ["x.wav", "y.wav"]
    assert {len(row.candidates) for row in rows} == {2}
    assert rows[0].references == ("a sound of x", "the noise x makes")
    figures = record.rows[0].figures
    assert {"oracle_rouge_l", "oracle_bleu", "mbleu_4", "mixture_nll"} <= figures.keys()
    if method.startswith("mcl"):
        assert len(rows[0].nll[0]) == 2
        assert figures["oracle_nll"] <= figures["mixture_nll"] <= figures["oracle_nll"] + np.log(2)


def budgets(record, run_dir):
    """Decoding -> budget of its row, checked against what was decoded: K candidates each, so many beams."""
    found = {}
    for i, row in enumerate(record.rows):
        name = row.settings["decoding"]
        folder = run_dir / "decodings" / f"test-{name}" if i else run_dir
        assert {len(line.candidates) for line in read_predictions(folder)} == {row.settings["K"]} == {2}
        assert {cost["beams"] for cost in read_json_lines(folder / "decoding_cost.jsonl")} == {row.settings["budget"]}
        found[name] = row.settings["budget"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mle", "moe_sparse"])
def test_every_row_of_the_audio_table_has_k_candidates_at_its_budget(clotho, tmp_path, method):
    done = run_recipe(audio(clotho, tmp_path, f"method={method}", "num_decodings=null"))
    wanted = {"beam": 2, "beam-x2": 4, "diverse-0.8": 2, "tta-2": 2, "tta-2-x2": 4}
    if method == "moe_sparse":
        wanted |= {"dense": 2, "sparse": 2, "router": 2, "experts": 2}
    record = read_record(done.run_dir / "result.json")
    assert budgets(record, done.run_dir) == wanted
    own, augmented = (record.rows[list(wanted).index(name)].figures for name in ("beam", "tta-2"))
    assert own["oracle_nll"] == augmented["oracle_nll"]  # likelihoods do not depend on the decoding


@pytest.mark.slow
def test_every_row_of_the_image_table_has_k_candidates_at_its_budget(photos, tmp_path, monkeypatch):
    """And who wrote what, where the k-th candidate is expert k's: vectors that give the writer away."""
    from polyrank.recipes._captions import speakers as _caption_speakers

    def vectors(candidates, encoder):
        assert encoder == "tfidf"
        return np.stack([np.eye(2)] * len(candidates)), "given"

    monkeypatch.setattr(_caption_speakers, "vectors_of", vectors)
    done = run_recipe(image(photos, tmp_path, "method=moe", "num_decodings=null"))
    record = read_record(done.run_dir / "result.json")
    wanted = {"beam": 2, "beam-x2": 4, "diverse-0.8": 2, "dense": 2, "sparse": 2, "router": 2, "experts": 2}
    assert budgets(record, done.run_dir) == wanted
    told = [row.settings["decoding"] for row in record.rows if "speaker_accuracy" in row.figures]
    assert told == ["experts"]
    assert record.rows[-1].figures["speaker_accuracy"] == 1.0
    assert record.details["decodings"]["test-experts"]["speakers"]["confusion"] == [[1, 0], [0, 1]]
    assert (done.run_dir / "decodings" / "test-experts" / "speakers.png").read_bytes().startswith(b"\x89PNG")
    assert [path.parent.name for path in done.run_dir.rglob("speakers.png")] == ["test-experts"]


@pytest.mark.parametrize("kind", ["audio", "image"])
def test_the_published_rows(kind):
    """Every decoding of the comparison, at beams 1, 2, 5 (sound) and 1, 2 (images); names tell what they are."""
    from polyrank.recipes._frame.compose import check_overrides, compose

    lists = {}
    for method in ("mle", "moe", "mcl"):
        settings = compose(check_overrides([f"recipe={kind}_captioning", f"method={method}"])).settings
        lists[method] = {d.name: (d.method, d.beams, d.options) for d in settings.chosen_decodings}
    times = (1, 2, 5) if kind == "audio" else (1, 2)
    augmented = {(0.2, 0.3), (0.4, 0.6), (0.6, 0.9)} if kind == "audio" else set()
    for method, many in {"mle": ("beam",), "moe": ("beam", "moe_stochastic", "moe_expert"), "mcl": ("mcl",)}.items():
        rows = list(lists[method].values())
        for name in many:
            assert [beams for found, beams, _ in rows if found == name] == list(times)
        diverse = {(o["diversity_penalty"], beams) for found, beams, o in rows if found == "diverse_beam"}
        assert diverse == (set() if method == "mcl" else {(x, b) for x in (0.5, 0.8, 1.0) for b in times})
        masks = {(o["time_fraction"], o["frequency_fraction"], b) for found, b, o in rows if found == "tta"}
        assert masks == (set() if method == "mcl" else {(*mask, b) for mask in augmented for b in times})
    assert {"dense", "sparse"} <= lists["moe"].keys()
    assert not {"dense", "sparse", "mcl"} & lists["mle"].keys()


def validated(clotho, runs_dir, *more):
    """The audio recipe, with a validation after every epoch of two steps."""
    kept = [
        text for text in audio(clotho, runs_dir) if text != "num_steps=3" and not text.startswith("data.validation")
    ]
    return [*kept, "num_steps=null", "data.validation=clotho_captions_evaluation.csv",
            "data.audio.validation=evaluation", *more]  # fmt: skip


@pytest.mark.parametrize("method", ["mle", "mcl"])
def test_validation_after_every_epoch_keeps_the_best(clotho, tmp_path, method):
    more = ["patience=1", "num_epochs=3", "learning_rate=0.5", "max_grad_norm=0.0", f"method={method}"]
    done = run_recipe(validated(clotho, tmp_path, *more))
    lines = read_json_lines(done.run_dir / "metrics.jsonl")
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert 2 <= len(losses) <= 3
    row = read_record(done.run_dir / "result.json").rows[0]
    assert np.isfinite(row.figures["oracle_nll"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mle", "mcl"])
def test_a_run_stopped_early_resumes_wherever_it_was_killed(clotho, tmp_path, monkeypatch, method):
    """After one of its checkpoints, the last of them, and between that and the end: the count of epochs that were no
    better goes on, no step is trained beyond the stop, and the best adapter is the same to the bit."""
    import transformers

    from polyrank.recipes._captions import training as _caption_training

    more = ["patience=2", "num_epochs=9", "learning_rate=0.1", "max_grad_norm=0.0", f"method={method}"]
    saves = []
    save = transformers.Trainer._save_checkpoint

    def count(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saves.append(self.state.global_step)
        if len(saves) == kill_after:
            raise KeyboardInterrupt

    def killed(*args):
        raise KeyboardInterrupt

    def evaluations(run):
        lines = [line for line in read_json_lines(run / "metrics.jsonl") if "eval_loss" in line]
        return {line["step"]: line["eval_loss"] for line in lines}

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", count)
    kill_after = None
    whole = run_recipe(validated(clotho, tmp_path, *more)).run_dir
    wanted, steps = load_file(whole / "adapter" / "adapter_model.safetensors"), sorted(set(saves))
    assert 3 <= len(steps) < 9  # it stopped by itself, after an epoch that was better than the first
    for point in [len(steps) - 1, len(steps), "at the end"][0 if method == "mle" else 2 :]:
        saves.clear()
        again = validated(clotho, tmp_path, *more, f"run_name=killed-{point}".replace(" ", "-"))
        with monkeypatch.context() as patch:
            kill_after = point
            if point == "at the end":
                patch.setattr(_caption_training, "atomic_write", killed)
            with pytest.raises(KeyboardInterrupt):
                run_recipe(again)
        kill_after = None
        run = run_recipe(again).run_dir
        assert sorted(set(saves)) == steps, point
        assert evaluations(run) == evaluations(whole), point
        found = load_file(run / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()), point


@pytest.mark.parametrize("method", ["mle_wide", "mcl"])
def test_images_from_files_to_result(photos, tmp_path, method):
    done = run_recipe(image(photos, tmp_path, f"method={method}"))
    record = read_record(done.run_dir / "result.json")
    assert record.details["skipped_images"] == {"train": 1, "test": 0}
    assert [item["id"] for item in read_json_lines(done.run_dir / "skipped-train.jsonl")] == ["4.png"]
    rows = read_predictions(done.run_dir)
    assert [row.id for row in rows] == ["0.png", "1.png"]
    assert rows[0].references == ("a photo of thing 0",)
    assert {len(row.candidates) for row in rows} == {2}


def test_an_interrupted_evaluation_decodes_what_is_missing_alone(photos, tmp_path, monkeypatch):
    from polyrank.recipes._captions import media as _caption_media

    done = run_recipe(image(photos, tmp_path, "decode_batch_size=1"))
    path = done.run_dir / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.splitlines(keepends=True)[0] + b'{"id": "1.p')
    for name in ("result.json", "finished"):
        (done.run_dir / name).unlink()
    decode, calls = _caption_media.decode_inputs, []
    monkeypatch.setattr(_caption_media, "decode_inputs", lambda *a, **k: calls.append(1) or decode(*a, **k))
    run_recipe(image(photos, tmp_path, "decode_batch_size=1"))
    assert len(calls) == 1
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_the_first_alone_writes(photos, tmp_path, run_program):
    """Two rows in each of two processes (gloo) are four rows of one: the same adapter and candidates."""
    more = ["method=mle", "num_steps=2"]
    one = run_recipe([*image(photos, tmp_path / "one", *more), "batch_size=4"]).run_dir  # builds the base model, too
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "polyrank"]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    overrides = image(photos, tmp_path / "two", *more)
    done = run_program([*launch, "run", *overrides], tmp_path / "log", timeout=540, env={**os.environ, **own})
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two" / one.relative_to(tmp_path / "one")
    tensors = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two)]
    for name, tensor in tensors[0].items():
        assert (tensor - tensors[1][name]).abs().mean() < 1e-4, name  # a step is 2e-3
    assert [row.candidates for row in read_predictions(one)] == [row.candidates for row in read_predictions(two)]
    assert [line["step"] for line in read_json_lines(two / "metrics.jsonl")] == [2]
    assert (two / "finished").is_file()
    assert not (two / "training").exists()
    built = run_program(
        [*launch, "run", *overrides, "model.small.layers=3", "run_name=other"],
        tmp_path / "log2",
        timeout=540,
        env={**os.environ, **own},
    )
    assert built.returncode != 0
    assert "model.small is built and trained first, in one process" in built.stderr


def test_a_model_split_between_processes_is_refused(photos, tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="FSDP: recipes keep the whole adapter in every process"):
        run_recipe(image(photos, tmp_path))
    with pytest.raises(ConfigError, match="'image_captioning/table' runs in one process"):
        run_recipe(["recipe=image_captioning/table", f"runs_dir={tmp_path}"])


def test_a_pack_whose_clips_lack_captions(clotho, tmp_path):
    import h5py

    run_recipe(audio(clotho, tmp_path / "packs", "method=mle"))
    packs = clotho / "cache" / "packs"
    names = [f"clotho_{part}_resample_mean_raw_ident_raw.hdf" for part in ("dev", "eval")]
    for name in names:
        (tmp_path / name).write_bytes((packs / name).read_bytes())
    with h5py.File(tmp_path / names[1], "r+") as file:
        file["captions"][1] = ["", " "]
    ready = ["data.format=pack", f"data.path={tmp_path}", f"data.train={names[0]}", f"data.test={names[1]}"]
    with pytest.raises(DataError, match=r"1 of 2 clips have no caption \(first: 'y\.wav'\)"):
        run_recipe(audio(clotho, tmp_path, *ready, "data.audio={}"))


def test_bad_settings_are_named(photos, clotho, tmp_path):
    for overrides, message in (
        (image(photos, tmp_path, "data.prompt='no image'"), "data.prompt must hold <image> once"),
        (image(photos, tmp_path, "model.name_or_path=x"), "name_or_path .* or small, not both"),
        (audio(clotho, tmp_path, "~data.audio.test"), r"data\.audio\.test: the folder"),
        (audio(clotho, tmp_path, "data.max_seconds=0"), r"data\.max_seconds must be positive"),
        (audio(clotho, tmp_path, "model.small.heads=3"), "even multiple of its 3 heads"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_recipe(overrides)


def test_a_candidate_is_cleaned():
    assert clean_caption("a\\ dog_and\n 一只狗 a cat ") == "a dog and a cat"


def example(name, captions):
    return MediaExample(name, lambda: None, captions)


def test_one_caption_an_epoch_is_drawn_anew_and_the_same_after_a_resume():
    examples = [example(str(i), tuple("abcde")) for i in range(40)]
    rows = CaptionRows(examples, one_per_epoch=True, seed=1)
    first = [rows[i]["target"] for i in range(40)]
    assert first == [rows[i]["target"] for i in range(40)]
    assert set(first) == set("abcde")
    rows.epoch = 1
    second = [rows[i]["target"] for i in range(40)]
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 20
    assert len(CaptionRows(examples, one_per_epoch=False, seed=1)) == 200


def test_rows_of_a_batch_are_what_each_is_alone():
    """Padding changes nothing: loss and NLL of a row are those of a batch with that row only, and of a plain loop."""
    from polyrank.recipes._captions.small_media import AUDIO, SmallMedia, qwen2_audio
    from polyrank.recipes._text.scratch_model import build_tokenizer

    prompt = f"{AUDIO[1]}{AUDIO[0]}{AUDIO[2]}Caption: "
    tokenizer = build_tokenizer([prompt, "a dog barks", "rain"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": list(AUDIO)})
    torch.manual_seed(0)
    model, processor = qwen2_audio(SmallMedia(width=16, heads=2, seconds=1), tokenizer)
    model.eval()
    coder = MediaCoder(processor, "audio", prompt)
    draw = np.random.default_rng(0)
    sounds = [draw.normal(size=n).astype(np.float32) for n in (4_000, 9_000)]
    examples = [MediaExample(str(i), lambda s=s: s, ()) for i, s in enumerate(sounds)]
    texts = ["a dog barks at the rain", "rain"]
    together, tokens = caption_nll(model, coder, examples, texts, None)
    alone = [caption_nll(model, coder, [e], [t], None)[0][0] for e, t in zip(examples, texts, strict=True)]
    assert together == pytest.approx(alone, rel=1e-4)
    batch = coder.rows(examples, texts)
    assert (batch["labels"] != -100).sum(1).tolist() == tokens
    assert batch["labels"][0][batch["labels"][0] != -100][-1] == tokenizer.eos_token_id
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    slow = 0.0
    for t in range(1, batch["labels"].shape[1]):
        if (label := int(batch["labels"][0, t])) != -100:
            slow -= float(logits[0, t - 1].log_softmax(-1)[label])
    assert together[0] == pytest.approx(slow, rel=1e-4)

"""Sound to 16 kHz mono, and packs: what is skipped, what an interruption leaves, what damage is noticed."""

import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from polyrank.core.errors import DataError
from polyrank.data import audio_pack
from polyrank.data.audio import load_mono, read_audio, resample, to_mono
from polyrank.data.clips import Clip, read_audiocaps, read_clotho

h5py = pytest.importorskip("h5py")
soundfile = pytest.importorskip("soundfile")
DATA = Path(os.environ.get("POLYRANK_DATA", "data"))


def tone(frequency, rate, seconds=0.5):
    return np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate).astype(np.float32)


def wav(samples, rate=16_000):
    """Bytes of a float WAV file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


@pytest.mark.parametrize("rate", [8_000, 32_000, 44_100])
def test_a_tone_of_another_rate_is_the_same_tone_at_16_khz(rate):
    got = load_mono(wav(tone(440, rate), rate), "tone")
    wanted = tone(440, 16_000)
    assert got.dtype == np.float32
    assert len(got) == len(wanted)
    assert np.abs(got - wanted)[400:-400].max() < 2e-3  # the filter's edges differ


def test_channels_are_averaged():
    both = np.stack([tone(440, 16_000), -tone(440, 16_000) + 0.5], axis=1)
    assert np.allclose(to_mono(both), 0.25, atol=1e-6)
    assert np.allclose(load_mono(wav(both)), 0.25, atol=1e-6)
    assert len(load_mono(wav(both), max_samples=100)) == 100


def test_sound_that_cannot_be_used(tmp_path):
    for data, message in (
        (wav(np.zeros((0, 1), np.float32)), "'x' has zero length"),
        (b"RIFF nonsense", "'x' is no sound file"),
        (b"", "'x' is no sound file"),
        (wav(np.array([0.0, np.nan], np.float32)), "no finite numbers"),
    ):
        with pytest.raises(DataError, match=message):
            read_audio(data, "x")
    with pytest.raises(DataError, match="no such file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(DataError, match="sample rate must be positive"):
        resample(np.zeros(4, np.float32), 0)


def clips(number, broken=()):
    """Clips of a constant, the i-th one i + 1 frames long."""
    made = []
    for i in range(number):
        data = wav(np.full((i + 1, 1), i / 100, np.float32))
        made.append(Clip(f"{i}.wav", (lambda data=data: data), (f"sound {i}", f"noise {i}")[: 1 + i % 2], f"src {i}"))
    for i, data in dict(broken).items():
        made[i] = Clip(f"{i}.wav", (lambda data=data: data), ("a sound",))
    return made


def test_a_pack_gives_back_what_was_packed_and_names_what_it_left_out(tmp_path):
    path = tmp_path / audio_pack.pack_name("clotho", "dev")
    assert path.name == "clotho_dev_resample_mean_raw_ident_raw.hdf"
    todo = clips(7, {2: b"no sound", 5: wav(np.zeros((0, 1), np.float32))})
    todo[6] = Clip("6.wav", todo[6].sound, ("good", " "))
    done = audio_pack.pack(todo, path, dataset="clotho", subset="dev", shard_size=2)
    assert done.num_clips == 4
    skipped = [json.loads(line) for line in (tmp_path / f"{path.name}.skipped.jsonl").read_text().splitlines()]
    assert skipped == done.skipped
    assert [item["index"] for item in skipped] == [2, 5, 6]
    assert "no sound file" in skipped[0]["reason"]
    assert "zero length" in skipped[1]["reason"]
    assert skipped[2]["reason"] == "a caption is empty"
    rows = list(audio_pack.AudioPack(path))
    assert [row.fname for row in rows] == ["0.wav", "1.wav", "3.wav", "4.wav"]
    assert [len(row.audio) for row in rows] == [1, 2, 4, 5]
    assert rows[1].captions == ("sound 1", "noise 1")
    assert rows[3].captions == ("sound 4",)
    assert np.allclose(rows[2].audio, 0.03)
    with h5py.File(path) as file:
        assert file["audio_shape"][:].tolist() == [[1, 1], [1, 2], [1, 4], [1, 5]]
        assert set(file["dataset"].asstr()[:]) == {"clotho"}
        assert file["index"][:].tolist() == [0, 1, 3, 4]
        assert file["source"].asstr()[2] == "src 3"
    assert not path.with_name(path.name + ".parts").exists()
    assert audio_pack.pack(todo, path, dataset="clotho", subset="dev", shard_size=2).skipped == skipped  # not anew


def test_an_interrupted_pack_goes_on_and_packs_nothing_twice(tmp_path):
    path, read, dying = tmp_path / "x.hdf", [], [True]

    def sound(i):
        def give():
            if i == 5 and dying[0]:
                raise KeyboardInterrupt
            read.append(i)
            return wav(np.full((3, 1), i / 10, np.float32))

        return give

    todo = [Clip(str(i), sound(i), (f"sound {i}",)) for i in range(8)]
    with pytest.raises(KeyboardInterrupt):
        audio_pack.pack(todo, path, dataset="d", subset="s", shard_size=2)
    assert not path.exists()
    dying[0] = False
    audio_pack.pack(todo, path, dataset="d", subset="s", shard_size=2)
    assert read == [0, 1, 2, 3, 4, 4, 5, 6, 7]  # 4 was read in the shard that was lost, and stands in the pack once
    assert [row.fname for row in audio_pack.AudioPack(path)] == list("01234567")


def test_parts_of_other_clips_are_not_used(tmp_path):
    path = tmp_path / "x.hdf"
    first = clips(4)
    first[3] = Clip("3.wav", lambda: (_ for _ in ()).throw(KeyboardInterrupt()), ("a",))
    with pytest.raises(KeyboardInterrupt):
        audio_pack.pack(first, path, dataset="d", subset="s", shard_size=2)
    audio_pack.pack(clips(3), path, dataset="d", subset="s", shard_size=2)
    assert len(audio_pack.AudioPack(path)) == 3
    with pytest.raises(DataError, match="packed from other clips"):
        audio_pack.pack(clips(2), path, dataset="d", subset="s", shard_size=2)


def test_damage_is_noticed(tmp_path):
    path = tmp_path / "x.hdf"
    audio_pack.pack(clips(3), path, dataset="d", subset="s")
    with h5py.File(path, "r+") as file:
        file["audio"][1] = np.zeros(2, np.float32)
    rows = audio_pack.AudioPack(path)
    assert len(rows[0].audio) == 1
    with pytest.raises(DataError, match=r"samples of '1\.wav' are not those that were packed"):
        rows[1]
    rows.file.close()
    with h5py.File(path, "r+") as file:
        del file["captions"]
    with pytest.raises(DataError, match="lacks captions"):
        audio_pack.AudioPack(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="no HDF5 file"):
        audio_pack.AudioPack(path)


def test_what_cannot_be_packed(tmp_path):
    with pytest.raises(DataError, match="no clips"):
        audio_pack.pack([], tmp_path / "x.hdf", dataset="d", subset="s")
    with pytest.raises(DataError, match=r"'0\.wav' appears twice"):
        audio_pack.pack(clips(1) * 2, tmp_path / "x.hdf", dataset="d", subset="s")
    with pytest.raises(DataError, match="none of the clips can be used"):
        audio_pack.pack(clips(1, {0: b""}), tmp_path / "x.hdf", dataset="d", subset="s")


def test_clotho_csv(tmp_path):
    (tmp_path / "c.csv").write_text('file_name,caption_1,caption_2\na.wav,A dog.,"Rain, far"\nb.wav,x,y\n')
    first, _ = read_clotho(tmp_path / "c.csv", tmp_path / "audio")
    assert first == Clip("a.wav", tmp_path / "audio" / "a.wav", ("A dog.", "Rain, far"), "a.wav")
    for text, message in (
        ("file_name,caption_1,caption_2\na.wav,A dog., \n", "line 2: caption_2 of 'a.wav' is empty"),
        ("file_name,caption_1\na.wav,A\na.wav,B\n", "line 3: file_name 'a.wav' is empty or appears twice"),
        ("name,caption_1\na,b\n", "no column 'file_name'; its columns are name, caption_1"),
        ("file_name,caption_1\n", "a header and no rows"),
    ):
        (tmp_path / "c.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            read_clotho(tmp_path / "c.csv", tmp_path)


def test_audiocaps_csv_gathers_captions_and_finds_files(tmp_path):
    (tmp_path / "audio").mkdir()
    for name in ("Yab.wav", "cd_30_40.flac", "7.wav"):
        (tmp_path / "audio" / name).touch()
    head = "audiocap_id,youtube_id,start_time,caption\n"
    (tmp_path / "a.csv").write_text(head + "1,ab,0,a dog\n2,ab,0,a hound\n3,cd,30,rain\n7,ef,1,wind\n9,gh,2,sea\n")
    clips = read_audiocaps(tmp_path / "a.csv", tmp_path / "audio")
    assert [clip.name for clip in clips] == ["ab", "cd", "ef", "gh"]
    assert clips[0].captions == ("a dog", "a hound")
    assert [clip.sound.name for clip in clips] == ["Yab.wav", "cd_30_40.flac", "7.wav", "gh"]
    (tmp_path / "a.csv").write_text(head + "1,ab,0, \n")
    with pytest.raises(DataError, match="line 2: caption is empty"):
        read_audiocaps(tmp_path / "a.csv", tmp_path / "audio")


@pytest.mark.skipif(not (DATA / "fsdd_small").is_dir(), reason="POLYRANK_DATA has no fsdd_small")
def test_the_real_spoken_digits(tmp_path):
    from polyrank.data.digits import read_digits

    found = read_digits(DATA / "fsdd_small", "test")
    assert len(found) == 60
    done = audio_pack.pack(found[:5], tmp_path / "x.hdf", dataset="fsdd", subset="test")
    assert done.skipped == []
    with zipfile.ZipFile(DATA / "fsdd_small" / "wavs.zip") as archive:
        name = next(n for n in archive.namelist() if n.endswith(found[0].name))
        frames = len(soundfile.read(io.BytesIO(archive.read(name)))[0])
    assert len(audio_pack.AudioPack(done.path)[0].audio) == 2 * frames  # 8 kHz to 16 kHz


@pytest.mark.skipif(not (DATA / "clotho_captions").is_dir(), reason="POLYRANK_DATA has no clotho_captions")
def test_the_real_clotho_and_audiocaps_texts(tmp_path):
    file = DATA / "clotho_captions" / "evaluation.csv.gz"
    assert gzip.decompress(file.read_bytes()).startswith(b"file_name,caption_1")
    clotho = read_clotho(file, tmp_path)
    assert {len(clip.captions) for clip in clotho} == {5}
    test = read_audiocaps(DATA / "audiocaps" / "test.csv.gz", tmp_path)
    assert len(test) == 975
    assert {len(clip.captions) for clip in test} == {5}

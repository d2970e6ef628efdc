"""Recipe e2e on a tiny random llama2.c model and a handful of rows: whole runs, both methods, interruptions."""

import csv
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from polyrank.core.errors import ConfigError, DataError
from polyrank.core.records import read_record
from polyrank.data.llama2c import Llama2cShape
from polyrank.evaluation.metrics import read_predictions
from polyrank.recipes import e2e
from polyrank.recipes._e2e import training as _e2e_training
from polyrank.recipes.run import run_recipe


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A llama2.c model of width 16, its tokenizer, and E2E files of 24 pairs and 5 inputs."""
    folder = tmp_path_factory.mktemp("files")
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256)), " ", *"abcdefgh", " a", " b", " c"]
    body = b"".join(struct.pack("<fi", -float(i), len(p)) + p.encode() for i, p in enumerate(pieces))
    (folder / "tok.bin").write_bytes(struct.pack("<i", 8) + body)
    shape = Llama2cShape(16, 24, 1, 2, 1, len(pieces), 64)
    rng = np.random.default_rng(0)
    data = b"".join(
        (rng.normal(size=dims) * 0.3 + (len(dims) == 1)).astype("<f4").tobytes() for _, dims in shape.blocks()
    )
    (folder / "model.bin").write_bytes(struct.pack("<7i", 16, 24, 1, 2, 1, len(pieces), 64) + data)
    (folder / "data").mkdir()
    for name, inputs, references in (("trainset.csv", 12, 2), ("testset_w_refs.csv", 5, 3)):
        with (folder / "data" / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["mr", "ref"])
            for i in range(inputs):
                for j in range(references):
                    writer.writerow([f"a {'bcdefgh'[i % 7]} {i}", f"{'ab'[j % 2]} c {'bcdefgh'[i % 7]} d {j}"])
    return folder


def overrides(files, runs_dir, *more):
    return [
        *(
            "recipe=e2e",
            f"runs_dir={runs_dir}",
            f"model.checkpoint={files}/model.bin",
            f"model.tokenizer={files}/tok.bin",
        ),
        *(f"data.path={files}/data", "num_hypotheses=2", "rank=2", "num_steps=6", "batch_size=4", "save_every=2"),
        *("decode_batch_size=3", "max_new_tokens=6", "run_name=run"),
        *more,
    ]


def figures(record):
    """Everything but times."""
    return [{k: v for k, v in row.figures.items() if not k.endswith("time_s")} for row in record.rows]


LABELS = {"mle": "LoRA-MLE r=2", "mle_wide": "LoRA-MLE r=4", "mcl": "LoRA-MCL r=2"}


@pytest.mark.parametrize("method", ["mle", "mle_wide", "mcl"])
def test_a_run_from_files_to_result(files, tmp_path, method):
    done = run_recipe(overrides(files, tmp_path, f"method={method}"))
    record = read_record(done.run_dir / "result.json")
    decodings = [row.settings["decoding"] for row in record.rows]
    assert len(decodings) == (3 if method == "mcl" else 7)
    assert record.rows[0].method == LABELS[method]
    assert {row.settings["budget"] for row in record.rows} == {2, 4}
    for name in decodings:
        folder = done.run_dir if name == decodings[0] else done.run_dir / "decodings" / name
        rows = read_predictions(folder)
        assert [row.id for row in rows] == [f"test-{i:05d}" for i in range(5)]
        assert {len(row.candidates) for row in rows} == {2}
        assert all(row.scores is not None for row in rows)
    nll = [row.nll for row in read_predictions(done.run_dir)]
    assert {len(reference) for row in nll for reference in row} == {2 if method == "mcl" else 1}
    first = record.rows[0].figures
    if method == "mcl":
        assert first["oracle_nll"] < first["mixture_nll"] < first["oracle_nll"] + np.log(2)
        assert sum(record.details["win_shares"]) == pytest.approx(1)
        parameters = [t.shape for t in load_file(done.run_dir / "adapter" / "adapter_model.safetensors").values()]
        assert all(shape[0] == 2 for shape in parameters)
    else:
        assert first["oracle_nll"] == pytest.approx(first["mixture_nll"])
    assert len(record.details["quality_diversity"]) == len(decodings)
    assert not (done.run_dir / "training").exists()
    steps = [json.loads(line)["step"] for line in (done.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("method, label", [("moe", "LoRA-MoE r=2"), ("moe_sparse", "LoRA-MoE top 2 r=2")])
def test_a_mixture_of_experts_at_the_same_budgets(files, tmp_path, method, label):
    done = run_recipe(overrides(files, tmp_path, f"method={method}", "num_hypotheses=3"))
    record = read_record(done.run_dir / "result.json")
    names = [row.settings["decoding"] for row in record.rows]
    assert {"beam", "diverse-0.5", "stochastic", "expert", "stochastic-x2", "expert-x2", "sample"} <= set(names)
    assert {row.method for row in record.rows} == {label}
    for row, name in zip(record.rows, names, strict=True):
        folder = done.run_dir if name == names[0] else done.run_dir / "decodings" / name
        assert {len(line.candidates) for line in read_predictions(folder)} == {3}
        costs = [json.loads(line)["beams"] for line in (folder / "decoding_cost.jsonl").read_text().splitlines()]
        assert set(costs) == {row.settings["budget"]} == {6 if name.endswith("x2") else 3}
    saved = json.loads((done.run_dir / "adapter" / "adapter_config.json").read_text())
    assert (saved["num_experts"], saved["top_k"]) == (3, 2 if method == "moe_sparse" else 0)
    figures = record.rows[0].figures
    assert figures["oracle_nll"] == pytest.approx(figures["mixture_nll"])  # one model, whatever its experts


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["mle", "mcl"])
def test_a_run_killed_in_training_and_in_decoding_ends_as_if_it_had_not_been(files, tmp_path, method, monkeypatch):
    whole = run_recipe(overrides(files, tmp_path / "whole", f"method={method}")).run_dir

    from transformers import Trainer

    original, calls = Trainer.training_step, {"n": 0}

    def dying_step(self, *args, **kwargs):
        calls["n"] += 1
        if calls["n"] == 4:  # steps 1, 2 (checkpoint), 3, and death in the fourth
            raise Killed
        return original(self, *args, **kwargs)

    cut = overrides(files, tmp_path / "cut", f"method={method}")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dying_step)
        with pytest.raises(Killed):
            run_recipe(cut)
    assert (tmp_path / "cut" / "e2e" / "run" / "training" / "checkpoint-2").is_dir()

    predict, written = e2e.predict, {"n": 0}

    def dying_predict(*args, **kwargs):
        written["n"] += 1
        if written["n"] == 2:
            raise Killed
        return predict(*args, **kwargs)

    calls["n"] = -100
    with monkeypatch.context() as patch:
        patch.setattr(e2e, "predict", dying_predict)
        patch.setattr(Trainer, "training_step", dying_step)
        with pytest.raises(Killed):
            run_recipe(cut)
    assert calls["n"] == -96  # only the four steps after the checkpoint were made again

    with monkeypatch.context() as patch:
        patch.setattr(_e2e_training, "_train", lambda *a, **k: pytest.fail("trained again"))
        again = run_recipe(cut).run_dir
    tensors = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, again)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    assert (whole / "predictions.jsonl").read_bytes() == (again / "predictions.jsonl").read_bytes()
    assert figures(read_record(whole / "result.json")) == figures(read_record(again / "result.json"))


def test_table_runs_everything_once_and_goes_on(files, tmp_path, monkeypatch):
    table = [text for text in overrides(files, tmp_path) if not text.startswith(("recipe=", "num_hypotheses="))] + [
        "recipe=e2e/table",
        "num_hypotheses=[2]",
        "seeds=[0,1]",
        "num_decodings=1",
        "num_steps=2",
    ]
    run_one, started = e2e.run_one, []

    def dying(config, folder):
        started.append(folder.name)
        if len(started) == 3:
            raise Killed
        return run_one(config, folder)

    with monkeypatch.context() as patch:
        patch.setattr(e2e, "run_one", dying)
        with pytest.raises(Killed):
            run_recipe(table)
    with monkeypatch.context() as patch:
        patch.setattr(e2e, "run_one", lambda config, folder: (started.append(folder.name), run_one(config, folder)))
        done = run_recipe(table)
    names = [f"{m}-k2-seed{s}" for s in (0, 1) for m in ("mle", "mle_wide", "mcl", "mcl_relaxed")]
    assert started == [*names[:3], *names[2:]]
    record = read_record(done.run_dir / "result.json")
    assert [(row.method, row.seed) for row in record.rows] == [
        (f"{m} r={r}", s)
        for s in (0, 1)
        for m, r in (("LoRA-MLE", 2), ("LoRA-MLE", 4), ("LoRA-MCL", 2), ("LoRA-MCL relaxed", 2))
    ]
    points = record.details["quality_diversity"]
    assert len(points) == 8
    assert {"mbleu_4", "oracle_bleu", "method", "seed", "budget"} <= set(points[0])
    assert len(list((done.run_dir / "base_model").iterdir())) == 1  # converted once


def test_limits_choose_the_same_inputs_for_every_seed(files, tmp_path):
    ids = []
    for seed in (0, 1):
        more = (
            f"seed={seed}",
            "data.test_limit=3",
            "data.train_limit=5",
            "num_decodings=1",
            "num_steps=1",
            "method=mle",
        )
        done = run_recipe(overrides(files, tmp_path / str(seed), *more))
        ids.append([row.id for row in read_predictions(done.run_dir)])
        assert json.loads((done.run_dir / "adapter" / "training.json").read_text())["rows"] == 5
    assert ids[0] == ids[1]
    assert len(ids[0]) == 3


@pytest.mark.parametrize(
    "more, error, match",
    [
        (["num_hypotheses=0"], ConfigError, "num_hypotheses must be at least 1"),
        (["learning_rate=0"], ConfigError, "learning_rate must be positive"),
        (["num_decodings=0"], ConfigError, "num_decodings must be at least 1"),
        (["data.test=tset"], ConfigError, "did you mean 'test'"),
        (["data.template=x"], ConfigError, "prompt template"),
        (["data.train_limit=0"], ConfigError, "train_limit must be at least 1"),
        (["model.tokenizer=null"], ConfigError, "give model.tokenizer"),
        (["model=hub", "model.name_or_path=x", "model.checkpoint=y"], ConfigError, "model needs name_or_path"),
        (["method.name=mle"], ConfigError, r"decoding 'beam' \(mcl\) does not go with method 'mle'"),
        (["method=mle", "method.name=moe_dense"], ConfigError, "did you mean 'moe'"),
        (["method=moe", "method.name=mle"], ConfigError, "'stochastic' .moe_stochastic. does not go with method 'mle'"),
        (["model.end_token=theend"], ConfigError, "'theend' is no token"),
        (["method.decodings=[]"], ConfigError, "at least one decoding"),
        (["data.path=/nowhere"], DataError, "holds no test set"),
        (["max_new_tokens=60"], DataError, "exceed the model's context of 64"),
        (["max_length=4"], DataError, "all 24 pairs are longer"),
        (["++method.options.rr=3"], ConfigError, "method.options"),
        (["method=mcl_relaxed", "method.epsilon=0.9"], ConfigError, "epsilon"),
    ],
)
def test_mistakes(files, tmp_path, more, error, match):
    if "model=hub" in more:
        given = [
            text
            for text in overrides(files, tmp_path, *more)
            if not text.startswith(("model.checkpoint=/", "model.tok"))
        ]
    else:
        given = overrides(files, tmp_path, *more)
    with pytest.raises(error, match=match):
        run_recipe([*given, "num_steps=1"] if "max_new_tokens=60" in more else given)


def test_a_folder_takes_the_same_path_as_a_hub_id(files, tmp_path):
    from polyrank.data.llama2c import convert_llama2c

    folder = convert_llama2c(files / "model.bin", files / "tok.bin", tmp_path / "model")
    given = [text for text in overrides(files, tmp_path) if not text.startswith("model.")]
    more = [
        "model=hub",
        f"model.name_or_path={folder}",
        "model.end_token='<s>'",
        "method=mle",
        "num_decodings=1",
        "num_steps=2",
    ]
    hub = run_recipe([*given, *more]).run_dir
    own = run_recipe(overrides(files, tmp_path / "own", "method=mle", "num_decodings=1", "num_steps=2")).run_dir
    assert (hub / "predictions.jsonl").read_bytes() == (own / "predictions.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="cannot load a tokenizer from"):
        run_recipe([*given, *more, f"model.name_or_path={tmp_path}/none", "run_name=other"])

"""Recipe `gpl` end to end on a tiny encoder: what is redone when, resume after kills, what is trained, bad input."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_domain

from polyrank.core.errors import CheckpointError, ConfigError, DataError, RunError
from polyrank.core.files import sha256
from polyrank.recipes._gpl import training as _gpl_training
from polyrank.recipes._gpl.config import GplConfig
from polyrank.recipes._gpl.evaluation import describe, find_adapters
from polyrank.recipes.gpl import run_gpl
from polyrank.recipes.run import run_recipe
from polyrank.retrieval import mine, teachers
from polyrank.retrieval.corpus import Document, write_beir
from polyrank.retrieval.dense import encode_corpus, load_encoder
from polyrank.retrieval.index import adapter_hash
from polyrank.retrieval.store import FORMAT


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return toy_domain.make_encoder(tmp_path_factory.mktemp("encoder") / "toy")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    documents = [
        Document(f"d{i}", f"old{i % 24}x0 old{i % 24}x1 old{i % 24}x2", " ".join(f"new{i % 24}x{j}" for j in range(6)))
        for i in range(48)
    ]
    return write_beir(folder, documents)


def config_of(corpus, encoder, **changes):
    given = {"queries_per_document": 1, "negatives": 5, "rank": 2, "lora_alpha": 2.0, "target_modules": "all-linear"}
    given |= {
        "pairs": "source",
        "steps": 6,
        "batch_size": 4,
        "warmup_steps": 1,
        "save_every": 2,
        "learning_rate": 1e-2,
        "max_length": 32,
    }
    return GplConfig(corpus=Path(corpus), encoder=encoder, **{**given, **changes})


@pytest.fixture
def calls(monkeypatch):
    """Counts texts encoded, pairs labelled, trainings begun."""
    counted = Counter()

    def counting(module, name, key, size):
        original = getattr(module, name)

        def call(*args, **kwargs):
            counted[key] += size(args)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counting(mine, "encode_corpus", "encoded", lambda args: len(args[1]))
    counting(teachers, "checked", "labelled", lambda args: args[1])
    counting(_gpl_training, "run_trainer", "trained", lambda args: 1)
    return counted


def test_equal_settings_call_no_model_and_a_change_redoes_what_depends_on_it(tmp_path, corpus, encoder, calls):
    config = config_of(corpus, encoder, steps=2)
    first = run_gpl(config, tmp_path)
    assert calls["encoded"] == 48 + first.prepared.queries.counts["rows"]
    assert calls["labelled"] > 0
    assert calls["trained"] == 1
    before = sha256(tmp_path / "adapter")

    def redone(**changes):
        calls.clear()
        run_gpl(replace(config, **changes), tmp_path)
        return {key for key, number in calls.items() if number}

    assert redone() == set()
    assert sha256(tmp_path / "adapter") == before
    assert redone(learning_rate=2e-2) == {"trained"}
    assert sha256(tmp_path / "adapter") != before
    assert redone(fusion_weight=0.5) == {"labelled", "trained"}
    assert redone(negatives=4) == {"labelled", "trained"}
    assert redone(query_kinds=["title"]) == {"encoded", "labelled", "trained"}
    assert calls["encoded"] == 48  # the queries, not the documents
    assert redone() == set()  # the first settings again: all of it is still there
    assert sha256(tmp_path / "adapter") == before


KILLED = """
import os, signal, sys
from pathlib import Path
import sentence_transformers.sentence_transformer.trainer  # imported once, before the children
from polyrank.recipes.gpl import GplConfig, run_gpl
from polyrank.retrieval import lexical
import datasets, peft

def child(writes):
    move = os.replace
    def counted(*args, **kwargs):
        nonlocal writes
        writes -= 1
        if writes < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return move(*args, **kwargs)
    os.replace = counted
    run_gpl(GplConfig(**CONFIG), FOLDER)
    os._exit(0)

codes = []
for writes in WRITES:
    pid = os.fork()
    if pid == 0:
        child(writes)
    codes.append(os.waitpid(pid, 0)[1])
print(codes)
"""


@pytest.mark.slow
def test_killed_at_many_points_the_files_are_the_same_in_the_end(tmp_path, corpus, encoder):
    """SIGKILL before the n-th move of a file, n growing; the children of one process that has computed nothing yet."""
    config = config_of(corpus, encoder, steps=4)
    run_gpl(config, tmp_path / "whole")
    values = {field.name: getattr(config, field.name) for field in fields(config)} | {"corpus": None}
    script = f"CONFIG = {values!r}\nFOLDER = {str(tmp_path / 'killed')!r}\nWRITES = (1, 9, 30, 1000)\n" + KILLED
    script = script.replace("**CONFIG", f"**CONFIG | dict(corpus=Path({str(corpus)!r}))")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "out").open("w") as out:
        command = [sys.executable, "-c", script]
        subprocess.run(command, stdout=out, stdin=subprocess.DEVNULL, env=environment, timeout=300, check=True)
    codes = json.loads((tmp_path / "out").read_text().splitlines()[-1])
    assert codes[0] == codes[1] == signal.SIGKILL
    assert codes[-1] == 0
    assert sha256(tmp_path / "killed" / "adapter") == sha256(tmp_path / "whole" / "adapter")
    stages = [sorted((folder / "stages").glob("[!t]*")) for folder in (tmp_path / "killed", tmp_path / "whole")]
    assert [sha256(one) for one in stages[0]] == [sha256(one) for one in stages[1]]
    assert len(stages[0]) == 6


def test_training_goes_on_from_its_checkpoint(tmp_path, corpus, encoder, monkeypatch):
    config = config_of(corpus, encoder)
    whole = run_gpl(config, tmp_path / "whole")
    steps = []
    original = _gpl_training.trainer_class

    def dying():
        class Trainer(original()):
            def training_step(self, *args, **kwargs):
                steps.append(self.state.global_step)
                if len(steps) == 6:
                    raise RuntimeError("the lights went out")
                return super().training_step(*args, **kwargs)

        return Trainer

    monkeypatch.setattr(_gpl_training, "trainer_class", dying)
    with pytest.raises(RuntimeError, match="lights"):
        run_gpl(config, tmp_path / "cut")
    cut = run_gpl(config, tmp_path / "cut")
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5]  # on from checkpoint-4
    assert sha256(cut.weights) == sha256(whole.weights)
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})


def test_checkpoints_are_kept_as_adapters_when_asked_for(tmp_path, corpus, encoder):
    done = run_gpl(config_of(corpus, encoder, keep_checkpoints=True), tmp_path)
    kept = [folder for folder in find_adapters(tmp_path) if folder.name.startswith("step-")]
    assert [describe(folder)[1]["step"] for folder in kept] == [2, 4]  # step-6 is the adapter itself
    assert len({adapter_hash(folder) for folder in [*kept, done.weights]}) == 3
    last = next(tmp_path.rglob("step-6"))
    assert adapter_hash(last) == adapter_hash(done.weights)
    assert sorted(file.name for file in last.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not list(tmp_path.rglob("checkpoint-*"))


def vectors(encoder, texts):
    return encode_corpus(encoder, texts)


TEXTS = ["old1x0 new2x3", "new5x5", "old7x1 old7x2 new7x7"]


def test_the_adapter_starts_as_the_base_trains_alone_and_loads_with_sentence_transformers(tmp_path, corpus, encoder):
    from sentence_transformers import SentenceTransformer

    config = config_of(corpus, encoder)
    base = load_encoder(encoder)
    fresh = _gpl_training.student(config)
    np.testing.assert_array_equal(vectors(fresh.eval(), TEXTS), vectors(base, TEXTS))
    assert all("lora_" in name for name, p in fresh.named_parameters() if p.requires_grad)
    before = sha256(encoder)
    done = run_gpl(config, tmp_path)
    assert sha256(encoder) == before
    assert sorted(file.name for file in done.weights.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    alone = SentenceTransformer(encoder, device="cpu")
    alone.load_adapter(str(done.weights))
    found = vectors(alone, TEXTS)
    np.testing.assert_array_equal(found, vectors(load_encoder(encoder, done.weights), TEXTS))
    assert np.abs(found - vectors(base, TEXTS)).max() > 1e-3
    for module in alone.modules():
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()
    np.testing.assert_allclose(vectors(alone, TEXTS), found, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lsr", "loha"])
def test_other_methods_by_name(tmp_path, corpus, encoder, adapter):
    config = config_of(corpus, encoder, steps=2, adapter=adapter, adapter_options={"r": 2})
    done = run_gpl(config, tmp_path)
    base = vectors(load_encoder(encoder), TEXTS)
    assert np.abs(vectors(load_encoder(encoder, done.weights), TEXTS) - base).max() > 1e-5


def test_half_precision_is_near_full_precision(tmp_path, corpus, encoder):
    losses = {}
    for precision in ("fp32", "bf16"):
        run_gpl(config_of(corpus, encoder, steps=2, precision=precision), tmp_path / precision)
        losses[precision] = json.loads((tmp_path / precision / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


def test_full_fine_tuning_qgen_and_tsdae(tmp_path, corpus, encoder):
    full = run_gpl(config_of(corpus, encoder, steps=2, adapter="full"), tmp_path / "full")
    assert full.weights.name == "model"
    assert full.facts["trainable_parameters"] == full.facts["parameters"]
    base = vectors(load_encoder(encoder), TEXTS)
    assert np.abs(vectors(load_encoder(str(full.weights)), TEXTS) - base).max() > 1e-4
    qgen = run_gpl(config_of(corpus, encoder, steps=2, loss="qgen"), tmp_path / "qgen")
    assert np.abs(vectors(load_encoder(encoder, qgen.weights), TEXTS) - base).max() > 1e-4
    plain = run_gpl(config_of(corpus, encoder, steps=1, learning_rate=1e-9), tmp_path / "plain")
    warm = run_gpl(
        config_of(corpus, encoder, steps=1, learning_rate=1e-9, tsdae_steps=2, tsdae_learning_rate=1e-2),
        tmp_path / "warm",
    )
    assert np.abs(vectors(load_encoder(encoder, plain.weights), TEXTS) - base).max() < 1e-5
    assert np.abs(vectors(load_encoder(encoder, warm.weights), TEXTS) - base).max() > 1e-4
    losses = [json.loads(line) for line in (tmp_path / "warm" / "tsdae.jsonl").read_text().splitlines()]
    assert losses[-1]["step"] <= 2


def test_a_run_of_the_command_line(tmp_path, corpus, encoder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [
        "steps=1",
        "batch_size=2",
        "rank=2",
        "target_modules=all-linear",
        "queries_per_document=1",
        "warmup_steps=0",
    ]
    done = run_recipe(["recipe=gpl", f"corpus={corpus}", f"encoder={encoder}", *given])
    assert (done.run_dir / "adapter" / "adapter_model.safetensors").is_file()
    manifest = json.loads((done.run_dir / "manifest.json").read_text())
    names = {name.rsplit("-", 1)[0] for name in manifest["stages"]}
    assert names == {"corpus", "queries", "doc_vectors", "query_vectors", "negatives", "labels", "tuples"}
    with pytest.raises(ConfigError, match="field 'corpus' has no value; give corpus="):
        run_recipe(["recipe=gpl", *given])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"sample_size": -2}, "sample_size must be -1"),
        ({"fusion_weight": 1.5}, r"fusion_weight must be in \(0, 1\], got 1.5"),
        ({"query_kinds": ["titel"]}, "unknown query_kinds 'titel'; did you mean 'title'"),
        ({"query_kinds": []}, "query_kinds must name at least one"),
        ({"query_kinds": ["t5"]}, "give generator="),
        ({"teacher": "cross-encoder"}, "needs cross_encoder="),
        ({"engine": "spark"}, r"unknown engine 'spark' \(allowed: local, ray\)|unknown engine 'spark'"),
        ({"retrievers": ["bm25", "bm25"]}, "retrievers must name at least one, each once"),
        ({"loss": "qgen", "batch_size": 1}, "batch_size must be at least 2"),
        ({"rescale": 0.0}, "rescale must be positive"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        GplConfig(corpus=Path("c"), **changes)


def test_names_of_an_adapter_and_of_modules_are_checked(tmp_path, corpus, encoder):
    with pytest.raises(ValueError, match="did you mean 'lora'"):
        run_gpl(config_of(corpus, encoder, adapter="lorra"), tmp_path)
    with pytest.raises(ConfigError, match="unknown module in target_modules 'querry'; did you mean 'query'"):
        run_gpl(config_of(corpus, encoder, target_modules=["querry"]), tmp_path)
    with pytest.raises(ConfigError, match="adapter_options of 'lora'"):
        run_gpl(config_of(corpus, encoder, adapter_options={"rnak": 3}), tmp_path)


def test_margins_out_of_a_cosine_students_reach_are_refused(tmp_path, corpus, encoder):
    config = config_of(corpus, encoder, fusion_units="standard")
    with pytest.raises(ConfigError, match="give rescale=1"):
        run_gpl(config, tmp_path)
    done = run_gpl(replace(config, rescale=1.0, steps=1), tmp_path)
    margins = [row["margin"] for row in done.prepared.tuples.rows()]
    assert max(map(abs, margins)) <= 1


def test_settings_of_an_older_version_are_named(tmp_path, corpus, encoder):
    from polyrank.core.structure import from_dict

    with pytest.raises(ConfigError, match="unknown field 'new_size'"):
        from_dict(GplConfig, {"corpus": "c", "new_size": -1})
    (tmp_path / "manifest.json").write_text('{"format": 0, "stages": {}}')
    with pytest.raises(CheckpointError, match=f"has format 0, this version reads {FORMAT}"):
        run_gpl(config_of(corpus, encoder), tmp_path)


def test_corpora_that_cannot_be_used(tmp_path, encoder):
    one = write_beir(tmp_path / "one", [Document("a", "a title here", "old1x1 old1x2 old1x3")])
    with pytest.raises(DataError, match="no query has a negative: the corpus needs at least two documents"):
        run_gpl(config_of(one, encoder), tmp_path / "run1")
    short = write_beir(tmp_path / "short", [Document("a", "", "x"), Document("b", "", "y")])
    with pytest.raises(DataError, match="gave a query of kinds title, cloze"):
        run_gpl(config_of(short, encoder), tmp_path / "run2")
    with pytest.raises(DataError, match="no such file or folder"):
        run_gpl(config_of(tmp_path / "gone", encoder), tmp_path / "run3")


def test_odd_documents_go_through(tmp_path, encoder):
    words = "old1x1 old2x2 old3x3 new4x4"
    documents = [
        Document("tab\tand\nbreak", "title of tabs", words),
        Document("empty", "", ""),
        Document("long", "", "old1x1 new1x1 " * 50_000),
        Document("script", "機械学習の本", "機械学習は面白いです。深層学習も面白いです。"),
        Document("query", "", words),  # its cloze query is the document itself
        Document("broken", "caf\ufffd title word", words + " new5x5"),
    ]
    done = run_gpl(config_of(write_beir(tmp_path / "c", documents), encoder, steps=2), tmp_path / "run")
    assert done.prepared.corpus.counts["empty"] == 1
    rows = list(done.prepared.tuples.rows())
    queries = {row["_id"]: row for row in done.prepared.queries.rows()}
    assert all(row["negative"] not in queries[row["query"]]["documents"] for row in rows)
    assert done.weights.is_dir()


@pytest.mark.slow
@pytest.mark.long
def test_the_toy_domain_shift(tmp_path):
    """Queries of which 60 % are off-topic: a teacher's margins repair what a query's source alone gets wrong."""
    encoder = toy_domain.make_encoder(tmp_path / "encoder")
    folder, held_out, _ = toy_domain.make_corpus(tmp_path / "data", off_topic=0.6)
    config = GplConfig(
        corpus=folder,
        queries=folder,
        encoder=encoder,
        rank=16,
        lora_alpha=16.0,
        lora_dropout=0.0,
        target_modules="all-linear",
        steps=400,
        batch_size=32,
        warmup_steps=50,
        learning_rate=1e-2,
        weight_decay=0.0,
        rescale=1.0,
        negatives=20,
        save_every=10_000,
    )

    def score(run):
        return toy_domain.ndcg(load_encoder(encoder, run.weights), folder, held_out)

    gpl = run_gpl(config, tmp_path / "run", toy_domain.teacher)
    found = {"zero-shot": toy_domain.ndcg(load_encoder(encoder), folder, held_out), "gpl": score(gpl)}
    found["mnrl"] = score(run_gpl(replace(config, loss="qgen"), tmp_path / "run", toy_domain.teacher))
    found["shuffled"] = score(shuffled_run(gpl, config, tmp_path))
    assert found["zero-shot"] < 0.1
    assert found["gpl"] > found["mnrl"] + 0.1, found
    assert found["gpl"] > found["shuffled"] + 0.2, found


def shuffled_run(run, config, tmp_path):
    """The same training with the margins shuffled inside each batch."""
    rows = list(run.prepared.tuples.rows())
    torch.manual_seed(0)
    for start in range(0, len(rows), config.batch_size):
        batch = rows[start : start + config.batch_size]
        margins = [batch[i]["margin"] for i in torch.randperm(len(batch))]
        rows[start : start + config.batch_size] = [{**row, "margin": y} for row, y in zip(batch, margins, strict=True)]
    stage = replace(run.prepared.tuples, folder=tmp_path / "shuffled")
    stage.folder.mkdir()
    (stage.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = replace(run.prepared, tuples=stage)
    _gpl_training.train(config, prepared, tmp_path / "training", tmp_path / "shuffled.jsonl")
    return replace(run, weights=tmp_path / "training" / "weights")


def test_queries_are_no_more_than_training_draws(tmp_path, corpus, encoder):
    """GPL's rule would give 2,500 queries a document here; 6 steps of 4 draw one query of each two documents."""
    done = run_gpl(config_of(corpus, encoder, queries_per_document=None, query_kinds=["title"]), tmp_path)
    assert done.prepared.queries.counts["rows"] == 48
    more = config_of(corpus, encoder, queries_per_document=None, query_kinds=["title"], batch_size=32)
    assert run_gpl(more, tmp_path).prepared.queries.counts["rows"] > 48


def test_learning_rate_by_what_is_trained():
    assert GplConfig(corpus=Path("c")).rate == 1e-3
    assert GplConfig(corpus=Path("c"), adapter="full").rate == 2e-5
    assert GplConfig(corpus=Path("c"), adapter="full", learning_rate=1e-4).rate == 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [16, 64, 160])
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(tmp_path, corpus, encoder, kilobytes):
    """A file system that is full in the middle of the stages, or of training, where this process may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, timeout=30).returncode:
        pytest.skip("no permission to mount")
    config = config_of(corpus, encoder)
    try:
        with pytest.raises(RunError, match="disk is full"):
            run_gpl(config, small / "run")
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True, timeout=30)
        done = run_gpl(config, small / "run")
        whole = run_gpl(config, tmp_path / "whole")
        for name in ("corpus", "queries", "labels", "tuples"):
            stages = [getattr(run.prepared, name) for run in (done, whole)]
            assert len({sha256(stage.folder / "rows.jsonl") for stage in stages}) == 1
        assert sha256(done.weights / "adapter_model.safetensors") == sha256(whole.weights / "adapter_model.safetensors")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True, timeout=30)  # lazily: files of it may be open

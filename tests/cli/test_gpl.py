"""`polyrank gpl`: each verb's examples do what they say, and every mistake is one line with status 2."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import search_place

from polyrank.cli import COMMANDS, _parse
from polyrank.core.records import read_record
from polyrank.recipes.gpl_commands import VERBS
from polyrank.retrieval.corpus import document_text, read_corpus, read_qrels, read_queries
from polyrank.retrieval.dense import encode_corpus, load_encoder
from polyrank.retrieval.evaluate import evaluate

pytest.importorskip("faiss")
EXAMPLES = [example for _, examples in VERBS.values() for example in examples] + list(COMMANDS["gpl"][1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the examples name: documents/ (a corpus), judged/, run/ (with adapter/ and checkpoints/), index/."""
    folder = tmp_path_factory.mktemp("gpl")
    search_place.make_encoder(folder / "encoder")
    search_place.make_adapter(folder / "encoder", folder / "run" / "adapter")
    for rank, step in ((2, 10), (2, 20), (4, 20)):
        search_place.make_adapter(folder / "encoder", folder / "sweep" / f"r{rank}" / f"checkpoint-{step}", rank, step)
    search_place.make_data(folder / "judged")
    (folder / "documents").mkdir()
    shutil.copy(folder / "judged" / "corpus.jsonl", folder / "documents")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def indexed(place, polyrank):
    assert polyrank("gpl index documents -o index --adapter run --both --quiet").status == 0
    return place


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_what_it_does_and_an_example(polyrank, verb):
    done = polyrank(f"gpl {verb} --help")
    summary, examples = VERBS[verb]
    assert (done.status, done.err) == (0, "")
    assert summary[1:].split()[0] in done.out
    assert done.out.rstrip().endswith(examples[-1])
    assert all(example in done.out for example in examples)
    assert f"\n    {verb}" in polyrank("gpl --help").out


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_parse(example):
    assert _parse(shlex.split(example)[1:]).verb == example.split()[2]


@pytest.mark.parametrize("example", [e for verb in ("index", "search", "evaluate") for e in VERBS[verb][1]])
def test_examples_run(polyrank, indexed, no_network, example):
    if "base-index" in example:
        example += f" --model {indexed / 'encoder'}"  # without one it is the real MiniLM
    done = polyrank(example)
    assert done.status == 0, done.err
    assert done.out.strip()


def test_index_then_search_finds_what_dot_products_find(polyrank, indexed):
    made = polyrank("gpl index documents -o index --adapter run --both --json").json
    assert [entry["index"] for entry in made] == ["index/base", "index/adapted"]
    assert [entry["documents"] for entry in made] == [12, 12]
    encoder = load_encoder(str(indexed / "encoder"), indexed / "run" / "adapter")
    documents = list(read_corpus(indexed / "documents"))
    scores = encode_corpus(encoder, ["ships tide"]) @ encode_corpus(encoder, list(map(document_text, documents))).T
    expected = [documents[i].id for i in (-scores[0]).argsort(kind="stable")[:4]]
    (found,) = polyrank('gpl search "ships tide" --index index -k 4 --json').json
    assert [hit["id"] for hit in found["hits"]] == expected
    lines = polyrank('gpl search "ships tide" --index index/adapted -k 4').out.splitlines()
    assert [line.split()[2] for line in lines] == expected
    several = polyrank("gpl search ships bread --index index").out
    assert re.findall("^# (.*)$", several, re.M) == ["ships", "bread"]


def test_evaluate_knows_the_answer(polyrank, place):
    done = polyrank("gpl evaluate run --data judged --json --measures nDCG@10,MAP,Recall@3")
    assert done.status == 0, done.err
    assert "1 qrels lines name an unknown document, such as 'sunk'" in done.err
    documents, queries = list(read_corpus("judged")), read_queries("judged")
    qrels = read_qrels("judged")
    del qrels["q-ships"]["sunk"]
    for system, adapter in (("zero-shot", None), ("adapted", "run/adapter")):
        encoder = load_encoder(str(place / "encoder"), adapter)
        vectors = encode_corpus(encoder, [document_text(document) for document in documents])
        scores = encode_corpus(encoder, list(queries.values())) @ vectors.T
        order = (-scores).argsort(axis=1, kind="stable")
        rankings = {query: [documents[i].id for i in row] for query, row in zip(queries, order, strict=True)}
        expected = evaluate(rankings, qrels, ["nDCG@10", "MAP", "Recall@3"]).mean
        (row,) = [row for row in done.json["systems"] if row["system"] == system]
        assert {key: row[key] for key in expected} == pytest.approx(expected)
    assert [row["system"] for row in done.json["systems"]] == ["BM25", "zero-shot", "adapted"]
    assert row["rank"] == 2
    assert row["index_bytes"] > 12 * 32 * 4
    assert row["latency_ms"] > 0
    comparison = done.json["comparisons"]["adapted"]["zero-shot"]
    assert row["p_zero_shot"] == comparison["p_value"]
    assert len(comparison["wins"]) + len(comparison["losses"]) + comparison["ties"] == 3
    record = read_record("run/evaluation/judged/result.json")
    assert record.name == "gpl-judged"
    assert record.details["unknown_documents"] == {"sunk": 1}
    lines = [json.loads(line) for line in Path("run/evaluation/judged/per_query.jsonl").read_text().splitlines()]
    assert [line["query"] for line in lines] == list(queries)


def test_evaluate_again_encodes_nothing_and_checkpoints_give_a_plot(polyrank, place, monkeypatch):
    line = f"gpl evaluate sweep --data judged --model {place / 'encoder'} -o out"
    first = polyrank(line)
    assert first.status == 0, first.err
    assert {"out/steps.png", "out/ranks.png"} <= set(re.findall(r"^figure\s+(.*)$", first.out, re.M))
    assert Path("out/steps.png").read_bytes().startswith(b"\x89PNG")
    rows = {row.method: row.settings for row in read_record("out/result.json").rows}
    assert rows["r4/checkpoint-20"] == {"rank": 4, "step": 20}
    assert list(rows) == ["BM25", "zero-shot", *(f"r{r}/checkpoint-{s}" for r, s in ((2, 10), (2, 20), (4, 20)))]
    assert "r2/checkpoint-10 against zero-shot: nDCG@10" in first.out
    assert not Path("out/.index").exists()

    def never(*args, **options):
        raise AssertionError("encoded again")

    monkeypatch.setattr("polyrank.recipes._gpl.evaluation.encode_corpus", never)
    monkeypatch.setattr("polyrank.recipes._gpl.search.encode_corpus", never)
    cut = next(Path("out/rankings").glob("r2-checkpoint-10-*"))
    again = polyrank(line)
    assert again.status == 0, again.err
    strip = lambda text: re.sub(r"\d+ s", "", text)  # noqa: E731
    assert strip(again.out) == strip(first.out)
    cut.write_text("{")  # a damaged file is made again
    assert "encoded again" in polyrank(line).err


MISTAKES = {
    "gpl": "the following arguments are required: VERB",
    "gpl serach x": "unknown verb 'serach'; did you mean 'search'?",
    "gpl run recipe=e2e": "polyrank gpl run has its recipe",
    "gpl run corpus": "cannot read 'corpus': an override is key=value",
    "gpl search": "the following arguments are required: QUERY, --index",
    "gpl search x --index absent": "absent is no index (no index.json); build one with: polyrank gpl index",
    "gpl search '' --index index": "the query is empty",
    "gpl search x --index index -k 0": "argument -k: must be at least 1, got '0'",
    "gpl search x --index index -k 5000": "k must be 1 to 1000, got 5000",
    "gpl search x --index index --josn": "unknown argument '--josn'; did you mean '--json'?",
    "gpl search x --index index --adapter sweep/r2/checkpoint-10": "was built by model",
    "gpl search x --index index/base --adapter run": "with no adapter",
    "gpl search x --index index --adapter absent": "absent: no such folder",
    "gpl index absent -o out": "absent: no such file or folder",
    "gpl index empty -o out": "holds no document",
    "gpl index twice.jsonl -o out": "the identifier 'a' appears twice",
    "gpl index documents -o documents": "documents exists already and is no index",
    "gpl index documents -o out --both": "--both compares an adapter with its base; give --adapter",
    "gpl index documents -o out --kind hnsw": "unknown kind of index 'hnsw'",
    "gpl index documents -o out --kind ivf --lists 13": "num_lists must be 1 to the number of documents, 12; got 13",
    "gpl index documents -o out --model absent/encoder": "cannot load an encoder from 'absent/encoder'",
    "gpl evaluate absent --data judged": "absent: no such folder",
    "gpl evaluate judged --data judged": "judged holds no adapter",
    "gpl evaluate run --data documents": "documents holds no queries",
    "gpl evaluate run --data absent": "absent: no such file or folder",
    "gpl evaluate run --data judged --split dev": "dev.tsv: no such file",
    "gpl evaluate run --data judged --measures ndcg": "measure 'ndcg' is none of nDCG@k",
    "gpl evaluate run --data strange": "no query has a relevant document in the corpus",
    "gpl serve --index absent": "absent is no index",
    "gpl serve --index index --port 99999": "cannot listen at 127.0.0.1 port 99999",
    "gpl serve --index index --base other": "do not hold the same documents",
}


@pytest.fixture(scope="module")
def bad(made, tmp_path_factory):
    """The folder in which mistakes are made: they change nothing, so all share it."""
    from polyrank.cli import main

    folder = tmp_path_factory.mktemp("bad") / "here"
    shutil.copytree(made, folder)
    (folder / "empty").mkdir()
    (folder / "twice.jsonl").write_text('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n')
    shutil.copytree(folder / "judged", folder / "strange")
    (folder / "strange" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq-ships\tsunk\t1\n")
    (folder / "few.jsonl").write_text('{"_id": "a", "text": "ship"}\n')
    adapter, encoder = folder / "run", folder / "encoder"
    assert main(shlex.split(f"gpl index {folder}/documents -o {folder}/index --adapter {adapter} --both -q")) == 0
    assert main(shlex.split(f"gpl index {folder}/few.jsonl -o {folder}/other --model {encoder} -q")) == 0
    return folder


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_line_with_status_2(polyrank, bad, monkeypatch, line):
    monkeypatch.chdir(bad)
    needs_model = line.startswith("gpl index") and "--model" not in line  # without one it is the real MiniLM
    done = polyrank(f"{line} --model {bad / 'encoder'}" if needs_model else line)
    assert done.status == 2, done
    *before, last = done.err.splitlines()
    assert last.startswith("polyrank: error: ")
    assert MISTAKES[line] in last
    assert "Traceback" not in done.err
    assert all("polyrank: error" not in text for text in before)  # a note on the way is allowed, a second error not
    assert done.out == ""


@pytest.mark.parametrize("example", VERBS["run"][1])
def test_examples_of_run(polyrank, place, no_network, example):
    """With the toy encoder and few steps; without them it is the real MiniLM and 600."""
    few = "queries_per_document=1 negatives=4 steps=2 batch_size=2 save_every=1 rank=2 warmup_steps=1 max_length=16"
    done = polyrank(f"{example} encoder={place / 'encoder'} {few}")
    assert done.status == 0, done.err
    if "--cfg" in example:
        assert "corpus: documents" in done.out
    else:
        assert (Path(done.out.strip()) / "adapter" / "adapter_model.safetensors").is_file()


def test_run_is_the_recipe_gpl(polyrank, place, monkeypatch):
    seen = {}
    monkeypatch.setattr("polyrank.recipes.commands.run_command", lambda args: seen.update(vars(args)))
    assert polyrank("gpl run corpus=documents --fresh rank=4").status == 0
    assert seen["overrides"] == ["recipe=gpl", "corpus=documents", "rank=4"]
    assert (seen["fresh"], seen["multirun"], seen["cfg"]) == (True, False, None)


@pytest.mark.slow
def test_serve_answers_until_ctrl_c(indexed, interruptible):
    command = [*interruptible, "gpl", "serve", "--index", "index", "--port", "0"]
    with open("out.txt", "w") as out, open("err.txt", "w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        try:
            deadline = time.monotonic() + 120
            while not Path("out.txt").read_text().endswith("\n"):
                assert process.poll() is None, Path("err.txt").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            url = Path("out.txt").read_text().strip()
            with urllib.request.urlopen(f"{url}api/search?q=ships&k=3", timeout=60) as response:
                answer = json.load(response)
            assert list(answer["rankings"]) == ["base", "adapted"]
            assert all(len(hits) == 3 for hits in answer["rankings"].values())
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait(60)
    assert "Traceback" not in Path("err.txt").read_text()

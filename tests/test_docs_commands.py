"""Every command line in the blocks of README and docs is run, small.

A line is run as it stands, in a folder of its own, after three changes: it gets small sizes (`SIZES`: steps, inputs,
tokens); a model or data set that is not on this machine becomes a small one of the same kind (`NOT_HERE`, and the words
that `prepare` replaces); and what the page takes for granted is in the folder already. A block that is no command, and
a line that a test cannot run, stand in `ELSEWHERE` with the test that covers them or the reason.
"""

import json
import os
import re
import shlex
import shutil
import socket
import sys
from pathlib import Path

import docs_stand_ins
import pytest
import torch

from polyrank.cli import main

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("POLYRANK_DATA", ROOT.parent / "shared" / "data"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMENT = re.compile(r"\s{2,}\S.*$")
COMMANDS = ("polyrank ", "torchrun ", "accelerate ")

# what a test cannot run, or no command: the first words of the line -> where it is covered, or why it is not
ELSEWHERE = {
    "make ": "the Makefile's targets: tests run below `make test`; test_makes_targets_exist",
    "pip install": "an install; `tools/compatibility.py` and CI's fresh virtual environment make it",
    ".venv/bin/python -m pytest": "the tests themselves; test_the_folders_of_tests_exist",
    "python tools/compatibility.py": "makes environments for hours; tests/test_distributions.py composes its commands",
    "polyrank demo": "minutes; tests/cli/test_commands.py runs it small",
    "polyrank gpl serve": "serves until it is stopped; tests/cli/test_gpl.py runs it and asks it",
    "polyrank bench": "minutes of measurement; tests/benchmarks runs each benchmark small",
    "VersionError: ": "what an import says: test_the_version_error_is_as_shown",
    "mine/recipe/short.yaml": "a file: test_a_recipe_of_ones_own",
    "index/index.json": "what an index consists of: test_an_index_has_the_files_that_its_page_shows",
    "GET  /api/search": "HTTP: tests/retrieval/test_serve.py",
    "src/polyrank/": "a tree of folders: test_the_tour_names_every_room",
    "accelerate launch --num_processes 4 --module polyrank": "the batch file has it, too: test_the_batch_file_runs",
    "#!/bin/bash": "a batch file for Slurm: test_the_batch_file_runs",
    "polyrank report RESULT...": "the shape of the command; docs/reports.md has real lines",
    "polyrank gpl VERB": "the shape of the command; docs/methods/gpl-search.md has real lines",
    "polyrank run recipe=NAME": "the shape of the command",
}

FEW = ["data.train_limit=8", "data.test_limit=2"]
TEXT = [*FEW, "num_steps=2", "num_epochs=null", "batch_size=2", "accumulation_steps=1", "warmup_steps=1",
        "save_every=2", "max_new_tokens=4"]  # fmt: skip
GLUE = ["data.train_limit=16", "data.validation_limit=8", "data.test_limit=8", "max_length=24"]
CAPTION = [*FEW, "num_steps=2", "num_epochs=null", "batch_size=2", "accumulation_steps=1", "save_every=2", "rank=2",
           "max_new_tokens=4", "num_decodings=1", "decode_batch_size=2", "bf16=false", "metrics=[oracle_rouge_l]",
           "speakers=tfidf"]  # fmt: skip
WIDTH = ["model.small.width=16", "model.small.heads=2", "model.small.num_steps=1", "model.small.batch_size=2"]
LLAMA = [*WIDTH, "model.small.layers=1", "model.small.feed_forward=16", "model.small.vocabulary=400"]
LEFT_OUT = ["dora", "rslora", "pissa", "lokr", "lorma_pi", "lorma_plus", "dylora", "allora", "codyra", "lora_ga", "eva",
            "lora_pro", "ba_lora", "l4q", "lq_lora", "loram", "pat"]  # fmt: skip
SIZES = [  # whatever matches is said, in place of what the line says of the same keys
    (r"recipe=markov/(?!.*num_steps=10,20)", ["num_steps=2"]),
    (r"num_steps=10,20", ["num_steps=2,3"]),
    (r"recipe=markov/", ["batch_size=4", "num_evaluation=8", "num_final=8", "eval_every=2"]),
    (r"recipe=markov/(?!.*joblib)", ["seeds=[0]"]),
    (r"hydra/launcher=joblib", ["seeds=[0],[1]"]),
    (r"recipe=e2e", ["data.train_limit=8", "data.test_limit=1", "num_steps=2", "batch_size=2", "max_new_tokens=2",
                     "num_decodings=1"]),
    (r"recipe=e2e/table", ["seeds=[0]", "num_hypotheses=[3]", "~methods.mle_wide", "~methods.mcl_relaxed"]),
    (r"(recipe=data_to_text|data=(e2e_d2t|webnlg|dart_dev)|recipe=lorma/e2e|recipe=maths|data=gsm8k|data=metamath|"
     r"recipe=lorma/maths)", TEXT),
    (r"(data_to_text|data=(e2e_d2t|webnlg|dart_dev)|recipe=lorma/e2e)", ["num_beams=2", "metrics=[bleu]"]),
    (r"--multirun recipe=data_to_text", ["method=lora,lorma_plus", "seed=0"]),
    (r"--multirun method=lsr data=mrpc", ["method.options.r=1,2", "method.options.num_terms=8"]),
    (r"gpt2_small", [f"model.scratch.{one}" for one in ("layers=1", "heads=2", "width=16", "num_steps=1")]),
    (r"recipe=methods", [*FEW, "num_steps=2", "batch_size=2"]),
    (r"--multirun recipe=methods", ["method=lora,lokr", "learning_rate=1e-3,3e-3"]),
    (r"recipe=methods/table", ["seeds=[0]", *(f"~methods.{name}" for name in LEFT_OUT)]),
    (r"recipe=glue/table", ["seeds=[0]", "sizes=[equal]", "~tasks.stsb", "~methods.lorma_pi", "~methods.lorma_plus",
                            "~methods.full", "num_steps=2", "batch_size=4", "eval_steps=2",
                            *(text.replace("data.", "tasks.mrpc.") for text in GLUE)]),
    (r"(recipe=glue |method=\S+ data=(mrpc|stsb)|recipe=lorma/roberta)", [*GLUE, "num_steps=2", "num_epochs=null",
                                                                         "batch_size=4", "eval_steps=2"]),
    (r" model[=.](roberta_l|lora[.]r)", [*GLUE, "training.num_train_epochs=1", "training.fp16=false"]),
    (r"(recipe=(image|audio)_captioning|recipe=translation)", CAPTION),
    (r"recipe=image_captioning(/small| data)", [*WIDTH, "model.small.vocabulary=300"]),
    (r"recipe=audio_captioning", [*WIDTH, "model.small.vocabulary=300", "model.small.seconds=1", "data.max_seconds=1"]),
    (r"--multirun recipe=audio_captioning", ["method=mle,mcl_relaxed", "seed=0"]),
    (r"(bilingual|recipe=translation/)", LLAMA),
    (r"bilingual", ["data.codebook.levels=1", "data.codebook.size=2", "data.codebook.width=2"]),
    (r"(bilingual_table|translation/table)", ["seeds=[0]", "~methods.mle_wide"]),
    (r"corpus=(?!.*multirun)", ["steps=2", "rank=2"]),
    (r"corpus=.*multirun", ["steps=1,2", "rank=2,4"]),
    (r"corpus=", ["batch_size=2", "warmup_steps=1", "queries_per_document=1", "negatives=2",
                  "save_every=2", "max_length=32"]),
]  # fmt: skip
NOT_HERE = [  # a model or data set that is not on this machine -> a small one of its kind
    (
        r"(model=gpt2( |$)|model=gpt2-medium|recipe=lorma/e2e|model[.]name_or_path=FOLDER)",
        "model.name_or_path={hub}/gpt2",
    ),
    (r"recipe=lorma/maths", "model.name_or_path={hub}/llama"),
    (r"(model=roberta-base|recipe=lorma/roberta)", "model.name_or_path={hub}/roberta"),
    (r" model[=.](roberta_l|lora[.]r)", "model.base_model={hub}/roberta"),
    (r"recipe=translation data", "model.name_or_path={hub}/llama"),
    (r"recipe=image_captioning data", "model=llava_next_small"),
    (r"recipe=audio_captioning data", "model=qwen2_audio_small"),
    (r"data=audiocaps", "data.path={hub}/audiocaps"),
    (r"data=gsm8k", "data.path={hub}/gsm8k"),
]


# -- what pages take for granted ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    return docs_stand_ins.make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def retrieval(tmp_path_factory):
    pytest.importorskip("faiss")
    return docs_stand_ins.make_retrieval(tmp_path_factory.mktemp("retrieval"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYRANK_DATA", str(DATA))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(page, line, place, request):
    """Put there what `line` names. Returns its words, with those replaced that stand for something."""
    words = shlex.split(COMMENT.sub("", line), comments=True)
    hub = request.getfixturevalue("hub")
    stand_in = {
        "TEXTCAPS": "textcaps", "/data/textcaps": "textcaps", "CLOTHO": "clotho", "/data/clotho": "clotho",
        "/shared/clotho": "clotho", "ALMA/deen": "deen", "MetaMathQA-40K.json": "MetaMathQA-40K.json",
        "GSM8K_test.jsonl": "GSM8K_test.jsonl", "MATH_test.jsonl": "MATH_test.jsonl", "MODEL": "base",
        "ADAPTER": "adapter",
    }  # fmt: skip
    stand_in = {name: str(hub / file) for name, file in stand_in.items()}
    stand_in |= {
        "/shared/runs": "runs",
        "slurm": "submitit_local",
        "hydra.launcher.partition=gpu": "hydra.launcher.timeout_min=5",
    }
    kind = words[1] if words[0] == "polyrank" else ""
    if kind == "gpl" or "recipe=gpl" in words:
        folder = request.getfixturevalue("retrieval")
        shutil.copytree(folder, place, dirs_exist_ok=True)
        stand_in["RUN"] = "runs/gpl/cranfield"
        stand_in["doc2query/msmarco-t5-base-v1"] = str(place / "t5")
        stand_in["cross-encoder/ms-marco-MiniLM-L6-v2"] = str(place / "cross-encoder")
        if words[1:3] == ["gpl", "evaluate"]:
            shutil.rmtree(place / "judged") if "ir_cranfield" in words else None
            stand_in["ir_cranfield"] = str(folder / "judged")
    elif kind in ("evaluate", "report"):
        docs_stand_ins.make_runs(place)
        stand_in |= {"RUN": "runs/e2e/mine", "FOLDER": "runs"}
        if "sbert=" in line:
            encoder = request.getfixturevalue("retrieval") / "encoder"
            shutil.copytree(encoder, place / words[-1].removeprefix("sbert="))
        if "gsm8k_accuracy" in line:
            solved = {"id": "1", "input": "How many?", "candidates": ["#### 3"], "references": ["3"]}
            (place / "runs" / "e2e" / "mine" / "predictions.jsonl").write_text(json.dumps(solved) + "\n")
    else:
        stand_in |= {
            "WHAT": "methods",
            "RUN": str(hub / ("lora" if kind == "merge" else "adapter")),
            "TEXT": "Once upon a",
            "FOLDER": "out" if "-o" in words else "FOLDER",
        }
        stand_in |= {"FILE": "train.jsonl", "NAME": str(hub / "base"), "Qwen/Qwen3-0.6B": str(hub / "base")}
        stand_in["runs/train/RUN"] = stand_in["RUN"]
        pairs = [{"prompt": "Once upon", "completion": text} for text in ("a time", "a little girl")]
        (place / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        for name in ("adapter", "lora"):
            shutil.copytree(hub / name, place / name)
        from safetensors.torch import load_file

        torch.save(load_file(place / "lora" / "adapter_model.safetensors"), place / "old.bin")
    if kind == "generate" and "--max-new-tokens" not in words:
        words += ["--max-new-tokens", "4"]
    if page == "docs/methods/e2e.md":
        stand_in["FOLDER"] = str(DATA / "e2e_nlg")
    if page == "docs/methods/data-to-text.md":
        stand_in["FOLDER"] = str(hub / "webnlg")

    def replaced(word):
        key, sign, value = word.partition("=")
        return stand_in.get(word) or (f"{key}={stand_in[value]}" if sign and value in stand_in else word)

    return [replaced(word) for word in words]


# -- the lines ---------------------------------------------------------------------------------------------------------


def blocks(page):
    """(language, text) of a page's fenced blocks, continuation lines joined."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)
    return [(language, re.sub(r"\s*\\\n\s*", " ", text)) for language, text in found]


def lines():
    """(page, line): every line of a block of commands; of another block its first line alone."""
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for language, text in blocks(page):
            if language == "python":
                continue
            all_lines = text.splitlines()
            own = [line for line in all_lines if line.startswith((*COMMANDS, "make ", "pip ", "python ", ".venv/"))]
            yield from dict.fromkeys((name, line) for line in own or all_lines[:1])


LINES = list(dict.fromkeys(lines()))
FIRST = {COMMENT.sub("", line): (page, line) for page, line in reversed(LINES)}  # a line of two pages is run once
HERE = [one for one in LINES if one in FIRST.values() and not one[1].startswith(tuple(ELSEWHERE))]


def sizes(line, hub):
    """What is said of models and sizes; it replaces what the line says of the same keys."""
    if line.startswith("polyrank train"):
        return ["training.max_steps=2"]
    if not re.match(r"polyrank (run|gpl run)", line):
        return []
    small = [text for pattern, extra in SIZES if re.search(pattern, line) for text in extra]
    models = [text.format(hub=hub) for pattern, text in NOT_HERE if re.search(pattern, line)]
    return [*models, *small]


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no POLYRANK_DATA: the lines run on real data")


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "line"),
    [pytest.param(*one, id=f"{one[0]}-{COMMENT.sub('', one[1])}") for one in HERE if one[1].startswith("polyrank ")],
)
def test_a_line_runs(page, line, place, request, capsys):
    words = prepare(page, line, place, request)
    extra = sizes(COMMENT.sub("", line), request.getfixturevalue("hub"))
    before = {path for path in place.rglob("*") if path.is_file()}
    said = {text.partition("=")[0] for text in extra}
    words = [word for word in words if word.partition("=")[0] not in said]
    assert main([*words[1:], *extra]) == 0, "\n".join(
        line for line in capsys.readouterr().err.splitlines() if "error" in line.lower() or "Error" in line
    )
    written = {path for path in place.rglob("*") if path.is_file()} - before
    assert capsys.readouterr().out.strip() or written
    if "-o" in words:
        assert (place / words[words.index("-o") + 1]).exists()


# -- several processes -------------------------------------------------------------------------------------------------

TRAIN = """
import os, sys
import torch, transformers
from peft import get_peft_model
from polyrank import MclConfig, MclTrainer

base = transformers.AutoModelForCausalLM.from_pretrained("gpt2")
model = get_peft_model(base, MclConfig(num_hypotheses=2, r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
rows = [{"input_ids": [3 + i, 4, 5], "labels": [3 + i, 4, 5], "attention_mask": [1, 1, 1]} for i in range(8)]
args = transformers.TrainingArguments("out", max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[])
trainer = MclTrainer(model=model, args=args, train_dataset=rows)
trainer.train()
trainer.save_model("adapter")
print("ranks", trainer.args.world_size, file=sys.stderr, flush=True)
torch.distributed.barrier()
os._exit(0)  # gloo now and then waits for ever in its shutdown
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "line"), [pytest.param(*one, id=one[1]) for one in HERE if not one[1].startswith("polyrank ")]
)
def test_a_line_for_several_processes_runs_with_two(page, line, place, request, run_program):
    hub = request.getfixturevalue("hub")
    (place / "train.py").write_text(TRAIN)
    shutil.copytree(hub / "gpt2", place / "gpt2")
    words = [re.sub("^4$", "2", word) for word in prepare(page, line, place, request)]
    extra = sizes(re.sub("^.* polyrank run", "polyrank run", line), hub)
    if extra:  # a small base is built in one process beforehand
        said = {text.partition("=")[0] for text in extra}
        words = [word for word in words if word.partition("=")[0] not in said]
        extra += [f"cache_dir={place}/cache"]
        assert main([*words[words.index("polyrank") + 1 :], *extra]) == 0
        extra += ["run_name=two"]
    if words[0] == "accelerate":  # what `accelerate config` would have been told
        words[2:2] = ["--multi_gpu", "--main_process_port", free_port(), *([] if extra else ["--num_processes", "2"])]
    elif "--standalone" not in words:  # both take port 29500, which another test may have
        words[1:1] = ["--master_port", free_port()]
    programs = {"torchrun": ["torch.distributed.run"], "accelerate": ["accelerate.commands.accelerate_cli"]}
    command = [sys.executable, "-m", *programs[words[0]], *words[1:], *extra]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = run_program(command, place / "log", timeout=600, env={**os.environ, **own})
    assert done.returncode == 0, done.stderr[-3000:]
    if extra:
        (run,) = place.glob("runs/*_captioning/two")
        assert (run / "finished").is_file()
    else:
        assert (place / "adapter" / "adapter_model.safetensors").is_file()
        assert done.stderr.count("ranks 2") == 2


# -- blocks that are no command ----------------------------------------------------------------------------------------


def block(page, begin):
    """The text of the page's block that begins so."""
    (text,) = [text for _, text in blocks(ROOT / page) if text.startswith(begin)]
    return text


def test_what_is_covered_elsewhere_is_in_the_docs():
    for begin, reason in ELSEWHERE.items():
        assert any(line.startswith(begin) for _, line in LINES), begin
        for file in re.findall(r"tests/[\w/.]*\w", reason):
            assert (ROOT / file).exists(), file
        for name in re.findall(r"\btest_\w+$", reason):
            assert name in globals(), name


def test_sizes_and_stand_ins_are_of_lines_that_are_there():
    for pattern, _ in [*SIZES, *NOT_HERE]:
        assert any(re.search(pattern, line) for _, line in HERE), pattern


def test_makes_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    asked = {line.split()[1] for _, line in LINES if line.startswith("make ")}
    assert asked == {"demo", "test", "faults", "audit"}
    assert asked <= targets


def test_the_folders_of_tests_exist():
    asked = {word for _, line in LINES for word in line.split() if word.startswith("tests/")}
    assert asked == {"tests/conformance", "tests/core"}
    assert all((ROOT / folder).is_dir() for folder in asked)


def test_the_version_error_is_as_shown(monkeypatch):
    import importlib.metadata

    from polyrank._requirements import check_requirements
    from polyrank.core.errors import VersionError

    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"peft": "0.9.0"}.get(name) or version(name))
    with pytest.raises(VersionError) as error:
        check_requirements()
    assert f"VersionError: {error.value}\n" == block("docs/compatibility.md", "VersionError: ")


def test_a_recipe_of_ones_own(place, capsys):
    first, *rest = block("docs/cli.md", "mine/recipe").splitlines()
    file = place / first.rstrip(":")
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(line.removeprefix("    ").split("   ")[0] for line in rest))
    line = "polyrank run --config-dir mine recipe=short"
    assert f"`{line}`" in (ROOT / "docs" / "cli.md").read_text()
    assert main([*line.split()[1:], "--cfg", "job"]) == 0
    assert "num_steps: 10\n" in capsys.readouterr().out
    assert main(["list", "recipes", "--config-dir", "mine"]) == 0
    assert re.search("short +Ten steps, to see that it runs", capsys.readouterr().out)


def test_an_index_has_the_files_that_its_page_shows(retrieval):
    adapted = retrieval / "index" / "adapted"  # one of the two of --both
    for line in block("docs/methods/gpl-search.md", "index/index.json").splitlines():
        shown = line.split()[0].removeprefix("index/").rstrip("/")
        assert list(adapted.glob(shown.replace("<key>", "*"))), line
    assert list(adapted.glob("data-*/offsets.npy"))


def test_the_tour_names_every_room():
    shown = re.findall(r"^  (\w+)/", block("docs/tour.md", "src/polyrank/"), re.M)
    assert sorted(shown) == sorted(p.parent.name for p in (ROOT / "src" / "polyrank").glob("*/__init__.py"))


@pytest.mark.slow
def test_the_batch_file_runs(place, hub, run_program):
    """With a `srun` that starts what it is given, on a small model and two processes."""
    script = block("docs/cluster.md", "#!/bin/bash")
    small = sizes("polyrank run recipe=audio_captioning data.path", hub)
    for before, after in (("/shared/clotho", str(hub / "clotho")), ("=/shared/runs", f"={place}/runs"), (" 4 ", " 2 ")):
        assert before in script
        script = script.replace(before, after)
    small += [f"cache_dir={place}/cache"]
    script = (
        script.replace("launch ", f"launch --multi_gpu --main_process_port {free_port()} ").rstrip()
        + f" {shlex.join(small)}\n"
    )
    (place / "bin").mkdir()
    for name, text in (("srun", '#!/bin/sh\nexec "$@"\n'), ("job", script)):
        (place / "bin" / name).write_text(text)
        (place / "bin" / name).chmod(0o755)
    alone = ["run", "recipe=audio_captioning", "method=mcl_relaxed", f"data.path={hub / 'clotho'}", *small]
    assert main(alone) == 0  # builds the small model, in one process
    path = f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = run_program([str(place / "bin" / "job")], place / "log", timeout=600, env={**os.environ, **own})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (place / "runs" / "audio_captioning" / "mcl" / "finished").is_file()

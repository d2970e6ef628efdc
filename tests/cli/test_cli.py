"""Every command: its example does what it says, and every mistake is one line with status 2."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import LoKrConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyrank.cli import COMMANDS, _parse

SLOW = {"polyrank demo", "polyrank demo --quick --out runs/demo-quick"}  # run by test_commands.py, with fewer steps
ELSEWHERE = "polyrank gpl "  # run by test_gpl.py, on files of their own
EXAMPLES = [example for _, examples in COMMANDS.values() for example in examples]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_it_does_and_an_example(polyrank, command):
    done = polyrank(f"{command} --help")
    assert (done.status, done.err) == (0, "")
    summary, examples = COMMANDS[command]
    assert summary[1:].split()[0] in done.out
    assert re.search(r"\nexamples?:\n  polyrank " + command, done.out)
    assert all(example in done.out for example in examples)
    assert done.out.rstrip().endswith(examples[-1]) or command == "gpl"  # gpl's verbs have their own


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e not in SLOW and not e.startswith(ELSEWHERE)])
def test_examples_run(polyrank, place, no_network, example):
    done = polyrank(example)
    assert done.status == 0, done.err
    assert done.out.strip()


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_parse(example):
    import shlex

    assert _parse(shlex.split(example)[1:]).command == example.split()[1]


MISTAKES = {
    "rnu": "unknown command 'rnu'; did you mean 'run'?",
    "list metods": "unknown name 'metods'; did you mean 'methods'?",
    "list metrics --jsn": "unknown argument '--jsn'; did you mean '--json'?",
    "list": "the following arguments are required: WHAT",
    "--vresion": "unknown argument '--vresion'; did you mean '--version'?",
    "run": "name a recipe: recipe=NAME (allowed: ",
    "run recipe=markvo/setup": "unknown recipe 'markvo/setup'; did you mean 'markov/setup'?",
    "run recipe=markov/setup num_stpes=3": "unknown key 'num_stpes'; did you mean 'num_steps'?",
    "run recipe=markov/setup num_steps=1,2": "add --multirun",
    "run recipe=markov/setup num_steps=x": "num_steps must be a whole number, got 'x'",
    "run recipe=markov/setup --cfg jbo": "argument --cfg: invalid choice: 'jbo'",
    "run recipe=markov/setup --frehs": "unknown argument '--frehs'; did you mean '--fresh'?",
    "run --config-dir absent recipe=markov/setup": "--config-dir 'absent' is no folder",
    "demo --seed -1": "seed",
    "demo --seed x": "argument --seed: must be a whole number >= 0, got 'x'",
    "evaluate absent.jsonl": "absent.jsonl",
    "evaluate predictions.jsonl --metrics orcale_bleu": "unknown metric 'orcale_bleu'; did you mean 'oracle_bleu'?",
    "evaluate predictions.jsonl --metrics oracle_nll": "metric 'oracle_nll' needs",
    "evaluate results/0.json": "results/0.json",
    "generate absent --prompt x": "absent: no such folder",
    "generate results --prompt x": "results holds no adapter",
    "generate adapter": "the following arguments are required: --prompt",
    "generate adapter --prompt Once --hypothesis 2": "--hypothesis 2: the adapter has 2, numbered from 0",
    "generate adapter --prompt Once --num-beams 0": "argument --num-beams: must be at least 1, got '0'",
    "generate adapter --prompt Once --sample --num-beams 2": "--sample and --num-beams exclude each other",
    "generate adapter --prompt Once --model absent/model": "cannot load base model 'absent/model'",
    "generate adapter --prompt Once --max-new-tokens 100": "exceed the model's context of 64",
    "export adapter -o results": "results exists already and is not empty",
    "export lora -o loras": "lora is an ordinary LoRA already",
    "merge lora -o merged --hypothesis 1": "--hypothesis: LORA has no hypotheses",
    "merge adapter -o merged": "the adapter has 2 hypotheses; say which one: --hypothesis 0 to 1",
    "merge adapter -o merged --hypothesis 2": "the adapter has 2 hypotheses; say which one",
    "merge lora -o lora": "lora exists already and is not empty",
    "inspect absent": "absent: no such file or folder",
    "inspect results": "holds no adapter",
    "inspect predictions.jsonl": "predictions.jsonl is no safetensors file",
    "report results -o report.pdf": "a report ends with .html, .md, .tex or .csv, got 'report.pdf'",
    "report absent.json -o r.html": "absent.json: no such file",
    "report predictions.jsonl -o r.html": "predictions.jsonl: not valid JSON",
    "report results": "the following arguments are required: -o/--out",
    "bench mrakov": "unknown benchmark 'mrakov'; did you mean 'markov'?",
    "bench --jsn": "unknown argument '--jsn'",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_line_with_status_2(polyrank, place, line):
    before = sorted(os.listdir(place))
    done = polyrank(line)
    assert done.status == 2, done
    assert done.err.startswith("polyrank: error: ")
    assert MISTAKES[line] in done.err
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    assert done.out == ""
    assert sorted(os.listdir(place)) == before  # nothing half-made is left


def test_no_command_shows_the_help(polyrank):
    done = polyrank([])
    assert done.status == 0
    assert all(command in done.out for command in COMMANDS)


def test_version(polyrank):
    from polyrank import __version__

    assert polyrank("--version").out == f"polyrank {__version__}\n"


def test_debug_raises_the_error_itself(polyrank, place):
    from polyrank.core.errors import UserError

    for line in ("--debug list metods", "list metods --debug", "run recipe=absent --debug"):
        with pytest.raises(UserError):
            polyrank(line)


def test_a_failure_that_is_no_mistake_has_status_1(polyrank, place, monkeypatch):
    from polyrank.recipes import commands

    def fail(args):
        raise OSError(5, "Input/output\nerror\x1b[31m")

    monkeypatch.setattr(commands, "list_command", fail)
    done = polyrank("list methods")
    assert done.status == 1
    assert done.err == "polyrank: error: OSError: [Errno 5] Input/output error?[31m (--debug shows where)\n"


def test_ctrl_c_says_how_to_go_on(polyrank, monkeypatch):
    from polyrank.recipes import commands

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_command", interrupt)
    done = polyrank("run recipe=markov/setup")
    assert done.status == 130
    assert done.err == "polyrank: interrupted; the same command goes on from what is saved\n"


def test_run_prints_its_folder_and_goes_on(polyrank, place):
    first = polyrank("run recipe=markov/setup num_steps=2 --quiet")
    assert first.status == 0, first.err
    run_dir = place / first.out.strip()
    assert (run_dir / "result.json").is_file()
    assert (run_dir / "config.yaml").is_file()
    again = polyrank("run --json num_steps=2 recipe=markov/setup")
    assert again.json == [{"run_dir": first.out.strip(), "recipe": "markov", "ran": False}]
    assert polyrank(f"report {first.out.strip()} -o page.html").status == 0


def test_overrides_on_both_sides_of_an_option():
    args = _parse(["run", "recipe=x", "--multirun", "a=1,2", "--fresh", "b=3"])
    assert args.overrides == ["recipe=x", "a=1,2", "b=3"]
    assert args.multirun
    assert args.fresh


@pytest.mark.parametrize("what", ["methods", "recipes", "data", "objectives", "metrics"])
def test_lists_as_json(polyrank, what):
    entries = polyrank(f"list {what} --json").json
    assert what == "data" or entries
    for entry in entries:
        assert entry["name"]
        assert entry["summary"]


def test_evaluate_knows_the_answer(polyrank, place):
    figures = polyrank("evaluate predictions.jsonl --json").json
    assert figures["num_examples"] == 3
    assert figures["oracle_bleu"] == pytest.approx(100.0)  # one candidate equals a reference
    assert "oracle_bleu" in polyrank("evaluate predictions.jsonl").out


def test_generate_is_what_the_model_generates(polyrank, place, models_folder):
    done = polyrank('generate lora --prompt "Once upon a" --prompt "the dog" --max-new-tokens 5 --json')
    base = AutoModelForCausalLM.from_pretrained(models_folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(models_folder / "base")
    model = PeftModel.from_pretrained(base, models_folder / "lora").eval()
    for entry in done.json:
        ids = tokenizer(entry["prompt"], return_tensors="pt", return_token_type_ids=False)
        new = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert entry["candidates"] == [" ".join(tokenizer.decode(new, skip_special_tokens=True).split())]
    sampled = [polyrank("generate lora --prompt Once --sample --seed 3 --max-new-tokens 5").out for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_generate_every_hypothesis_or_one(polyrank, place, models_folder):
    line = "generate adapter --prompt 'Once upon a' --max-new-tokens 5"
    (entry,) = polyrank(f"{line} --json").json
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models_folder / "base"), place / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(models_folder / "base")
    ids = tokenizer("Once upon a", return_tensors="pt", return_token_type_ids=False)
    for k in range(2):
        new = model.eval().generate(**ids, max_new_tokens=5, do_sample=False, hypothesis_idx=k)
        text = " ".join(tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).split())
        assert entry["candidates"][k] == text
        assert polyrank(f"{line} --hypothesis {k}").out == f"{k}: {text}\n"


@pytest.mark.parametrize(("source", "hypothesis"), [("lora", None), ("adapter", 0), ("adapter", 1)])
def test_merge_gives_the_same_logits_without_the_adapter(polyrank, place, models_folder, source, hypothesis):
    chosen = "" if hypothesis is None else f" --hypothesis {hypothesis}"
    assert polyrank(f"merge {source} -o merged{chosen}").status == 0
    ids = torch.arange(3, 13)[None]
    base = AutoModelForCausalLM.from_pretrained(models_folder / "base")
    adapted = PeftModel.from_pretrained(base, place / source).eval()
    routed = {} if hypothesis is None else {"hypothesis_idx": hypothesis}
    with torch.no_grad():
        expected = adapted(ids, **routed).logits
        seen = AutoModelForCausalLM.from_pretrained(place / "merged").eval()(ids).logits
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    AutoTokenizer.from_pretrained(place / "merged")
    assert (place / "merged" / "model.safetensors").is_file()


def test_inspect_counts_and_names_the_layers(polyrank, place):
    weights = load_file(place / "lora" / "adapter_model.safetensors")
    seen = polyrank("inspect lora --layers --json").json
    assert seen["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert seen["layers"][0]["module"] == "model.layers.0.self_attn.q_proj"
    A = weights["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    B = weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert seen["layers"][0]["updates"][0]["frobenius"] == pytest.approx(float((2 * B @ A).norm()), rel=1e-5)
    several = polyrank("inspect adapter --json").json
    assert several["num_hypotheses"] == 2
    assert several["cosines"][0][0] == pytest.approx(1.0)
    assert "cos 1" in polyrank("inspect adapter --layers").out


def test_a_folder_without_the_adapter_itself(polyrank, place):
    (place / "run").mkdir()
    (place / "run" / "config.yaml").write_text("recipe: x\n")
    (place / "adapter").rename(place / "run" / "adapter")
    assert polyrank("inspect run --json").json["path"] == "run/adapter"
    (place / "run" / "other").symlink_to(place / "run" / "adapter", target_is_directory=True)
    assert polyrank("generate run --prompt Once --max-new-tokens 2").status == 0


def test_a_pickle_in_place_of_safetensors_is_never_read(polyrank, place):
    folder = place / "pickled"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    torch.save({"a": torch.ones(1)}, folder / "adapter_model.bin")
    for command in ("inspect pickled", "generate pickled --prompt x", "merge pickled -o m", "export pickled -o e"):
        done = polyrank(command)
        assert done.status == 2
        assert "is a pickle, which can run code and is never read" in done.err


def test_export_of_another_method_fits_a_lora(polyrank, place, models_folder, make_adapter):
    model = make_adapter(
        models_folder / "base", place / "lokr", LoKrConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    assert "give --rank" in polyrank("export lokr -o loras").err
    assert polyrank("export lokr -o loras --rank 16").out.strip() == "loras/lora0"
    base = AutoModelForCausalLM.from_pretrained(models_folder / "base")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        seen = PeftModel.from_pretrained(base, place / "loras" / "lora0").eval()(ids).logits
        torch.testing.assert_close(seen, model.eval()(ids).logits, atol=1e-4, rtol=1e-4)  # through an SVD in float32


def test_progress_and_results_are_apart(place):
    command = [sys.executable, "-m", "polyrank", "run", "recipe=markov/setup", "num_steps=2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=place)
    assert json.loads(done.stdout)[0]["ran"] is True
    assert "running in runs/markov/setup/" in done.stderr


def test_a_run_that_is_interrupted_ends_at_once_and_goes_on(place, interruptible):
    command = [*interruptible, "run", "recipe=markov/setup", "num_steps=3000", "run_name=long"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=place)
    run_dir = place / "runs" / "markov" / "setup" / "long"
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "the same command goes on from what is saved" in err
    assert "Traceback" not in err
    assert out == ""
    assert err.splitlines()[-1] == "polyrank: interrupted; the same command goes on from what is saved"
    assert not (run_dir / "finished").exists()
    assert (run_dir / "config.yaml").exists()
    for file in run_dir.rglob("*.json*"):  # whole files, and none that was being written
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text)
    assert not [file for file in run_dir.rglob(".*") if file.name != ".lock"]

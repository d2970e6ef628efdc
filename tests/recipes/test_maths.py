"""Recipe maths on a tiny random GPT-2: a whole run, prompts that are too long, mistakes."""

import json

import pytest
import torch

from polyrank.core.errors import ConfigError, DataError
from polyrank.core.records import read_record
from polyrank.data.maths import PROMPT, TEST_PROMPT
from polyrank.evaluation.metrics import read_predictions
from polyrank.recipes._frame.compose import check_overrides, compose
from polyrank.recipes._text.config import Scratch
from polyrank.recipes._text.scratch_model import build_model, build_tokenizer
from polyrank.recipes.run import run_recipe


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A GPT-2 of width 16; 6 problems to learn from in MetaMathQA's format, 4 to solve in GSM8K's, one of them long."""
    folder = tmp_path_factory.mktemp("files")
    train = [(f"Ann has {i} eggs. How many?", f"She has {i}.\n#### {i}\nThe answer is: {i}") for i in range(6)]
    test = [("How many eggs?", "#### 3"), ("How many?", "It is <<2+2=4>>4.\n#### 4"), ("qzx " * 60, "#### 1")]
    test.append(("Ann has 5 eggs?", "#### 5"))
    (folder / "train.json").write_text(json.dumps([{"query": q, "response": r, "type": "x"} for q, r in train]))
    (folder / "test.jsonl").write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in test))
    tokenizer = build_tokenizer([" ".join(pair) for pair in train], 300)
    torch.manual_seed(0)
    build_model(Scratch(layers=1, heads=2, width=16, context=128), tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def overrides(files, runs_dir, *more):
    return [
        *("recipe=maths", "data=metamath_gsm8k", f"data.path={files}", f"data.test_path={files}", "run_name=run"),
        *(f"runs_dir={runs_dir}", f"model.name_or_path={files}/model", "num_steps=2", "batch_size=4", "warmup_steps=1"),
        *("max_new_tokens=8", "data.template='{question}\n'", "data.test_template='{question}\n'"),
        *more,
    ]


@pytest.mark.parametrize("method", ["lora", "lorma_plus"])
def test_a_run_from_files_to_result(files, tmp_path, method, monkeypatch):
    from polyrank.evaluation import predict

    decode = predict.decode

    def knowing_one(*args, **kwargs):
        result = decode(*args, **kwargs)
        texts = [
            ["#### 3"] if text.startswith("How many eggs") else ["none"]
            for text, _ in zip(args[2], result.candidates, strict=True)
        ]
        return type(result)(texts, result.cost)

    monkeypatch.setattr(predict, "decode", knowing_one)
    done = run_recipe(overrides(files, tmp_path, f"method={method}"))
    record = read_record(done.run_dir / "result.json")
    (row,) = record.rows
    assert row.figures["gsm8k_accuracy"] == 25  # one of four: the long one, which was not tried, is wrong
    assert record.details["inputs_too_long"] == 1
    assert record.details["num_examples"] == 4
    predictions = read_predictions(done.run_dir)
    assert [p.id for p in predictions] == ["test-00000", "test-00001", "test-00003"]
    assert predictions[1].references == ("It is 4.\n#### 4",)
    assert record.details["training"]["rows"] == 6


def test_the_published_prompt_is_the_default_and_too_long_here(files, tmp_path):
    given = [text for text in overrides(files, tmp_path) if "template" not in text]
    config = compose(check_overrides(given)).settings
    assert (config.data.template, config.data.test_template) == (PROMPT, TEST_PROMPT)
    with pytest.raises(DataError, match="none of the 4 test prompts leaves room for max_new_tokens 100"):
        run_recipe([*given, "max_new_tokens=100"])


@pytest.mark.parametrize(
    "more, error, match",
    [
        (["data.answers=numbers"], ConfigError, "did you mean 'number'"),
        (["data.template=x"], ConfigError, r"data.template 'x' must hold \{question\} once"),
        (["data.test_limit=0"], ConfigError, "test_limit must be at least 1"),
        (["data.path=/nowhere"], DataError, "holds no train set"),
        (["max_length=4"], DataError, "all 6 pairs are longer"),
    ],
)
def test_mistakes(files, tmp_path, more, error, match):
    with pytest.raises(error, match=match):
        run_recipe([*overrides(files, tmp_path), *more])


def test_a_test_problem_without_an_answer_is_refused(files, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"question": "q", "answer": "nobody knows"}))
    with pytest.raises(DataError, match="test problem test-00000 gives no answer: 'nobody knows'"):
        run_recipe(overrides(files, tmp_path, f"data.test_path={tmp_path}/bad.jsonl"))

"""A run that resumes from a checkpoint which somebody damaged or made: refused in one line, nothing of it is run."""

import json
import shutil

import hostile_files as hostile
import pytest
import torch
from peft import get_peft_model
from transformers import TrainingArguments

from polyrank import MclConfig, MclTrainer
from polyrank.core.errors import CheckpointError
from polyrank.hypotheses.scorer import FILE_NAME, HypothesisScorer

ROWS = [{"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]} for _ in range(8)]


def trainer(folder, max_steps):
    model = get_peft_model(hostile.tiny_llama(), MclConfig(target_modules=["q_proj"], r=2, num_hypotheses=2))
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
    )
    collate = lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}  # noqa: E731
    return MclTrainer(model=model, args=args, train_dataset=ROWS, data_collator=collate)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    trainer(place, 1).train()
    return place / "checkpoint-1"


def resume(checkpoint, tmp_path, change):
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint-1")
    change(tmp_path / "run" / "checkpoint-1")
    trainer(tmp_path / "run", 2).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_the_checkpoint_itself_resumes(checkpoint, tmp_path):
    resume(checkpoint, tmp_path, lambda folder: None)
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").is_file()


PICKLED = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("kind", hostile.pickles("x"))
@pytest.mark.parametrize("name", PICKLED)
def test_pickles_that_would_run_code(checkpoint, tmp_path, name, kind):
    content = hostile.pickles(tmp_path / "was-run")[kind]
    with pytest.raises(CheckpointError, match="damaged"):
        resume(checkpoint, tmp_path, lambda folder: (folder / name).write_bytes(content))
    assert not (tmp_path / "was-run").exists()


def test_arguments_of_the_run_are_not_read(checkpoint, tmp_path):
    content = hostile.pickles(tmp_path / "was-run")["torch-zip"]
    resume(checkpoint, tmp_path, lambda folder: (folder / "training_args.bin").write_bytes(content))
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("cut", [0, 1, 100, 0.5, 0.95])
@pytest.mark.parametrize(
    "name",
    [*PICKLED, "adapter_model.safetensors", "mcl_state_0.safetensors", "adapter_config.json", "trainer_state.json"],
)
def test_files_that_are_cut_off(checkpoint, tmp_path, name, cut):
    content = (checkpoint / name).read_bytes()
    part = content[: int(cut * len(content)) if isinstance(cut, float) else cut]
    with pytest.raises(CheckpointError):
        resume(checkpoint, tmp_path, lambda folder: (folder / name).write_bytes(part))


STATES = {
    "list": [],
    "number": 5,
    "unknown-key": {"surprise": 1},
    "step-text": {"global_step": "1"},
    "step-negative": {"global_step": -1},
    "step-half": {"global_step": 0.5},
    "step-null": {"global_step": None},
    "max-text": {"max_steps": "x"},
    "html": hostile.HTML,
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_form(checkpoint, tmp_path, name):
    def change(folder):
        file = folder / "trainer_state.json"
        value = STATES[name]
        file.write_text(json.dumps(json.loads(file.read_text()) | value if isinstance(value, dict) else value))

    with pytest.raises(CheckpointError, match=r"trainer_state\.json"):
        resume(checkpoint, tmp_path, change)


@pytest.mark.parametrize(
    "config", [{"r": 10**9}, {"num_hypotheses": 10**9}, {"peft_type": "LORA"}, {"r": "2"}, {"r": None}]
)
def test_an_adapter_of_another_form(checkpoint, tmp_path, config):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))

    with hostile.NoLargeTensors(), pytest.raises(CheckpointError):
        resume(checkpoint, tmp_path, change)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_features": 10**12},
        {"hidden": 10**12},
        {"num_hypotheses": 10**12},
        {"hidden": "4"},
        {"surprise": 1},
        {"num_features": 8.0},
    ],
    ids=str,
)
def test_a_scorer_that_claims_more_than_it_holds(tmp_path, shape):
    from safetensors import safe_open
    from safetensors.torch import save_file

    scorer = HypothesisScorer(8, 2, 4)
    path = scorer.save(tmp_path)
    loaded = HypothesisScorer.load(tmp_path, 2)
    assert all(torch.equal(a, b) for a, b in zip(scorer.parameters(), loaded.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["shape"] = json.dumps(json.loads(metadata["shape"]) | shape)
    save_file(tensors, tmp_path / FILE_NAME, metadata)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        HypothesisScorer.load(tmp_path)

"""A recipe that counts: small enough to run in no time, with every kind of field a real one has."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from polyrank.core.errors import ConfigError
from polyrank.core.files import append_json_line, atomic_write, read_json_lines
from polyrank.recipes._frame.registry import recipes


@dataclass
class Optimizer:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass
class CountConfig:
    num_steps: int = 3
    mode: Literal["up", "down"] = "up"
    optimizer: Optimizer = field(default_factory=Optimizer)
    stop_at: int | None = None
    method: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"num_steps must be >= 1, got {self.num_steps}")


def count(config: CountConfig, run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    start = len(read_json_lines(metrics)) if metrics.exists() else 0
    for step in range(start, config.num_steps):
        if step == config.stop_at and not (run_dir / "stopped").exists():
            (run_dir / "stopped").touch()
            raise RuntimeError("the lights went out\nsecond line")
        append_json_line(metrics, {"step": step, "lr": config.optimizer.lr})
    atomic_write(run_dir / "result.json", json.dumps({"steps": config.num_steps, "rank": config.method.get("r")}))


@pytest.fixture
def config_dir(tmp_path, monkeypatch):
    """A user's own folder of YAML, with the counting recipe; the current folder is empty and elsewhere."""
    if "count" not in recipes:
        recipes.register("count", count)
    files = {
        "recipe/count.yaml": "# @package _global_\n# Counts to num_steps\nrecipe: count\nnum_steps: 2\n",
        "recipe/count/long.yaml": "# @package _global_\ndefaults:\n  - /recipe/count@_global_\nnum_steps: 9\n",
        "recipe/needy.yaml": "# @package _global_\nrecipe: count\nnum_steps: ???\n",
        "recipe/broken.yaml": "# @package _global_\nrecipe: [\n",
        "recipe/nameless.yaml": "# @package _global_\nnum_steps: 2\n",
        "method/plain.yaml": "name: plain\nr: 4\n",
        "data/dice.yaml": "name: dice\nsides: 6\ndefault_recipe: count\n",
        "data/lost.yaml": "name: lost\ndefault_recipe: coutn\n",
    }
    for name, text in files.items():
        file = tmp_path / "conf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "conf"

"""The benchmark of the methods: LoRA is what all is measured by, and sizes are those of the recipe."""

import sys
from pathlib import Path

import pytest

from polyrank.core.records import read_record

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in ("methods", "_measure"):
        sys.modules.pop(name, None)


def test_each_method_beside_lora(tmp_path):
    import methods

    small = ["--rounds", "1", "--width", "64", "--layers", "1", "--batch", "2", "--length", "8"]
    names = ["dora", "lora_pro", "ba_lora", "eva", "loram"]
    assert methods.main(["--methods", *names, *small, "--output", str(tmp_path / "bench.json")]) == 0
    rows = {row.method: row.figures for row in read_record(tmp_path / "bench.json").rows}
    assert list(rows) == ["LoRA", "DoRA", "LoRA-Pro", "BA-LoRA", "EVA", "LoRAM"]
    assert rows["LoRA"]["time_over_lora"] == rows["LoRA"]["memory_over_lora"] == 1
    # width 64, one key head of 32, intermediate 168: q, o; k, v; gate, up, down
    assert rows["LoRA"]["trainable_parameters"] == 8 * (2 * 128 + 2 * 96 + 3 * 232)
    assert rows["LoRA-Pro"]["trainable_parameters"] == rows["LoRA"]["trainable_parameters"]
    assert rows["LoRA-Pro"]["memory_bytes"] > rows["LoRA"]["memory_bytes"]  # moments of the whole update
    assert rows["BA-LoRA"]["memory_bytes"] > rows["LoRA"]["memory_bytes"]  # logits twice
    assert all(figures["time_ms"] > 0 for figures in rows.values())

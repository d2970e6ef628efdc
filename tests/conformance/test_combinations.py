"""Which methods go together: every pair tried, every refusal naming both, and the page that lists them."""

import pytest
from combinations import ADAPTERS, LORA, PAGE, SPARED, YES, adapter_pairs, extra_pairs, markdown, page_with

KNOWN = {*LORA, "LoKr", "mcl", "dylora", "allora", "codyra", "lsr", "lorma", "sara"}
TOGETHER = {
    "LoRA-GA": {"LoRA", "rsLoRA", "DoRA"},
    "EVA": {"LoRA", "rsLoRA", "DoRA", "dylora", "allora", "codyra"},
    "LoRA-Pro": {"LoRA", "rsLoRA", "PiSSA", "mcl"},
}
"""What the mathematics of each allows: two factors in a sum; the layer's input under A; true gradients of A and B."""


@pytest.fixture(scope="module")
def tables():
    return adapter_pairs(), extra_pairs()


@pytest.mark.parametrize("beside", list(TOGETHER))
def test_what_goes_together_does_and_the_rest_says_why(tables, beside):
    for adapter in ADAPTERS:
        found = tables[0][adapter][beside]
        assert adapter not in KNOWN or (found == YES) == (adapter in TOGETHER[beside]), (adapter, found)
        assert found == YES or beside in found, found
        named = (adapter.split("_")[0].lower(), "init_lora_weights")
        assert found == YES or any(name in found.lower() for name in named), found


def test_ba_lora_goes_with_every_adapter_that_returns_logits(tables):
    refused = {adapter: tables[0][adapter]["BA-LoRA"] for adapter in sorted(KNOWN)}
    refused = {adapter: text for adapter, text in refused.items() if text != YES}
    assert list(refused) == ["mcl"]
    assert "does not combine with LoRA-MCL" in refused["mcl"]


def test_weight_decay_spares_what_is_near_no_zero(tables):
    spared = {adapter for adapter, row in tables[0].items() if row["weight decay"] == SPARED}
    assert {"lorma", "codyra"} <= spared
    assert not spared & {"LoRA", "DoRA", "mcl", "lsr", "dylora", "allora", "sara"}


def test_what_comes_beside_a_lora_goes_together_but_for_two_starts(tables):
    refused = {(a, b): text for a, row in tables[1].items() for b, text in row.items() if text != YES}
    assert list(refused) == [("LoRA-GA", "EVA")]
    assert "LoRA-GA does not combine with init_lora_weights='eva'" in refused["LoRA-GA", "EVA"]


def test_the_page_says_what_was_found(tables):
    text = PAGE.read_text(encoding="utf-8")
    assert text == page_with(text, markdown(list(tables))), "run: python tests/conformance/combinations.py"

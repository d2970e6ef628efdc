"""What the packages say they offer is there, and nothing that a user types is missing."""

import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    ["polyrank", "polyrank.adapters", "polyrank.hypotheses", "polyrank.objectives", "polyrank.routing"],
)
def test_all_is_true(module):
    module = importlib.import_module(module)
    assert len(module.__all__) == len(set(module.__all__))
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing


def test_names_a_user_types():
    import polyrank

    typed = {
        *("MclConfig", "MclModel", "MclTrainer", "generate_hypotheses", "export_hypotheses", "import_hypotheses"),
        *("LsrConfig", "LormaConfig", "L4qConfig", "MoeConfig", "get_peft_mcl", "MCLTrainer", "patch_peft_for_mcl"),
    }
    assert typed <= set(polyrank.__all__)

"""Recipes by name. A recipe is `run(config, run_dir)`; its first parameter's dataclass is what its YAML must fit.

    @recipes.decorator("e2e")
    def run(config: E2eConfig, run_dir: Path) -> None: ...

    conf/recipe/e2e.yaml
        # @package _global_
        # Restaurant descriptions: one hypothesis against several     (the line that `polyrank list recipes` shows)
        recipe: e2e
        num_steps: 300

A recipe writes into `run_dir` and goes on from what it finds there. The frame (recipes/run.py) has put config.yaml
there before and puts `finished` there after. Without an annotated dataclass the recipe gets the plain dict. A recipe
that may be started in several processes by torchrun says `run.distributed = True`.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from ...core.registry import Registry

Recipe = Callable[[Any, Path], Any]
recipes: Registry[Recipe] = Registry("recipe")
_ROOM = __package__.removesuffix("._frame")
_NO_RECIPES = {"run", "commands", "gpl_commands"}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; only its own module (recipes/<first part of the name>.py) is imported if that suffices.

    Raises: UnknownNameError with the nearest name.
    """
    module = str(name).split("/", 1)[0]
    if name not in recipes and module.isidentifier() and module not in _NO_RECIPES and find_spec(f"{_ROOM}.{module}"):
        import_module(f"{_ROOM}.{module}")
    if name not in recipes:
        load_recipes()
    return recipes.get(name)


def load_recipes() -> Registry[Recipe]:
    """All recipes, after importing every module of polyrank.recipes that is one."""
    folder = str(Path(__file__).parents[1])
    for module in iter_modules([folder]):
        if not module.name.startswith("_") and module.name not in _NO_RECIPES:
            import_module(f"{_ROOM}.{module.name}")
    return recipes


def config_class(recipe: Recipe) -> type | None:
    """The dataclass that a recipe's first parameter is annotated with; None if it takes a plain dict."""
    parameter = next(iter(inspect.signature(recipe).parameters))
    kind = typing.get_type_hints(recipe).get(parameter)
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None

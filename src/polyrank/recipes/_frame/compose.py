"""From overrides typed on the command line to one checked configuration, composed by Hydra.

Hydra's own messages run over many lines and name no neighbour, so the overrides are checked here first: syntax, choice
of each group, key. What is left to Hydra's composition afterwards fails only on a broken YAML file.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, UserError, name_message, unknown_name
from ...core.structure import from_dict
from .registry import config_class, get_recipe
from .yaml_files import check_yaml, read_yaml

CONF = Path(__file__).parents[1] / "conf"
FRAME_KEYS = ("runs_dir", "run_name")
DEFAULT_RECIPE = "default_recipe"
"""Key by which an entry of data/, method/ or model/ names the recipe to run where the user names none."""


@dataclass(frozen=True)
class Composed:
    """One run's configuration.

    Attributes: config (whole, plain, with the recipe's defaults filled in); recipe (registered name); choice (name of
        the recipe's YAML, such as markov/transition1); settings (what the recipe function gets).
    """

    config: dict[str, Any]
    recipe: str
    choice: str
    settings: Any


def options(group: str, config_dir: Path | None = None) -> dict[str, Path]:
    """Choices of a config group: name -> YAML file. Files that start with an underscore are parts of others."""
    found = {}
    for root in (CONF, config_dir):
        folder = root / group if root is not None else None
        for file in sorted(folder.rglob("*.yaml")) if folder is not None and folder.is_dir() else ():
            if not file.name.startswith("_"):
                found[file.relative_to(folder).with_suffix("").as_posix()] = file
    return found


def groups(config_dir: Path | None = None) -> list[str]:
    """Names of the config groups: recipe, method, data, model and whatever a user's folder adds."""
    folders = (root.iterdir() for root in (CONF, config_dir) if root is not None)
    found = {folder.name for inside in folders for folder in inside if folder.is_dir()}
    return sorted((found | {"recipe"}) - {"hydra"})  # hydra: its own, hydra/launcher=slurm


def describe(file: Path) -> str:
    """The first comment line of a YAML file that is no directive."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ").strip()
    return ""


def check_overrides(overrides: Iterable[str], config_dir: Path | None = None, *, sweep: bool = False) -> list[str]:
    """The overrides as Hydra is to get them: recipe named, keys that only the recipe's dataclass knows marked as added.

    Raises: ConfigError or UnknownNameError for the first that is malformed, unknown, a list where one run was asked, or
        a list that another value of the same key overrides.
    """
    from hydra.core.override_parser.types import OverrideType

    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {str(config_dir)!r} is no folder")
    for file in sorted(config_dir.rglob("*.yaml")) if config_dir is not None else ():
        check_yaml(file)  # Hydra trusts what it composes
    parsed = _parse(overrides)
    known_groups = groups(config_dir)
    for item in parsed:
        if item.is_sweep_override() and not sweep:
            raise ConfigError(
                f"{item.input_line!r} lists several values: add --multirun for one run each,"
                f" or brackets, [...], for one run with a list"
            )
        group = item.key_or_group
        others = [other for other in parsed if other is not item and other.key_or_group == group]
        if item.is_sweep_override() and others:  # the last would hold for every combination, and all would run
            raise ConfigError(f"{group!r} is given twice: {item.input_line!r} and {others[0].input_line!r}")
        if group in known_groups:
            for choice in _choices(item):
                if choice is not None and str(choice) not in options(group, config_dir):
                    raise unknown_name(group, choice, options(group, config_dir))
                if choice is not None:
                    read_yaml(options(group, config_dir)[str(choice)])  # Hydra would not say which file is wrong
    implied = _implied_choices(parsed, known_groups, config_dir)
    parsed = _parse(implied) + parsed
    texts = [item.input_line for item in parsed]
    if not any(item.key_or_group == "recipe" for item in parsed):
        texts.insert(0, f"recipe={_default_recipe(parsed, known_groups, config_dir)}")
        parsed = _parse(texts)
    first = [_first_value(item) for item in parsed if item.key_or_group in known_groups]
    base = _compose(first, config_dir)
    allowed = set(_flat_keys(base))
    optional = set(_field_keys(config_class(get_recipe(_recipe_name(base)))))
    group_is_swept = any(item.is_sweep_override() and item.key_or_group in known_groups for item in parsed)
    checked = []
    for item in parsed:
        key, text = item.key_or_group, item.input_line
        if key not in known_groups and not key.startswith("hydra") and item.type == OverrideType.CHANGE:
            if key not in allowed and key in optional:
                text = f"++{text}"
            elif key not in allowed:
                names = {name for name in allowed | optional if "." not in name or "." in key} | set(known_groups)
                raise ConfigError(name_message("key", key, names))
            elif group_is_swept and not item.is_sweep_override():
                text = f"++{text}"  # Hydra reads it before it has chosen the group that holds the key
        checked.append(text)
    return checked


def compose(checked: list[str], config_dir: Path | None = None) -> Composed:
    """Compose overrides that `check_overrides` passed. Raises ConfigError if a value or a YAML file is wrong."""
    config = _compose(checked, config_dir, final=True)
    choice = next(text.split("=", 1)[1] for text in reversed(checked) if text.startswith("recipe="))
    return settle(config, choice)


def settle(config: Mapping[str, Any], choice: str) -> Composed:
    """Check a composed, plain configuration against its recipe's dataclass. Raises ConfigError."""
    name = _recipe_name(config)
    frame = {key: config.get(key) for key in FRAME_KEYS}
    for key, value in frame.items():
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise ConfigError(f"{key} must be text, got {value!r}")
    values = {
        key: {k: v for k, v in value.items() if k != DEFAULT_RECIPE} if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in FRAME_KEYS and key != "recipe"
    }
    kind = config_class(get_recipe(name))
    settings: Any = values if kind is None else from_dict(kind, values)
    if kind is not None:
        values = _plain(dataclasses.asdict(settings))
    return Composed({"recipe": name, **frame, **values}, name, choice, settings)


def search_path(config_dir: Path | None) -> list[str]:
    return [] if config_dir is None else [f"hydra.searchpath=[file://{config_dir.resolve()}]"]


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into one-line errors of ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        yield
    except UserError:
        raise
    except MissingMandatoryValue as error:
        raise ConfigError(f"field {error.full_key!r} has no value; give {error.full_key}=...") from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        text = str(cause if isinstance(cause, OmegaConfBaseException) else error)
        raise ConfigError(" ".join(text.split("full_key:")[0].split())) from error


def _compose(overrides: list[str], config_dir: Path | None, *, final: bool = False) -> dict[str, Any]:
    """Compose to a plain dict; only a final one needs every value to be there."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    try:
        with hydra_errors(), initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            composed = hydra_compose("config", overrides=search_path(config_dir) + overrides)
            values = OmegaConf.to_container(composed, resolve=final, throw_on_missing=final)
    except UserError:
        raise
    except Exception as error:  # Hydra trusts the files: whatever it raises over them is about one of them
        raise ConfigError(f"a configuration file cannot be composed: {' '.join(str(error).split())}") from error
    return {str(key): value for key, value in typing.cast(dict[Any, Any], values).items()}


def _parse(overrides: Iterable[str]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parsed = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f"cannot read {text!r}: an override is key=value")
        try:
            parsed += OverridesParser.create().parse_overrides([text])
        except (HydraException, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"cannot read {text!r}: {reason} (quote values with special characters)") from error
    return parsed


def _choices(item: Any) -> list[Any]:
    """The choices that an override of a group names; none for a pattern, which Hydra expands."""
    from hydra.core.override_parser.types import ValueType

    if not item.is_sweep_override():
        value = item.value()
        return list(value) if isinstance(value, list) else [value]
    return [] if item.value_type is ValueType.GLOB_CHOICE_SWEEP else list(item.sweep_iterator())


def _first_value(item: Any) -> str:
    choices = _choices(item)
    return f"{item.key_or_group}={choices[0]}" if item.is_sweep_override() and choices else item.input_line


def _default_recipe(parsed: list[Any], known_groups: list[str], config_dir: Path | None) -> str:
    """The recipe that the chosen data, method or model names as its own."""
    chosen = {item.key_or_group: item for item in parsed if item.key_or_group in known_groups}
    base = _compose([_first_value(item) for item in chosen.values()], config_dir)
    for group in ("data", "method", "model"):
        entry = base.get(group)
        if isinstance(entry, Mapping) and entry.get(DEFAULT_RECIPE):
            name = str(entry[DEFAULT_RECIPE])
            if name not in options("recipe", config_dir):
                raise unknown_name(f"{DEFAULT_RECIPE} of {group}", name, options("recipe", config_dir))
            return name
    raise ConfigError(f"name a recipe: recipe=NAME (allowed: {', '.join(options('recipe', config_dir))})")


def _implied_choices(parsed: list[Any], known_groups: list[str], config_dir: Path | None) -> list[str]:
    """Where no recipe and no entry of any group is named, a key that one entry alone has names that entry:
    `model.lora.r=16` is `model=roberta_lora model.lora.r=16`."""
    keys = [item.key_or_group for item in parsed]
    if any(key in known_groups for key in keys):
        return []
    implied = {}
    for key in keys:
        group, _, rest = key.partition(".")
        if not rest or group not in known_groups or group in implied:
            continue
        holders = []
        for name, file in options(group, config_dir).items():
            values = read_yaml(file)
            if isinstance(values, Mapping) and "@package _global_" in file.read_text(encoding="utf-8"):
                values = values.get(group)
            if isinstance(values, Mapping) and rest in _flat_keys(values):
                holders.append(name)
        if len(holders) == 1:
            implied[group] = f"{group}={holders[0]}"
    return list(implied.values())


def _recipe_name(config: Mapping[str, Any]) -> str:
    name = config.get("recipe")
    if not isinstance(name, str):
        raise ConfigError(f"the recipe's YAML must say `recipe: <registered name>` at its top, got {name!r}")
    return name


def _flat_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat_keys(value, f"{prefix}{key}.")


def _field_keys(kind: type | None, prefix: str = "") -> Iterator[str]:
    if kind is None:
        return
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        yield f"{prefix}{item.name}"
        if isinstance(hints[item.name], type) and dataclasses.is_dataclass(hints[item.name]):
            yield from _field_keys(hints[item.name], f"{prefix}{item.name}.")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    return str(value) if isinstance(value, Path) else value

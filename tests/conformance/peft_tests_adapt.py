"""PEFT's own test classes, run with our methods' configurations instead of PEFT's.

PEFT parametrises its tests over lists of (config class, arguments). `adapt` imports one of its test modules, takes a
test class and returns a subclass whose test functions are PEFT's, parametrised over our cases; a test that builds
PEFT's own configs in its body is left out, with a reason that `left_out` gives and docs/testing.md lists.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from method_cases import NOT_APPLICABLE, Case, all_cases, cases, methods
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft_tests_fetch import PACKAGE, package_folder
from peft_tests_reasons import LEFT_OUT, NEEDS_TAG, RUNS_AS_LORA, RUNS_IN_PLACE_OF_LORA, SKIPS_BY_NAME

CLASSES: dict[str, tuple[str, ...]] = {
    "test_custom_models": (
        "TestPeftCustomModel",
        "TestMultipleActiveAdapters",
        "TestRequiresGrad",
        "TestMixedAdapterBatches",
    ),
    "test_decoder_models": ("TestDecoderModels",),
    "test_encoder_decoder_models": ("TestEncoderDecoderModels",),
    "test_feature_extraction_models": ("TestPeftFeatureExtractionModel",),
    "test_seq_classifier": ("TestSequenceClassificationModels",),
    "test_token_classification_qa": ("TestTokenClassificationModels", "TestQuestionAnsweringModels"),
    "test_config": ("TestPeftConfig",),
    "test_mixed": ("TestMixedAdapterTypes",),
    "test_torch_compile": ("TestTorchCompileCausalLM",),
}
"""Test modules and classes of PEFT's suite whose contracts hold for any method."""


COMPILE = {"torch_compile_backend": "aot_eager"}
"""PEFT compiles with inductor, which needs a C++ compiler; what a method can break is what comes before it."""


# -- our configurations in the shapes that PEFT's tests take --------------------------------------------------------


def custom_model_rows(case: Case, first: bool) -> Iterator[Any]:
    """(test_name, model_id, config_cls, config_kwargs), PEFT's own choices of layers for a Linear method."""
    both = {"target_modules": ["lin0", "lin1"]}
    alpha = 0.5 if case.method == "l4q" else 4  # L4Q does not divide it by r: 4 / 8, as PEFT's LoRA has it in this row
    rows = [("MLP lin0 lin1", "MLP", both)]
    if first:
        rows = [
            ("MLP lin0 as str", "MLP", {"target_modules": "lin0"}),
            ("MLP lin0", "MLP", {"target_modules": ["lin0"]}),
            ("MLP lin1", "MLP", {"target_modules": ["lin1"]}),
            *rows,
            ("MLP saves lin1", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
            ("MLP dropout", "MLP", {"target_modules": ["lin0"], "lora_alpha": alpha, "lora_dropout": 0.1}),
        ]
        if "conv1d" in case.tags:
            rows.append(("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}))
        if "embedding" in case.tags:
            # at scale 1 three steps move a parameter by about PEFT's threshold of 1e-4: random values decide
            rows.append(("Embedding", "EmbConv1D", {"target_modules": ["emb"], "lora_alpha": 32}))
        if {"conv1d", "embedding"} <= case.tags:
            rows.append(("Embedding Conv1D", "EmbConv1D", {"target_modules": ["emb", "conv1d"], "lora_alpha": 32}))
    for name, model, kwargs in rows:
        yield row(case, f"{case}-{name}", model, case.entry.config, {**case.options, **kwargs}, id=f"{case}-{name}")


def row(case: Case, *values: Any, id: str) -> Any:
    return pytest.param(*values, id=id, marks=pytest.mark.method(case.method))


def first_cases() -> list[Case]:
    return [cases(method)[0] for method in methods()]


def rows_for(argnames: str, argvalues: list[Any]) -> list[Any] | None:
    """Our rows for one of PEFT's `parametrize` marks, or None where the mark is not about configs."""
    names = [name.strip() for name in argnames.split(",")]
    firsts = first_cases()
    match names:
        case ["test_name", "model_id", "config_cls", "config_kwargs"]:
            return [r for c in all_cases() for r in custom_model_rows(c, first=c in firsts)]
        case ["config_cls", "config_kwargs"]:
            task_type = next(iter(argvalues))[1]["task_type"]
            kwargs = {"task_type": task_type, "target_modules": None}
            return [row(c, c.entry.config, {**kwargs, **c.options}, id=str(c)) for c in firsts]
        case ["config_cls"] | ["config_class"]:
            return [row(c, c.entry.config, id=str(c)) for c in firsts]
        case ["config_class", "mandatory_kwargs"]:
            return [row(c, c.entry.config, dict(c.options), id=str(c)) for c in firsts]
        case ["test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"]:
            return [
                row(c, f"{c} {name}", c.method, c.entry.config, options(c, *one), options(c, *two), id=f"{c}-{name}")
                for c in all_cases()
                for name, one, two in (("same", ["lin0"], ["lin0"]), ("different", ["lin0"], ["lin1"]))
            ]
        case ["settings"]:
            return [row(c, (c.config(task_type="CAUSAL_LM"), COMPILE), id=str(c)) for c in firsts]
    return as_ours(argvalues)


def options(case: Case, *targets: str) -> dict[str, Any]:
    return {**case.options, "target_modules": list(targets), "init_weights": False}


def as_ours(argvalues: list[Any]) -> list[Any] | None:
    """Rows that hold ready-made LoraConfigs, with our class and the same fields; None where there are none.

    Rows with configs of other classes, or with fields that only PEFT's LoRA has, are dropped.
    """
    ours = []
    for number, values in enumerate(argvalues):
        values = getattr(values, "values", values)  # a pytest.param
        values = values if isinstance(values, tuple) else (values,)
        configs = [value for value in values if isinstance(value, PeftConfig)]
        if not configs or not all(type(config) is LoraConfig for config in configs):
            continue
        for case in first_cases():
            if all(fields_for(case, config) is not None for config in configs):
                translated = [case.config(**fields_for(case, v)) if v in configs else v for v in values]
                ours.append(row(case, *translated, id=f"{case}-{number}"))
    return ours or None


def fields_for(case: Case, config: LoraConfig) -> dict[str, Any] | None:
    """The fields of a LoraConfig that differ from its defaults, as our config names them; None for one it lacks."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    default = LoraConfig()
    changed = {name: value for name, value in fields.items() if value != getattr(default, name)}
    if changed.pop("init_lora_weights", True) is False:
        changed["init_weights"] = False
    known = {f.name for f in dataclasses.fields(case.entry.config)}
    return changed if set(changed) <= known else None


def mixed_model_pairs(test: str) -> list[Any]:
    """(config0, config1) for the tests of mixed models: ours beside PEFT's LoRA, LoHa and LoKr, and beside itself."""
    targets = {"first": ["lin0"], "last": ["lin1"], "different": None}[test.split("_")[2]]
    same_type = test.endswith("same_type")
    pairs = []
    for case in first_cases():

        def ours(case: Case = case, **more: Any) -> PeftConfig:
            return case.config(init_weights=False, target_modules=targets, **more)

        if same_type:
            pairs.append(row(case, ours(), ours(r=16), id=f"{case}-twice"))
            continue
        others: list[tuple[type[PeftConfig], dict[str, Any]]] = [
            (LoraConfig, {"init_lora_weights": False}),
            (LoHaConfig, {"init_weights": False}),
            (LoKrConfig, {"init_weights": False}),
        ]
        for (other, kwargs), swapped in itertools.product(others, (False, True)):
            pair = [ours(), other(target_modules=targets, **kwargs)]
            name = f"{case}-{other.__name__}-{'second' if swapped else 'first'}"
            pairs.append(row(case, *(pair[::-1] if swapped else pair), id=name))
    return pairs


# -- PEFT's classes with these rows ---------------------------------------------------------------------------------


@functools.cache
def load(module: str) -> types.ModuleType:
    """Import one of PEFT's test modules, its skip helpers and its access to the hub replaced by ours.

    Raises: FetchError where PEFT's tests are not here and cannot be downloaded.
    """
    folder = str(package_folder())
    if folder not in sys.path:
        sys.path.append(folder)
    pytest.register_assert_rewrite(f"{PACKAGE}.{module}", f"{PACKAGE}.testing_common")
    utils = importlib.import_module(f"{PACKAGE}.testing_utils")
    utils.hub_online_once = _stay_offline
    utils.load_dataset_english_quotes = english_quotes
    common = importlib.import_module(f"{PACKAGE}.testing_common")
    common._skip_if_conv1d_not_supported = _skip_unless_conv1d
    common._skip_if_merging_not_supported = _skip_unless_mergeable
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_DEBUG_WITH_TORCH_COMPILE", "1")
        loaded = importlib.import_module(f"{PACKAGE}.{module}")
    for helper in SKIPS_BY_NAME:
        if hasattr(loaded, helper):
            setattr(loaded, helper, lambda *args: None)
    return loaded


def adapt(module: str, name: str) -> type:
    """PEFT's test class `name`, with our rows; tests that `left_out` names are gone from it."""
    original = getattr(load(module), name)
    namespace: dict[str, Any] = {"__doc__": f"PEFT's {module}.{name} over our methods."}
    for test in tests_of(original):
        if left_out(module, name, test) is not None:
            namespace[test] = None
            continue
        namespace[test] = parametrised(inspect.getattr_static(original, test))
    for helper in RUNS_AS_LORA:
        if helper.startswith("_test") and hasattr(original, helper):
            namespace[helper] = as_lora(getattr(original, helper))
    if hasattr(original, "compile"):
        namespace["compile"] = lambda self, model, compile_kwargs: torch.compile(model, backend="aot_eager")
    if "unittest" in {base.__module__.partition(".")[0] for base in original.__mro__}:
        namespace |= {k: v for k, v in vars(original).items() if not k.startswith(("test", "__"))}
        return type(name, (), namespace)  # unittest's classes cannot be parametrised
    return type(name, (original,), namespace)


def tests_of(cls: type) -> list[str]:
    """Names of a class's tests; tests that `parameterized.expand` multiplied count once, by their first name."""
    expanded = [name for name in dir(cls) if name.startswith("test")]
    seen, kept = set(), []
    for name in expanded:
        if getattr(cls, name) is None:  # what parameterized.expand leaves behind
            continue
        function = written(getattr(cls, name))
        if function.__name__ not in seen:
            seen.add(function.__name__)
            kept.append(name)
    return kept


def written(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as PEFT wrote it, below what `parameterized.expand` made of it."""
    return inspect.unwrap(getattr(function, "place_as", function))


def parametrised(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of one of PEFT's tests with our rows in its parametrize marks."""
    plain = written(function)
    name = plain.__name__
    marks, ours = [], False
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            rows = rows_for(mark.args[0], list(mark.args[1]))
            if rows is not None:
                ours = True
                mark = pytest.mark.parametrize(mark.args[0], [r for r in rows if applies(r, name)]).mark
        marks.append(mark)
    if ours:
        copy = as_lora(plain) if name in RUNS_AS_LORA else _copied(plain)
    elif name in RUNS_IN_PLACE_OF_LORA:
        copy = in_place_of_lora(plain)
        rows = [row(case, case, id=str(case)) for case in first_cases()]
        marks.append(pytest.mark.parametrize("case", [r for r in rows if applies(r, name)]).mark)
    else:  # test_target_*, which parameterized.expand multiplied over pairs of configs
        copy = _copied(plain)
        rows = [r for r in mixed_model_pairs(name) if applies(r, name)]
        marks.append(pytest.mark.parametrize("config0, config1", rows).mark)
    copy.pytestmark = marks
    return copy


def applies(row: Any, test: str) -> bool:
    """Whether a row's method has what the test needs."""
    method = next(mark.args[0] for mark in row.marks if mark.name == "method")
    if test in NOT_APPLICABLE.get(method, {}):
        return False
    return NEEDS_TAG.get(test, frozenset()) <= cases(method)[0].tags


def as_lora(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a test that believes our config class to be LoraConfig, so that what it keeps to LoRA runs for us."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
        return _copied(function, LoraConfig=bound["config_cls"])(*args, **kwargs)

    return run


def in_place_of_lora(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a test that builds LoraConfigs in its body, which builds those of the argument `case` instead."""

    def run(*args: Any, case: Case, **kwargs: Any) -> Any:
        def config(**fields: Any) -> PeftConfig:
            if not fields.pop("init_lora_weights", True):
                fields["init_weights"] = False
            return case.config(**fields)

        return _copied(function, LoraConfig=config)(*args, **kwargs)

    signature = inspect.signature(function)
    extra = inspect.Parameter("case", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])
    run.__name__, run.__qualname__, run.__doc__ = function.__name__, function.__qualname__, function.__doc__
    return run


def _copied(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """The same code with other globals and a `pytestmark` of its own."""
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names} if names else function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__dict__.update(function.__dict__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__ = function.__qualname__
    return copy


def left_out(module: str, cls: str, test: str) -> str | None:
    """Why a test of PEFT's is not run with our methods, or None where it is."""
    function = inspect.getattr_static(getattr(load(module), cls), test)
    plain = written(function)
    for name in (f"{cls}.{plain.__name__}", plain.__name__):
        if name in LEFT_OUT:
            return LEFT_OUT[name]
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    if plain.__name__ in RUNS_IN_PLACE_OF_LORA or plain.__name__.startswith("test_target_"):
        return None
    for mark in marks:
        if rows_for(mark.args[0], list(mark.args[1])) is not None:
            return None
    named = sorted(name for name in plain.__code__.co_names if name.endswith("Config") and name != "PeftConfig")
    if named:
        return f"builds {', '.join(named)} in its body"
    raise LookupError(f"{module}.{cls}.{test} has no config parameter and no reason in peft_tests_reasons.py")


# -- what stands in for PEFT's helpers ------------------------------------------------------------------------------


def _method_of(config_cls: type) -> frozenset[str]:
    return next(c.tags for c in first_cases() if c.entry.config is config_cls)


def _skip_unless_conv1d(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
    if "gpt2" in model_id.lower() and "conv1d" not in _method_of(config_cls):
        pytest.skip("by tag: the method does not adapt Conv1D")


def _skip_unless_mergeable(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
    if "mergeable" not in _method_of(config_cls):
        pytest.skip("by tag: the method cannot be merged")


class _stay_offline:
    """PEFT's `hub_online_once` opens the network for a model's first use; our models lie in a local folder."""

    def __init__(self, model_id: str) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def english_quotes() -> Any:
    """Stands for the data set of quotes that PEFT's training tests download: 32 rows of words the tokenizers know."""
    from datasets import Dataset, DatasetDict

    rows = [" ".join(f"w{(7 * i + j * j) % 60}" for j in range(8)) for i in range(32)]
    data = {"quote": rows, "author": ["nobody"] * len(rows), "tags": [[]] * len(rows)}
    return DatasetDict({"train": Dataset.from_dict(data)})

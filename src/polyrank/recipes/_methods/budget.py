"""Adapters by name: any registered method or type of PEFT's, and their size at a parameter budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ...core.errors import ConfigError, name_message, unknown_name
from ...core.seeding import preserved_torch_rng
from .._glue.config import Encoder, Settings
from .entry import MethodEntry, with_option
from .preparation import PROCEDURES, lora_part, trained_part

_LARGEST_OPTION = 1 << 16
ANNEALED_TO = 0.01
"""Temperature (nats per token) that annealed winner-takes-all, starting at 1, has come down to at the last step."""


def config_type(adapter: str) -> type:
    """The config class of a registered method ("lsr") or of one of PEFT's types ("lora", "loha"), registered first.

    Raises: UnknownNameError with the nearest name.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    from ...adapters import adapters

    if adapter in adapters:
        return adapters.get(adapter).config
    if adapter in PROCEDURES:
        also = "" if adapter == "pat" else ", glue"
        raise ConfigError(
            f"method {adapter!r} changes the base model; it runs in recipes data_to_text, maths, methods{also}"
        )
    known = {str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    own = {name for name in known if name.startswith("polyrank_")}
    if adapter not in known:
        raise unknown_name("adapter", adapter, {*adapters.names(), *known} - own)
    return known[adapter]


def adapter_config(method: MethodEntry, model: Encoder, *, head: bool, num_steps: int | None = None) -> Any:
    """The method's config for this model; with `head` its new modules are trained and saved too. `num_steps`, those of
    the run, goes to methods that plan over them (`total_steps`). For a procedure (`preparation`): its LoRA's.

    Raises: ConfigError in one line for an option that the method has not, or a value that it refuses.
    """
    method = lora_part(method)
    kind = config_type(method.adapter)
    known = {item.name for item in dataclasses.fields(kind)}
    for name in method.options:
        if name not in known:
            raise ConfigError(f"method.options: {name_message(f'field of {kind.__name__}', name, known)}")
    given: dict[str, Any] = {"target_modules": model.target_modules}
    if head:
        given |= {"task_type": "SEQ_CLS", "modules_to_save": list(model.head_modules)}
    if method.alpha_per_rank is not None:
        given["lora_alpha"] = method.alpha_per_rank * method.options.get("r", getattr(kind, "r", 8))
    if "total_steps" in known:
        given["total_steps"] = num_steps or 1
    if "temperature_decay" in known:
        given["temperature_decay"] = ANNEALED_TO ** (1 / (num_steps or 1))
    try:
        return kind(**{**given, **method.options})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method {method.name!r}: {str(error).splitlines()[0]}") from error


def count_parameters(model: Any, heads: Sequence[str]) -> dict[str, int]:
    """Trainable parameters: all, those of the head, and the others (the adapter's; the encoder's if it is trained)."""
    parts = {"trainable_parameters": 0, "head_parameters": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts["trainable_parameters"] += parameter.numel()
            if any(f".{head}." in f".{name}" for head in heads):
                parts["head_parameters"] += parameter.numel()
    parts["adapter_parameters"] = parts["trainable_parameters"] - parts["head_parameters"]
    return parts


def adapter_parameters(base: Any, method: MethodEntry, model: Encoder) -> int:
    """How many parameters the adapter has on this model, the head's left out. The model and the random state are as
    before."""
    from peft import get_peft_model

    config = adapter_config(method, model, head=False)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # PiSSA and its kin would change the base's weights
    with preserved_torch_rng():
        try:
            wrapped = get_peft_model(base, config)
        except ValueError as error:
            raise ConfigError(f"method {method.name!r}: {str(error).splitlines()[0]}") from error
        number = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        wrapped.unload()
    return number


def matched_method(config: Settings, base: Any, method: MethodEntry | None = None) -> MethodEntry:
    """The method at the budget of `match_parameters` or `match_lora_rank`; unchanged where neither is set, or no match.

    Rule: `method.match` becomes the whole number that brings the parameters trained with the adapter (those of a pruned
    base, and a procedure's own) nearest to the budget, the smaller of two that are equally near; other options stay.

    Raises: ConfigError if even the value 1 gives more than twice the budget, or if the option does not change the size.
    """
    method = method or config.method  # type: ignore[attr-defined]
    budget = budget_parameters(config, base)
    if budget is None or not method.has_adapter or method.match is None:
        return method
    adapted, beside = trained_part(method, base)

    def size(value: int) -> int:
        return beside + adapter_parameters(adapted, with_option(method, value), config.model)

    low, high = 1, 2
    smallest = size(low)
    if smallest > 2 * budget:
        raise ConfigError(f"method {method.name!r} has {smallest} parameters at {method.match}=1: more than {budget}")
    while size(high) < budget:
        low, high = high, 2 * high
        if high > _LARGEST_OPTION or size(high) == smallest:
            raise ConfigError(f"method {method.name!r}: option {method.match!r} does not reach {budget} parameters")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < budget else (low, middle)
    return with_option(method, min((low, high), key=lambda value: (abs(size(value) - budget), value)))


def budget_parameters(config: Settings, base: Any) -> int | None:
    """The number of adapter parameters asked for; None: each method's own."""
    if config.match_lora_rank is None:
        return config.match_parameters
    options: Mapping[str, Any] = {"r": config.match_lora_rank}
    return adapter_parameters(base, MethodEntry("lora", "LoRA", "lora", dict(options)), config.model)

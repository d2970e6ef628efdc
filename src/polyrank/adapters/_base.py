"""What every weight-level method shares: configuration, adapted layer, tuner and registration, as PEFT expects them.

A method file subclasses `AdapterConfig` with its own fields and `AdapterLayer` with its hooks (`make_parameters`,
`delta` or `adapted_forward`, `delta_weight` or `lora_factors`), then calls `register_adapter`. Everything else is
here and in `_layer.py` once: matching, several adapters, dropout, dtypes, merging, mixed batches, saving.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft.tuners._buffer_dict import BufferDict  # noqa: F401  for methods with buffers
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn

from ..core.errors import ConfigError, nearest
from ..core.registry import DuplicateNameError, Registry
from ._config import AdapterConfig
from ._layer import AdapterLayer
from ._peft_bridge import check_peft_version, parameter_prefix, register_method

TAGS = frozenset({"identity_at_init", "mergeable", "additive", "exact_unmerge", "mixed_batch", "embedding", "conv1d"})
"""Capabilities that the conformance tests read.

identity_at_init: the adapted model equals the base before training. mergeable: merge and unmerge work. additive: the
update is a weight delta that does not depend on other adapters (PEFT can convert it to LoRA). exact_unmerge: unmerging
restores the weight bit by bit. mixed_batch: `adapter_names=` per row. embedding, conv1d: these layers can be adapted.
"""


def _inject_adapter_names(target: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]):
    return args, {**kwargs, "adapter_names": adapter_names}


class AdapterTuner(BaseTuner):
    """PEFT tuner of one method; `register_adapter` makes the subclass.

    PEFT's tuners pass unknown attributes on to the base model, so a public attribute here would hide one of the model's
    (`layers`, for one): this class has none beside those that PEFT asks for.
    """

    prefix = ""
    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _check_targets_exist(self.peft_config[adapter_name], model)
        with _others_set_aside(model, adapter_name):
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        # `self` is PEFT's MixedModel in mixed models, so nothing of this class may be used through it
        method = adapters.get(config.method)
        config = config.for_layer(current_key)
        rank, alpha = config.r, config.lora_alpha
        if isinstance(target, tuple(set(method.layers.values()))):
            target.update_layer(adapter_name, config, rank, alpha)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantization = get_quantization_kwargs(self)
        layer_cls = method.layer_for(base, current_key, **quantization)
        layer = layer_cls(target, **quantization)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, config, rank, alpha)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Carry `adapter_names` (one per row) from the model's call to every adapted layer."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        adapter_names = list(adapter_names)
        if self.training:
            raise ConfigError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self._adapter_layers() for name in layer.r}
        unknown = sorted({name for name in adapter_names if name != "__base__"} - known)
        if unknown:
            raise ConfigError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)} "
                f"(known: {', '.join(sorted(known))})"
            )
        num_beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None) or 1
        beams = partial(_inject_adapter_names, adapter_names=[n for n in adapter_names for _ in range(num_beams)])
        rows = partial(_inject_adapter_names, adapter_names=adapter_names)
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        in_encoder = set() if encoder in (None, self.model) else set(encoder.modules())  # it runs once for all beams
        handles = [
            module.register_forward_pre_hook(rows if module in in_encoder else beams, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (AdapterLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _adapter_layers(self) -> Iterator[AdapterLayer]:
        return (module for module in self.modules() if isinstance(module, AdapterLayer))


@contextmanager
def _others_set_aside(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """While one adapter is injected, the others' parameters are out of PEFT's sight: they must not change.

    PEFT walks all parameters half a dozen times for each adapter (to note and put back what is trainable), so that the
    sixtieth adapter takes several times as long as the first. What it does not see, it need not put back.
    """
    aside: list[tuple[AdapterLayer, str, nn.ParameterDict]] = []
    for layer in model.modules():
        if isinstance(layer, AdapterLayer):
            for name in layer.adapter_layer_names:
                whole = getattr(layer, name)
                aside.append((layer, name, whole))
                setattr(layer, name, nn.ParameterDict({k: whole[k] for k in (adapter_name,) if k in whole}))
    try:
        yield
    finally:
        for layer, name, whole in aside:
            seen = getattr(layer, name)
            if adapter_name in seen:
                whole[adapter_name] = seen[adapter_name]
            elif adapter_name in whole:
                del whole[adapter_name]
            setattr(layer, name, whole)


def _check_targets_exist(config: AdapterConfig, model: nn.Module) -> None:
    """Raise ConfigError if one of several target names matches no module (PEFT only sees when none does)."""
    targets = config.target_modules
    if not isinstance(targets, (set, list)) or len(targets) < 2:
        return
    names = [name.replace(".base_layer", "") for name, _ in model.named_modules()]
    suffixes = {name[i:] for name in names for i in [0, *(j + 1 for j, c in enumerate(name) if c == ".")]}
    missing = sorted(set(targets) - suffixes)
    if missing and len(missing) < len(targets):  # where all miss, PEFT's own error follows
        leaves = {name.rpartition(".")[2] for name in names if name}
        hints = [f"{name!r}" + (f" (nearest: {n!r})" if (n := nearest(name, leaves)) else "") for name in missing]
        raise ConfigError(f"target_modules that match no module of the model: {', '.join(hints)}")


@dataclass(frozen=True)
class AdapterMethod:
    """A registered method: its classes, the layers it can adapt, and the tags that choose its conformance tests."""

    name: str
    config: type[AdapterConfig]
    model: type[AdapterTuner]
    layers: Mapping[type[nn.Module], type[AdapterLayer]]
    tags: frozenset[str]

    def layer_for(self, base: nn.Module, key: str, **quantization: Any) -> type[AdapterLayer]:
        """The layer class for a base layer. Raises ConfigError for a kind that the method does not adapt."""
        for kind, layer in self.layers.items():
            if isinstance(base, kind):
                return layer
        backend = resolve_quantization_backend(base, **quantization)
        if backend is not None and backend.layer_type == "linear" and nn.Linear in self.layers:
            return self.layers[nn.Linear]
        kinds = ", ".join(kind.__name__ for kind in self.layers)
        raise ConfigError(
            f"Target module {key!r} of type {type(base).__name__} is not supported by method {self.name!r} "
            f"(supported: {kinds})"
        )


adapters: Registry[AdapterMethod] = Registry("adapter method")


def register_adapter(
    name: str,
    config: type[AdapterConfig],
    layers: Mapping[type[nn.Module], type[AdapterLayer]],
    tags: Collection[str] = (),
    model: type[AdapterTuner] | None = None,
) -> type[AdapterTuner]:
    """Make the tuner of a method and register the method with polyrank and with PEFT.

    Args:
        name: registry name, lower_snake_case; the type is "POLYRANK_" + upper case, parameters are prefixed with
            "polyrank_" + name + "_".
        config, layers: the method's classes. All layers share one `parameter_names`.
        tags: capabilities, from TAGS.
        model: a subclass of AdapterTuner where the method needs more than the layers.
    Returns: the tuner class (`LsrModel`); registering the same classes again returns the same one.
    Raises: ConfigError for an unknown tag or an unfit name, DuplicateNameError where another method has the name,
        VersionError on a PEFT that was not tested.
    """
    check_peft_version()
    unknown = set(tags) - TAGS
    if unknown:
        raise ConfigError(f"unknown tags {sorted(unknown)} (allowed: {', '.join(sorted(TAGS))})")
    if not name.isidentifier():
        raise ConfigError(f"adapter method {name!r} must be lower_snake_case: it becomes a prefix of parameter names")
    if name in adapters:
        known = adapters.get(name)
        if known.config is config and dict(known.layers) == dict(layers) and known.tags == frozenset(tags):
            return known.model
        raise DuplicateNameError(f"adapter method {name!r} is registered already, for {known.config.__name__}")
    prefix = parameter_prefix(name)
    config.method = name
    for layer in set(layers.values()):
        layer.method, layer.prefix = name, prefix
        layer.adapter_layer_names = tuple(prefix + parameter for parameter in layer.parameter_names)
    first = next(iter(layers.values()))
    base = model or AdapterTuner
    tuner = type(
        config.__name__.removesuffix("Config") + "Model",
        (base,),
        {
            "__module__": (model or config).__module__,  # where the returned class gets its name: it can be pickled
            "__doc__": f"PEFT tuner of the method {name!r}; see `{config.__name__}`.",
            "prefix": prefix,
            "tuner_layer_cls": _common_class(layers.values()),
        },
    )
    adapters.register(name, AdapterMethod(name, config, tuner, dict(layers), frozenset(tags)))
    register_method(name, config, tuner, first, mixed=True)
    return tuner


def _common_class(layers: Collection[type[AdapterLayer]]) -> type[AdapterLayer]:
    """The most specific class that all layer classes of a method share."""
    first, *others = layers
    return next(cls for cls in first.__mro__ if all(issubclass(other, cls) for other in others))

"""Gives PEFT a new method from outside: a member of its closed enum of types, then its own registration.

PEFT finds the classes of a method through `PeftType`, an enum that cannot be subclassed once it has members. A real
member is added here (so that `PeftType("POLYRANK_LSR")`, `PeftType.POLYRANK_LSR` and the JSON of a saved config all
work), and PEFT's `register_peft_method` does the rest. Type names carry the prefix POLYRANK_ so that a future PEFT with
a method of the same name does not collide; transformers derives the parameters' prefix as the type's name in lower
case plus "_", and so do we. This file and `_base.py` are the only ones that know PEFT's internals.
"""

from __future__ import annotations

from importlib.metadata import version

import peft
from packaging.version import Version
from peft.tuners import mixed as _mixed
from peft.tuners.mixed import model as _mixed_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.tuners.tuners_utils import _get_in_out_features as get_in_out_features
from peft.utils import PeftType, register_peft_method, resolve_quantization_backend
from peft.utils.other import get_pattern_key

from ..core.errors import VersionError
from ..core.registry import DuplicateNameError

PEFT_TESTED = (Version("0.21.0"), Version("0.22"))
"""Half-open range of PEFT versions whose internals this bridge was tested with."""

__all__ = [
    "BaseTunerLayer",
    "check_adapters_to_merge",
    "check_peft_version",
    "get_in_out_features",
    "get_pattern_key",
    "parameter_prefix",
    "peft_type",
    "register_method",
    "resolve_quantization_backend",
]

NAMESPACE = "polyrank_"


def check_peft_version(installed: str | None = None) -> None:
    """Raise VersionError where the installed PEFT lies outside the tested range."""
    installed = installed or version("peft")
    low, high = PEFT_TESTED
    if not low <= Version(installed) < high:
        raise VersionError(
            f"polyrank leans on PEFT's internals and was tested with peft >= {low}, < {high}; "
            f"peft {installed} is installed. Install a tested one: pip install 'peft>={low},<{high}'"
        )


def parameter_prefix(name: str) -> str:
    """Prefix of a method's parameters in the state dict: "lsr" -> "polyrank_lsr_"."""
    return f"{NAMESPACE}{name}_"


def peft_type(name: str) -> PeftType:
    """The member of PEFT's enum for a method, added on first use: "lsr" -> PeftType.POLYRANK_LSR."""
    value = f"{NAMESPACE}{name}".upper()
    if value in PeftType.__members__:
        return PeftType[value]
    member = str.__new__(PeftType, value)
    member._name_ = value
    member._value_ = value
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, value, member)  # EnumType.__setattr__ would refuse once it is in the member map
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    return member


def register_method(name: str, config_cls: type, model_cls: type[BaseTuner], layer_cls: type, mixed: bool) -> None:
    """Register a method with PEFT; a second call with the same classes does nothing.

    Raises: DuplicateNameError where another class holds the name, VersionError on an untested PEFT.
    """
    check_peft_version()
    member = peft_type(name)
    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is config_cls:
        return
    if known is not None:
        raise DuplicateNameError(f"PEFT method {member.value!r} is registered already, for {known.__name__}")
    register_peft_method(
        name=f"{NAMESPACE}{name}", config_cls=config_cls, model_cls=model_cls, is_mixed_compatible=mixed
    )
    if mixed:
        _open_mixed_model(member, config_cls, model_cls, layer_cls)


def _open_mixed_model(member: PeftType, config_cls: type, model_cls: type[BaseTuner], layer_cls: type) -> None:
    """Let `get_peft_model(..., mixed=True)` take the method: PEFT keeps these lists as module constants."""
    types = (*_mixed_model.COMPATIBLE_TUNER_TYPES, member)
    _mixed_model.COMPATIBLE_TUNER_TYPES = _mixed.COMPATIBLE_TUNER_TYPES = types
    _mixed_model.PREFIXES = [*_mixed_model.PREFIXES, model_cls.prefix]
    _mixed_model.Layers = (*_mixed_model.Layers, layer_cls)
    _mixed_model.Configs = _mixed_model.Configs | config_cls

    original = _mixed_model.MixedModel._create_and_replace

    def create_and_replace(self, config, *args, **kwargs):
        if isinstance(config, config_cls):
            return model_cls._create_and_replace(self, config, *args, **kwargs)
        return original(self, config, *args, **kwargs)

    _mixed_model.MixedModel._create_and_replace = create_and_replace

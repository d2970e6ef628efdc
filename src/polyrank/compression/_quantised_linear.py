"""Linear layers whose weight is held as packed integer codes and decoded where it is used, and their files.

All buffers are integers (floats are held by their bits), so that moving a model to another dtype changes none of them.
A layer's weight cannot be written to: PEFT's adapters train on top of it, and merge after `make_dense`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from ..core.errors import CheckpointError, ConfigError
from ..core.files import atomic_path, parse_json

FILE = "quantised.safetensors"
_RAW = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
_KINDS: dict[str, type[QuantisedLinear]] = {}


# -- codes in bytes -------------------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) below 2^bits as bytes (ceil(n bits / 8),): code i has bits [i b, (i + 1) b) of a little-endian row."""
    row = ((codes.to(torch.uint8)[:, None] >> torch.arange(bits, device=codes.device)) & 1).flatten()
    row = nn.functional.pad(row, (0, -len(row) % 8)).view(-1, 8)
    return (row << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes, uint8; the reverse of `pack`."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    if 8 % bits == 0:
        return ((packed[:, None] >> shifts[::bits]) & (2**bits - 1)).flatten()[:count]
    row = ((packed[:, None] >> shifts) & 1).flatten()[: count * bits].view(-1, bits)
    return (row << shifts[:bits]).sum(1).to(torch.uint8)


def packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def as_raw(values: Tensor) -> Tensor:
    """Floats by their bits."""
    return values.contiguous().view(_RAW[values.dtype])


# -- layers ---------------------------------------------------------------------------------------------------------


class FrozenWeight(Tensor):
    """A decoded weight: what is written to it would be lost, so that writing raises."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        return self.as_subclass(Tensor).detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ConfigError("a quantised weight cannot be written to: call make_dense(model) before merging into it")


class DecodedLinear(torch.autograd.Function):
    """x W^T + bias with W decoded in the forward and again in the backward, so that it is never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.decode().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        g_x = g @ ctx.layer.decode().to(g.dtype) if ctx.needs_input_grad[0] else None
        g_bias = g.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return g_x, g_bias, None


class QuantisedLinear(nn.Linear):
    """Base of the layers below: y = x W^T + bias. `transposed`: it stands for a Conv1D, and `weight` is (in, out)."""

    kind: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        _KINDS[cls.kind] = cls

    def __init__(self, in_features: int, out_features: int, transposed: bool = False) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.register_parameter("bias", None)
        self.register_buffer("like", torch.empty(0), persistent=False)  # follows the model's dtype and device

    def decode(self) -> Tensor:
        """The weight (out, in), fp32."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Arguments, beside the sizes, that make an empty layer of this form."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        weight = self.decode().to(self.like.dtype)
        return (weight.T if self.transposed else weight).as_subclass(FrozenWeight)

    @property
    def storage_bytes(self) -> int:
        """Of the codes and their scales."""
        return sum(b.numel() * b.element_size() for name, b in self.named_buffers() if name != "like")

    def take_place_of(self, layer: nn.Module) -> QuantisedLinear:
        """Bias, dtype and device of the layer whose place this one takes."""
        self.bias = layer.bias
        self.like = torch.empty(0, dtype=layer.weight.dtype)
        return self.to(layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        with torch.autocast(device, enabled=False):
            return DecodedLinear.apply(x, bias, self)

    def dense(self) -> nn.Module:
        """An ordinary Linear or Conv1D with the decoded weight."""
        with torch.device("meta"):
            sizes = self.in_features, self.out_features
            layer = Conv1D(*sizes[::-1]) if self.transposed else nn.Linear(*sizes, bias=False)
        layer.weight = nn.Parameter(self.weight.data.contiguous(), requires_grad=False)
        layer.bias = self.bias
        return layer


class IntegerLinear(QuantisedLinear):
    """W = codes * step + offset, codes in [-2^(bits-1), 2^(bits-1) - 1], (out, in); step, offset (out, groups) fp32."""

    kind = "integer"

    def __init__(self, in_features: int, out_features: int, bits: int, groups: int, transposed: bool = False) -> None:
        super().__init__(in_features, out_features, transposed)
        self.bits, self.groups = bits, groups
        size = packed_bytes(in_features * out_features, bits)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("step", torch.zeros(out_features, groups, dtype=torch.int32))
        self.register_buffer("offset", torch.zeros(out_features, groups, dtype=torch.int32))

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "groups": self.groups, "transposed": self.transposed}

    def fill(self, integers: Tensor, step: Tensor, offset: Tensor) -> IntegerLinear:
        """Take integers (out, in), step and offset (out, groups)."""
        self.codes = pack((integers + 2 ** (self.bits - 1)).flatten(), self.bits)
        self.step, self.offset = as_raw(step.float()), as_raw(offset.float())
        return self

    def integers(self) -> Tensor:
        """(out, in), int16."""
        codes = unpack(self.codes, self.bits, self.in_features * self.out_features)
        return codes.view(self.out_features, -1).to(torch.int16) - 2 ** (self.bits - 1)

    def decode(self) -> Tensor:
        integers = self.integers().view(self.out_features, self.groups, -1).float()
        step, offset = (raw.view(torch.float32)[..., None] for raw in (self.step, self.offset))
        return (integers * step + offset).flatten(1)


# -- in models and files --------------------------------------------------------------------------------------------


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantisedLinear)}


def put_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def make_dense(model: nn.Module) -> nn.Module:
    """Put an ordinary layer with the same (quantised) values in the place of every quantised one, to merge into."""
    for name, layer in quantised_layers(model).items():
        put_layer(model, name, layer.dense())
    return model


def save_quantised(model: nn.Module, folder: str | Path, modules: Sequence[str] = ()) -> Path:
    """Write the codes and scales of all quantised layers, and the whole of `modules` (a trained head), to one file.

    Returns: the file's path. Raises: ConfigError without such a layer; RunError where it cannot be written.
    """
    from safetensors.torch import save_file

    layers = quantised_layers(model)
    if not layers:
        raise ConfigError("the model has no quantised layer to save")
    names = {_plain(name): layer for name, layer in layers.items()}
    tensors = {f"{name}.{key}": b for name, layer in names.items() for key, b in layer.state_dict().items()}
    for name in modules:
        tensors |= {f"{name}.{key}": value for key, value in model.get_submodule(name).state_dict().items()}
    about = {n: {"kind": l.kind, "in": l.in_features, "out": l.out_features, **l.settings()} for n, l in names.items()}  # noqa: E741
    text = json.dumps({"layers": about, "modules": list(modules)})
    path = Path(folder) / FILE
    with atomic_path(path) as temporary:
        content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(content, temporary, metadata={"polyrank": text})
    return path


def load_quantised(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the quantised layers of a folder in the place of the model's own, and its modules' values in theirs.

    Raises: CheckpointError where the file is missing, torn, or does not fit the model.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            about = parse_json((file.metadata() or {}).get("polyrank", ""))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = {_plain(name): name for name, _ in model.named_modules()}
        for name, entry in about["layers"].items():
            place = _innermost(model, names.get(name))
            put_layer(model, place, _rebuilt(model.get_submodule(place), name, dict(entry), state))
        for name in about["modules"]:
            _load_module(model.get_submodule(names[name]), name, state)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not fit this model: {str(error).splitlines()[0]}") from error
    return model


def _plain(name: str) -> str:
    """A module's name without what PEFT puts before and into it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _innermost(model: nn.Module, place: str | None) -> str:
    """The layer itself, below what PEFT has wrapped around it."""
    if place is None:
        raise ValueError("it names a layer that the model lacks")
    while hasattr(model.get_submodule(place), "base_layer"):
        place += ".base_layer"
    return place


def _rebuilt(base: nn.Module, name: str, entry: dict[str, Any], state: Mapping[str, Tensor]) -> QuantisedLinear:
    kind, sizes = entry.pop("kind"), (entry.pop("in"), entry.pop("out"))
    transposed = isinstance(base, Conv1D)
    found = tuple(base.weight.shape) if transposed else tuple(base.weight.shape)[::-1]
    if sizes != found or transposed != entry["transposed"]:
        raise ValueError(f"layer {name!r} has {sizes} inputs and outputs in the file, {found} in the model")
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of layer {kind!r}")
    with torch.device("meta"):  # what the entry claims, before anything of that size is made
        claimed = _KINDS[kind](*sizes, **entry).state_dict()
    for key, value in claimed.items():
        if (held := state.get(f"{name}.{key}")) is None or held.shape != value.shape:
            raise ValueError(f"layer {name!r} has no {key} of {tuple(value.shape)}")
    layer = _KINDS[kind](*sizes, **entry)
    layer.take_place_of(base)
    _load_module(layer, name, state)
    return layer


def _load_module(module: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    for key, value in module.state_dict().items():
        if key in own and own[key].dtype != value.dtype and not value.is_floating_point():
            raise ValueError(f"{name}.{key} is {own[key].dtype}, not {value.dtype}")
    module.load_state_dict(own)

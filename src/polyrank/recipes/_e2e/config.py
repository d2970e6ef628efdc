"""What the YAML of recipe `e2e` may say, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, check_choice
from ...data.e2e import PROMPT, SPLITS, check_template
from ...evaluation.decoding import DECODERS

METHODS = ("mle", "mcl", "moe")


@dataclass(frozen=True)
class ModelChoice:
    """The base model: a hub id or folder, or a llama2.c checkpoint with its tokenizer file.

    Attributes: end_token: text of the token that ends a target; None: the tokenizer's own. Models of llama2.c's
    TinyStories
        were trained on stories that begin with <s> and end with nothing: <s> is what they know as an end, </s> they
        have never seen, and a frozen head cannot learn to say it.
    """

    name_or_path: str | None = None
    checkpoint: Path | None = None
    tokenizer: Path | None = None
    target_modules: str | list[str] = "all-linear"
    end_token: str | None = None

    def __post_init__(self) -> None:
        if (self.name_or_path is None) == (self.checkpoint is None):
            raise ConfigError(
                "model needs name_or_path (hub id or folder), or checkpoint and tokenizer (llama2.c files)"
            )
        if self.checkpoint is not None and self.tokenizer is None:
            raise ConfigError("model.checkpoint is a llama2.c file: give model.tokenizer, its tok*.bin, too")


@dataclass(frozen=True)
class DataChoice:
    """The data set: a folder in E2E's format, or one file for each split."""

    path: Path = Path("e2e_nlg")
    train: str = "train"
    test: str = "test"
    template: str = PROMPT
    train_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        check_choice("data.train", self.train, SPLITS)
        check_choice("data.test", self.test, SPLITS)
        check_template(self.template)
        for name in ("train_limit", "test_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Decoding:
    """One way to write K candidates. `beams` is beams for each candidate: the budget is K * beams for every method."""

    name: str
    method: str
    beams: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice(f"method of decoding {self.name!r}", self.method, DECODERS.names())
        if not self.name or not all(c.isalnum() or c in "._-" for c in self.name):
            raise ConfigError(f"name of a decoding must be letters, digits and ._-, got {self.name!r}")
        if self.beams < 1:
            raise ConfigError(f"beams of decoding {self.name!r} must be at least 1, got {self.beams}")


@dataclass(frozen=True)
class Method:
    """How the adapter is trained and how it writes.

    Attributes:
        name: "mle" (one LoRA, PEFT's own), "mcl" (K hypotheses, winner takes all) or "moe" (one LoRA-MoE of K experts).
        label: as it stands in tables.
        wide: rank K * r instead of r: as many trainable parameters as K hypotheses of rank r.
        mode, epsilon: of MclConfig.
        annealed_to: temperature (nats per token) that annealed-wta, starting at 1, has come down to at the last step.
        options: further fields of LoraConfig, MclConfig or MoeConfig.
        decodings: the first writes the run's predictions.jsonl, each of the others a folder under decodings/.
    """

    name: str
    label: str
    decodings: list[Decoding]
    wide: bool = False
    mode: str = "annealed-wta"
    epsilon: float = 0.05
    annealed_to: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("method.name", self.name, METHODS)
        if not 0 < self.annealed_to <= 1:
            raise ConfigError(f"method.annealed_to must be in (0, 1], got {self.annealed_to}")
        names = [decoding.name for decoding in self.decodings]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"method.decodings must name at least one decoding, each once, got {names}")
        for decoding in self.decodings:
            if not self.takes(decoding):
                raise ConfigError(
                    f"decoding {decoding.name!r} ({decoding.method}) does not go with method {self.name!r}"
                )

    def takes(self, decoding: Decoding) -> bool:
        """Whether a model of this method can be decoded so: hypotheses by "mcl" alone, experts by "moe...", one model
        by all others."""
        if decoding.method == "mcl":
            return self.name == "mcl"
        return self.name == "moe" if decoding.method.startswith("moe") else self.name != "mcl"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every run of a table shares.

    Attributes: rank is r of one hypothesis; lora_alpha is for rank r (a wide adapter keeps alpha / rank). cache_dir:
    where
        converted llama2.c models lie (default: base_model/ in the run's folder). warmup: share of the steps in which
        the learning rate rises. num_decodings: only the first so many of the method's decodings; None: all.
    """

    model: ModelChoice
    data: DataChoice
    rank: int = 16
    lora_alpha: float = 32.0
    num_steps: int = 120
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup: float = 0.05
    max_length: int = 512
    save_every: int = 50
    decode_batch_size: int = 128
    max_new_tokens: int = 160
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    num_decodings: int | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in (
            "rank",
            "num_steps",
            "batch_size",
            "save_every",
            "decode_batch_size",
            "max_length",
            "max_new_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lora_alpha", "learning_rate", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup must be in 0..1, got {self.warmup}")
        if self.num_decodings is not None and self.num_decodings < 1:
            raise ConfigError(f"num_decodings must be at least 1, got {self.num_decodings}")


@dataclass(frozen=True, kw_only=True)
class E2eConfig(Settings):
    """One run: train one adapter, decode the test inputs, score. num_hypotheses is K, candidates of every method."""

    method: Method
    num_hypotheses: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_hypotheses < 1:
            raise ConfigError(f"num_hypotheses must be at least 1, got {self.num_hypotheses}")

    @property
    def decodings(self) -> list[Decoding]:
        return self.method.decodings[: self.num_decodings]

    @property
    def adapter_rank(self) -> int:
        return self.rank * self.num_hypotheses if self.method.wide else self.rank

    @property
    def adapter_alpha(self) -> float:
        return self.lora_alpha * self.adapter_rank / self.rank


@dataclass(frozen=True, kw_only=True)
class E2eTableConfig(Settings):
    """Methods x K x seeds, one run after the other."""

    methods: dict[str, Method]
    num_hypotheses: list[int] = field(default_factory=lambda: [3, 5])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods:
            raise ConfigError("methods must hold at least one method")
        for name in ("num_hypotheses", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name} must hold at least one value, each once, got {values}")
        self.runs()

    def runs(self) -> list[tuple[str, E2eConfig]]:
        """Folder name and configuration of every run, seed by seed: a table cut short still compares the methods."""
        shared = {item.name: getattr(self, item.name) for item in fields(Settings)}
        return [
            (f"{name}-k{k}-seed{seed}", E2eConfig(**shared, method=method, num_hypotheses=k, seed=seed))
            for seed in self.seeds
            for k in self.num_hypotheses
            for name, method in self.methods.items()
        ]

"""polyrank: low-rank adaptation of pretrained models, past plain LoRA.

Importing this package registers every adapter method with PEFT.
"""

from importlib.metadata import version as _version

from . import _requirements as _requirements  # first: it raises where the packages below would fail in other words
from .adapters import adapters
from .adapters.allora import AlloraConfig
from .adapters.codyra import CodyraConfig
from .adapters.dylora import DyloraConfig
from .adapters.lorma import LormaConfig
from .adapters.lsr import LsrConfig
from .adapters.sara import SaraConfig
from .compression.l4q import L4qConfig
from .hypotheses import (
    MclConfig,
    MclModel,
    MCLTrainer,
    MclTrainer,
    export_hypotheses,
    generate_hypotheses,
    get_peft_mcl,
    import_hypotheses,
    patch_peft_for_mcl,
)
from .routing import MoeConfig, MoeModel, MoeTrainer, record_routing, route_experts

__version__ = _version("polyrank")

__all__ = [
    "AlloraConfig",
    "CodyraConfig",
    "DyloraConfig",
    "L4qConfig",
    "LormaConfig",
    "LsrConfig",
    "MCLTrainer",
    "MclConfig",
    "MclModel",
    "MclTrainer",
    "MoeConfig",
    "MoeModel",
    "MoeTrainer",
    "SaraConfig",
    "adapters",
    "export_hypotheses",
    "generate_hypotheses",
    "get_peft_mcl",
    "import_hypotheses",
    "patch_peft_for_mcl",
    "record_routing",
    "route_experts",
]

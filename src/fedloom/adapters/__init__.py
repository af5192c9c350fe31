"""One file per PEFT kind, each with the cohort axis."""

from fedloom.adapters.bottleneck import Bottleneck, bottleneck
from fedloom.adapters.dora import dora
from fedloom.adapters.dpo import Dpo, Rewards, dpo
from fedloom.adapters.full import full
from fedloom.adapters.ia3 import Ia3, ia3
from fedloom.adapters.kept_below import with_activation_cache
from fedloom.adapters.last_layers import last_layers
from fedloom.adapters.lora import Lora, lora, with_triton
from fedloom.adapters.offload import offloading, with_activation_offload
from fedloom.adapters.p_tuning import PTuning, p_tuning
from fedloom.adapters.prefix_tuning import PrefixTuning, prefix_tuning
from fedloom.adapters.prompt_tuning import PromptTuning, prompt_tuning
from fedloom.adapters.recompute import recomputing, with_recompute
from fedloom.adapters.seed_space import SeedSpace, seed_space

__all__ = [
    "Bottleneck",
    "Dpo",
    "Ia3",
    "Lora",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "Rewards",
    "SeedSpace",
    "bottleneck",
    "dora",
    "dpo",
    "full",
    "ia3",
    "last_layers",
    "lora",
    "offloading",
    "p_tuning",
    "prefix_tuning",
    "prompt_tuning",
    "recomputing",
    "seed_space",
    "with_activation_cache",
    "with_activation_offload",
    "with_recompute",
    "with_triton",
]

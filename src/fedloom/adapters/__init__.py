"""One file per PEFT kind, each with the cohort axis."""

from fedloom.adapters.dora import dora
from fedloom.adapters.dpo import Dpo, Rewards, dpo
from fedloom.adapters.full import Full, full
from fedloom.adapters.ia3 import Ia3, ia3
from fedloom.adapters.lora import Lora, lora
from fedloom.adapters.p_tuning import PTuning, p_tuning
from fedloom.adapters.prefix_tuning import PrefixTuning, prefix_tuning
from fedloom.adapters.prompt_tuning import PromptTuning, prompt_tuning

__all__ = [
    "Dpo",
    "Full",
    "Ia3",
    "Lora",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "Rewards",
    "dora",
    "dpo",
    "full",
    "ia3",
    "lora",
    "p_tuning",
    "prefix_tuning",
    "prompt_tuning",
]

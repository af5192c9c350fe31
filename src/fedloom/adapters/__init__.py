"""One file per PEFT kind; each works with the cohort axis."""

from fedloom.adapters.lora import Lora, lora

__all__ = ["Lora", "lora"]

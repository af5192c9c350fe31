"""One file per rule for what the sum of uploads means."""

from fedloom.aggregates.fedex_lora import fedex_lora
from fedloom.aggregates.flex_lora import flex_lora
from fedloom.aggregates.flora import flora
from fedloom.aggregates.het_lora import het_lora
from fedloom.aggregates.mean import add_uploads, mean

__all__ = ["add_uploads", "fedex_lora", "flex_lora", "flora", "het_lora", "mean"]

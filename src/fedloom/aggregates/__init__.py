"""One file per rule for what the sum of uploads means."""

from fedloom.aggregates.fed_exp import fed_exp
from fedloom.aggregates.fedex_lora import fedex_lora
from fedloom.aggregates.fednova import fednova
from fedloom.aggregates.flex_lora import flex_lora
from fedloom.aggregates.flora import flora
from fedloom.aggregates.het_lora import het_lora
from fedloom.aggregates.mean import add_uploads, mean
from fedloom.aggregates.q_fedavg import q_fedavg
from fedloom.aggregates.scaffold import scaffold

__all__ = [
    "add_uploads",
    "fed_exp",
    "fedex_lora",
    "fednova",
    "flex_lora",
    "flora",
    "het_lora",
    "mean",
    "q_fedavg",
    "scaffold",
]

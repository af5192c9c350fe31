"""Full fine-tuning: every weight of the model is trained, and each client of a cohort has its own.

FedAvg as McMahan et al. 2017 have it: the whole model travels both ways, in float32 (`compress: {up: [bfloat16]}`
halves it). A tied embedding is one leaf and travels once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from fedloom.adapters.weights import OwnWeights


def full(model: nn.Module, *, save_tokenizer: Callable[[Path], None] | None = None) -> OwnWeights:
    """Every weight of the model, under its own name.

    Args:
        model: any Hugging Face causal LM. Its own parameters stay as they are; a tree stands in for them while it is
            on. Several clients at once need a model whose layers do products, lookups and scalings with their weights
            (see `ops.per_client`); one at a time, any.
        save_tokenizer: writes the tokenizer into an exported folder.
    """
    return OwnWeights(model, "full", lambda name: True, save_tokenizer)

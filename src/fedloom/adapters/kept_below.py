"""Keep what the frozen blocks below the lowest adapter make of each row, so that every row runs through them once.

In a plain pass over a model of L blocks of which the upper k are trained, L - k forward passes through a block are the
same in every epoch. They are most of the work where k is small: a step needs about L + 2k block passes without what is
kept, and 3k with it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fedloom.adapters.frame import Frame
from fedloom.adapters.targets import decoder_blocks, final_norms
from fedloom.errors import UserError
from fedloom.models.causal import body_of
from fedloom.models.frozen import FrozenBlocks
from fedloom.types import Adapter

__all__ = ["frozen_below", "with_activation_cache"]


def with_activation_cache(adapter: Adapter, budget_bytes: int) -> Adapter:
    """The same adapter, whose model keeps up to so many bytes of hidden states from below what is trained.

    Raises:
        UserError: the adapter reaches down to the first block, or the model goes other ways than through its blocks.
    """
    if not isinstance(adapter, Frame):
        raise UserError(
            f"{getattr(adapter, 'kind', 'this adapter')} has nothing frozen below it",
            "runtime.activation_cache_gb: null",
            "adapter.activation_cache",
        )
    blocks = decoder_blocks(adapter.model)
    number = frozen_below(adapter, blocks)
    if number == 0 or adapter.causal.head is None:
        reason = "reaches down to the first block" if number == 0 else "works on a model that is used whole"
        raise UserError(
            f"runtime.activation_cache_gb: this {adapter.kind} adapter {reason}, so no activation stays the same "
            "between steps",
            "adapter.kind: last_layers, lora_target_modules that name upper layers only, or activation_cache_gb: null",
            "adapter.activation_cache",
        )
    adapter.causal.rows.keep_below(FrozenBlocks(body_of(adapter.model), list(blocks.values()), number, budget_bytes))
    return adapter


def frozen_below(adapter: Any, blocks: dict[str, nn.Module]) -> int:
    """How many of the lowest blocks have no leaf of the adapter in or before them, told from the leaves' names."""
    model: Any = adapter.model
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    above = [*final_norms(model, blocks)]
    if head is not None and getattr(head, "weight", None) is not table.weight:
        above += [name for name, module in model.named_modules() if module is head]
    lowest = len(blocks)
    for leaf in adapter.init(0):
        place = next((i for i, name in enumerate(blocks) if leaf.startswith(f"{name}.")), None)
        if place is None:
            place = len(blocks) if any(leaf.startswith(f"{name}.") for name in above) else 0
        lowest = min(lowest, place)
    return min(lowest, len(blocks) - 1)  # the last block is where the states are put in

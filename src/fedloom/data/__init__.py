"""Sources, prompt templates, splits, and token batches with loss masks.

Names are looked up when they are used: reading rows (`fedloom init`) must not wait for torch to be imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.data.batches import Batches, eval_batches, round_batches, steps_per_epoch
    from fedloom.data.clients import Clients, population
    from fedloom.data.federation import ClientData, DataReport, Federation, prepare
    from fedloom.data.rows import Row, Source, read
    from fedloom.data.templates import alpaca_prompt, answer_of, prompt_of
    from fedloom.data.tokens import Example, Examples, pad_id_of, prompt_ids, render_tokens

_HOMES = {
    "batches": ("Batches", "eval_batches", "round_batches", "steps_per_epoch"),
    "federation": ("ClientData", "DataReport", "Federation", "prepare"),
    "clients": ("Clients", "population"),
    "rows": ("Row", "Source", "read"),
    "templates": ("alpaca_prompt", "answer_of", "prompt_of"),
    "tokens": ("Example", "Examples", "pad_id_of", "prompt_ids", "render_tokens"),
}

__all__ = [
    "Batches",
    "ClientData",
    "Clients",
    "DataReport",
    "Example",
    "Examples",
    "Federation",
    "Row",
    "Source",
    "alpaca_prompt",
    "answer_of",
    "eval_batches",
    "pad_id_of",
    "population",
    "prepare",
    "prompt_ids",
    "prompt_of",
    "read",
    "render_tokens",
    "round_batches",
    "steps_per_epoch",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"fedloom.data.{module}"), name)
    raise AttributeError(f"module 'fedloom.data' has no attribute {name!r}")

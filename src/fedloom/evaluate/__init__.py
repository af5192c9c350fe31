"""Measurements of a tuned model: loss on held-out examples, written answers, and how those are judged.

Names are looked up when they are used: a list of tasks must not wait for torch to be imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.evaluate.generate import generate, generate_one
    from fedloom.evaluate.loss import loss_evaluation, mean_loss, require_finite
    from fedloom.evaluate.sampling import Sampling
    from fedloom.evaluate.scores import SCORES, auto_score, final_number, mean_score, score_evaluation

_HOMES = {
    "generate": ("generate", "generate_one"),
    "loss": ("loss_evaluation", "mean_loss", "require_finite"),
    "sampling": ("Sampling",),
    "scores": ("SCORES", "auto_score", "final_number", "mean_score", "score_evaluation"),
}

__all__ = [
    "SCORES",
    "Sampling",
    "auto_score",
    "final_number",
    "generate",
    "generate_one",
    "loss_evaluation",
    "mean_loss",
    "mean_score",
    "require_finite",
    "score_evaluation",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"fedloom.evaluate.{module}"), name)
    raise AttributeError(f"module 'fedloom.evaluate' has no attribute {name!r}")

"""Measurements of a tuned model: loss on held-out examples, written answers, and how those are judged."""

from __future__ import annotations

from fedloom.evaluate.generate import Sampling, generate, generate_one
from fedloom.evaluate.loss import loss_evaluation, mean_loss, require_finite
from fedloom.evaluate.scores import SCORES, auto_score, final_number, mean_score, score_evaluation

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

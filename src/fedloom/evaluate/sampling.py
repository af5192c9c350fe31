"""How tokens are drawn. Imports no torch, since tasks are listed without it."""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.errors import UserError

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; without one of these the most likely token is taken."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if not self.temperature > 0:
            wrong.append(f"temperature is {self.temperature}, must be above 0 (leave it out for the most likely token)")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p is {self.top_p}, must be above 0 and at most 1")
        if self.top_k < 0:
            wrong.append(f"top_k is {self.top_k}, must be 0 or more")
        if wrong:
            raise UserError("; ".join(wrong), code="generate.sampling")

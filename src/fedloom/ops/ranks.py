"""Rank and scale of each layer: one for all, or by PEFT's patterns, for everyone and for a client of its own rank."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fedloom.errors import UserError, suggest
from fedloom.types import NOTHING


class Ranks(NamedTuple):
    """PEFT's r, lora_alpha, use_rslora, rank_pattern and alpha_pattern."""

    rank: int
    alpha: float
    use_rslora: bool = False  # alpha / sqrt(r) in place of alpha / r (Kalajdzievski 2023, Theorem 3.2)
    rank_pattern: Mapping[str, int] = NOTHING  # end of a layer's name, a regular expression -> its own rank
    alpha_pattern: Mapping[str, float] = NOTHING

    def at(self, layer: str, client_rank: int | None = None) -> int:
        """The layer's rank; a client of half the adapter's rank has half of each layer's, and at least 1."""
        whole = int(matched(self.rank_pattern, layer, self.rank))
        return whole if client_rank is None else max(1, whole * client_rank // self.rank)

    def scale(self, layer: str, client_rank: int | None = None) -> float:
        """What the layer's B A is multiplied by."""
        rank = self.at(layer, client_rank)
        return matched(self.alpha_pattern, layer, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def check(self, layers: Iterable[str]) -> None:
        """Raise UserError when a number is out of range or a pattern matches none of these layers."""
        problems = [] if self.rank >= 1 else [f"lora_r is {self.rank}, must be at least 1"]
        problems += [] if self.alpha > 0 else [f"lora_alpha is {self.alpha}, must be above 0"]
        names = list(layers)
        ends = sorted({name.rsplit(".", 1)[-1] for name in names})
        for what, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key, value in pattern.items():
                if value <= 0:
                    problems.append(f"{what}: {key!r} is {value}, must be above 0")
                try:
                    if not any(_matches(key, name) for name in names):
                        problems.append(f"{what}: {key!r} matches no adapted layer{suggest(key, ends)}")
                except re.error as error:
                    problems.append(f"{what}: {key!r} is no regular expression: {error}")
        if problems:
            raise UserError(
                "; ".join(problems), f"the adapted layers end in: {', '.join(ends)}" if names else "", "adapter.lora"
            )


def matched(pattern: Mapping[str, float], layer: str, otherwise: float) -> float:
    """The value of the first key that is the layer's name or its end after a dot, as PEFT looks it up."""
    return next((value for key, value in pattern.items() if _matches(key, layer)), otherwise)


def _matches(key: str, layer: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", layer) is not None

"""How many clients are named one by one in a file or on a page. Imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

__all__ = ["MOST_LISTED", "listed", "spread"]

MOST_LISTED = 1000

Value = TypeVar("Value")


def spread(number: int, most: int = MOST_LISTED) -> range | list[int]:
    """At most so many places of `number`, evenly from the first to the last."""
    if number <= most:
        return range(number)
    return [place * (number - 1) // (most - 1) for place in range(most)]


def listed(per_client: Mapping[str, Value], most: int = MOST_LISTED) -> dict[str, Value]:
    """All of a table of clients, or of a very long one as many lines, evenly spread."""
    if len(per_client) <= most:
        return dict(per_client)
    names = list(per_client)
    return {names[place]: per_client[names[place]] for place in spread(len(names), most)}

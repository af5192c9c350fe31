"""Simulated time: how long clients take, so that what waits for the slowest can be compared with what does not."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from fedloom.seeds import seed_of

Speeds = Callable[[str], float]  # client id -> simulated seconds per local step

DISTRIBUTIONS: Mapping[str, Callable[[random.Random], float]] = {
    "steps": lambda draw: 1.0,
    "uniform": lambda draw: draw.uniform(0.5, 1.5),
    "lognormal": lambda draw: draw.lognormvariate(0.0, 1.0),
}


def speeds(kind: str, seed: int) -> Speeds:
    """Each client's seconds per local step: fixed for the whole run, drawn from the seed and its id.

    `steps`: 1 for all, so that a client takes as long as it has steps. `uniform`: 0.5 to 1.5. `lognormal`: exp of a
    standard normal, with the median 1; one client in twenty takes more than five times as long, one less than a fifth.
    Messages take no time.
    """
    draw_of = DISTRIBUTIONS[kind]
    return lambda client: draw_of(random.Random(seed_of(seed, 0, client, "speed")))

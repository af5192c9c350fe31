"""How far long work has come: said after some seconds, then ever more seldom. Imports nothing heavy."""

from __future__ import annotations

import logging
import time

__all__ = ["LOGGER", "Telling"]

LOGGER = "fedloom.data.progress"  # at level INFO
FIRST_SECONDS = 5.0
MOST_SECONDS = 60.0


class Telling:
    """Tell it what is done; it decides whether that is worth saying.

    Args:
        what: what is done to the rows ("tokenised").
        total: rows in all, if that is known.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what = what
        self._total = total
        self._began = time.monotonic()
        self._next = self._began + FIRST_SECONDS

    def tell(self, done: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        seconds = now - self._began
        self._next = now + min(MOST_SECONDS, seconds)
        rate = done / seconds
        text = f"{self._what} {done:,}"
        if self._total is not None:
            left = (self._total - done) / max(rate, 1e-9)
            text += f" of {self._total:,} rows ({rate:,.0f} rows/s, about {_short(left)} left)"
        else:
            text += f" rows ({rate:,.0f} rows/s)"
        logging.getLogger(LOGGER).info("%s", text)


def _short(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

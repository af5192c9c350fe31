"""What a run says while it goes on: the protocol that a display fills, and the one line that a round is worth.

Nothing here draws: a terminal's display is in `fedloom.cli.display`, and a run in a program of its own takes `Silent`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Display", "Silent", "amount", "byte_text", "duration", "round_text"]


class Display(Protocol):
    """Where a run reports to. All calls come from the one process and thread that drives the run."""

    def plan(self, lines: Sequence[str]) -> None:
        """What will be done, before it is done."""

    def arm(self, arm: str, rounds: int) -> None:
        """An arm starts and will have this many rounds (0 for one that does not train)."""

    def advance(self, done: int, total: int, what: str) -> None:
        """Progress inside a round or an evaluation: `done` of `total`, and what is being counted."""

    def round(self, line: Mapping[str, Any]) -> None:
        """A round is over; `line` is its line of rounds.jsonl."""

    def message(self, text: str) -> None:
        """Something a person should read: a warning, a step of the preparation."""

    def end(self, result: Mapping[str, Any]) -> None:
        """The run is over; `result` is its result.json."""


class Silent:
    """A display that shows nothing."""

    def plan(self, lines: Sequence[str]) -> None:
        pass

    def arm(self, arm: str, rounds: int) -> None:
        pass

    def advance(self, done: int, total: int, what: str) -> None:
        pass

    def round(self, line: Mapping[str, Any]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def end(self, result: Mapping[str, Any]) -> None:
        pass


def amount(value: float) -> str:
    """A count, short: 41k, 1.2M.

    >>> [amount(x) for x in (7, 999, 41_234, 999_600, 1_234_567)]
    ['7', '999', '41k', '1.0M', '1.2M']
    """
    if value < 999.5:
        return f"{value:.0f}"
    for factor, unit in ((1e3, "k"), (1e6, "M"), (1e9, "G")):
        scaled = value / factor
        if scaled < 9.95:
            return f"{scaled:.1f}{unit}"
        if scaled < 999.5:
            return f"{scaled:.0f}{unit}"
    return f"{value / 1e12:.1f}T"


def byte_text(value: float) -> str:
    """A number of bytes in decimal units: 512 B, 38 kB, 8.0 MB."""
    if value < 999.5:
        return f"{value:.0f} B"
    for factor, unit in ((1e3, "kB"), (1e6, "MB"), (1e9, "GB")):
        scaled = value / factor
        if scaled < 99.95:
            return f"{scaled:.1f} {unit}"
        if scaled < 999.5:
            return f"{scaled:.0f} {unit}"
    return f"{value / 1e12:.1f} TB"


def duration(seconds: float) -> str:
    """A time for people: 0.4 s, 47.9 s, 6 min 10 s, 3 h 05 min.

    >>> [duration(x) for x in (0.41, 47.9, 370, 11_100)]
    ['0.4 s', '47.9 s', '6 min 10 s', '3 h 05 min']
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


def round_text(line: Mapping[str, Any], last_val_loss: float | None = None) -> str:
    """The row of a round; `last_val_loss` is the validation loss measured before this one, for the difference.

    What was not measured in this round (validation loss, score, the slowest client) is left out of the row.
    """
    total = line.get("rounds")
    parts = [f"round {line['round']}/{total}" if total else f"round {line['round']}"]
    if line.get("cohort") is not None:
        parts.append(f"{line['clients']}/{line['cohort']} clients")
    if line.get("train_loss") is not None:
        parts.append(f"train {line['train_loss']:.3f}")
    if line.get("val_loss") is not None:
        known = last_val_loss is not None and math.isfinite(last_val_loss)
        change = f" ({line['val_loss'] - last_val_loss:+.3f})" if known and last_val_loss is not None else ""
        parts.append(f"val {line['val_loss']:.3f}{change}")
    if line.get("score") is not None:
        parts.append(f"score {100 * line['score']:.1f} %")
    if line.get("preference_accuracy") is not None:
        parts.append(f"preferred {100 * line['preference_accuracy']:.1f} %, margin {line['reward_margin']:.2f}")
    if line.get("bytes_up_per_client"):
        parts.append(f"up {byte_text(line['bytes_up_per_client'])}/client")
    if line.get("tokens_per_second"):
        parts.append(f"{amount(line['tokens_per_second'])} tok/s")
    if line.get("slowest"):
        client, ratio = line["slowest"]
        parts.append(f"slowest {client} {100 * (ratio - 1):+.0f} %")
    if line.get("seconds") is not None:
        parts.append(duration(line["seconds"]))
    if line.get("failed"):
        failed = line["failed"]
        named = ", ".join(f"{client} ({reason})" for client, reason in list(failed.items())[:3])
        parts.append(f"failed: {named}" + (f" and {len(failed) - 3} more" if len(failed) > 3 else ""))
    return " · ".join(parts)

"""Means over items, with standard errors and by group, under the names that all tasks use.

A summary has `METRIC`, `METRIC_stderr` (of the mean, from the sample's own spread) and `METRIC/GROUP`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fedloom.evaluate.tasks.base import Answer, Item, ItemScore

__all__ = ["STDERR", "best", "choice_scores", "groups_of", "mean", "standard_error", "summary_of"]

STDERR = "_stderr"


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for a single value, whose spread is not known."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def groups_of(items: Sequence[Item], scores: Sequence[ItemScore], metric: str) -> dict[str, list[float]]:
    """The metric's values by group, in the order of the items."""
    found: dict[str, list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        found.setdefault(item.group, []).append(score[metric])
    return found


def summary_of(*metrics: str) -> Callable[[Sequence[Item], Sequence[ItemScore]], dict[str, float]]:
    """A `Task.summarise`: the mean of each metric over all items, and of the first one by group, if there are some."""

    def summarise(items: Sequence[Item], scores: Sequence[ItemScore]) -> dict[str, float]:
        found: dict[str, float] = {}
        for metric in metrics:
            values = [score[metric] for score in scores]
            found[metric] = mean(values)
            error = standard_error(values)
            if error is not None:
                found[metric + STDERR] = error
        groups = groups_of(items, scores, metrics[0])
        if len(groups) > 1:
            found |= {f"{metrics[0]}/{group or 'without'}": mean(values) for group, values in groups.items()}
        return found

    return summarise


def best(values: Sequence[float]) -> int:
    """Where the largest is; the first of several."""
    return max(range(len(values)), key=values.__getitem__)


def choice_scores(items: Sequence[Item], answers: Sequence[Answer]) -> list[ItemScore]:
    """A `Task.judge` of choices, whose reference is the right one's place.

    `accuracy` takes the likeliest choice, `accuracy_norm` the likeliest per character: longer choices are less likely
    for their length alone.
    """
    found: list[ItemScore] = []
    for item, answer in zip(items, answers, strict=True):
        per_character = [nats / size for nats, size in zip(answer.loglikelihoods, answer.lengths, strict=True)]
        found.append(
            {
                "accuracy": float(best(answer.loglikelihoods) == item.reference),
                "accuracy_norm": float(best(per_character) == item.reference),
            }
        )
    return found

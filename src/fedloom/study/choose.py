"""Which state of an arm is the best, and when an arm stops early.

As Hugging Face's trainer has it: any improvement makes a state the best; the patience is used up by evaluations in a
row that are not better than the best before them by more than the threshold. Round 0 counts, so that a run which makes
a model worse says that the untouched one is best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedloom.errors import RunError, suggest
from fedloom.evaluate.loss import add_metrics, mean_loss
from fedloom.evaluate.scores import mean_score
from fedloom.study.measure import summary
from fedloom.study.settings import BEST_BY
from fedloom.types import Metrics

__all__ = ["LAST", "Best", "larger_is_better", "value_of"]

LAST = "last"  # there is nothing to choose by: the last state is the best

TaskFigures = Mapping[str, Mapping[str, float]]  # task -> metric -> value


@dataclass
class Best:
    """The best state so far, and for how many evaluations there was no better one; saved with each checkpoint."""

    by: str
    value: float | None = None
    round: int | None = None
    samples: float = 0.0  # that one model had seen by then
    waited: int = 0

    def see(self, value: float | None, round: int, samples: float, threshold: float = 0.0) -> bool:
        """Whether the state of this round is the best so far. None: it was not measured."""
        if self.by == LAST:
            self.round, self.samples = round, samples
            return True
        if value is None:
            return False
        gain = None if self.value is None else (value - self.value if larger_is_better(self.by) else self.value - value)
        self.waited = 0 if gain is None or gain > threshold else self.waited + 1
        if gain is not None and gain <= 0:
            return False
        self.value, self.round, self.samples = value, round, samples
        return True


def larger_is_better(by: str) -> bool:
    return BEST_BY.get(by, True)


def value_of(by: str, validation: Mapping[str, Metrics] | None, tasks: TaskFigures | None) -> float | None:
    """What a state is chosen by, from what was measured of it; None when that was not measured now.

    Raises:
        RunError: the task has no such metric.
    """
    if "/" in by:
        if tasks is None:
            return None
        task = next(task for task in tasks if by.startswith(f"{task}/"))  # names of a harness's tasks may have slashes
        found, metric = tasks[task], by.removeprefix(f"{task}/")
        if metric not in found:
            raise RunError(
                f"evaluate.best_by {by}: {task} has no metric {metric!r}{suggest(metric, found)}; "
                f"it has {', '.join(found)}",
                code="evaluate.best_by",
            )
        return found[metric]
    if validation is None or by == LAST:
        return None
    total = add_metrics(validation.values())
    figures = summary(validation, loss=mean_loss(total), score=mean_score(total))
    return figures[by]  # type: ignore[literal-required,no-any-return]

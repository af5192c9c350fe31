"""Sets of tasks by name. A scenario that no task stands for is a row like any other, and says so.

The mean of a set is there only when every scenario was measured: a mean over what happened to work is another figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fedloom.evaluate.harness import PREFIX, expanded, is_known
from fedloom.evaluate.tasks import TASKS, is_task

__all__ = ["SETS", "Scenario", "SetResult", "SetRow", "expanded_names", "names_tasks", "set_result", "tasks_of"]


class Scenario(NamedTuple):
    """A part of a set."""

    name: str
    task: str | None = None  # None: no task stands for it
    metric: str = ""  # of the task's summary
    note: str = ""  # what differs from the original


class SetRow(NamedTuple):
    """What was measured for a scenario."""

    scenario: str
    task: str
    metric: str
    value: float | None
    note: str  # with no value: why


class SetResult(NamedTuple):
    """A set after measuring."""

    name: str
    rows: list[SetRow]

    @property
    def measured(self) -> int:
        return sum(row.value is not None for row in self.rows)

    @property
    def mean(self) -> float | None:
        """Over the scenarios, when all of them were measured."""
        values = [row.value for row in self.rows if row.value is not None]
        return math.fsum(values) / len(values) if len(values) == len(self.rows) else None

    def to_json(self) -> dict[str, Any]:
        rows = [row._asdict() for row in self.rows]
        return {"set": self.name, "measured": self.measured, "scenarios": len(rows), "mean": self.mean, "rows": rows}


NOWHERE = "neither fedloom nor the harness has a task for it"

MMLU = Scenario("MMLU", "mmlu", "accuracy", "all 57 subjects; HELM takes 5")
BOOLQ = Scenario("BoolQ", "boolq", "accuracy", "choices by log-likelihood; HELM: the written answer")
HELLASWAG = Scenario("HellaSwag", "lm_eval:hellaswag", "acc_norm")
TRUTHFULQA = Scenario("TruthfulQA", "lm_eval:truthfulqa_mc1", "acc")

SETS: Mapping[str, tuple[Scenario, ...]] = {
    # The 16 core scenarios of HELM (Liang et al. 2022).
    "helm": (
        MMLU,
        BOOLQ,
        Scenario("NarrativeQA", "lm_eval:longbench_narrativeqa", "qa_f1_score", "whole stories; HELM: their summaries"),
        Scenario("NaturalQuestions (closed-book)", "lm_eval:nq_open", "exact_match", "HELM: F1"),
        Scenario("NaturalQuestions (open-book)", note=NOWHERE),
        Scenario("QuAC", note=NOWHERE),
        HELLASWAG,
        Scenario("OpenbookQA", "lm_eval:openbookqa", "acc_norm"),
        TRUTHFULQA,
        Scenario("MS MARCO (regular)", note=NOWHERE),
        Scenario("MS MARCO (TREC)", note=NOWHERE),
        Scenario("CNN/DailyMail", "lm_eval:cnn_dailymail_abisee", "rouge2", "zero-shot"),
        Scenario("XSUM", "lm_eval:xsum", "", "through unitxt; its own metric"),
        Scenario("IMDB", note=NOWHERE),
        Scenario("CivilComments", note=NOWHERE),
        Scenario("RAFT", note=NOWHERE),
    ),
    "helm_mini": (
        MMLU,
        BOOLQ,
        TRUTHFULQA,
        Scenario("ARC-Easy", "arc_easy", "accuracy", "not among HELM's own"),
        HELLASWAG,
    ),
}


def tasks_of(name: str) -> list[str]:
    """The tasks of a set."""
    return [one.task for one in SETS[name] if one.task is not None]


def names_tasks(name: str) -> bool:
    """Whether a name is a task's, a set's, or one that the harness knows."""
    return name in SETS or is_task(name) or is_known(name)


def expanded_names(names: Iterable[str]) -> list[str]:
    """Names of tasks in place of those of sets, of the harness's tags and folders, and of its tasks without "lm_eval:";
    each task once. A name that nobody knows stays as it is.

    Raises:
        UserError: the harness is not installed, or knows no such name.
    """
    found: list[str] = []
    for name in names:
        if name in SETS:
            found += tasks_of(name)
        elif name.startswith(PREFIX) or (name not in TASKS and is_known(name)):
            found += expanded(name)
        else:
            found.append(name)
    return list(dict.fromkeys(found))


def set_result(name: str, summaries: Mapping[str, Mapping[str, float]], reasons: Mapping[str, str]) -> SetResult:
    """A set from what its tasks measured.

    Args:
        summaries: task -> metric -> value.
        reasons: task -> why it was not measured.
    """
    rows = []
    for one in SETS[name]:
        summary = summaries.get(one.task or "")
        if one.task is None or not summary:
            rows.append(SetRow(one.name, one.task or "", one.metric, None, reasons.get(one.task or "", one.note)))
            continue
        metric = one.metric or next(iter(summary))
        value = summary.get(metric)
        rows.append(SetRow(one.name, one.task, metric, value, one.note if value is not None else f"no {metric} in it"))
    return SetResult(name, rows)

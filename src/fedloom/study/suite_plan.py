"""What a suite would do and cost, found before anything is run: one probe for each choice of settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.errors import FedloomError
from fedloom.ops.host import available_cores
from fedloom.study.suite import Suite, settings_text
from fedloom.study.suite_run import Job, cells_of

__all__ = ["PlannedCells", "SuitePlan", "known_seconds", "plan_suite"]


@dataclass(frozen=True)
class PlannedCells:
    """The runs that share their settings."""

    settings: dict[str, Any]
    seeds: list[int]
    done: list[int]  # of the seeds
    seconds: float | None  # of one run
    measured: bool  # by runs that are done, all phases; else by a probe, training alone
    report: dict[str, Any] | None  # of `fedloom plan` for the first seed
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "seeds": self.seeds,
            "done": self.done,
            "seconds": self.seconds,
            "seconds_are": "measured" if self.measured else "training" if self.seconds is not None else None,
            "plan": self.report,
            "problem": self.problem or None,
        }


@dataclass(frozen=True)
class SuitePlan:
    """A whole suite."""

    groups: list[PlannedCells]
    jobs: int
    threads: int
    seconds: float | None  # of all that is not done, with `jobs` at once

    @property
    def problems(self) -> list[str]:
        return [f"{settings_text(group.settings)}: {group.problem}" for group in self.groups if group.problem]


def known_seconds(jobs: Sequence[Job]) -> dict[str, float]:
    """Mean time of the runs that are done, by their settings."""
    found: dict[str, list[float]] = {}
    for job in jobs:
        if job.status == "done" and job.seconds:
            found.setdefault(job.group, []).append(job.seconds)
    return {group: math.fsum(times) / len(times) for group, times in found.items()}


def plan_suite(suite: Suite, *, jobs: int | None = None, probe: bool = True) -> SuitePlan:
    """Open each choice of settings once, with its data and model, and time a step of it; nothing is written.

    Where runs with the same settings are done, their time is taken. What is wrong with one is in its `problem`.
    """
    from fedloom.study.plan import plan
    from fedloom.study.session import open_session

    width = jobs or suite.limits.jobs
    threads = max(1, available_cores() // width)
    made = cells_of(suite)
    known = known_seconds(made)
    groups: dict[str, list[Job]] = {}
    for job in made:
        groups.setdefault(job.group, []).append(job)
    planned: list[PlannedCells] = []
    for name, group in groups.items():
        recipe = group[0].cell.recipe
        if recipe.runtime.threads == "auto":
            recipe = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"threads": threads})})
        seconds, report, problem = known.get(name), None, ""
        try:
            found = plan(open_session(recipe), probe=probe and seconds is None)
            report = found.to_json()
        except FedloomError as error:
            problem = f"{error.message} ({error.hint})" if error.hint else error.message
        else:
            seconds = found.train_seconds if seconds is None else seconds
        planned.append(
            PlannedCells(
                dict(group[0].cell.settings),
                [job.cell.seed for job in group],
                [job.cell.seed for job in group if job.status == "done"],
                seconds,
                name in known,
                report,
                problem,
            )
        )
    left = [(group.seconds, len(group.seeds) - len(group.done)) for group in planned]
    whole = [seconds * runs for seconds, runs in left if seconds is not None and runs]
    unknown = any(seconds is None and runs for seconds, runs in left)
    return SuitePlan(planned, width, threads, None if unknown else math.fsum(whole) / width)

"""Benchmarks inside a run: found and read before it starts, put to an arm's model, with a file of items for each.

    RUN/eval/ARM/round_00012/TASK.jsonl                 one model
    RUN/eval/local/round_00012/TASK.client_0003.jsonl   a model per client, numbered as the data has them

Before training all arms have the same model, so round 0 is measured once, as `base`. A file that is there already and
says the same settings and model is read and not made again: a state and its answers do not depend on interruptions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.errors import UserError
from fedloom.evaluate.harness import LESS_IS_BETTER
from fedloom.evaluate.tasks.base import Task, TaskSettings
from fedloom.evaluate.tasks.run import Answerer, find_task, limited, run_task
from fedloom.evaluate.tasks.sets import SETS, expanded_names, set_result
from fedloom.study.recipe import Recipe

__all__ = ["Benchmark", "Figures", "mean_figures", "measure", "merged_counts", "open_benchmarks", "place_of"]

SAID = {
    "too_long": "too long for the model, so wrong",
    "fewer_shots": "asked with fewer shots",
    "less_room": "less room for the answer",
}

Figures = dict[str, dict[str, float]]  # task -> metric -> value


class Benchmark(NamedTuple):
    """A task and where its files are (None: the usual place)."""

    task: Task
    source: Path | None
    items: int


def settings_of(recipe: Recipe) -> TaskSettings:
    evaluate = recipe.evaluate
    return TaskSettings(num_fewshot=evaluate.num_fewshot, limit=evaluate.task_limit, seed=recipe.seed)


def open_benchmarks(recipe: Recipe) -> list[Benchmark]:
    """The recipe's benchmarks, their files read once.

    Raises:
        UserError: a name is unknown, or files are missing or not what they should be; every reason is told.
    """
    found: list[Benchmark] = []
    wrong: list[UserError] = []
    spelled = {one: name for name in recipe.evaluate.tasks for one in _alone(name, wrong)}
    for name, said in spelled.items():
        given = recipe.evaluate.task_paths.get(name, recipe.evaluate.task_paths.get(said))
        source = None if given is None else Path(given).expanduser()
        try:
            task = find_task(name)
            if source is not None and not source.exists():
                raise UserError(
                    f"evaluate.task_paths.{name}: there is no {source}",
                    f"it is published at {task.source}",
                    "data.missing",
                )
            items = limited(list(task.load(source, settings_of(recipe))), recipe.evaluate.task_limit)
        except UserError as error:
            wrong.append(error)
            continue
        found.append(Benchmark(task, source, len(items)))
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        said = "".join(f"\n  - {one.message}" + (f"\n    {one.hint}" if one.hint else "") for one in wrong)
        raise UserError(f"{len(wrong)} of evaluate.tasks cannot be run:{said}", code="evaluate.tasks")
    _check_best(recipe.evaluate.best_by or "", {one.task.name for one in found})
    return found


def _alone(name: str, wrong: list[UserError]) -> list[str]:
    """The tasks that a name stands for: those of a set, say."""
    try:
        return expanded_names([name])
    except UserError as error:
        wrong.append(error)
        return []


def _check_best(best_by: str, names: Collection[str]) -> None:
    """What a state is chosen by must be measured, and more of it must be better."""
    if "/" not in best_by:
        return
    task = next((name for name in names if best_by.startswith(f"{name}/")), None)
    if task is None:
        raise UserError(
            f"evaluate.best_by {best_by} names none of the benchmarks",
            f"they are {', '.join(sorted(names))}",
            "evaluate.best_by",
        )
    if LESS_IS_BETTER.search(best_by.removeprefix(task)):
        raise UserError(
            f"evaluate.best_by {best_by}: the less the better, and best_by takes the most",
            "evaluate.best_by=loss",
            "evaluate.best_by",
        )


def place_of(folder: Path, arm: str, round: int) -> Path:
    """Where an arm's files of items of a round lie."""
    return folder / "eval" / (arm if round else "base") / f"round_{round:05d}"


def measure(
    benchmarks: Sequence[Benchmark],
    recipe: Recipe,
    answerer: Callable[[str], Answerer],
    place: Path,
    about: Mapping[str, Any],
    *,
    part: str = "",
) -> tuple[Figures, dict[str, dict[str, int]]]:
    """All benchmarks put to one model: figures, and what was skipped or asked otherwise than meant.

    Args:
        answerer: the model, told a benchmark's name for its progress.
        about: which model this is, for the files.
        part: what tells apart the files of several models in one place.
    """
    figures: Figures = {}
    left_out: dict[str, dict[str, int]] = {}
    settings = settings_of(recipe)
    for benchmark in benchmarks:
        name = benchmark.task.name
        path = place / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}{part}.jsonl"
        known = _known(path, name, settings, about)
        if known is None:
            done = run_task(
                benchmark.task, answerer(name), source=benchmark.source, settings=settings, out=path, about=about
            )
            known = done.summary, {**done.skipped, **done.notes}
        first = benchmark.task.metric if benchmark.task.metric in known[0] else next(iter(known[0]))
        figures[name] = {first: known[0][first], **known[0]}  # what is reported first stands first
        if known[1]:
            left_out[name] = {SAID.get(reason, reason): count for reason, count in known[1].items()}
    return figures | _of_sets(recipe, figures), left_out


def _of_sets(recipe: Recipe, figures: Figures) -> Figures:
    """How much of each set was measured, and its mean where that is all of it."""
    found: Figures = {}
    for name in recipe.evaluate.tasks:
        if name in SETS:
            whole = set_result(name, figures, {})
            mean = {} if whole.mean is None else {"mean": whole.mean}
            found[name] = {**mean, "measured": float(whole.measured), "scenarios": float(len(whole.rows))}
    return found


def _known(
    path: Path, name: str, settings: TaskSettings, about: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, int]] | None:
    """What the file at `path` says, if it is of this model and these settings. It is there whole or not at all."""
    try:
        with path.open(encoding="utf-8") as stream:
            head = json.loads(stream.readline())
        same = (head["task"], head["settings"], head["model"]) == (
            name,
            json.loads(json.dumps({**asdict(settings), "extra": dict(settings.extra)})),
            json.loads(json.dumps(about)),
        )
        return (head["summary"], {**head["skipped"], **head["notes"]}) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def merged_counts(several: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Task -> reason -> items, of several models: they see the same questions, so the counts are not added."""
    merged: dict[str, dict[str, int]] = {}
    for one in several:
        for task, counts in one.items():
            own = merged.setdefault(task, {})
            own.update({reason: max(count, own.get(reason, 0)) for reason, count in counts.items()})
    return merged


def mean_figures(several: Sequence[Figures]) -> Figures:
    """Plain means over models, metric by metric; a metric that some model lacks is left out."""
    first = several[0]
    return {
        task: {
            metric: math.fsum(one[task][metric] for one in several) / len(several)
            for metric in first[task]
            if all(metric in one[task] for one in several)
        }
        for task in first
    }

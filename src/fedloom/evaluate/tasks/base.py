"""What a task is: questions, what a model is asked to do with each, and how its answers are judged.

A task is a value. Its items are read from files, a model answers them, and judging needs the answers alone: an answer
that was written down can be judged again without the model.

    items = task.load(source, settings)          # from local files, in a fixed order
    answers = answer(model, items)               # texts for `Write`, log-likelihoods for `Choose`
    scores = task.judge(items, answers)          # one mapping of metrics per item
    summary = task.summarise(items, scores)      # metrics of the whole
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.data.rows import Row
from fedloom.errors import UserError, suggest
from fedloom.evaluate.sampling import Sampling

__all__ = [
    "Answer",
    "Choose",
    "Item",
    "ItemScore",
    "Judged",
    "Request",
    "Task",
    "TaskSettings",
    "Write",
    "check_settings",
]


class Write(NamedTuple):
    """Write text after a prompt.

    `prompt` is raw text, or a data row, whose prompt is then laid out as in training (the Alpaca layout or the chat
    template). Writing ends at the model's stop token, before the first of `stop`, or after `max_new_tokens`.
    """

    prompt: str | Row
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling | None = None  # None: the most likely token. Its seed is set per item when a task is run
    samples: int = 1  # answers to write, each with draws of its own
    shots: tuple[str, ...] = ()  # solved examples before a raw prompt, each ending as it must; the last go first
    head: str = ""  # what stands before the shots


class Choose(NamedTuple):
    """Say how likely each choice is after the prompt. A choice is scored by the sum of its tokens' log-likelihoods.

    After a raw prompt a choice begins with the space that parts the two (" A"). After a data row it is an answer, laid
    out as in training, without the stop token.
    """

    prompt: str | Row
    choices: tuple[str, ...]
    shots: tuple[str, ...] = ()  # as in `Write`: where all do not fit into the model's positions, the last are left out
    head: str = ""


Request = Write | Choose


class Item(NamedTuple):
    """One question of a task."""

    id: str  # unique in the task, and the same in every run
    request: Request
    reference: Any  # what judging needs, as JSON: the gold number, the right choice's index, the tests of a program
    group: str = ""  # subject or category, for scores by group


class Answer(NamedTuple):
    """What a model answered: texts or log-likelihoods. A task judges no item whose question was too long to ask."""

    texts: tuple[str, ...] = ()  # of `Write`: one per sample, without the stop sequence
    loglikelihoods: tuple[float, ...] = ()  # of `Choose`: nats, one per choice
    lengths: tuple[int, ...] = ()  # of `Choose`: characters of each choice, for length-normalised accuracy


ItemScore = Mapping[str, float]  # metric -> between 0 and 1


class Judged(NamedTuple):
    """An item's scores, with a line on what became of each answer. A task may judge in these, too."""

    scores: ItemScore
    outcomes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSettings:
    """What a user may choose; None is the task's own default."""

    num_fewshot: int | None = None
    limit: int | None = None  # items, the first ones (of each group, where the task has groups)
    max_new_tokens: int | None = None
    samples: int | None = None
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)  # a task's own settings, validated by the task


@dataclass(frozen=True)
class Task:
    """A benchmark.

    `load` takes a file or folder in the published format (None: the task's usual place, else an error that says which
    file to fetch and where to put it). `judge` gets all items at once, so that programs can run side by side.
    """

    name: str
    title: str
    metric: str  # the one to report first
    source: str  # where the published files are, licence included
    load: Callable[[Path | None, TaskSettings], Sequence[Item]]
    judge: Callable[[Sequence[Item], Sequence[Answer]], Sequence[ItemScore | Judged]]
    summarise: Callable[[Sequence[Item], Sequence[ItemScore]], dict[str, float]]
    places: tuple[str, ...] = ()  # where its files are looked for below `data_home()`, the usual place first
    run: Callable[..., Any] | None = (
        None  # in place of asking and judging items one by one: as `run_task`, a `TaskResult`
    )


def check_settings(task: str, settings: TaskSettings, *takes: str, extra: Collection[str] = ()) -> None:
    """Refuse what a task has no use for, so that nothing a user says is passed over in silence.

    Args:
        takes: of num_fewshot, max_new_tokens and samples; `limit` and `seed` are for all tasks.
        extra: names of the task's own settings.

    Raises:
        UserError: a setting is of no use here, unknown or out of range; every reason is named.
    """
    problems = []
    for name, least in (("num_fewshot", 0), ("max_new_tokens", 1), ("samples", 1), ("limit", 1)):
        value = getattr(settings, name)
        if value is None:
            continue
        if value < least:
            problems.append(f"{name} is {value}, must be {least} or more")
        if name != "limit" and name not in takes:
            problems.append(f"it has no use for {name} ({value})")
    problems += [f"it has no setting {name!r}{suggest(name, extra)}" for name in settings.extra if name not in extra]
    if problems:
        raise UserError(f"{task}: " + "; ".join(problems), "leave it out, or ask this task by itself", "task.settings")

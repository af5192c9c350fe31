"""Benchmarks by name. A new one is a file here and a line in `TASKS`; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from fedloom.errors import UserError, suggest
from fedloom.evaluate.tasks.base import Answer, Choose, Item, Task, TaskSettings, Write

__all__ = [
    "FAMILIES",
    "TASKS",
    "Answer",
    "Choose",
    "Item",
    "Task",
    "TaskSettings",
    "Write",
    "find_task",
    "is_task",
]

# name -> "module:value", a `Task`
TASKS: Mapping[str, str] = {
    "gsm8k": "fedloom.evaluate.tasks.gsm8k:GSM8K",
    "gsm8k_zeroshot": "fedloom.evaluate.tasks.gsm8k:ZEROSHOT",
    "mmlu": "fedloom.evaluate.tasks.mmlu:MMLU",
    "boolq": "fedloom.evaluate.tasks.boolq:BOOLQ",
    "arc_easy": "fedloom.evaluate.tasks.arc:ARC_EASY",
    "arc_challenge": "fedloom.evaluate.tasks.arc:ARC_CHALLENGE",
    "multiple_choice": "fedloom.evaluate.tasks.multiple_choice:MULTIPLE_CHOICE",
    "humaneval": "fedloom.evaluate.tasks.humaneval:HUMANEVAL",
    "humaneval_x": "fedloom.evaluate.tasks.humaneval:HUMANEVAL_X",
    "mbpp": "fedloom.evaluate.tasks.mbpp:MBPP",
    "exact": "fedloom.evaluate.tasks.rows:EXACT",
    "final_number": "fedloom.evaluate.tasks.rows:FINAL_NUMBER",
}

# beginning of a name -> "module:function" that makes a `Task` of what follows it (or raises UserError)
FAMILIES: Mapping[str, str] = {"lm_eval:": "fedloom.evaluate.harness:task_of"}


def is_task(name: str) -> bool:
    """Whether this is the name of a task. One of a family may still turn out not to be there."""
    return name in TASKS or any(name.startswith(start) for start in FAMILIES)


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        UserError: there is none.
    """
    for start, place in FAMILIES.items():
        if name.startswith(start):
            made: Task = _value(place)(name.removeprefix(start))
            return made
    if name not in TASKS:
        from fedloom.evaluate.harness import is_known, task_of
        from fedloom.evaluate.tasks.sets import SETS

        if name in SETS:
            raise UserError(f"{name} is a set of tasks", "fedloom eval TARGET --tasks " + name, "task.several")
        if is_known(name):
            return task_of(name)
        raise UserError(f"no such task: {name!r}{suggest(name, [*TASKS, *SETS])}", "fedloom ls tasks", "task.unknown")
    task: Task = _value(TASKS[name])
    return task


def _value(place: str) -> Any:
    module, _, value = place.partition(":")
    return getattr(importlib.import_module(module), value)

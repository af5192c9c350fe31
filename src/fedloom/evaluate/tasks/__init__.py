"""Benchmarks by name. A new one is a file here and a line in `TASKS`; nothing is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.evaluate.tasks.base import Answer, Choose, Item, Task, TaskSettings, Write

__all__ = ["FAMILIES", "TASKS", "Answer", "Choose", "Item", "Task", "TaskSettings", "Write"]

# name -> "module:value", a `Task`
TASKS: Mapping[str, str] = {}

# beginning of a name -> "module:function" that makes a `Task` of what follows it (or raises UserError)
FAMILIES: Mapping[str, str] = {}

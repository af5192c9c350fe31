"""Benchmarks by name. A new one is a file here and a line in `TASKS`."""

from __future__ import annotations

from fedloom.evaluate.tasks.base import Answer, Choose, Item, Task, TaskSettings, Write

__all__ = ["Answer", "Choose", "Item", "Task", "TaskSettings", "Write"]

"""Benchmarks by name. A new one is a file here and a line in `TASKS`; nothing is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.evaluate.tasks.base import Answer, Choose, Item, Task, TaskSettings, Write

__all__ = ["FAMILIES", "TASKS", "Answer", "Choose", "Item", "Task", "TaskSettings", "Write"]

# name -> "module:value", a `Task`
TASKS: Mapping[str, str] = {
    "gsm8k": "fedloom.evaluate.tasks.gsm8k:GSM8K",
    "gsm8k_zeroshot": "fedloom.evaluate.tasks.gsm8k:ZEROSHOT",
    "mmlu": "fedloom.evaluate.tasks.mmlu:MMLU",
    "boolq": "fedloom.evaluate.tasks.boolq:BOOLQ",
    "arc_easy": "fedloom.evaluate.tasks.arc:ARC_EASY",
    "arc_challenge": "fedloom.evaluate.tasks.arc:ARC_CHALLENGE",
    "multiple_choice": "fedloom.evaluate.tasks.multiple_choice:MULTIPLE_CHOICE",
    "exact": "fedloom.evaluate.tasks.rows:EXACT",
    "final_number": "fedloom.evaluate.tasks.rows:FINAL_NUMBER",
}

# beginning of a name -> "module:function" that makes a `Task` of what follows it (or raises UserError)
FAMILIES: Mapping[str, str] = {"lm_eval:": "fedloom.evaluate.harness:task_of"}

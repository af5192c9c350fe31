"""Any data file, asked in the layout of training and judged by its own answers: `exact` and `final_number`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fedloom.data.rows import Row, read
from fedloom.data.templates import answer_of
from fedloom.errors import UserError
from fedloom.evaluate.scores import SCORES, final_number
from fedloom.evaluate.tasks.base import Answer, Item, ItemScore, Task, TaskSettings, Write, check_settings
from fedloom.evaluate.tasks.metrics import summary_of

__all__ = ["EXACT", "FINAL_NUMBER"]

NEW_TOKENS = 256

logger = logging.getLogger("fedloom")


def _rows(task: str, title: str) -> Task:
    """A task that asks rows and judges by the score of its name."""

    def load(path: Path | None, settings: TaskSettings) -> list[Item]:
        check_settings(task, settings, "max_new_tokens")
        if path is None:
            raise UserError(f"{task} needs data", f"--tasks {task}=FILE", "data.missing")
        source = read(str(path))
        rows = list(source.rows)
        if source.natural is not None:  # a built-in task has rows to train on, too
            rows = [rows[number] for parts in source.natural.values() for number in parts.get("test", ())]
        if source.kind == "completion":
            raise UserError(f"{task}: {path} is plain text, with no questions in it", code="task.format")
        if task == "final_number" and (wrong := [row for row in rows if final_number(answer_of(row)) is None]):
            raise UserError(
                f"final_number: {len(wrong):,} answers of {path} have no number: {answer_of(wrong[0])[-80:]!r}",
                f"--tasks exact={path}",
                "task.format",
            )
        for reason, count in source.dropped.items():
            logger.warning("%s: %d rows of %s are left out: %s", task, count, path, reason)
        new_tokens = settings.max_new_tokens or NEW_TOKENS
        return [
            Item(str(number), Write(_question(row), new_tokens), answer_of(row), row.get("category", ""))
            for number, row in enumerate(rows)
        ]

    def judge(items: Sequence[Item], answers: Sequence[Answer]) -> list[ItemScore]:
        score = SCORES[task]
        return [
            {"accuracy": score({"kind": "completion", "text": item.reference}, answer.texts[0])}
            for item, answer in zip(items, answers, strict=True)
        ]

    return Task(task, title, "accuracy", "your own file", load, judge, summary_of("accuracy"))


def _question(row: Row) -> Row:
    """What the model is asked: the row without its answer, and without what only data knows."""
    if row["kind"] == "chat":
        return {"kind": "chat", "messages": row["messages"][:-1]}
    if row["kind"] == "prompt_completion":
        return {"kind": "prompt_completion", "prompt": row["prompt"], "completion": ""}
    return {"kind": "alpaca", "instruction": row["instruction"], "input": row["input"], "output": ""}


EXACT = _rows("exact", "any data file: the answer is the row's, letter by letter")
FINAL_NUMBER = _rows("final_number", "any data file: the answer's final number is the row's")

"""MBPP (Austin et al. 2021): basic Python problems in a sentence, with three assertions each.

The paper's prompt: problems 2, 3 and 4 solved, then one of the test split (11 to 510) with its assertions, which the
program has to hold. The most likely answer, once; more samples are drawn at the paper's temperature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom.errors import UserError
from fedloom.evaluate.tasks.base import Item, Task, TaskSettings, Write, check_settings
from fedloom.evaluate.tasks.programs import SAMPLING, judge, read_lines, reference_of, sampling_of, summarise

__all__ = ["MBPP"]

NEW_TOKENS = 512
TEMPERATURE = 0.5  # of several samples
SHOTS = (2, 3, 4, 1, 5, 6, 7, 8, 9, 10)  # the ids of the problems for prompts, the paper's three first
TEST = range(11, 511)
PLACES = ("mbpp/mbpp.jsonl",)
SOURCE = "github.com/google-research/google-research, mbpp/mbpp.jsonl (CC-BY 4.0)"
KEYS = {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str}
_CALLED = re.compile(r"assert\s+\(*\s*(?:set|sorted|list|tuple|math\.isclose|not)?\s*\(*\s*(\w+)\s*\(")


def load(given: Path | None, settings: TaskSettings) -> list[Item]:
    check_settings("mbpp", settings, "num_fewshot", "max_new_tokens", "samples", extra=SAMPLING)
    if (settings.samples or 1) > 1 and "temperature" not in settings.extra:
        settings = replace(settings, extra={**settings.extra, "temperature": TEMPERATURE})
    sampling = sampling_of("mbpp", settings, None)
    path, rows = read_lines("mbpp", PLACES, given, SOURCE, KEYS)
    by_id = {row["task_id"]: row for row in rows}
    number = 3 if settings.num_fewshot is None else settings.num_fewshot
    missing = [wanted for wanted in SHOTS[:number] if wanted not in by_id]
    if missing or number > len(SHOTS):
        raise UserError(
            f"mbpp: there are {len(SHOTS)} problems for prompts, not {number}"
            if number > len(SHOTS)
            else f"mbpp: {path} has no problem {missing[0]}, one of those that are shown solved",
            f"--num-fewshot {min(number, len(SHOTS)) if not missing else 0}",
            "task.exemplars",
        )
    shots = tuple(f"{_question(by_id[wanted])}{_unix(by_id[wanted]['code'])}\n[DONE]\n\n" for wanted in SHOTS[:number])
    tests = [by_id[wanted] for wanted in TEST if wanted in by_id]
    if not tests:
        raise UserError(f"mbpp: {path} has no problem from 11 to 510, the test split", f"from {SOURCE}", "task.format")
    return [
        Item(
            str(row["task_id"]),
            Write(
                _question(row),
                settings.max_new_tokens or NEW_TOKENS,
                ("[DONE]",),
                sampling,
                settings.samples or 1,
                shots,
            ),
            _reference(row),
        )
        for row in tests
    ]


def _question(row: Mapping[str, Any]) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text'].strip()} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _reference(row: Mapping[str, Any]) -> dict[str, Any]:
    called = _CALLED.search(row["test_list"][0]) if row["test_list"] else None
    # The set-up comes behind the answer: it uses classes that the answer defines.
    setup = [row["test_setup_code"]] if row["test_setup_code"].strip() else []
    return reference_of("", called[1] if called else "", [*setup, "\n".join(row["test_list"])])


def _unix(text: str) -> str:
    """The file's solutions have line ends of two kinds."""
    return text.replace("\r\n", "\n").strip()


MBPP = Task(
    "mbpp",
    "MBPP: short Python programs from a sentence, run against tests",
    "pass@1",
    SOURCE,
    load,
    judge,
    summarise,
    PLACES,
)

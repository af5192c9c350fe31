"""How an answer to a built-in task is judged; every score lies between 0 and 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedloom.data.builtin.interpreter import ProgramError, execute, translate

_ANSWER = re.compile(r"The answer is\s*(-?[0-9]+)")


def final_number(text: str) -> int | None:
    """The number after the last "The answer is", or None."""
    found = _ANSWER.findall(text)
    return int(found[-1]) if found else None


def passes(language: str, program: str, tests: list[list[Any]]) -> bool:
    """Whether the program gives the expected value in every test."""
    try:
        translated = translate(language, program)
        return all(execute(translated, arguments) == expected for arguments, expected in tests)
    except ProgramError:
        return False


def score(task_name: str, row: Mapping[str, Any], completion: str) -> float:
    """1.0 if `completion` answers `row` of the task, else 0.0."""
    match task_name:
        case "skills":
            return float(completion.strip() == row["output"])
        case "arith":
            found = final_number(completion)
            return float(found is not None and found == final_number(row["output"]))
        case "code":
            return float(passes(row["language"], completion, row["tests"]))
        case _:
            raise ValueError(f"no built-in task {task_name!r}, there are arith, skills, code")

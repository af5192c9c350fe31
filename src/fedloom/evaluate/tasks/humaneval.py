"""HumanEval (Chen et al. 2021) and the Python part of HumanEval-X (Zheng et al. 2023): functions to be completed.

Both are asked with the raw prompt, a signature and a docstring, five samples each, drawn almost greedily. Tests run in
the sandbox. `humaneval_x` has the same functions, its own files and rules: imports that all programs get, tests that
call themselves, and answers that end before their first line without indentation.

With the setting `instruct` the function is asked for in words, laid out as in training, and only the model ends the
answer: the published stop sequences would cut a fenced function before its first line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.data.rows import Row
from fedloom.errors import UserError
from fedloom.evaluate.sampling import Sampling
from fedloom.evaluate.tasks.base import Item, Task, TaskSettings, Write, check_settings
from fedloom.evaluate.tasks.programs import SAMPLING, judge, read_lines, reference_of, sampling_of, summarise

__all__ = ["HUMANEVAL", "HUMANEVAL_X"]

NEW_TOKENS = 512
SAMPLES = 5
DRAWN = Sampling(temperature=0.1, top_p=0.75, top_k=40)
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# The published list but for numpy, which no reference solution needs and the sandbox does not have.
HELPERS = """\
import math, re, sys, copy, datetime, itertools, collections, heapq, statistics, functools, hashlib, string
from typing import *
from collections import *
"""
_DEF = re.compile(r"^def\s+(\w+)", re.MULTILINE)


def _loader(
    task: str,
    places: Sequence[str],
    source: str,
    keys: Mapping[str, type],
    reference: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> Callable[[Path | None, TaskSettings], list[Item]]:
    def load(given: Path | None, settings: TaskSettings) -> list[Item]:
        check_settings(task, settings, "max_new_tokens", "samples", extra=(*SAMPLING, "instruct"))
        wish = settings.extra.get("instruct", False)
        instruct = {"true": True, "false": False}.get(str(wish).lower())
        if instruct is None:
            raise UserError(f"{task}: instruct is {wish!r}, not true or false", code="task.settings")
        sampling = sampling_of(task, settings, DRAWN)
        samples = settings.samples or (1 if sampling is None else SAMPLES)
        path, rows = read_lines(task, places, given, source, keys)
        other = [row["task_id"] for row in rows if not row["task_id"].startswith(("HumanEval/", "Python/"))]
        if other and task == "humaneval_x":
            raise UserError(
                f"humaneval_x: {path} has {other[0]!r}; programs in other languages than Python are not run here",
                f"the file is humaneval_python.jsonl.gz of {source}",
                "task.format",
            )
        return [
            Item(
                row["task_id"],
                Write(
                    _in_words(row["prompt"]) if instruct else row["prompt"],
                    settings.max_new_tokens or NEW_TOKENS,
                    () if instruct else STOP,
                    sampling,
                    samples,
                ),
                reference(row),
            )
            for row in rows
        ]

    return load


def _in_words(prompt: str) -> Row:
    text = f"Complete this Python function. Answer with the whole function in a code block.\n\n```python\n{prompt}```"
    return {"kind": "alpaca", "instruction": text, "input": "", "output": ""}


def _humaneval(row: Mapping[str, Any]) -> dict[str, Any]:
    return reference_of(row["prompt"], row["entry_point"], [f"{row['test']}\n\ncheck({row['entry_point']})\n"])


def _humaneval_x(row: Mapping[str, Any]) -> dict[str, Any]:
    names = _DEF.findall(row["declaration"])
    return reference_of(HELPERS + row["prompt"], names[-1] if names else "", [row["test"]], cut=True)


def _task(
    name: str,
    title: str,
    source: str,
    places: tuple[str, ...],
    keys: Mapping[str, type],
    reference: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> Task:
    return Task(name, title, "pass@1", source, _loader(name, places, source, keys, reference), judge, summarise, places)


HUMANEVAL = _task(
    "humaneval",
    "HumanEval: Python functions from their docstrings, run against tests",
    "github.com/openai/human-eval, data/HumanEval.jsonl.gz (MIT)",
    ("humaneval/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl"),
    {"task_id": str, "prompt": str, "entry_point": str, "test": str},
    _humaneval,
)
HUMANEVAL_X = _task(
    "humaneval_x",
    "HumanEval-X, Python: the same functions under its own rules",
    "github.com/THUDM/CodeGeeX, codegeex/benchmark/humaneval-x/python/data (Apache-2.0)",
    ("humaneval_x/humaneval_python.jsonl", "humaneval_x/humaneval_python.jsonl.gz"),
    {"task_id": str, "prompt": str, "declaration": str, "test": str},
    _humaneval_x,
)

"""Benchmarks of programs on their published files: reference solutions pass, empty and constant answers do not."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.tasks.told import Knows

from fedloom.evaluate import sandbox
from fedloom.evaluate.tasks.base import TaskSettings
from fedloom.evaluate.tasks.run import find_task, run_task

pytestmark = pytest.mark.skipif(bool(sandbox._layers_of_this_machine()[1]), reason="no sandbox here")

# task -> (file, items, key of the reference solution, an answer that returns nothing)
FILES = {
    "humaneval": ("data/humaneval/HumanEval.jsonl.gz", 164, "canonical_solution", "    return None\n"),
    "humaneval_x": ("data/humaneval_x/humaneval_python.jsonl.gz", 164, "canonical_solution", "    return None\n"),
    "mbpp": ("data/mbpp/mbpp.jsonl", 500, "code", "def answer(*numbers): return None"),
}


@pytest.mark.parametrize("name", FILES)
def test_references_pass_and_nothing_else(name: str, real_path: Callable[[str], Path], tmp_path: Path) -> None:
    file, count, key, nothing = FILES[name]
    path, task, settings = real_path(file), find_task(name), TaskSettings(samples=1)
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    solution = {str(row["task_id"]): row[key] for row in rows}
    items = task.load(path, settings)
    assert len(items) == count

    def outcomes(answer: Callable[[Any], str]) -> Counter[str]:
        out = tmp_path / "items.jsonl"
        found = run_task(task, Knows(items, answer), source=path, settings=settings, out=out)
        lines = [json.loads(line) for line in out.read_text().splitlines()][1:]
        counts = Counter(re.split("[: ]", line["outcomes"][0])[0] for line in lines)
        assert counts["passed"] == round(found.score * count)
        return counts

    assert outcomes(lambda item: solution[item.id]) == {"passed": count}
    assert outcomes(lambda item: "") == {"failed": count}
    assert outcomes(lambda item: nothing) == {"failed": count}
    if name == "humaneval":
        assert outcomes(lambda item: f"Here it is:\n```python\n{item.reference['before']}{solution[item.id]}```") == {
            "passed": count
        }
        assert outcomes(lambda item: "    import os\n    os._exit(0)\n") == {"quit": count}

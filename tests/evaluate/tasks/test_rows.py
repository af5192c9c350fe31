"""Any data file as a task, and the table of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.tasks.told import Told, question, write_jsonl

from fedloom.errors import UserError
from fedloom.evaluate.tasks import TASKS
from fedloom.evaluate.tasks.base import Task, TaskSettings, Write
from fedloom.evaluate.tasks.run import find_task, run_task

ALPACA: dict[str, Any] = {"instruction": "say a", "input": "", "output": "a", "category": "letters"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]}
PROMPT: dict[str, Any] = {"prompt": "say a", "completion": "a"}


@pytest.mark.parametrize("row", [ALPACA, CHAT, PROMPT])
def test_rows_of_every_kind_are_judged_letter_by_letter(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [row])
    task = find_task("exact")
    for text, score in ((" a\n", 1.0), ("A", 0.0), ("", 0.0)):
        told = Told(lambda one, text=text: text)
        assert run_task(task, told, source=path, settings=TaskSettings(), out=None).score == score
        [seen] = told.seen
        assert isinstance(seen, Write) and seen.max_new_tokens == 256 and question(seen) == "say a"
        assert "'a'" not in str(seen.prompt)  # the answer is nowhere in what is asked


def test_scores_by_category(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [ALPACA, {**ALPACA, "instruction": "say b", "category": "others"}])
    told = Told(lambda one: question(one).removeprefix("say "))
    summary = run_task(find_task("exact"), told, source=path, settings=TaskSettings(max_new_tokens=3), out=None).summary
    assert (summary["accuracy"], summary["accuracy/letters"], summary["accuracy/others"]) == (0.5, 1.0, 0.0)


def test_a_built_in_task_stands_for_its_test_rows() -> None:
    items = find_task("exact").load(Path("builtin:skills"), TaskSettings())
    from fedloom.data import read

    natural = read("builtin:skills").natural
    assert natural is not None
    assert len(items) == sum(len(parts["test"]) for parts in natural.values())


def test_final_number(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [{**ALPACA, "output": "It is 1,000."}])
    task = find_task("final_number")
    for text, score in (("The answer is 1000.0", 1.0), ("1001", 0.0)):
        told = Told(lambda one, text=text: text)
        assert run_task(task, told, source=path, settings=TaskSettings(), out=None).score == score
    with pytest.raises(UserError, match=r"1 answers of .* have no number: 'a'"):
        task.load(write_jsonl(tmp_path / "f.jsonl", [ALPACA]), TaskSettings())


def test_what_cannot_be_asked_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="--tasks exact=FILE"):
        find_task("exact").load(None, TaskSettings())
    with pytest.raises(UserError, match="plain text"):
        find_task("exact").load(write_jsonl(tmp_path / "t.jsonl", [{"text": "once"}]), TaskSettings())
    with pytest.raises(UserError, match="no use for num_fewshot"):
        find_task("exact").load(write_jsonl(tmp_path / "a.jsonl", [ALPACA]), TaskSettings(num_fewshot=2))
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        find_task("exact").load(tmp_path / "a.jsonl", TaskSettings(max_new_tokens=0))
    write_jsonl(tmp_path / "a.jsonl", [ALPACA, {**ALPACA, "output": ""}])
    assert len(find_task("exact").load(tmp_path / "a.jsonl", TaskSettings())) == 1
    assert "1 rows of" in caplog.text and "empty output" in caplog.text


@pytest.mark.parametrize("name", TASKS)
def test_every_name_in_the_table_is_a_task_of_that_name(name: str) -> None:
    task = find_task(name)
    assert isinstance(task, Task) and task.name == name and task.metric and task.source


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(UserError, match="no such task: 'gsm8'; did you mean 'gsm8k'"):
        find_task("gsm8")

"""BoolQ, ARC and any file of questions with choices, in the shapes that such files have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.tasks.told import Knows, Told, write_jsonl

from fedloom.errors import UserError
from fedloom.evaluate.tasks.base import Answer, Choose, Item, TaskSettings
from fedloom.evaluate.tasks.metrics import choice_scores
from fedloom.evaluate.tasks.run import find_task, run_task

ANY = "multiple_choice"


def yes_or_no(answer: str) -> dict[str, str]:
    return {
        "instruction": f"Is water wet, {answer}?\n\nAnswer format: true/false",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


SCIENCE = {
    "instruction": "Which one floats?\n\nAnswer1: iron Answer2: cork\n\nAnswer format: answer1/answer2",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


def test_instructions_are_asked_as_training_has_them(tmp_path: Path) -> None:
    boolq = write_jsonl(tmp_path / "boolq.jsonl", [yes_or_no("true"), yes_or_no("false")])
    [first, second] = find_task("boolq").load(boolq, TaskSettings())
    prompt = {"kind": "alpaca", "instruction": yes_or_no("true")["instruction"], "input": "", "output": ""}
    assert first == Item("0", Choose(prompt, ("the correct answer is true", "the correct answer is false")), 0)
    assert second.reference == 1
    arc = write_jsonl(tmp_path / "arc.jsonl", [SCIENCE])
    [item] = find_task("arc_easy").load(arc, TaskSettings())
    assert item.request.choices == ("the correct answer is answer1", "the correct answer is answer2")
    assert item.reference == 1
    bare = write_jsonl(tmp_path / "bare.jsonl", [{**SCIENCE, "output": ""}])
    assert find_task(ANY).load(bare, TaskSettings())[0].request.choices == ("answer1", "answer2")


PLAIN_BOOLQ = {"question": "is cork light", "title": "Cork", "passage": "Cork floats.", "answer": True}
ARCHIVE_ARC = {
    "id": "M1",
    "question": {"stem": "What floats?", "choices": [{"text": "iron", "label": "A"}, {"text": "cork", "label": "B"}]},
    "answerKey": "B",
}
HUB_ARC = {
    "id": "M1",
    "question": "What floats?",
    "choices": {"text": ["iron", "cork"], "label": ["1", "2"]},
    "answerKey": "2",
}
LETTERS = {"question": "q", "context": "c", "A": "x", "B": "y", "C": None, "answer": "B"}


@pytest.mark.parametrize(
    ("task", "row", "prompt", "choices", "answer"),
    [
        ("boolq", PLAIN_BOOLQ, "Cork floats.\nQuestion: is cork light?\nAnswer:", (" no", " yes"), 1),
        ("boolq", {**PLAIN_BOOLQ, "answer": False}, None, (" no", " yes"), 0),
        ("boolq", {"question": "is it?", "passage": "p", "label": 1}, "p\nQuestion: is it?\nAnswer:", None, 1),
        ("arc_easy", ARCHIVE_ARC, "Question: What floats?\nAnswer:", (" iron", " cork"), 1),
        ("arc_challenge", HUB_ARC, "Question: What floats?\nAnswer:", (" iron", " cork"), 1),
        (ANY, ARCHIVE_ARC, "Question: What floats?\nAnswer:", (" iron", " cork"), 1),
        (ANY, HUB_ARC, "Question: What floats?\nAnswer:", (" iron", " cork"), 1),
        (ANY, {"question": "q", "choices": ["a", "b", "c"], "answer": 2}, None, (" a", " b", " c"), 2),
        (ANY, {"query": "q", "options": ["a", "b"], "gold": "B"}, "Question: q\nAnswer:", None, 1),
        (ANY, {"question": "q", "choices": ["red", "blue"], "answer": "blue"}, None, None, 1),
        (ANY, LETTERS, "c\nQuestion: q\nAnswer:", (" x", " y"), 1),
        (ANY, {"question": "q", "choice0": "x", "choice1": "y", "answer": "1"}, None, (" x", " y"), 1),
    ],
)  # fmt: skip
def test_published_shapes(
    tmp_path: Path, task: str, row: dict[str, Any], prompt: str | None, choices: tuple[str, ...] | None, answer: int
) -> None:
    [item] = find_task(task).load(write_jsonl(tmp_path / "f.jsonl", [row]), TaskSettings())
    assert item.reference == answer
    assert prompt is None or item.request.prompt == prompt
    assert choices is None or item.request.choices == choices


def test_a_csv_file_with_groups(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("question,A,B,answer,category\nq1,x,y,A,easy\nq2,x,y,B,hard\nq3,x,y,B,hard\n")
    task = find_task(ANY)
    result = run_task(task, Told(choose=1), source=tmp_path / "f.csv", settings=TaskSettings(), out=None)
    assert (result.summary["accuracy/easy"], result.summary["accuracy/hard"]) == (0, 1)
    assert result.score == pytest.approx(2 / 3)


def test_the_way_to_read_answers_is_the_one_that_fits_all_rows(tmp_path: Path) -> None:
    rows = [{"question": "q", "choices": ["1", "2", "3"], "answer": answer} for answer in ("1", "3")]
    [first, second] = find_task(ANY).load(write_jsonl(tmp_path / "f.jsonl", rows), TaskSettings())
    assert (first.reference, second.reference) == (0, 2)  # as texts: 3 is no place
    unclear = write_jsonl(tmp_path / "f.jsonl", rows[:1])
    with pytest.raises(UserError, match="2 ways that differ: index, text"):
        find_task(ANY).load(unclear, TaskSettings())
    [item] = find_task(ANY).load(unclear, TaskSettings(extra={"answer": "index"}))
    assert item.reference == 1
    with pytest.raises(UserError, match="answer='indx'; did you mean 'index'"):
        find_task(ANY).load(unclear, TaskSettings(extra={"answer": "indx"}))


def test_solved_examples_come_from_a_file_that_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [PLAIN_BOOLQ])
    solved = write_jsonl(tmp_path / "s.jsonl", [{**PLAIN_BOOLQ, "answer": False}] * 2)
    task = find_task("boolq")
    [item] = task.load(path, TaskSettings(num_fewshot=2, extra={"exemplars": str(solved)}))
    assert item.request.shots == ("Cork floats.\nQuestion: is cork light?\nAnswer: no\n\n",) * 2
    for settings, match in (
        (TaskSettings(num_fewshot=1), "from which file"),
        (TaskSettings(num_fewshot=3, extra={"exemplars": str(solved)}), "2 rows, fewer than 3"),
        (TaskSettings(extra={"exemplars": str(solved)}), "how many"),
        (TaskSettings(max_new_tokens=3), "no use for max_new_tokens"),
    ):
        with pytest.raises(UserError, match=match):
            task.load(path, settings)
    with pytest.raises(UserError, match="no use for num_fewshot"):
        task.load(write_jsonl(tmp_path / "i.jsonl", [yes_or_no("true")]), TaskSettings(num_fewshot=2))


def test_length_does_not_decide_when_it_is_normalised() -> None:
    item = Item("0", Choose("q", (" yes", " most certainly not")), 1)
    answer = Answer(loglikelihoods=(-3.0, -9.0), lengths=(3, 18))
    assert choice_scores([item], [answer]) == [{"accuracy": 0.0, "accuracy_norm": 1.0}]


@pytest.mark.parametrize("name", ["boolq", "arc_easy", "arc_challenge", ANY])
def test_right_choices_score_one(tmp_path: Path, name: str) -> None:
    rows = [yes_or_no("true"), yes_or_no("false")]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    items = find_task(name).load(path, TaskSettings())
    for shift, score in ((0, 1.0), (1, 0.0)):
        knows = Knows(items, lambda item, shift=shift: (item.reference + shift) % 2)
        result = run_task(find_task(name), knows, source=path, settings=TaskSettings(), out=None)
        assert result.summary["accuracy"] == result.summary["accuracy_norm"] == score


@pytest.mark.parametrize(
    ("task", "row", "match"),
    [
        (
            "boolq",
            {"question": "q", "answer": True},
            "line 1: the fields are question, answer; expected question, pass",
        ),
        ("boolq", {**PLAIN_BOOLQ, "answer": "true"}, "expected question, passage and answer"),
        ("boolq", {**yes_or_no("true"), "answer": "maybe"}, "'maybe' is not one of true/false"),
        ("boolq", {"instruction": "Is it?", "answer": "true"}, "no answer format"),
        ("arc_easy", {**HUB_ARC, "answerKey": "5"}, "expected question, choices and answerKey"),
        ("arc_easy", PLAIN_BOOLQ, "expected question, choices and answerKey"),
        (ANY, {"question": "q", "choices": ["a", "b"], "answer": 2}, "the answer 2 names none of"),
        (ANY, {"question": "q", "choices": ["a"], "answer": 0}, "fewer than two choices"),
        (ANY, {"question": "q", "choices": ["a", ""], "answer": 0}, "a choice that is no text"),
        (ANY, {"choices": ["a", "b"]}, "no question, no answer"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, task: str, row: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        find_task(task).load(write_jsonl(tmp_path / "f.jsonl", [row]), TaskSettings())


def test_absent_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"LLM-Adapters(.|\n)*qa/boolq_test\.json"):
        find_task("boolq").load(None, TaskSettings())
    with pytest.raises(UserError, match="--tasks multiple_choice=FILE"):
        find_task(ANY).load(None, TaskSettings())
    for name in ("arc_easy", ANY):
        with pytest.raises(UserError, match="there is no"):
            find_task(name).load(tmp_path / "f.jsonl", TaskSettings())

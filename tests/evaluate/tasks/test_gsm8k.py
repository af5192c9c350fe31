"""GSM8K: what is asked, and that gold answers score 1 and others 0."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.evaluate.tasks.told import Knows, Told, write_jsonl

from fedloom.errors import UserError
from fedloom.evaluate.tasks.base import TaskSettings, Write
from fedloom.evaluate.tasks.run import find_task, run_task


def problem(number: int) -> dict[str, str]:
    total = 1000 + 3 * number
    return {
        "question": f"A mill grinds {total - 5} sacks and then 5. How many is that?",
        "answer": f"It is {total - 5} + 5 = <<{total - 5}+5={total}>>{total} sacks.\n#### {total:,}",
    }


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", [problem(n) for n in range(20, 30)])
    return write_jsonl(tmp_path / "gsm8k" / "test.jsonl", [problem(n) for n in range(4)])


def test_eight_solved_problems_in_the_order_of_the_file_stand_before_each(test_file: Path) -> None:
    items = find_task("gsm8k").load(test_file, TaskSettings())
    requests = [item.request for item in items]
    assert all(isinstance(one, Write) and one.shots == requests[0].shots for one in requests)
    first = requests[0]
    assert isinstance(first, Write)
    assert (len(first.shots), first.max_new_tokens, first.stop, first.sampling) == (8, 256, ("Question:",), None)
    assert first.prompt == "Question: A mill grinds 995 sacks and then 5. How many is that?\nAnswer:"
    assert first.shots[0] == (
        "Question: A mill grinds 1055 sacks and then 5. How many is that?\n"
        "Answer: It is 1055 + 5 = 1060 sacks.\nThe answer is 1,060.\n\n"
    )
    assert [item.reference for item in items] == ["1000", "1003", "1006", "1009"]
    assert find_task("gsm8k").load(test_file.parent, TaskSettings())[2] == items[2]


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_zeroshot"])
def test_gold_answers_score_one_and_shifted_ones_zero(test_file: Path, name: str) -> None:
    task = find_task(name)
    items = task.load(test_file, TaskSettings())

    def score(shift: int, text: str) -> float:
        answers = Knows(items, lambda item: text.format(int(item.reference) + shift))
        return run_task(task, answers, source=test_file, settings=TaskSettings(), out=None).score

    for text in ("#### {}", "so 3 and 4, and the answer is ${}.00, I think of 7", "5 and {:,}."):
        assert (score(0, text), score(1, text)) == (1.0, 0.0)


def test_zero_shot_is_the_prompt_of_training(test_file: Path) -> None:
    [first, *_] = find_task("gsm8k_zeroshot").load(test_file, TaskSettings(num_fewshot=0, max_new_tokens=9))
    assert isinstance(first.request, Write)
    assert first.request.prompt == {
        "kind": "alpaca",
        "instruction": "A mill grinds 995 sacks and then 5. How many is that?",
        "input": "",
        "output": "",
    }
    assert first.request.max_new_tokens == 9 and not first.request.shots
    with pytest.raises(UserError, match="no use for num_fewshot"):
        find_task("gsm8k_zeroshot").load(test_file, TaskSettings(num_fewshot=2))


def test_solved_problems_may_come_from_another_file(test_file: Path, tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", [{"question": "2 + 2?", "answer": "2 and 2 is 4. The answer is 4."}])
    settings = TaskSettings(num_fewshot=1, extra={"exemplars": str(own)})
    [first, *_] = find_task("gsm8k").load(test_file, settings)
    assert first.request.shots == ("Question: 2 + 2?\nAnswer: 2 and 2 is 4. The answer is 4.\n\n",)
    with pytest.raises(UserError, match="1 rows, fewer than 8"):
        find_task("gsm8k").load(test_file, TaskSettings(extra={"exemplars": str(own)}))
    assert find_task("gsm8k").load(test_file, TaskSettings(num_fewshot=0))[0].request.shots == ()


def test_without_a_train_file_it_is_said_how_to_go_on(test_file: Path) -> None:
    (test_file.parent / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"train\.jsonl, which is not there(.|\n)*--num-fewshot 0"):
        find_task("gsm8k").load(test_file, TaskSettings())
    alone = test_file.rename(test_file.with_name("problems.jsonl"))
    with pytest.raises(UserError, match="none is named"):
        find_task("gsm8k").load(alone, TaskSettings())


def test_files_are_looked_for_in_their_usual_place(test_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_DATA", str(test_file.parent.parent))
    assert len(find_task("gsm8k").load(None, TaskSettings())) == 4
    monkeypatch.setenv("FEDLOOM_DATA", str(test_file.parent / "nowhere"))
    with pytest.raises(UserError, match=r"grade-school-math(.|\n)*nowhere/gsm8k/test\.jsonl"):
        find_task("gsm8k").load(None, TaskSettings())


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"question": "a", "answer": "1"}, "row 5 has no final number"),
        ({"question": "a", "answer": "#### many"}, "row 5 has no final number"),
        ({"question": "a", "answer": ""}, "cannot be used"),
    ],
)
def test_other_files_are_refused(test_file: Path, row: dict[str, str], match: str) -> None:
    wrong = write_jsonl(test_file, [*(problem(n) for n in range(4)), row])
    for name in ("gsm8k", "gsm8k_zeroshot"):
        with pytest.raises(UserError, match=match):
            find_task(name).load(wrong, TaskSettings())


def test_rows_of_another_kind_are_refused(test_file: Path) -> None:
    write_jsonl(test_file, [{"text": "The answer is 3"}])
    with pytest.raises(UserError, match="completion rows"):
        find_task("gsm8k").load(test_file, TaskSettings(num_fewshot=0))


def test_a_limit_and_an_unused_setting(test_file: Path) -> None:
    told = Told(lambda one: "1000")
    result = run_task(find_task("gsm8k"), told, source=test_file, settings=TaskSettings(limit=2), out=None)
    assert (result.items, result.score) == (2, 0.5)
    assert result.summary["accuracy_stderr"] == pytest.approx(0.5)
    with pytest.raises(UserError, match="no use for samples"):
        find_task("gsm8k").load(test_file, TaskSettings(samples=3))
    with pytest.raises(UserError, match="no setting 'exemplar'; did you mean 'exemplars'"):
        find_task("gsm8k").load(test_file, TaskSettings(extra={"exemplar": 1}))

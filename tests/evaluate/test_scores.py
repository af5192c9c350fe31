"""Judging written answers."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from fedloom.errors import UserError
from fedloom.evaluate import scores
from fedloom.evaluate.scores import auto_score, exact, final_number, pass_at_1, same_final_number


def row(output: str, **more: Any) -> dict[str, Any]:
    return {"kind": "alpaca", "instruction": "?", "input": "", "output": output, **more}


@pytest.mark.parametrize(
    "text", ["18", "18.0", "$18.00", "18%", "$18", "18.", "So 18 dollars", "18,", "(18)", "£18", "US$18"]
)
def test_ways_to_write_eighteen(text: str) -> None:
    assert final_number(text) == Decimal(18)
    assert same_final_number(row("#### 18"), text) == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,800", 1800),
        ("12,345,678.5", Decimal("12345678.5")),
        ("1,800 / 100", 100),  # nothing is computed: the last number
        ("The answer is 1,800 / 100", 1800),  # or the first behind the marker
        ("1, 2,3", 3),  # a list is no thousands separator
        ("-5", -5),
        ("−5", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("it fell by - 5", -5),
        ("10-5", 5),
        ("10 - 5 = 5", 5),
        ("0.5", Decimal("0.5")),
        (".5", Decimal("0.5")),
        ("... 7", 7),
        ("7...", 7),
        ("#### 72", 72),
        ("#### 1,200", 1200),
        ("2 + 2 = <<2+2=4>>4\n#### 4", 4),
        ("The answer is 3. Then THE ANSWER IS: 4 of 9", 4),
        ("the answer  is\n\n42", 42),
        ("9 apples. The answer is nine.", 9),  # no number behind the marker
        ("The answer is 6 and not 7.", 6),
        ("no number", None),
        ("", None),
        ("abc123", None),
        ("2x", 2),
    ],
)
def test_final_number(text: str, number: Decimal | int | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_no_number_is_never_right() -> None:
    assert same_final_number(row("#### 4"), "four") == 0.0
    assert same_final_number(row("no number"), "no number") == 0.0


def test_exact_sees_case_and_letters_but_not_outer_space() -> None:
    assert exact(row("ABC"), " ABC\n") == 1.0
    assert exact(row("ABC"), "abc") == 0.0
    assert exact(row("ABC"), "ABC.") == 0.0


def test_pass_at_1_runs_the_rows_own_tests() -> None:
    from fedloom.data.builtin import TASKS

    client, parts = next(iter(TASKS["code"].rows(0).items()))
    task_row = {"kind": "alpaca", **parts["test"][0]}
    assert client
    assert pass_at_1(task_row, task_row["output"]) == 1.0
    assert pass_at_1(task_row, "nonsense") == 0.0


def test_pass_at_1_without_tests_is_refused() -> None:
    with pytest.raises(UserError, match="no language and no tests"):
        pass_at_1(row("x"), "x")


def test_every_builtin_answer_scores_one_under_its_own_rule() -> None:
    from fedloom.data.builtin import TASKS

    for task in TASKS.values():
        judge = scores.SCORES[task.metric]
        for parts in task.rows(0).values():
            for one in parts["test"][:20]:
                assert judge({"kind": "alpaca", **one}, one["output"]) == 1.0


def test_auto_takes_the_tasks_own_or_looks_at_the_answers() -> None:
    from fedloom.data.builtin import TASKS

    assert auto_score(TASKS["skills"], []) == "exact"
    assert auto_score(None, [row("3 + 4 = 7\nThe answer is 7.")] * 5) == "final_number"
    assert auto_score(None, [row("3 + 4 = 7\nThe answer is 7."), row("a poem")]) == "none"
    assert auto_score(None, []) == "none"


def test_an_unknown_score_names_the_nearest() -> None:
    with pytest.raises(UserError, match="exact"):
        scores.score_evaluation("x", lambda client: [], "exakt", None, max_new_tokens=1, batch_size=1)


def test_the_mean_of_nothing_is_none() -> None:
    assert scores.mean_score({}) is None
    assert scores.mean_score({"score_sum": 3.0, "scored": 4.0}) == 0.75

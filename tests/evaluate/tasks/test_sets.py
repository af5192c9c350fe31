"""Sets of tasks: every scenario is a row, and a mean is only there when all were measured."""

from __future__ import annotations

import pytest

from fedloom.evaluate.tasks import TASKS, sets
from fedloom.evaluate.tasks.sets import SETS, Scenario, expanded_names, set_result, tasks_of


def test_helm_has_its_sixteen_scenarios_and_says_which_have_no_task() -> None:
    rows = set_result("helm", {}, {}).rows
    assert len(rows) == 16 and len({row.scenario for row in rows}) == 16
    nowhere = [row for row in rows if not row.task]
    assert len(nowhere) == 7 and {row.note for row in nowhere} == {sets.NOWHERE}
    assert "MS MARCO (TREC)" in {row.scenario for row in nowhere}


@pytest.mark.parametrize("name", SETS)
def test_a_sets_own_tasks_are_there(name: str) -> None:
    assert name not in TASKS
    for task in tasks_of(name):
        assert task in TASKS or task.startswith("lm_eval:")


def test_names_are_expanded_and_asked_once() -> None:
    assert expanded_names(["gsm8k", "helm_mini", "mmlu"]) == ["gsm8k", *tasks_of("helm_mini")]


def test_a_mean_needs_all_scenarios(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (Scenario("One", "mmlu", "accuracy"), Scenario("Two", "lm_eval:x", "acc_norm"), Scenario("Three", "gsm8k"))
    monkeypatch.setattr(sets, "SETS", {"own": parts})
    measured = {
        "mmlu": {"accuracy": 0.25, "n": 9.0},
        "lm_eval:x": {"acc": 0.1, "acc_norm": 0.5},
        "gsm8k": {"exact": 0.0},
    }
    whole = set_result("own", measured, {})
    assert [row.value for row in whole.rows] == [0.25, 0.5, 0.0] and whole.mean == 0.25 and whole.measured == 3
    del measured["gsm8k"]
    part = set_result("own", measured, {"gsm8k": "its files are not here"})
    assert part.mean is None and part.measured == 2 and part.rows[2].note == "its files are not here"
    assert set_result("own", {"lm_eval:x": {"acc": 0.1}}, {}).rows[1].note == "no acc_norm in it"

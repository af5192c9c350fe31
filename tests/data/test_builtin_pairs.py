"""Built-in tasks as pairs: the right answer chosen, a wrong one rejected, the same one for every seed."""

from __future__ import annotations

import pytest

from fedloom.data import read
from fedloom.data.builtin import TASKS
from fedloom.data.builtin.pairs import as_pair
from fedloom.data.builtin.scoring import score


@pytest.mark.parametrize("name", TASKS)
def test_what_is_rejected_is_wrong_and_looks_like_an_answer(name: str) -> None:
    source = read(f"builtin:{name}", type="preference", seed=1)
    assert source.kind == "preference"
    for row in source.rows:
        told = row["columns"]
        assert row["chosen"] == told["output"] and score(name, told, row["chosen"]) == 1.0
        assert row["rejected"].strip() and score(name, told, row["rejected"]) == 0.0
        assert len(row["rejected"]) <= len(row["chosen"]) + 12


def test_a_row_has_the_same_mistake_for_every_seed() -> None:
    one, two = (TASKS["skills"].rows(seed)["reverse"]["test"] for seed in (1, 2))
    assert [as_pair("skills", row) for row in one] == [as_pair("skills", row) for row in two]


def test_mistakes_differ_within_a_skill() -> None:
    rows = TASKS["skills"].rows(0)
    copied = [as_pair("skills", row)["rejected"] == row["input"] for row in rows["reverse"]["train"]]
    assert 0.2 < sum(copied) / len(copied) < 0.8

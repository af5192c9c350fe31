"""Which state is the best, and when waiting has been long enough."""

from __future__ import annotations

import pytest

from fedloom.errors import RunError
from fedloom.study.choose import LAST, Best, value_of


def seen(best: Best, values: list[float | None], threshold: float = 0.0) -> list[tuple[bool, int]]:
    return [(best.see(value, r, 10.0 * r, threshold), best.waited) for r, value in enumerate(values)]


def test_less_loss_is_better_and_a_tie_is_not() -> None:
    best = Best("loss")
    assert seen(best, [2.0, 1.5, 1.5, None, 1.6, 1.4]) == [
        (True, 0),
        (True, 0),
        (False, 1),
        (False, 1),  # not measured: no evaluation
        (False, 2),
        (True, 0),
    ]
    assert (best.value, best.round, best.samples) == (1.4, 5, 50.0)


def test_more_score_is_better() -> None:
    best = Best("score_decile")
    assert [one for one, _ in seen(best, [0.0, 0.2, 0.1, 0.3])] == [True, True, False, True]
    assert [one for one, _ in seen(Best("gsm8k/accuracy"), [0.1, 0.0, 0.2])] == [True, False, True]


def test_small_gains_make_a_best_state_and_use_up_the_patience() -> None:
    """As the callback of Hugging Face's trainer: it compares with the best before, which small gains move along."""
    best = Best("loss")
    assert seen(best, [2.0, 1.95, 1.9, 1.85, 1.6], threshold=0.1) == [
        (True, 0),
        (True, 1),
        (True, 2),
        (True, 3),
        (True, 0),
    ]


def test_without_anything_to_choose_by_the_last_state_is_the_best() -> None:
    best = Best(LAST)
    assert seen(best, [None, None, None]) == [(True, 0)] * 3
    assert (best.round, best.value) == (2, None)


def row(loss: float, tokens: float, right: float) -> dict[str, float]:
    return {"loss_sum": loss * tokens, "target_tokens": tokens, "score_sum": right, "scored": 1.0}


def test_values_by_every_key() -> None:
    found = {"a": row(1.0, 30, 1), "b": row(3.0, 10, 0)}
    assert [value_of(by, found, None) for by in ("loss", "loss_plain_mean", "loss_decile")] == [1.5, 2.0, 3.0]
    assert [value_of(by, found, None) for by in ("score", "score_plain_mean", "score_decile")] == [0.5, 0.5, 0.0]
    assert value_of("loss", None, None) is None
    assert value_of(LAST, found, None) is None
    unscored = {"a": {"loss_sum": 1.0, "target_tokens": 1.0}}
    assert value_of("score", unscored, None) is None


def test_a_metric_of_a_task_and_one_that_it_does_not_have() -> None:
    figures = {"gsm8k": {"accuracy": 0.25}}
    assert value_of("gsm8k/accuracy", None, figures) == 0.25
    assert value_of("own/t.yaml/acc", None, {"gsm8k": {"acc": 0.1}, "own/t.yaml": {"acc": 0.5}}) == 0.5
    assert value_of("gsm8k/accuracy", {"a": row(1, 1, 1)}, None) is None
    with pytest.raises(RunError, match="did you mean 'accuracy'"):
        value_of("gsm8k/acuracy", None, figures)

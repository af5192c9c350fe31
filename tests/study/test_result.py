"""The figures over clients, and the form of result.json."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from fedloom.study.measure import model_each, one_model
from fedloom.study.result import build_result, check_result, perplexity, scores


def test_figures_over_clients_by_hand() -> None:
    found = scores({"a": 0.5, "b": 1.0, "c": None}, loss=1.0)
    assert found == {
        "loss": 1.0,
        "score": 0.75,
        "score_per_client": {"a": 0.5, "b": 1.0, "c": None},
        "score_worst": 0.5,
        "score_std": 0.25,
        "score_plain_mean": 0.75,
        "score_decile": 0.5,
        "perplexity": math.e,
    }
    assert scores({"a": 0.5}, loss=None, score=0.4)["score"] == 0.4
    nothing = scores({}, loss=None, losses={"a": None}, score_weights={}, loss_weights={"a": 0.0})
    assert {key: value for key, value in nothing.items() if value is not None} == {
        "score_per_client": {},
        "loss_per_client": {"a": None},
    }


def test_weighted_and_plain_means_differ_where_clients_do() -> None:
    found = scores(
        {"a": 0.0, "b": 1.0},
        loss=None,
        losses={"a": 3.0, "b": 1.0},
        score_weights={"a": 1.0, "b": 3.0},
        loss_weights={"a": 10.0, "b": 30.0},
    )
    assert (found["score_plain_mean"], found["score_weighted_mean"]) == (0.5, 0.75)
    assert (found["loss_plain_mean"], found["loss_weighted_mean"]) == (2.0, 1.5)
    assert (found["loss_worst"], found["loss_std"]) == (3.0, 1.0)


@pytest.mark.parametrize(("clients", "worst"), [(3, 1), (10, 1), (19, 1), (20, 2), (45, 4)])
def test_the_decile_is_the_worst_tenth_rounded_down_at_least_one(clients: int, worst: int) -> None:
    values = {f"c{n}": ((7 * n) % clients) / clients for n in range(clients)}
    found = scores(values, loss=None, losses=values)
    ordered = sorted(values.values())
    assert found["score_decile"] == pytest.approx(statistics.fmean(ordered[:worst]))
    assert found["loss_decile"] == pytest.approx(statistics.fmean(ordered[-worst:]))
    assert found["score_std"] == pytest.approx(statistics.pstdev(ordered))


def test_a_perplexity_beyond_numbers_is_none() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) is None
    assert perplexity(None) is None


def row(loss: float, tokens: float, right: float, rows: float) -> dict[str, float]:
    return {"loss_sum": loss * tokens, "target_tokens": tokens, "nonfinite": 0.0, "score_sum": right, "scored": rows}


def test_one_model_is_weighed_by_tokens_and_rows_and_a_client_without_tests_counts_nowhere() -> None:
    empty = row(0.0, 0.0, 0.0, 0.0)
    found = one_model({"a": row(1.0, 10, 1, 1), "b": row(3.0, 30, 0, 3), "c": empty})
    assert (found["loss"], found["score"]) == (2.5, 0.25)
    assert found["own_test"]["loss"] == 2.0
    assert found["own_test"]["loss_weighted_mean"] == 2.5
    assert found["own_test"]["score"] == found["own_test"]["score_plain_mean"] == 0.5
    assert found["loss_per_client"] == {"a": 1.0, "b": 3.0, "c": None}
    assert found["score_per_client"] == {"a": 1.0, "b": 0.0, "c": None}
    assert found["perplexity"] == pytest.approx(math.exp(2.5))


def test_a_model_each_is_judged_on_all_tests_and_on_its_own() -> None:
    def model(a: float, b: float) -> dict[str, float]:
        parts = [row(a, 10, 1, 1), row(b, 30, 0, 3)]
        return {f"{number}/{key}": value for number, part in enumerate(parts) for key, value in part.items()}

    found = model_each({"a": model(1.0, 3.0), "b": model(2.0, 1.0)}, ["a", "b"])
    assert found["loss_per_client"] == {"a": 2.5, "b": 1.25}
    assert found["loss"] == pytest.approx((2.5 + 1.25) / 2)
    assert found["own_test"]["loss_per_client"] == {"a": 1.0, "b": 1.0}
    assert found["own_test"]["score_per_client"] == {"a": 1.0, "b": 0.0}
    assert found["own_test"]["score_weighted_mean"] == 0.25


COSTS: dict[str, Any] = {
    "bytes_up_per_client_round": 1,
    "bytes_down_per_client_round": 1,
    "train_tokens": 1,
    "train_seconds": 1.0,
    "tokens_per_second": 1.0,
}


def a_result(**more: Any) -> Any:
    arm = {**scores({"a": 0.5}, loss=1.0), "own_test": scores({"a": 0.5}, loss=1.0)}
    parts: dict[str, Any] = {
        "seed": 1,
        "arms": {"federated": arm},
        "costs": {**COSTS, "peak_memory_bytes": 1, "trainable_parameters": 1, "total_parameters": 2},
        "costs_per_arm": {"federated": COSTS},
        "data": {},
        "model": {},
        "recipe": {},
    }
    return build_result(**{**parts, **more})


def test_a_result_without_the_later_keys_still_has_its_form() -> None:
    plain = a_result()
    for arm in (plain["arms"]["federated"], plain["arms"]["federated"]["own_test"]):
        for key in ("score_plain_mean", "score_decile", "perplexity"):
            del arm[key]
    assert check_result(plain) == plain
    assert not {"tasks", "equal_samples", "outcomes"} & set(plain)


def test_a_result_with_tasks_equal_samples_and_outcomes() -> None:
    arm = a_result()["arms"]["federated"]
    ended = {
        "rounds": 3,
        "planned_rounds": 5,
        "stopped_early": True,
        "best_round": 1,
        "best_by": "loss",
        "best_value": 0.5,
        "round": 1,
    }
    full = a_result(
        tasks={"federated": {"gsm8k": {"accuracy": 0.25}}},
        equal_samples={"samples": 16, "arms": {"federated": {"round": 1, "samples": 16.0, "result": arm}}},
        outcomes={"federated": ended},
    )
    assert full["tasks"]["federated"]["gsm8k"]["accuracy"] == 0.25
    assert full["equal_samples"]["arms"]["federated"]["result"] == arm
    assert full["outcomes"]["federated"] == ended
    with pytest.raises(ValueError, match=r"equal_samples\.samples"):
        a_result(equal_samples={"samples": -1, "arms": {}})

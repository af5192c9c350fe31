"""From results to a suite's table: values, means, differences, texts."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from fedloom.study.result import build_result, scores
from fedloom.study.suite_result import COSTS, check_suite
from fedloom.study.suite_table import (
    Finished,
    costs_of,
    csv_text,
    difference_text,
    differences_of,
    grouped,
    markdown,
    metrics_of,
    notes_of,
    rows_of,
    value_of,
)

ARMS = ("base", "local", "federated", "global")
LEVELS = {"base": 0.0, "local": 0.2, "federated": 0.8, "global": 0.81}


def an_arm(score: float | None, loss: float) -> Any:
    each = {"a": score, "b": score}
    own = {"a": score, "b": None if score is None else score / 2}
    return {**scores(each, loss=loss), "own_test": scores(own, loss=loss / 2)}


def costs(arm: str) -> Any:
    return {
        "bytes_up_per_client_round": 1000.0 if arm == "federated" else 0.0,
        "bytes_down_per_client_round": 1100.0 if arm == "federated" else 0.0,
        "train_tokens": 500,
        "train_seconds": 2.0,
        "tokens_per_second": 250.0,
        "rounds": 3,
        "samples_per_model": 96.0,
        "peak_memory_bytes": 5_000,
    }


def a_cell(settings: dict[str, Any], seed: int, shift: float = 0.0, scored: bool = True, **more: Any) -> Finished:
    """Scores move by seed in all arms alike, and by a little more in federated."""
    noise = 0.01 * seed
    arms = {
        arm: an_arm(level + shift + noise + (0.002 * seed if arm == "federated" else 0) if scored else None, 2 - level)
        for arm, level in LEVELS.items()
    }
    whole: Any = {"bytes_up_per_client_round": 1000.0, "bytes_down_per_client_round": 1100.0, "train_tokens": 500,
                  "train_seconds": 2.0, "tokens_per_second": 250.0, "peak_memory_bytes": 9_000,
                  "trainable_parameters": 10, "total_parameters": 100}  # fmt: skip
    result = build_result(seed=seed, arms=arms, costs=whole, costs_per_arm={arm: costs(arm) for arm in ARMS}, data={},
                          model={}, recipe={}, **more)  # fmt: skip
    rounds = [{"arm": "federated", "round": 0}] + [
        {"arm": "federated", "round": number, "clients": 2, "bytes_up_per_client": 1000, "bytes_down_per_client": 1100}
        for number in (1, 2, 3)
    ]
    return Finished(settings, seed, result, rounds)


def equal_samples() -> Any:
    arms = {
        arm: {"round": 2, "samples": 48.0, "result": an_arm(LEVELS[arm] - 0.1, 1.5)} for arm in ("federated", "global")
    }
    return {"samples": 48, "arms": arms}


AXES = {"recipe": ("x", "y"), "method": ("plain", "pulled")}
CELLS = [
    a_cell({"recipe": recipe, "method": method}, seed, shift=0.05 * (method == "pulled"))
    for recipe in AXES["recipe"]
    for method in AXES["method"]
    for seed in (0, 1, 2)
]


def a_suite(cells: list[Finished], /, **more: Any) -> Any:
    metrics = metrics_of(cells)
    rows = rows_of(cells, metrics)
    differences = differences_of(rows, AXES, ("method",))
    return check_suite({
        "schema": 1, "name": "s", "status": "done", "fedloom_version": "0", "arms": list(ARMS), "seeds": [0, 1, 2],
        "settings": {name: list(values) for name, values in AXES.items()}, "metrics": metrics, "cells": [],
        "table": rows, "differences": differences, "notes": notes_of(cells, [0, 1, 2], differences), "seconds": 1.0,
        "jobs": 1, "versions": {}, "machine": {}, "suite": {}, **more,
    })  # fmt: skip


# ---- values


def test_values_are_found_by_their_place() -> None:
    result = a_cell({}, 0, tasks={"federated": {"gsm8k": {"accuracy": 0.25}}}).result
    assert value_of(result, "federated", "score") == 0.8
    assert value_of(result, "federated", "own_test.score") == pytest.approx(0.6)
    assert value_of(result, "federated", "own_test.score_worst") == pytest.approx(0.4)
    assert value_of(result, "federated", "own_test.loss") == pytest.approx(0.6)
    assert value_of(result, "federated", "tasks.gsm8k.accuracy") == 0.25
    assert value_of(result, "base", "tasks.gsm8k.accuracy") is None
    assert value_of(result, "nobody", "score") is None
    assert value_of(result, "federated", "score_per_client") is None


def test_equal_samples_take_the_base_and_local_models_from_their_end() -> None:
    result = a_cell({}, 0, equal_samples=equal_samples()).result
    assert value_of(result, "federated", "score", "samples") == pytest.approx(0.7)
    assert value_of(result, "local", "score", "samples") == 0.2
    assert value_of(result, "base", "score", "samples") == 0.0
    assert value_of(a_cell({}, 0).result, "local", "score", "samples") is None


def test_which_metrics_are_tabulated() -> None:
    task = {"tasks": {"base": {"mmlu": {"accuracy": 0.25, "macro_perplexity": 7.0}}}}
    assert [(one["name"], one["unit"], one["better"]) for one in metrics_of([a_cell({}, 0, **task)])] == [
        ("score", "share", "higher"),
        ("loss", "nats", "lower"),
        ("own_test.score", "share", "higher"),
        ("own_test.score_worst", "share", "higher"),
        ("tasks.mmlu.accuracy", "share", "higher"),
        ("tasks.mmlu.macro_perplexity", "number", "lower"),
    ]
    assert [one["name"] for one in metrics_of([a_cell({}, 0, scored=False)])] == ["loss", "perplexity", "own_test.loss"]
    assert [one["name"] for one in metrics_of([a_cell({}, 0)], ["score_std"])] == ["score_std"]


def test_costs_are_of_the_arm_and_bytes_in_all_are_counted() -> None:
    found = costs_of(CELLS[0], "federated", "rounds")
    assert found["bytes_up"] == 6000 and found["bytes_down"] == 6600
    assert found["peak_memory_bytes"] == 5000 and found["trainable_share"] == 0.1
    assert costs_of(CELLS[0], "base", "rounds")["trainable_share"] == 0.0
    assert "bytes_up" not in costs_of(CELLS[0], "global", "rounds")
    at = costs_of(a_cell({}, 0, equal_samples=equal_samples()), "federated", "samples")
    assert at == {"samples_per_model": 48.0, "rounds": 2.0}


# ---- rows and differences


def test_rows_are_means_over_seeds() -> None:
    rows = {(row["settings"]["recipe"], row["settings"]["method"], row["arm"], row["metric"]): row
            for row in rows_of(CELLS, metrics_of(CELLS))}  # fmt: skip
    row = rows["x", "pulled", "federated", "score"]
    assert row["values"] == pytest.approx({"0": 0.85, "1": 0.862, "2": 0.874})
    assert (row["n"], row["mean"], row["std"]) == (3, pytest.approx(0.862), pytest.approx(0.012))
    assert row["costs"]["train_seconds"] == 2.0 and set(row["costs"]) <= set(COSTS)
    assert len(rows) == 2 * 2 * 4 * 4


def test_a_seed_that_lacks_a_figure_is_not_counted() -> None:
    cells = [a_cell({"m": 1}, 0), a_cell({"m": 1}, 1, scored=False)]
    rows = {(row["arm"], row["metric"]): row for row in rows_of(cells, metrics_of(cells))}
    assert rows["federated", "score"]["n"] == 1 and rows["federated", "score"]["std"] is None
    assert rows["federated", "loss"]["n"] == 2


def test_arms_are_compared_by_seed_and_what_all_share_drops_out() -> None:
    found = differences_of(rows_of(CELLS, metrics_of(CELLS)), AXES, ("method",))
    arms = [one for one in found if one["by"] == "arm" and one["metric"] == "score"]
    assert [(one["a"], one["b"]) for one in arms[:4]] == [
        ("federated", "base"), ("federated", "local"), ("global", "federated"), ("local", "base")
    ]  # fmt: skip
    assert len(arms) == 4 * 4
    gain = arms[1]
    # differences 0.6, 0.602, 0.604: std 0.002, half a width of 4.303 x 0.002 / sqrt(3)
    assert (gain["n"], gain["mean"]) == (3, pytest.approx(0.602))
    assert gain["high"] - gain["mean"] == pytest.approx(4.302653 * 0.002 / 3**0.5, rel=1e-6)
    assert gain["resolved"] and gain["resolved_holm"] and "arm" not in gain
    # 0.01, 0.008, 0.006: resolved alone (p 0.02), and not among 16 comparisons
    close = arms[2]
    assert close["resolved"] and not close["resolved_holm"]
    assert close["p"] is not None and close["p_holm"] is not None and close["p"] < 0.05 < close["p_holm"]
    # local less base is 0.2 for every seed
    assert arms[3]["low"] == arms[3]["high"] == pytest.approx(0.2)


def test_values_of_a_setting_are_compared_with_the_first_within_an_arm() -> None:
    found = differences_of(rows_of(CELLS, metrics_of(CELLS)), AXES, ("method",))
    by = [one for one in found if one["by"] == "method" and one["metric"] == "score"]
    assert {one["arm"] for one in by} == {"local", "federated", "global"}
    assert {(one["a"], one["b"]) for one in by} == {("pulled", "plain")}
    assert [one["settings"] for one in by[:1]] == [{"recipe": "x"}] and len(by) == 6
    assert all(one["mean"] == pytest.approx(0.05) for one in by)
    assert not any(one["by"] == "recipe" for one in found)  # other recipes have other tests


def test_one_seed_has_differences_without_intervals() -> None:
    cells = [cell for cell in CELLS if cell.seed == 0]
    found = differences_of(rows_of(cells, metrics_of(cells)), AXES, ("method",))
    assert all(one["low"] is None and not one["resolved"] and one["p_holm"] is None for one in found)
    notes = " ".join(notes_of(cells, [0], found))
    assert "1 seed: too few" in notes and "paired" not in notes


# ---- texts


def test_texts_of_the_table() -> None:
    suite = a_suite(CELLS)
    text = markdown(suite)
    assert "| recipe | method | arm | score | loss | own test: score | own test: worst client | n |" in text
    assert "| x | pulled | federated | 86.2 ± 1.2 % | 1.200 ± 0.000 |" in text
    assert "| x | plain | federated − local | +60.2 [59.7, 60.7] ** |" in text
    assert "| x | federated | pulled − plain |" in text
    assert "| x | plain | federated | 1.0 kB | 1.1 kB | 6.0 kB | 2.0 s | 250 | 5.0 kB | 10 % |" in text
    assert "at equal samples" not in text
    assert text.index("Scores at equal rounds") < text.index("Differences between arms") < text.index("## Costs")


def test_both_comparisons_are_printed_where_both_were_measured() -> None:
    cells = [a_cell({"recipe": "x", "method": "plain"}, seed, equal_samples=equal_samples()) for seed in (0, 1)]
    text = markdown(a_suite(cells))
    assert "## Scores at equal samples" in text and "## Differences between arms at equal samples" in text
    assert "| plain | federated | 70.0 ± 0.0 % |" in text.replace("| x ", "")
    assert "as many rows as one local model sees" in text


def test_marks() -> None:
    metric: Any = metrics_of(CELLS)[0]
    one: Any = {"mean": 0.1, "low": -0.05, "high": 0.25, "resolved": False, "resolved_holm": False}
    assert difference_text(metric, one) == "+10.0 [-5.0, 25.0] ~"
    assert difference_text(metric, {**one, "low": 0.05, "resolved": True}) == "+10.0 [5.0, 25.0] *"
    assert difference_text(metric, {**one, "low": 0.05, "resolved": True, "resolved_holm": True}).endswith("] **")
    assert difference_text(metric, {**one, "low": None, "high": None}) == "+10.0"


def test_the_spreadsheet_has_numbers_as_they_are() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(a_suite(CELLS)))))
    assert len(rows) == len(grouped(a_suite(CELLS))) == 16
    row = next(row for row in rows if (row["recipe"], row["method"], row["arm"]) == ("y", "plain", "federated"))
    assert float(row["score_mean"]) == pytest.approx(0.812) and row["score_n"] == "3"
    assert float(row["bytes_up"]) == 6000 and row["flops"] == ""


def test_a_reason_with_many_lines_stays_in_its_cell() -> None:
    cell: Any = {"id": "i", "settings": {"recipe": "x", "method": "a|b"}, "seed": 1, "run": "r", "status": "failed",
                 "seconds": 1.0, "reason": "one\ntwo | three"}  # fmt: skip
    text = markdown(a_suite(CELLS, cells=[cell]))
    assert "| x, a\\|b | 1 | one two \\| three |" in text

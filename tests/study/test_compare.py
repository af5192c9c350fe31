"""Runs side by side, and suites side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.study.test_suite_table import a_cell, a_suite

from fedloom.errors import UserError
from fedloom.study.compare import compare
from fedloom.study.folder import RunFolder
from fedloom.study.recipe import Recipe, resolved_json, resolved_yaml
from fedloom.study.suite_result import write_suite


def a_run(path: Path, shift: float = 0.0, done: bool = True, **values: Any) -> Path:
    recipe = Recipe.model_validate(
        {"model": "m", "data": {"path": "d.jsonl"}, "local_steps": 3, "seed": 1, "output_dir": str(path), **values}
    )
    cell = a_cell({}, recipe.seed, shift)
    with RunFolder.create(path, resolved_yaml(recipe)) as run:
        for line in cell.rounds:
            run.append_round(line)
        if done:
            run.write_result({**cell.result, "recipe": resolved_json(recipe)})
        else:
            run.write_stage(
                "base", {"result": cell.result["arms"]["base"], "costs": cell.result["costs_per_arm"]["base"]}
            )
    return path


def a_suite_in(path: Path, cells: list[Any], **more: Any) -> Path:
    path.mkdir()
    write_suite(path, a_suite(cells, **more))
    return path


def test_runs_show_what_differs_and_by_how_much(tmp_path: Path) -> None:
    a = a_run(tmp_path / "a")
    b = a_run(tmp_path / "b", shift=0.05, adapter={"lora_r": 4})
    c = a_run(tmp_path / "c", shift=0.1, client={"optim": "sgd"})
    found = compare([a, b, c])
    assert found.names == ["a", "b", "c"]
    assert found.settings["adapter.lora_r"] == [8, 4, 8]
    assert found.settings["client.optim"] == ["adamw", "adamw", "sgd"]
    assert found.settings["client.adam_beta1"] == [0.9, 0.9, None]
    assert "output_dir" not in found.settings and "rounds" not in found.settings
    line = next(line for line in found.lines if (line.arm, line.metric["name"]) == ("federated", "score"))
    assert line.values == pytest.approx([0.812, 0.862, 0.912])
    assert line.differences[0] is None
    assert [one["mean"] for one in line.differences[1:] if one] == pytest.approx([0.05, 0.1])
    cost = next(one for one in found.costs if (one["arm"], one["cost"]) == ("federated", "bytes_up"))
    assert cost["values"] == [6000, 6000, 6000]
    assert any("no intervals" in note for note in found.notes)


def test_a_run_that_goes_on_has_what_is_done(tmp_path: Path) -> None:
    found = compare([a_run(tmp_path / "a"), a_run(tmp_path / "b", done=False)])
    assert found.settings == {} and found.notes[0] == "the recipes are the same"
    assert "b is not finished: base of it is there" in found.notes
    values = {line.arm: line.values for line in found.lines if line.metric["name"] == "loss"}
    assert values["base"] == [2.0, 2.0] and values["federated"] == [1.2, None]


def test_suites_are_paired_by_seed(tmp_path: Path) -> None:
    def cells(shift: float, seeds: tuple[int, ...]) -> list[Any]:
        return [a_cell({"recipe": "x", "method": "plain"}, seed, shift + 0.001 * seed * bool(shift)) for seed in seeds]

    first = a_suite_in(tmp_path / "first", cells(0.0, (0, 1, 2)), suite={"set": {"rounds": 3}})
    second = a_suite_in(tmp_path / "second", cells(0.05, (1, 2, 3)), suite={"set": {"rounds": 5}})
    found = compare([first, second])
    assert found.kind == "suites" and found.settings["set.rounds"] == [3, 5]
    line = next(line for line in found.lines if (line.arm, line.metric["name"]) == ("global", "score"))
    difference = line.differences[1]
    assert difference is not None and difference["n"] == 2  # seeds 1 and 2
    assert difference["mean"] == pytest.approx(0.0515) and difference["low"] < difference["mean"] < difference["high"]
    assert line.stds[0] == pytest.approx(0.01)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a")
    suite = a_suite_in(tmp_path / "s", [a_cell({"recipe": "x", "method": "plain"}, 0)])
    other = a_suite_in(
        tmp_path / "t",
        [a_cell({"recipe": "x", "method": "plain", "rank": 4}, 0)],
        settings={"recipe": ["x"], "method": ["plain"], "rank": [4, 8]},
    )
    far = a_suite_in(tmp_path / "u", [a_cell({"recipe": "z", "method": "plain"}, 0)])
    for places, part in (
        ([run], "two or more folders, and there is one"),
        ([run, suite], "compare runs with runs"),
        ([run, tmp_path / "nowhere"], "there is no run folder"),
        ([suite, other], "t varies rank and another does not have it"),
        ([suite, far], "share no row"),
    ):
        with pytest.raises(UserError, match=part):
            compare(places)
    with pytest.raises(UserError, match=r"scor is no metric, did you mean score\?"):
        compare([run, run], ["scor"])


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    found = compare([a_run(tmp_path / "x" / "run"), a_run(tmp_path / "y" / "run")])
    assert found.names == ["x/run", "y/run"]

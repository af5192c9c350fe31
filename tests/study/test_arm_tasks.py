"""Files of answers inside a run: made once for a model and its settings, and never taken for another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedloom.evaluate.tasks.base import Item, Task, Write
from fedloom.study.arm_tasks import Benchmark, mean_figures, measure, merged_counts, place_of
from fedloom.study.recipe import Recipe

TOY = Task(
    "toy/1",
    "Toy",
    "share",
    "nowhere",
    lambda source, settings: [Item(f"i{n}", Write("a" * (n + 1), 3), "a") for n in range(4)],
    lambda items, answers: [{"share": float(answer.texts[0] == "aaa"), "other": 0.5} for answer in answers],
    lambda items, scores: {"other": 0.5, "share": sum(one["share"] for one in scores) / len(scores)},
)
BENCHMARKS = [Benchmark(TOY, None, 4)]


class Model:
    """Writes its prompt again; the longest one does not fit."""

    questions = 0

    def write(self, requests: Any) -> list[tuple[str, ...]]:
        Model.questions += len(requests)
        return [(str(request.prompt),) if len(request.prompt) < 4 else () for request in requests]

    def choose(self, requests: Any) -> list[tuple[float, ...]]:
        raise NotImplementedError


def recipe(limit: int | None) -> Recipe:
    evaluate = {"tasks": ["gsm8k"], "task_limit": limit} if limit else {}
    return Recipe(model="m", data={"path": "d"}, local_steps=1, evaluate=evaluate)


def ask(place: Path, about: dict[str, Any], limit: int | None = None, part: str = "") -> tuple[Any, Any, int]:
    before = Model.questions
    figures, left_out = measure(BENCHMARKS, recipe(limit), lambda name: Model(), place, about, part=part)
    return figures, left_out, Model.questions - before


def test_answers_are_made_once_and_those_of_another_model_or_setting_are_not_taken(tmp_path: Path) -> None:
    figures, left_out, asked = ask(tmp_path, {"round": 1})
    assert figures == {"toy/1": {"share": 0.25, "other": 0.5}} and asked == 4
    assert list(figures["toy/1"]) == ["share", "other"], "what is reported first stands first"
    assert left_out == {"toy/1": {"too long for the model, so wrong": 1}}
    assert ask(tmp_path, {"round": 1}) == (figures, left_out, 0)
    assert ask(tmp_path, {"round": 2})[2] == 4
    assert ask(tmp_path, {"round": 2}, limit=2) == ({"toy/1": {"share": 0.0, "other": 0.5}}, {}, 2)
    assert ask(tmp_path, {"round": 2}, part=".client_0001")[2] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy-1.client_0001.jsonl", "toy-1.jsonl"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"task": "toy/1"}', "\x00\xff"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "toy-1.jsonl").write_bytes(content.encode("latin1"))
    assert ask(tmp_path, {"round": 1})[2] == 4
    assert ask(tmp_path, {"round": 1})[2] == 0


def test_before_training_all_arms_are_the_base(tmp_path: Path) -> None:
    assert place_of(tmp_path, "local", 0) == place_of(tmp_path, "base", 0) == tmp_path / "eval" / "base" / "round_00000"
    assert place_of(tmp_path, "local", 12) == tmp_path / "eval" / "local" / "round_00012"


def test_what_was_left_out_is_told_once_for_all_models() -> None:
    several = [{"t": {"long": 2}}, {}, {"t": {"long": 3, "short": 1}, "u": {"long": 1}}]
    assert merged_counts(several) == {"t": {"long": 3, "short": 1}, "u": {"long": 1}}


def test_the_mean_of_models_leaves_out_what_some_lack() -> None:
    several = [{"t": {"a": 0.0, "b": 1.0}}, {"t": {"a": 1.0}}]
    assert mean_figures(several) == {"t": {"a": 0.5}}

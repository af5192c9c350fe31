"""Tasks of the lm-evaluation-harness, and sets of tasks, inside a run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.tasks.told import write_jsonl
from tests.study.tiny_runs import recipe

from fedloom.errors import UserError
from fedloom.evaluate.tasks import sets
from fedloom.evaluate.tasks.sets import Scenario
from fedloom.study.arm_tasks import open_benchmarks
from fedloom.study.run import run_recipe

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")

CHOICES = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " river"
metric_list:
  - {metric: perplexity, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def asked(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes a recipe with a task of the harness and a set, and other settings of `evaluate`."""
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path / "data"))
    passages = [{"question": f"{n}?", "passage": "p", "answer": n % 2 == 0} for n in range(4)]
    write_jsonl(tmp_path / "data/boolq/dev.jsonl", passages)
    write_jsonl(tmp_path / "rows.jsonl", [{"question": f"Say {n}:"} for n in range(3)])
    (tmp_path / "own.yaml").write_text(CHOICES)
    monkeypatch.setattr(sets, "SETS", {})
    for place in ("fedloom.study.arm_tasks.SETS", "fedloom.evaluate.tasks.sets.SETS"):
        monkeypatch.setattr(place, {"tiny": (Scenario("Yes or no", "boolq", "accuracy"),)})

    def make(**evaluate: Any) -> Any:
        chosen = {"tasks": [f"lm_eval:{tmp_path / 'own.yaml'}", "tiny"], "task_rounds": 1, "task_limit": 2, **evaluate}
        return recipe(home, tmp_path / "run", rounds=2, method="fedavg", arms=["federated"], evaluate=chosen)

    return make


def test_figures_of_each_round_have_the_harness_and_the_set(asked: Any) -> None:
    run = run_recipe(asked())
    result = json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    rounds = [line["tasks"] for line in lines if line["arm"] == "federated"]
    assert all(set(one) == {"lm_eval:own", "boolq", "tiny"} for one in rounds) and len(rounds) == 3
    assert len({one["lm_eval:own"]["perplexity"] for one in rounds}) == 3, "the figures do not depend on the model"
    figures = result["tasks"]["federated"]
    assert figures["tiny"] == {"mean": figures["boolq"]["accuracy"], "measured": 1.0, "scenarios": 1.0}
    kept = run / "eval/federated/round_00002/lm_eval-own.jsonl"
    head, *items = [json.loads(line) for line in kept.read_text().splitlines()]
    assert head["summary"] == rounds[2]["lm_eval:own"] and len(items) == 2


def test_what_a_state_is_chosen_by_must_be_measured_and_grow(asked: Any) -> None:
    with pytest.raises(UserError, match="the less the better"):
        open_benchmarks(asked(best_by="lm_eval:own/perplexity"))
    with pytest.raises(UserError, match="names none of the benchmarks") as caught:
        open_benchmarks(asked(best_by="lm_eval:other/acc"))
    assert "boolq, lm_eval:own" in caught.value.hint
    with pytest.raises(UserError, match="no task file"):
        open_benchmarks(asked(tasks=["lm_eval:./nowhere.yaml"]))

"""`fedloom eval` with sets of tasks, and with tasks of the harness."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.evaluate.tasks.told import write_jsonl

from fedloom.cli import main
from fedloom.evaluate.tasks import sets
from fedloom.evaluate.tasks.sets import Scenario
from fedloom.models import random_base

ROWS = [{"question": f"q{n}?", "choices": ["a", "b", "no"], "answer": n % 3, "passage": "p"} for n in range(6)]
TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    base = random_base(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, max_positions=200)
    base.model.save_pretrained(path)
    base.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def said(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Said]:
    """Return a function that asks tasks of a small model, in a folder with a task of the harness and one data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "own" / "rows.jsonl", ROWS)
    (tmp_path / "own" / "task.yaml").write_text(TASK)
    passages = [{"question": row["question"], "passage": "p", "answer": row["answer"] == 0} for row in ROWS]
    write_jsonl(tmp_path / "data" / "boolq" / "dev.jsonl", passages)
    parts = (Scenario("Yes or no", "boolq", "accuracy", "by choices"), Scenario("Numbers", "gsm8k", "accuracy"))
    monkeypatch.setattr(sets, "SETS", {"tiny": parts, "less": (*parts[:1], Scenario("Nothing", note="no task"))})

    def run(*words: str) -> Said:
        capfd.readouterr()
        code = main(["eval", str(model), "--threads", "1", *words])
        return Said(code, *capfd.readouterr())

    return run


def test_a_set_says_what_was_not_measured_and_then_has_no_mean(said: Callable[..., Said], tmp_path: Path) -> None:
    code, out, err = said("--tasks", "tiny,less", "--out", "kept")
    assert code == 0
    tiny, less = out.split("\ntiny: ")[1].split("\nless: ")
    assert tiny.startswith("1 of 2 measured, no mean") and less.startswith("1 of 2 measured, no mean")
    assert "Numbers" in tiny and "its files are not on this machine" in tiny and "no task" in less
    assert "note: gsm8k is left out" in err and "gsm8k/test.jsonl" in err
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["boolq.json", "boolq.jsonl"]
    problems = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(8)]
    for part in ("train", "test"):
        write_jsonl(tmp_path / "data" / "gsm8k" / f"{part}.jsonl", problems)
    code, out, _ = said("--tasks", "tiny,gsm8k", "--limit", "2", "--format", "json")
    *tasks, whole = json.loads(out)
    assert code == 0 and [one["task"] for one in tasks] == ["gsm8k", "boolq"]
    values = [row["value"] for row in whole["rows"]]
    assert whole["set"] == "tiny" and whole["measured"] == whole["scenarios"] == 2
    assert whole["mean"] == pytest.approx(sum(values) / 2) and values == [tasks[1]["score"], tasks[0]["score"]]


def test_a_set_without_any_task_that_can_be_measured_is_an_error(said: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "data" / "boolq" / "dev.jsonl").unlink()
    code, out, err = said("--tasks", "tiny")
    assert (code, out) == (2, "") and "none of these tasks can be measured" in err
    assert said("--tasks", "gsm8k,less").code == 2  # by itself a task has to be there


@needs_harness
def test_a_task_of_the_harness_is_asked_kept_and_judged_again(said: Callable[..., Said], tmp_path: Path) -> None:
    code, out, err = said("--tasks", "lm_eval:./own/task.yaml,multiple_choice=own/rows.jsonl", "--out", "kept")
    assert code == 0 and out.splitlines()[1].split()[:2] == ["lm_eval:own", "acc"]
    assert err == "items: kept/lm_eval-own.jsonl, kept/multiple_choice.jsonl\n"  # and nothing of the harness
    kept = json.loads((tmp_path / "kept" / "lm_eval-own.json").read_text())
    assert kept["metric"] == "acc" and kept["items"] == 6 and kept["model"]["measured"] == "model"
    assert main(["eval", "--rescore", "kept/lm_eval-own.jsonl", "--out", "again"]) == 0
    assert "lm_eval:own" in said("--tasks", "lm_eval:./own", "--limit", "2").out  # a folder of tasks
    assert (tmp_path / "again" / "lm_eval-own.jsonl").read_text() == (tmp_path / "kept/lm_eval-own.jsonl").read_text()


def test_without_the_harness_the_pip_line_is_said(said: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = said("--tasks", "lm_eval:./own/task.yaml")
    assert (code, out) == (2, "") and "pip install 'fedloom[eval]'" in err

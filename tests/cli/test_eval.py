"""`fedloom eval` with benchmarks: what may be named, what is kept, what is refused before a model is loaded."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.evaluate.tasks.told import write_jsonl

from fedloom.adapters import lora
from fedloom.cli import main
from fedloom.cli.evaluate import _bar
from fedloom.models import random_base


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an adapter for it, and files of three benchmarks in their usual place."""
    home = tmp_path_factory.mktemp("eval")
    base = random_base(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, max_positions=400)
    base.model.save_pretrained(home / "model")
    base.tokenizer.save_pretrained(home / "model")
    adapter = lora(base.model, rank=2, base_name=str(home / "model"))
    tree = {name: leaf + 0.5 for name, leaf in adapter.init(0).items()}
    adapter.export(tree, home / "adapter")
    problems = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(12)]
    for part in ("train", "test"):
        write_jsonl(home / "data" / "gsm8k" / f"{part}.jsonl", problems)
    for part in ("dev", "test"):
        path = home / "data" / "mmlu" / part / f"anatomy_{part}.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([f"q{n}", "w", "x", "y", "z", "ABCD"[n % 4]] for n in range(6))
    write_jsonl(home / "own.jsonl", [{"question": f"q{n}", "choices": ["a", "b"], "answer": n % 2} for n in range(3)])
    return home


@pytest.fixture
def fedloom(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Return a function that runs a command line in that folder."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("FEDLOOM_DATA", str(place / "data"))

    def run(*words: str) -> Said:
        capsys.readouterr()
        # One thread: the tests run side by side.
        code = main([*words, "--threads", "1"] if words[0] == "eval" else words)
        return Said(code, *capsys.readouterr())

    return run


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_plain_model_is_asked_benchmarks_and_its_items_are_kept(fedloom: Callable[..., Said], tmp_path: Path) -> None:
    out = tmp_path / "kept"
    words = ("eval", "model", "--tasks", "gsm8k,mmlu,multiple_choice=own.jsonl", "--limit", "2", "--dtype", "float32")
    code, table, err = fedloom(*words, "--out", str(out), "--set", "exemplars=data/gsm8k/train.jsonl")
    assert code == 2 and "mmlu: it has no setting 'exemplars'" in err and not out.exists()
    code, table, err = fedloom(*words, "--out", str(out))
    assert code == 0, err
    assert re.search(r"(?m)^gsm8k +accuracy +\d+\.\d\d % ± \d+\.\d\d +2$", table)
    assert re.search(r"(?m)^mmlu +accuracy .* 2$", table) and re.search(r"(?m)^ +  other +", table)
    assert re.search(r"(?m)^multiple_choice +accuracy .* 2$", table) and "accuracy_norm" in table
    names = ["gsm8k_limit2", "mmlu_limit2", "multiple_choice_limit2"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{n}.{end}" for n in names for end in ("json", "jsonl")
    )
    head, *items = lines_of(out / "mmlu_limit2.jsonl")
    assert head["model"] == {
        "target": "model", "kind": "model", "chat_template": "auto", "base": "model", "dtype": "float32",
        "measured": "model", "batch_size": 16,
    }  # fmt: skip
    assert [item["id"] for item in items] == ["anatomy/0", "anatomy/1"]
    summary = json.loads((out / "mmlu_limit2.json").read_text())
    assert summary["summary"] == head["summary"] and summary["settings"]["limit"] == 2
    assert "items had fewer solved examples than meant" in err  # 400 positions do not hold 8 and 256 new tokens


def test_json_is_data_alone(fedloom: Callable[..., Said]) -> None:
    code, out, err = fedloom("eval", "model", "--tasks", "multiple_choice=own.jsonl", "--format", "json")
    [found] = json.loads(out)
    assert (code, found["task"], found["items"], found["file"]) == (0, "multiple_choice", 3, None)
    assert found["score"] == found["summary"]["accuracy"] and err == ""


def test_an_adapter_and_its_base(fedloom: Callable[..., Said], tmp_path: Path) -> None:
    found = {}
    for name, words in (("tuned", ["adapter"]), ("base", ["adapter", "--base"]), ("model", ["model"])):
        asked = ("--tasks", "mmlu", "--dtype", "float32", "--out", str(tmp_path / name))
        assert fedloom("eval", *words, *asked).code == 0
        head, *items = lines_of(tmp_path / name / "mmlu.jsonl")
        assert head["model"]["measured"] == name
        found[name] = [item["loglikelihoods"] for item in items]
    assert found["base"] == found["model"] != found["tuned"]
    assert fedloom("eval", "adapter", "--tasks", "mmlu", "--num-fewshot", "0").code == 0
    assert not (Path("adapter") / "eval").exists()  # nobody's folder is written into unasked


def test_scoring_again_needs_no_model(fedloom: Callable[..., Said], tmp_path: Path) -> None:
    assert fedloom("eval", "model", "--tasks", "mmlu", "--out", str(tmp_path / "a")).code == 0
    file = tmp_path / "a" / "mmlu.jsonl"
    first = json.loads(file.with_suffix(".json").read_text())
    code, out, _ = fedloom("eval", "--rescore", str(file), "--format", "json")
    [again] = json.loads(out)
    assert code == 0 and again["summary"] == first["summary"]
    text = file.read_text()
    head, *items = lines_of(file)
    for item in items:
        item["loglikelihoods"] = [float(place == item["reference"]) for place in range(4)]
    write_jsonl(file, [head, *items])
    code, out, _ = fedloom("eval", "--rescore", str(file), "--out", str(tmp_path / "b"))
    assert code == 0 and "100.00 %" in out
    assert json.loads((tmp_path / "b" / "mmlu.json").read_text())["summary"]["accuracy"] == 1.0
    assert json.loads(file.with_suffix(".json").read_text()) == first and file.read_text() != text
    code, _, err = fedloom("eval", "--rescore", str(file), "--out", str(tmp_path / "a"))
    assert code == 2 and "would be written over" in err
    code, _, err = fedloom("eval", "model", "--rescore", str(file))
    assert code == 2 and "takes a file and no model" in err
    code, _, err = fedloom("eval", "--rescore", "own.jsonl")
    assert code == 2 and "no file of items" in err


def test_a_benchmarks_name_goes_before_a_file_of_that_name(fedloom: Callable[..., Said], place: Path) -> None:
    (place / "mmlu").write_text("not this")
    try:
        code, out, err = fedloom("eval", "model", "--tasks", "mmlu", "--limit", "1")
        assert code == 0 and "mmlu is the benchmark; the file or folder here is ./mmlu" in err and "accuracy" in out
    finally:
        (place / "mmlu").unlink()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "eval needs a run or a model"),
        (["model"], "has no test rows of its own(.|\n)*--tasks gsm8k"),
        (["adapter"], "adapter is an adapter and has no test rows"),
        (["model", "--tasks", "own.jsonl"], "exact=own.jsonl"),
        (["model", "--tasks", "gsm8"], "no such task: 'gsm8'; did you mean 'gsm8k'"),
        (["model", "--tasks", "mmluu=data/mmlu"], "no such task: 'mmluu'; did you mean 'mmlu'"),
        (["model", "--tasks", ","], "names nothing"),
        (["model", "--tasks", "boolq"], r"boolq: its files are not on this machine(.|\n)*boolq_test\.json"),
        (["model", "--tasks", "gsm8k=nowhere.jsonl"], "there is no nowhere.jsonl"),
        (["model", "--tasks", "mmlu", "--max-new-tokens", "3"], "no use for max_new_tokens"),
        (["model", "--tasks", "mmlu", "--base"], "without an adapter already"),
        (["model", "--tasks", "mmlu", "--model", "model"], "is a model itself"),
        (["model", "--tasks", "mmlu", "--score", "exact"], "--score is for data"),
        (["model", "--tasks", "mmlu", "--set", "subjects"], "expected KEY=VALUE"),
        (["data", "--tasks", "mmlu"], "neither a run, nor an adapter, nor a model: it holds gsm8k, mmlu"),
        (["data/nowhere", "--tasks", "mmlu"], "there is no run folder data/nowhere"),
        (["somebody/model", "--tasks", "mmlu"], "no folder of a run or an adapter here(.|\n)*hub cannot be reached"),
        (["nowhere", "--tasks", "mmlu", "--base"], "there is no run folder nowhere"),
    ],
)
def test_what_is_refused(fedloom: Callable[..., Said], words: list[str], match: str) -> None:
    code, out, err = fedloom("eval", *words)
    assert (code, out) == (2, "") and re.search(match, err) and "Traceback" not in err, err


def test_a_bar_only_where_somebody_looks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with _bar("mmlu") as nothing:
        assert nothing is None
    monkeypatch.setattr(sys, "stderr", Terminal())
    with _bar("mmlu") as show:
        assert show is not None
        show(3, 8, "rows")
        show(8, 8, "rows")
    assert "mmlu: rows" in sys.stderr.getvalue() and "8/8" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_ls_tasks_says_what_is_here(fedloom: Callable[..., Said], place: Path) -> None:
    code, out, err = fedloom("ls", "tasks")
    assert code == 0 and str(place / "data") in err
    assert re.search(r"(?m)^mmlu +here +.*\(accuracy\): mmlu$", out)
    assert re.search(r"(?m)^boolq +not here +.*: qa/boolq_test.json$", out)
    assert re.search(r"(?m)^exact +your own +.*: exact=FILE$", out)
    entries = {entry["name"]: entry for entry in json.loads(fedloom("ls", "tasks", "--format", "json").out)}
    assert entries["gsm8k"]["source"].startswith("github.com/openai") and entries["gsm8k"]["metric"] == "accuracy"

"""A run imitates answers: preference data is refused before anything is trained, with the way out."""

import json
from pathlib import Path

import pytest

from fedloom.cli import main

ROWS = [{"prompt": f"count to {i} ", "chosen": "one " * (1 + i % 4), "rejected": "no"} for i in range(40)]


def test_a_run_refuses_pairs_and_takes_one_column_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    Path("r.yaml").write_text("model: builtin\ndata: {path: p.jsonl}\nlocal_steps: 1\nrounds: 1\n", encoding="utf-8")
    assert main(["run", "r.yaml", "threads=1"]) == 2
    said = capsys.readouterr().err
    assert "preference data" in said and "data.columns.completion=chosen" in said and not Path("runs").exists()
    assert main(["preview", "r.yaml", "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    [pair] = shown["examples"]
    assert shown["read_as"] == "preference" and pair["rejected"][-1]["text"].strip().startswith("no")
    assert main(["run", "r.yaml", "threads=1", "data.columns.completion=chosen", "score=none", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["read_as"] == "prompt_completion"

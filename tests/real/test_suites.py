"""A suite over the paper's own recipes, on real files and a real model folder, in small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.cli import main

SUITE = """\
suite: small
base: [paper/dolly, paper/gsm8k]
set:
  rounds: 1
  local_steps: 4
  data: {limit: 400, max_length: 256, val_set_size: 0, test_set_size: 0.1}
  evaluate: {tasks: [], eval_rounds: 0}
  arms: [base, federated]
  split.clients: 3
  dtype: float32
seeds: [0]
limits: {jobs: 2}
"""


def test_the_papers_recipes_make_a_table_of_real_data(
    real_path: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real_path("data/dolly/global_test.json")
    monkeypatch.setenv("FEDLOOM_DATA", str(real_path("data/gsm8k/train.jsonl").parents[1]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(SUITE)
    code = main(["run", "s.yaml", f"model={real_path('models/stories260K')}", "--format", "json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    suite = json.loads(out)
    means = {
        (row["settings"]["recipe"], row["arm"]): (row["mean"], row["n"])
        for row in suite["table"]
        if (row["metric"], row["comparison"]) == ("loss", "rounds")
    }
    for recipe in ("dolly", "gsm8k"):
        assert means[recipe, "federated"][0] < means[recipe, "base"][0] and means[recipe, "base"][1] == 1
    assert (tmp_path / "runs" / "small" / "report.html").is_file()

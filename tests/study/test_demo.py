"""The demo, a little shorter: what a newcomer is shown must be so, with a margin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MARGIN = 0.15  # federated over local, on the common test set


@pytest.mark.slow
def test_federated_beats_local_by_far_and_comes_near_global(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    words = ["demo", f"output_dir={run}", "rounds=16", "evaluate.limit=20", "runtime.threads=1", "--format", "json"]
    command = [sys.executable, "-c", "import sys; from fedloom.cli import main; sys.exit(main())", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result == json.loads((run / "result.json").read_text())
    arms = result["arms"]
    score = {name: arm["score"] for name, arm in arms.items()}
    loss = {name: arm["loss"] for name, arm in arms.items()}
    assert score["base"] < 0.15
    assert score["base"] < score["local"]
    assert score["federated"] >= score["local"] + MARGIN
    assert score["global"] >= score["federated"] - 0.1, "federated is far above what pooled rows give"
    assert loss["federated"] < loss["local"]
    assert loss["federated"] < loss["base"] / 3
    # each client's own model is good at its own skill, and at no other: that is why federating pays
    assert arms["local"]["own_test"]["score"] > score["local"] + MARGIN
    assert len(arms["federated"]["score_per_client"]) == 8
    costs = result["costs"]
    assert 4 * costs["trainable_parameters"] < costs["bytes_up_per_client_round"] < 5 * costs["trainable_parameters"]
    assert costs["tokens_per_second"] > 0
    assert costs["peak_memory_bytes"] > 10**8
    report = (run / "report.html").read_text()
    assert report.count("<svg") >= 4, "pictures: score by arm, loss by round, per client, bytes"
    assert "<script src" not in report
    assert "Federated reaches" in report
    assert "\x1b[" not in done.stderr, "escape codes although this is no terminal"
    assert "round 16/16" in done.stderr

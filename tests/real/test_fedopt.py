"""Methods of federated optimisation on a real model folder and real files, through the command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.cli import main


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("scaffold", ["clients_per_round=4"]),
        ("fednova", ["local_epochs=1", "--local_steps=null"]),
        ("qfedavg", ["learning_rate=0.5"]),
        ("diloco", ["learning_rate=2e-4"]),
        ("fedbuff", ["clients_per_round=4", "client_speeds=lognormal", "rounds=4"]),
    ],
)
def test_a_method_runs_from_rows_to_an_answer(
    method: str, more: list[str], real_path: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""\
model: {real_path("models/stories260K")}
dtype: float32
data: {{path: {real_path("data/gsm8k/train.jsonl")}, max_length: 256, limit: 36, val_set_size: 0.1, test_set_size: 0.1}}
split: {{kind: quantity_skew, clients: 6, alpha: 2}}
method: {method}
rounds: 2
local_steps: 2
client: {{learning_rate: 5e-3, per_device_train_batch_size: 2}}
arms: [base, federated]
evaluate: {{score: none}}
runtime: {{threads: 1}}
output_dir: run
"""
    )
    assert main(["run", str(recipe), *more, "--format", "json"]) == 0
    result = json.loads(Path("run/result.json").read_text())
    assert result["arms"]["federated"]["loss"] < result["arms"]["base"]["loss"]
    lines = [json.loads(line) for line in Path("run/rounds.jsonl").read_text().splitlines()]
    times = [line["simulated_seconds"] for line in lines if line["arm"] == "federated" and line["round"]]
    assert times == sorted(times) and times[0] > 0
    assert main(["generate", "run", "Once upon a time", "--max-new-tokens", "3"]) == 0
    assert main(["generate", "run", "Once upon a time", "--max-new-tokens", "3", "--checkpoint", "last"]) == 0

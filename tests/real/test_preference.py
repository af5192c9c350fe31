"""Preference tuning on a real model and real pairs, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.cli import main

pytestmark = pytest.mark.slow

SHORT = [
    "dtype=float32", "threads=1", "max_length=256", "data.limit=120", "split.clients=3", "rounds=3", "local_steps=4",
    "per_device_train_batch_size=4", "learning_rate=2e-3", "lora_target_modules=all-linear", "val_set_size=0.1",
    "test_set_size=0.2", "score=none", "eval_rounds=1",
]  # fmt: skip


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main(["run", *words, *SHORT, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("file", ["llamafactory_dpo_en_demo.json", "hh_harmless_base_test.jsonl.gz"])
def test_real_pairs_are_ranked_better_after_training(
    file: str,
    real_path: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        f"model: {real_path('models/stories260K')}\ndata: {{path: {real_path('data/preference/' + file)}}}\n"
        "arms: [base, local, federated, global]\n"
    )
    result = told(["r.yaml"], capsys)
    assert result["recipe"]["data"]["type"] == "preference" and result["recipe"]["dpo"]["beta"] == 0.1
    base, federated = result["arms"]["base"], result["arms"]["federated"]
    assert base["preference_accuracy"] == 0.5 and base["loss"] == pytest.approx(0.6931, abs=1e-4)
    lines = [json.loads(line) for line in Path("runs/r/rounds.jsonl").read_text().splitlines()]
    trained = [line["train_loss"] for line in lines if line["arm"] == "federated" and line["round"]]
    assert trained[-1] < 0.69 and federated["reward_margin"] > 0
    assert main(["eval", "runs/r"]) == 0
    assert "ranked right" in capsys.readouterr().out
    assert main(["generate", "runs/r", "How do I say no?", "--max-new-tokens", "3"]) == 0


def test_supervised_then_preference_tuning(
    real_path: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model, pairs = real_path("models/stories260K"), real_path("data/preference/llamafactory_dpo_en_demo.json")
    Path("sft.yaml").write_text(f"model: {model}\ndata: {{path: {real_path('data/gsm8k/train.jsonl')}}}\n")
    Path("dpo.yaml").write_text(f"model: {model}\ndata: {{path: {pairs}}}\nstart_from: runs/sft\n")
    told(["sft.yaml"], capsys)
    after = told(["dpo.yaml"], capsys)
    assert after["arms"]["base"]["preference_accuracy"] == 0.5
    assert after["arms"]["federated"]["reward_margin"] > 0
    config = json.loads(Path("runs/dpo/adapter/adapter_config.json").read_text())
    assert config["r"] == 16

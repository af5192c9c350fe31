"""The commands on a real model folder and real files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.cli import main
from fedloom.study.load import packaged_recipes, read_recipe


def test_gsm8k_recipe_runs_on_a_model_folder_and_the_real_files(
    real_path: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        str(packaged_recipes()["fed_gsm8k"]),
        f"model={real_path('models/stories260K')}",
        f"data.path={real_path('data/gsm8k/train.jsonl')}",
        f"data.test_path={real_path('data/gsm8k/test.jsonl')}",
    ]
    monkeypatch.chdir(tmp_path)
    assert main(["validate", *words]) == 0
    recipe = read_recipe(words[0], words[1:]).recipe
    assert (recipe.split.kind, recipe.split.clients, recipe.evaluate.score) == ("iid", 3, "final_number")
    # The run as it is, only shorter: few rows, rounds and answers.
    short = [
        "rounds=2",
        "local_steps=3",
        "data.limit=60",
        "val_set_size=0.1",
        "evaluate.limit=2",
        "max_new_tokens=4",
        "dtype=float32",
        "threads=1",
        "per_device_train_batch_size=2",
        "arms=base,local,federated,global",
        "evaluate.tasks=gsm8k",
        "evaluate.task_limit=2",
        "evaluate.task_clients=1",
    ]
    monkeypatch.setenv("FEDLOOM_DATA", str(real_path("data")))
    capsys.readouterr()
    assert main(["run", *words, *short, "--format", "json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["arms"]["federated"]["loss"] < result["arms"]["base"]["loss"]
    assert result["data"]["rows_read"] == 120 and "round 2/2 · 3/3 clients" in err
    assert all(0 <= figures["gsm8k"]["accuracy"] <= 1 for figures in result["tasks"].values())
    compared = result["equal_samples"]
    assert compared["samples"] == 2 * 3 * 2
    assert [compared["arms"][arm]["round"] for arm in ("base", "local", "federated", "global")] == [0, 2, 1, 1]
    assert compared["arms"]["federated"]["samples"] == 18
    assert "after equal samples: 12 for each model" in err
    answers = Path("runs/fed_gsm8k/eval/federated/round_00002/gsm8k.jsonl").read_text().splitlines()
    assert len(answers) == 1 + 2
    assert main(["generate", "runs/fed_gsm8k", "How many apples?", "--max-new-tokens", "3"]) == 0


@pytest.mark.parametrize(
    ("data", "kind", "split"),
    [
        ("data/gsm8k/train.jsonl", "alpaca", "iid"),
        ("data/dolly", "alpaca", "files"),
        ("data/dolly/local_training_0.json", "alpaca", "by_category"),
        ("data/code/new_codealpaca.json", "alpaca", "iid"),
        ("data/qa/boolq_train.json", "alpaca", "iid"),
    ],
)
def test_init_reads_real_files(
    real_path: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, kind: str, split: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path, model = real_path(data), real_path("models/stories260K")
    assert main(["init", str(path), "--model", str(model), "-o", "r.yaml"]) == 0
    recipe = read_recipe("r.yaml").recipe
    assert (recipe.data.type, recipe.split.kind, recipe.data.max_length) == (kind, split, 512)
    assert (recipe.data.test_path is not None) is (data == "data/dolly")

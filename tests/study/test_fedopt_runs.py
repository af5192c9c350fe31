"""Whole runs of methods that send or keep more than parameters: killed and resumed they are as if never stopped."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from tests.study.tiny_runs import kill_at, outcome, recipe

from fedloom.study.run import run_recipe

LIGHT = {"arms": ["federated"], "evaluate": {"eval_rounds": 3, "score": "none", "max_new_tokens": None, "limit": None}}


@pytest.mark.parametrize("method", ["scaffold", "diloco"])
def test_a_resumed_run_is_the_uninterrupted_one(method, home, tmp_path):
    told = {**LIGHT, "method": method, "clients_per_round": 2}
    plain = run_recipe(recipe(home, tmp_path / "plain", **told))
    broken = recipe(home, tmp_path / "broken", **told)
    kill_at(broken, "after line federated 2")
    run_recipe(broken, resume=tmp_path / "broken")
    assert outcome(tmp_path / "broken") == outcome(plain)
    result = json.loads((plain / "result.json").read_text())
    exported = load_file(plain / "adapter" / "adapter_model.safetensors")
    assert result["costs"]["trainable_parameters"] == sum(leaf.numel() for leaf in exported.values())
    assert all("lora_" in name and "control" not in name for name in exported)
    once = 8 * result["costs"]["trainable_parameters"]
    copies = 2 if method == "scaffold" else 1
    for way in ("up", "down"):
        assert copies * once < result["costs"][f"bytes_{way}_per_client_round"] < copies * once + 8000


def test_the_other_arms_of_such_a_recipe_are_plain(home, tmp_path):
    told = {**LIGHT, "arms": ["local", "global"], "rounds": 1}
    runs = {}
    for method in ("fedavg", "scaffold"):
        run = run_recipe(recipe(home, tmp_path / method, method=method, **told))
        runs[method] = json.loads((run / "result.json").read_text())
    for arm in ("local", "global"):
        ours, plain = (runs[method]["arms"][arm]["loss"] for method in ("scaffold", "fedavg"))
        assert ours == pytest.approx(plain, rel=1e-12)

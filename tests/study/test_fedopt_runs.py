"""Whole runs of methods that send or keep more than parameters: killed and resumed they are as if never stopped."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from tests.study.tiny_runs import kill_at, outcome, recipe

from fedloom.personal import Store
from fedloom.study.compare import compare
from fedloom.study.report_compare import compare_page
from fedloom.study.run import run_recipe

LIGHT = {"arms": ["federated"], "evaluate": {"eval_rounds": 3, "score": "none", "max_new_tokens": None, "limit": None}}


@pytest.mark.parametrize("method", ["scaffold", "diloco", "fedbuff"])
def test_a_resumed_run_is_the_uninterrupted_one(method, home, tmp_path):
    told = {**LIGHT, "method": method, "clients_per_round": 2}
    if method == "fedbuff":
        told["runtime"] = {"client_speeds": "lognormal", "buffer_size": 1}
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


@pytest.mark.parametrize("method", ["scaffold", "fedsa_lora"])
def test_personal_state_on_disk_gives_the_very_run_of_memory_also_after_a_kill(method, home, tmp_path):
    told = {**LIGHT, "method": method, "clients_per_round": 2}
    plain = outcome(run_recipe(recipe(home, tmp_path / "plain", **told)))
    broken = recipe(
        home, tmp_path / "broken", **told, runtime={"personal_state": "disk"}, checkpoint={"save_rounds": 2}
    )
    kill_at(broken, "after line federated 3")  # round 3 is in the file, and in no checkpoint
    place = tmp_path / "broken" / "checkpoints" / "federated" / "personal.sqlite"
    assert Store(place).head == 3
    run_recipe(broken, resume=tmp_path / "broken")
    found = outcome(tmp_path / "broken")
    for one in (plain, found):
        for key in ("runtime", "checkpoint"):
            one["result"]["recipe"].pop(key)
    assert found == plain
    adapter_only = sum(part.stat().st_size for part in place.parent.glob("round_*/state.safetensors"))
    kept = Store(place)
    assert kept.head == 3 and len(kept.at(3)) == 3 and place.stat().st_size > adapter_only / 4


def test_the_other_arms_of_such_a_recipe_are_plain(home, tmp_path):
    told = {**LIGHT, "arms": ["local", "global"], "rounds": 1}
    runs = {}
    for method in ("fedavg", "scaffold"):
        run = run_recipe(recipe(home, tmp_path / method, method=method, **told))
        runs[method] = json.loads((run / "result.json").read_text())
    for arm in ("local", "global"):
        ours, plain = (runs[method]["arms"][arm]["loss"] for method in ("scaffold", "fedavg"))
        assert ours == pytest.approx(plain, rel=1e-12)


def test_asynchronous_and_synchronous_runs_are_compared_by_simulated_time(home, tmp_path):
    told = {**LIGHT, "evaluate": {**LIGHT["evaluate"], "eval_rounds": 1}}
    speeds = {"client_speeds": "lognormal"}
    late = run_recipe(recipe(home, tmp_path / "late", **told, method="fedbuff", rounds=6, runtime=speeds))
    sync = run_recipe(recipe(home, tmp_path / "sync", **told, method="fedavg", rounds=3, runtime=speeds))
    lines = {
        run: [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()] for run in (late, sync)
    }
    times = {run: [line["simulated_seconds"] for line in own[1:]] for run, own in lines.items()}
    for own in times.values():
        assert own == sorted(own) and own[0] > 0
    slowest = times[sync][0]
    assert times[sync] == pytest.approx([slowest, 2 * slowest, 3 * slowest])
    assert times[late][0] < slowest, "someone waited for the slowest"
    assert [line["clients"] for line in lines[late][1:]] == [2] * 6, "half of three, rounded up"
    assert sum(line["staleness"] for line in lines[late][1:]) > 0
    assert all("staleness" not in line for line in lines[sync])

    found = compare([late, sync])
    costs = {row["cost"]: row["values"] for row in found.costs}
    assert costs["simulated_seconds"] == [times[late][-1], times[sync][-1]]
    reached = [[line["val_loss"] for line in lines[run]] for run in (late, sync)]
    level = max(map(min, reached))
    for run, losses, at in zip((late, sync), reached, costs["simulated_seconds_to_loss"], strict=True):
        first = next(i for i, loss in enumerate(losses) if loss <= level)
        assert at == ([0.0, *times[run]])[first]
    assert f"federated: all reach a validation loss of {level:.3f}" in found.notes
    assert "over simulated time" in compare_page([late, sync])
    assert "over simulated time" not in compare_page([sync])

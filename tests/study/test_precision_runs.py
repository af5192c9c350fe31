"""Whole runs in each precision: rounds with evaluations between them, facts, resumption, chat, scores and export."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from tests.study.tiny_runs import kill_at, outcome, recipe

from fedloom.models import quantised
from fedloom.models.load import load_base
from fedloom.study.plan import plan
from fedloom.study.run import run_recipe
from fedloom.study.session import open_session
from fedloom.study.tuned import evaluate_run, export_lora, export_merged, open_tuned

absent = any(importlib.util.find_spec(name) is None for name in quantised._NEEDED)
installed = pytest.mark.skipif(absent, reason=f"needs {quantised.INSTALL}")

PRECISIONS = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
    "nf4": {"dtype": "float32", "quantization": "nf4"},
    "nf4 in float16": {"dtype": "float16", "quantization": "nf4"},
}
FEW = {"arms": ["federated"], "rounds": 2, "method": "fedavg", "evaluate": {"limit": 1}}


@pytest.fixture(scope="module")
def exact(home, tmp_path_factory):
    return run_recipe(recipe(home, tmp_path_factory.mktemp("exact") / "run", dtype="float32", **FEW))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=installed if "quantization" in v else ()) for n, v in PRECISIONS.items()]
)
def test_a_run_follows_float32_and_says_what_it_computed_in(home, tmp_path, exact, name):
    values = PRECISIONS[name]
    run = run_recipe(recipe(home, tmp_path / "run", **FEW, **values))
    got, want = (outcome(one) for one in (run, exact))
    losses, wanted = ([line.get("train_loss") for line in one["rounds"] if "train_loss" in line] for one in (got, want))
    assert losses == pytest.approx(wanted, rel=2e-2) and losses != wanted
    model = got["result"]["model"]
    assert (model["dtype"], model["quantization"]) == (values["dtype"], values.get("quantization", "none"))
    assert model["total_parameters"] == want["result"]["model"]["total_parameters"]
    assert model["weight_bytes"] < want["result"]["model"]["weight_bytes"]
    assert got["result"]["costs"]["flops"] == want["result"]["costs"]["flops"]
    assert all(
        ("skipped_steps" in line) == (values["dtype"] == "float16") for line in got["rounds"] if "tokens" in line
    )


@installed
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(home, tmp_path):
    told = {**FEW, **PRECISIONS["nf4 in float16"]}
    whole = run_recipe(recipe(home, tmp_path / "whole", **told))
    again = recipe(home, tmp_path / "run", **told)
    assert kill_at(again, "after line federated 2") == -9
    run_recipe(again, resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(whole)


@installed
def test_every_command_opens_a_run_on_packed_weights(home, tmp_path):
    run = run_recipe(recipe(home, tmp_path / "run", **FEW, **PRECISIONS["nf4"]))
    tuned = open_tuned(run)
    assert tuned.base.quantization == "nf4"
    assert isinstance(tuned.answer([{"role": "user", "content": "Say river"}], max_new_tokens=3), str)
    loss = outcome(run)["result"]["arms"]["federated"]["loss"]
    assert evaluate_run(run).outcome["loss"] == pytest.approx(loss, rel=1e-6)
    export_lora(run, tmp_path / "lora")
    export_merged(run, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged, plain = open_tuned(tmp_path / "lora", model=str(home / "model"), dtype="float32"), tmp_path / "merged"
    ids = torch.arange(4, 12)[None]
    with torch.no_grad(), merged.adapter.bound({k: x[None] for k, x in merged.tree.items()}) as model:
        want = model(input_ids=ids).logits
        got = load_base(str(plain), dtype="float32").model(input_ids=ids).logits
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())  # the original weights, not those read back


@installed
def test_a_plan_tells_what_the_layers_are_stored_in(home, tmp_path):
    session = open_session(recipe(home, tmp_path / "run", **FEW, **PRECISIONS["nf4"]))
    planned = plan(session, probe=False)
    assert planned.quantization == "nf4"
    assert "layers in nf4 (" in planned.lines[0] and "computed in" in planned.lines[0]

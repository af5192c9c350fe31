"""Whole runs without gradients: the folder they leave, every command that opens it, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file
from tests.study.tiny_runs import kill_at, outcome, recipe

from fedloom.study import checkpoint
from fedloom.study.build import algorithm_of
from fedloom.study.load import validate_text
from fedloom.study.plan import plan
from fedloom.study.recipe import Recipe
from fedloom.study.run import run_recipe
from fedloom.study.session import initial_state, open_session
from fedloom.study.tuned import evaluate_run, export_merged, open_tuned

IDS = torch.arange(4, 44).reshape(2, 20)


def told(home: Path, out: Path, method: str = "fedkseed", **more: Any) -> Recipe:
    values = {
        "method": method,
        "client": {"learning_rate": 3e-3, "per_device_train_batch_size": 2},
        "adapter": {"num_seeds": 32} if method != "fedmezo" else {},
        "rounds": 2,
        "local_steps": 3,
        "arms": ["local", "federated"],
        "evaluate": {"score": "exact", "max_new_tokens": 3, "limit": 2},
    }
    return recipe(home, out, **{**values, **more})


@pytest.fixture(scope="module")
def done(home) -> Path:
    return run_recipe(told(home, home / "kseed"))


def trained(done: Path, home: Path) -> Any:
    session = open_session(told(home, home / "unused"))
    start = initial_state(algorithm_of(session.recipe), session.adapter, session.recipe.seed)
    state, _ = checkpoint.load(done / "checkpoints" / "federated", start)
    assert int((state.params["seed_coefficients"] != 0).sum()) > 3
    session.adapter.go(state.params["seed_coefficients"])
    return session.adapter.model


def test_the_run_has_a_model_that_transformers_loads_bit_for_bit(done, home):
    assert not (done / "adapter").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(done / "model", dtype="float64")
    want = dict(trained(done, home).named_parameters())
    found = dict(model.named_parameters())
    assert want.keys() == found.keys()
    assert all(torch.equal(leaf, want[name]) for name, leaf in found.items())
    base = dict(transformers.AutoModelForCausalLM.from_pretrained(home / "model", dtype="float64").named_parameters())
    assert all(not torch.equal(leaf, base[name]) for name, leaf in found.items()), "every weight has moved"
    ours = transformers.AutoTokenizer.from_pretrained(done / "model")
    assert ours("abc")["input_ids"] == transformers.AutoTokenizer.from_pretrained(home / "model")("abc")["input_ids"]


def test_messages_give_the_same_run_and_bytes(done, home):
    run = run_recipe(told(home, home / "kseed_far", runtime={"kind": "loopback"}))
    want, got = outcome(done)["result"], outcome(run)["result"]
    a, b = (load_file(place / "model" / "model.safetensors") for place in (done, run))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-9
    for arm in want["arms"]:
        assert want["arms"][arm]["loss"] == pytest.approx(got["arms"][arm]["loss"], rel=1e-8)


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(done, home, tmp_path):
    again = told(home, tmp_path / "run")
    assert kill_at(again, "after line federated 1") == -signal.SIGKILL
    run_recipe(again, resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(done)


def test_every_command_opens_it(done, home, tmp_path):
    with torch.no_grad():
        want = trained(done, home)(IDS).logits
    for place, more in ((done, {}), (done, {"checkpoint": "last"}), (done / "model", {"dtype": "float64"})):
        tuned = open_tuned(place, **more)
        with torch.no_grad(), tuned.adapter.bound({k: leaf[None] for k, leaf in tuned.tree.items()}) as model:
            assert float((model(IDS).logits - want).abs().max()) < 1e-9, place
        assert isinstance(tuned.answer([{"role": "user", "content": "Say river"}], max_new_tokens=3), str)
    loss = outcome(done)["result"]["arms"]["federated"]["loss"]
    assert evaluate_run(done).outcome["loss"] == pytest.approx(loss, rel=1e-9)
    assert evaluate_run(done, checkpoint="last").outcome["loss"] == pytest.approx(loss, rel=1e-9)
    export_merged(done, tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()


def test_what_is_planned_is_what_the_run_sends(done, home, tmp_path):
    planned = plan(open_session(told(home, tmp_path / "x")), probe=False)
    assert planned.clients_per_batch == 1
    assert planned.adapter == "seed_space, every weight of the model by 32 seeds"
    sent = outcome(done)["result"]["costs_per_arm"]["federated"]
    assert planned.bytes_up_per_client_round == pytest.approx(sent["bytes_up_per_client_round"], rel=0.05)


@pytest.mark.parametrize("method", ["fedmezo", "fedkseed_pro"])
def test_other_methods_run(home, tmp_path, method):
    more = {"adapter": {"kind": "prompt_tuning"}} if method == "fedmezo" else {}
    run = run_recipe(told(home, tmp_path / "run", method=method, arms=["federated", "global"], **more))
    losses = {arm: one["loss"] for arm, one in json.loads((run / "result.json").read_text())["arms"].items()}
    assert len(set(losses.values())) == 2, "each arm has trained in its way"
    assert (run / ("adapter" if method == "fedmezo" else "model")).is_dir()


def plain(**values: Any) -> Recipe:
    return Recipe(**{"model": "m", "data": {"path": "d.jsonl"}, "local_steps": 3, **values})


def test_the_methods_fill_their_slots() -> None:
    kseed, pro, mezo = (plain(method=name) for name in ("fedkseed", "fedkseed_pro", "fedmezo"))
    assert (kseed.adapter.kind, kseed.adapter.num_seeds, kseed.adapter.seed_sampling) == ("seed_space", 4096, "uniform")
    assert (kseed.client.kind, kseed.client.optim, kseed.client.zo_eps, kseed.client.max_grad_norm) == (
        "zo",
        "sgd",
        5e-4,
        None,
    )
    assert (kseed.dtype, kseed.adapter.direction_seed) == ("float32", 42)
    assert (kseed.compress.up, kseed.compress.down, kseed.compress.error_feedback) == (
        ["nonzero", "zstd"],
        ["zstd"],
        None,
    )
    assert (pro.adapter.num_seeds, pro.adapter.seed_sampling) == (1024, "magnitude")
    assert plain(method="fedkseed", seed=7).adapter.direction_seed == 7
    assert plain(method="fedkseed", seed=7, adapter={"direction_seed": 1}).adapter.direction_seed == 1
    assert (mezo.adapter.kind, mezo.client.kind, mezo.client.zo_eps, mezo.dtype) == ("lora", "mezo", 1e-3, "auto")
    assert plain(method="fedmezo", client={"optim": "adam", "shared": "lora_A"}).client.adam_beta1 == 0.9


def test_a_method_on_the_command_line_leaves_out_what_recipes_say_of_gradients() -> None:
    text = (
        "model: builtin\nlocal_steps: 1\nadapter: {kind: lora, lora_r: 4}\n"
        "client: {optim: adamw, learning_rate: 0.01, max_grad_norm: 1.0, per_device_train_batch_size: 3}\n"
    )
    made, notes = validate_text(text, ["method=fedkseed", "client.learning_rate=1e-5"])
    assert (made.adapter.kind, made.adapter.lora_r, made.client.kind) == ("seed_space", None, "zo")
    assert (made.client.optim, made.client.learning_rate, made.client.max_grad_norm) == ("sgd", 1e-5, None)
    assert made.client.per_device_train_batch_size == 3
    assert any("without the recipe's adapter.kind, adapter.lora_r, client.optim" in note for note in notes)
    made, _ = validate_text(text, ["method=fedmezo"])
    assert (made.adapter.lora_r, made.client.kind, made.client.learning_rate) == (4, "mezo", 1e-4)
    assert validate_text(text, ["method=fedprox"])[0].client.learning_rate == 0.01
    again, _ = validate_text(text + "method: fedavg\n", ["method=fedavg"])
    assert again.client.learning_rate == 0.01
    own = "model: builtin\nlocal_steps: 1\nmethod: fedmezo\nclient: {learning_rate: 0.5}\n"
    assert validate_text(own, ["method=fedmezo"])[0].client.learning_rate == 0.5


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "fedkseed", "adapter": {"kind": "lora"}}, "client.kind: zo, but adapter.kind is lora"),
        ({"adapter": {"kind": "seed_space"}}, "client.kind: sgd, but adapter.kind is seed_space"),
        ({"method": "fedmezo", "adapter": {"kind": "seed_space"}}, "client.kind: mezo, but adapter.kind is seed_space"),
        ({"method": "fedkseed", "data": {"path": "d", "type": "preference"}}, "whose reference is the untouched base"),
        ({"method": "fedkseed", "dtype": "bfloat16"}, "dtype: bfloat16, but steps of seed_space"),
        ({"method": "fedkseed", "client": {"optim": "adamw"}}, "client.optim: adamw, but client.kind zo"),
        ({"method": "fedkseed", "client": {"weight_decay": 0.1}}, "client.weight_decay: 0.1, but weights that decay"),
        ({"method": "fedkseed", "client": {"max_grad_norm": 1.0}}, "client.max_grad_norm: 1.0 would have no effect"),
        ({"method": "fedmezo", "client": {"prox_mu": 0.1}}, "client.prox_mu: 0.1 would have no effect"),
        ({"method": "fedmezo", "client": {"optimizer_state": "kept"}}, "client.optimizer_state: kept, but clients of"),
        ({"method": "fedmezo", "aggregate": {"kind": "fednova"}}, "aggregate.kind: fednova, but clients of kind mezo"),
        ({"method": "fedkseed", "aggregate": {"weighting": "loss"}}, "aggregate.weighting: loss, but clients of kind"),
        ({"method": "fedkseed", "aggregate": {"kind": "flora"}}, "adapter.kind is seed_space"),
        (
            {"method": "fedkseed_pro", "server": {"kind": "optimize", "server_optim": "adam"}},
            "such counts are no steps",
        ),
        ({"client": {"zo_eps": 1e-3}}, "client.zo_eps: 0.001 would have no effect: client.kind is sgd"),
        ({"adapter": {"num_seeds": 5}}, "adapter.num_seeds: 5 would have no effect: kind is lora"),
        ({"method": "fedkseed", "compress": {"up": ["nonzero", "top_k"]}}, "nonzero, top_k: one of them is enough"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        plain(**values)
    assert said in str(error.value)

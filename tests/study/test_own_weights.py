"""Whole runs of kinds that train the model's own weights: what lies in the folder, and every command that opens it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file
from tests.study.tiny_runs import outcome, recipe

from fedloom.errors import UserError
from fedloom.models.load import load_base
from fedloom.study import checkpoint
from fedloom.study.benchmarks import kind_of, open_target
from fedloom.study.build import algorithm_of, width_of
from fedloom.study.plan import plan
from fedloom.study.run import run_recipe
from fedloom.study.session import initial_state, open_session
from fedloom.study.tuned import evaluate_run, export_lora, export_merged, open_tuned

KINDS = {"full": {"kind": "full"}, "last_layers": {"kind": "last_layers", "trainable_layers": 1}}
IDS = torch.arange(4, 44).reshape(2, 20)


def told(kind: str, home: Path, out: Path, **more):
    values = {
        "adapter": KINDS[kind],
        "rounds": 2,
        "local_steps": 1,
        "arms": ["local", "federated"],
        "evaluate": {"score": "none", "max_new_tokens": None, "limit": None},
    }
    return recipe(home, out, **{**values, **more})


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def done(kind, home) -> Path:
    return run_recipe(told(kind, home, home / kind))


def wanted_logits(done, kind, home):
    session = open_session(told(kind, home, home / "unused"))
    start = initial_state(algorithm_of(session.recipe), session.adapter, session.recipe.seed)
    state, _ = checkpoint.load(done / "checkpoints" / "federated", start)
    assert max(float((state.params[name] - leaf).abs().max()) for name, leaf in start.params.items()) > 1e-3
    with torch.no_grad(), session.adapter.bound({k: leaf[None] for k, leaf in state.params.items()}) as ours:
        return ours(IDS).logits


def test_the_run_has_a_model_that_transformers_loads(done, kind, home):
    assert not (done / "adapter").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(done / "model")
    assert model.dtype == torch.float64
    with torch.no_grad():
        assert float((model(IDS).logits - wanted_logits(done, kind, home)).abs().max()) < 1e-9
    ours = transformers.AutoTokenizer.from_pretrained(done / "model")
    assert ours("abc")["input_ids"] == transformers.AutoTokenizer.from_pretrained(home / "model")("abc")["input_ids"]


def test_every_command_opens_it(done, kind, home, tmp_path):
    want = wanted_logits(done, kind, home)
    for place, more in ((done, {}), (done, {"checkpoint": "last"}), (done / "model", {"dtype": "float64"})):
        tuned = open_tuned(place, **more)
        with torch.no_grad(), tuned.adapter.bound({k: leaf[None] for k, leaf in tuned.tree.items()}) as model:
            assert float((model(IDS).logits - want).abs().max()) < 1e-9, place
        assert isinstance(tuned.answer([{"role": "user", "content": "Say river"}], max_new_tokens=3), str)
    loss = outcome(done)["result"]["arms"]["federated"]["loss"]
    assert evaluate_run(done).outcome["loss"] == pytest.approx(loss, rel=1e-9)
    assert evaluate_run(done, base_only=True).outcome["loss"] != pytest.approx(loss, rel=1e-3)
    assert kind_of(str(done / "model")) == "model"
    target = open_target(str(done))
    assert len(target.about["adapter_sha256"]) == 64
    with pytest.raises(UserError, match="is a model itself"):
        open_tuned(done, model="builtin")
    for name, write in (("same", export_lora), ("merged", export_merged)):
        write(done, tmp_path / name)
        exported = load_base(str(tmp_path / name), dtype="float64").model
        with torch.no_grad():
            assert float((exported(IDS).logits - want).abs().max()) < 1e-3, name


def test_what_is_planned(kind, home, tmp_path):
    told_lr = told(kind, home, tmp_path / "x", client={"learning_rate": None})
    assert told_lr.client.learning_rate == 2e-5
    session = open_session(told(kind, home, tmp_path / "x"))
    planned = plan(session, probe=False)
    size = 8 * planned.trainable_parameters  # float64 here
    assert size < planned.bytes_up_per_client_round < 1.1 * size + 8000
    assert kind.split("_")[0] in planned.adapter


@pytest.mark.parametrize("method", ["ffa_lora", "rolora", "fedsa_lora", "flora", "flex_lora", "fedex_lora", "het_lora"])
def test_methods_on_loras_factors_are_refused(kind, home, tmp_path, method):
    with pytest.raises(ValidationError, match=f"works on LoRA's factors and adapter.kind is {kind}"):
        told(kind, home, tmp_path / "x", method=method)


def test_settings_of_other_kinds_are_refused(kind, home, tmp_path):
    for setting, value in (("lora_r", 4), ("client_ranks", "uniform"), ("num_virtual_tokens", 3)):
        with pytest.raises(ValidationError, match=f"would have no effect: kind is {kind}"):
            told(kind, home, tmp_path / "x", adapter={**KINDS[kind], setting: value})


def test_a_run_with_bottlenecks_opens_everywhere_and_merges_nowhere(home, tmp_path):
    settings = {"kind": "bottleneck", "reduction_factor": 8, "non_linearity": "silu", "bottleneck_after": "mlp"}
    again = told("full", home, tmp_path / "run", adapter=settings, client={"learning_rate": 0.1}, local_steps=2)
    run = run_recipe(again)
    tuned = open_tuned(run)
    want = outcome(run)["result"]["arms"]["federated"]["loss"]
    assert evaluate_run(run).outcome["loss"] == pytest.approx(want, rel=1e-9)
    with torch.no_grad(), tuned.adapter.bound({k: leaf[None] for k, leaf in tuned.tree.items()}) as model:
        logits = model(IDS).logits
    with torch.no_grad():
        assert float((tuned.base.model(IDS).logits - logits).abs().max()) > 1e-4
    assert load_file(run / "adapter" / "adapter_model.safetensors")["model.layers.1.mlp.adapter_up.weight"].shape == (
        32,
        4,
    )
    export_lora(run, tmp_path / "again")
    copy = open_tuned(tmp_path / "again", model=str(home / "model"), dtype="float64")
    assert all(torch.equal(copy.tree[name], leaf) for name, leaf in tuned.tree.items())
    assert open_target(str(tmp_path / "again"), model=str(home / "model")).kind == "adapter"
    with pytest.raises(UserError, match="cannot be added to the weights"):
        export_merged(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValidationError, match="but bottleneck_size is 3: leave one of them out"):
        told("full", home, tmp_path / "x", adapter={**settings, "bottleneck_size": 3})
    sized = told("full", home, tmp_path / "x", adapter={"kind": "bottleneck", "bottleneck_size": 3})
    assert sized.adapter.reduction_factor is None
    assert told("full", home, tmp_path / "x", adapter={"kind": "bottleneck"}).adapter.reduction_factor == 16
    assert sized.client.learning_rate == 1e-2
    assert plan(open_session(sized), probe=False).adapter == "bottleneck size 3 after attention and mlp"


def test_a_pass_of_large_models_has_fewer_clients(home, monkeypatch, tmp_path):
    session = open_session(told("full", home, tmp_path / "x"))
    assert width_of(session.recipe, session.federation, session.base) == 3
    monkeypatch.setattr("fedloom.study.build.WEIGHTS_PER_PASS", 2 * session.base.num_parameters)
    assert width_of(session.recipe, session.federation, session.base) == 2
    monkeypatch.setattr("fedloom.study.build.WEIGHTS_PER_PASS", 10)
    assert width_of(session.recipe, session.federation, session.base) == 1

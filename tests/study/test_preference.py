"""Preference data trains by DPO through the command line; what has no pairs has none of its settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.study.tiny_runs import WORDS, recipe

from fedloom.cli import main
from fedloom.errors import UserError
from fedloom.models.load import load_base
from fedloom.study.load import validate_text
from fedloom.study.recipe import load_recipe
from fedloom.study.run import run_recipe
from fedloom.study.tuned import evaluate_run, open_tuned

UNSCORED = {"score": "none", "limit": None, "max_new_tokens": None}
PAIRS = [
    {
        "instruction": f"Say the word {WORDS[i % 10]} {i} times",
        "chosen": f"{WORDS[i % 10]} " * (1 + i % 4) + f"and {i}",
        "rejected": "no, I will not" + " at all" * (i % 3),
        "category": ["a", "b", "c"][i % 3],
    }
    for i in range(60)
]


def run(home: Path, out: Path, **values: Any) -> dict[str, Any]:
    place = home / "pairs.json"
    place.write_text(json.dumps(PAIRS))
    told = {
        "data": {"path": str(place), "type": "preference"},
        "method": "fedavg",
        "evaluate": UNSCORED,
        **values,
    }
    return json.loads((run_recipe(recipe(home, out, **told)) / "result.json").read_text())


def test_all_arms_train_on_pairs_and_every_figure_is_there(home: Path, tmp_path: Path) -> None:
    result = run(home, tmp_path / "a", dpo={"beta": 0.5})
    base, federated = result["arms"]["base"], result["arms"]["federated"]
    assert base["loss"] == pytest.approx(math.log(2)) and base["preference_accuracy"] == 0.5
    assert base["reward_margin"] == 0 and base["perplexity"] is None
    assert federated["preference_accuracy"] > 0.9 and federated["reward_margin"] > 0.1
    assert federated["loss"] < 0.6
    assert set(federated["preference_accuracy_per_client"]) == {"a", "b", "c"}
    for arm in ("local", "global"):
        assert result["arms"][arm]["own_test"]["preference_accuracy"] > 0.5
    lines = [json.loads(line) for line in (tmp_path / "a" / "rounds.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["arm"] == "federated"][-1]
    assert last["preference_accuracy"] > 0.9 and last["reward_chosen"] > last["reward_rejected"]
    assert last["samples"] == 3 * 2 * 2 and 0 < last["train_loss"] < math.log(2)  # pairs, not sides
    text = load_recipe(tmp_path / "a").dpo
    assert (text.loss_type, text.beta, text.label_smoothing) == ("sigmoid", 0.5, 0.0)
    again = evaluate_run(tmp_path / "a").outcome
    assert again["preference_accuracy"] == federated["preference_accuracy"]
    assert again["loss"] == pytest.approx(federated["loss"], rel=1e-9)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "ranked right" in page and "perplexity" not in page.split("</table>")[0]


def test_messages_and_one_at_a_time_give_the_same(home: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "rounds": 2, "method": "flora", "dpo": {"loss_type": "ipo"}, "arms": ["federated"],
        "client": {"gradient_accumulation_steps": 2},
    }  # fmt: skip
    each = [
        run(home, tmp_path / kind, runtime={"kind": kind}, **settings)["arms"]["federated"]
        for kind in ("batched", "sequential", "loopback")
    ]
    assert each[0]["reward_margin"] != 0
    for other in each[1:]:
        assert other["loss"] == pytest.approx(each[0]["loss"], rel=1e-9)
        assert other["reward_margin"] == pytest.approx(each[0]["reward_margin"], rel=1e-7)


def test_a_resumed_run_is_the_same_to_the_bit(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom.study import run as module

    settings: dict[str, Any] = {"arms": ["federated"], "method": "fedex_lora", "checkpoint": {"save_rounds": 1}}
    want = run(home, tmp_path / "whole", **settings)["arms"]
    line = module._Runner._line

    def stopped(self: Any, arm: str, round: int, *rest: Any) -> None:
        line(self, arm, round, *rest)
        if round == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module._Runner, "_line", stopped)
    with pytest.raises(Exception, match="stopped"):
        run(home, tmp_path / "cut", **settings)
    monkeypatch.undo()
    run_recipe(load_recipe(tmp_path / "cut"), resume=tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "result.json").read_text())["arms"] == want


def test_preference_tuning_starts_from_a_run_and_exports_one_adapter_for_the_base(home: Path, tmp_path: Path) -> None:
    run_recipe(recipe(home, tmp_path / "sft", arms=["federated"], evaluate=UNSCORED))
    start = str(tmp_path / "sft")
    result = run(home, tmp_path / "dpo", start_from=start, arms=["base", "federated"], adapter={"lora_r": 3})
    assert result["arms"]["base"]["loss"] == pytest.approx(math.log(2)), "the reference is not the merged model"
    assert result["arms"]["federated"]["preference_accuracy"] > 0.9
    config = json.loads((tmp_path / "dpo" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 3 + 8

    ids = torch.arange(5, 45).reshape(2, 20)
    model = load_base(str(home / "model"), dtype="float64")
    from peft import PeftModel

    stacked = PeftModel.from_pretrained(model.model, tmp_path / "dpo" / "adapter")
    got = stacked(input_ids=ids).logits
    sft = open_tuned(tmp_path / "sft", dtype="float64")
    with torch.no_grad(), sft.adapter.bound({name: leaf[None] for name, leaf in sft.tree.items()}) as tuned:
        before = tuned(input_ids=ids).logits
    assert float((got - before).abs().max()) > 1e-3, "the export is the SFT adapter alone"
    from fedloom.study.session import open_session
    from fedloom.study.tuned import state_of

    session = open_session(load_recipe(tmp_path / "dpo"))
    state = state_of(tmp_path / "dpo", session.recipe, session.adapter, "last")
    with torch.no_grad(), session.adapter.bound({n: leaf[None] for n, leaf in state.params.items()}) as trained:
        want = trained(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # adapters are written as float32
    again = evaluate_run(tmp_path / "dpo").outcome
    assert again["loss"] == pytest.approx(result["arms"]["federated"]["loss"], rel=1e-9)

    weights = tmp_path / "sft" / "adapter" / "adapter_model.safetensors"
    (tmp_path / "dpo" / "result.json").unlink()
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match="not what the run began with"):
        run_recipe(load_recipe(tmp_path / "dpo"), resume=tmp_path / "dpo")


def test_what_cannot_be_started_from_is_refused_with_the_way_out(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        run(home, tmp_path / "x", start_from=str(tmp_path / "none"))
    wide = {"adapter": {"lora_target_modules": "all-linear"}, "rounds": 1, "arms": ["federated"], "evaluate": UNSCORED}
    run_recipe(recipe(home, tmp_path / "wide", **wide))
    with pytest.raises(UserError, match="layers") as caught:
        run(home, tmp_path / "x", start_from=str(tmp_path / "wide"))
    assert "adapter.lora_target_modules=[down_proj, gate_proj" in caught.value.hint
    assert not (tmp_path / "x").exists()


def refused(text: str) -> str:
    with pytest.raises(UserError) as caught:
        validate_text(f"model: builtin\nlocal_steps: 1\n{text}")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {path: builtin:skills, type: preference}\ndpo: {loss_type: hinge, label_smoothing: 0.1}", "hinge"),
        ("data: {path: builtin:skills, type: preference, train_on_inputs: true}", "it cancels"),
        ("data: {path: p.jsonl, type: alpaca}\nbeta: 0.2", "data.type is alpaca"),
        ("data: {path: p.jsonl, type: chat}\nbest_by: preference_accuracy", "only preference rows have pairs"),
        ("start_from: runs/sft\nadapter: {kind: prompt_tuning}", "adapter.kind is prompt_tuning"),
        ("data: {path: builtin:skills, type: preference}\nloss_type: sigmod", "sigmoid"),
    ],
)
def test_settings_without_effect_are_refused(text: str, said: str) -> None:
    assert said in refused(text)


def test_rows_that_read_as_pairs_are_compared_and_one_column_of_them_is_imitated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"count to {i} ", "chosen": "one " * (1 + i % 4), "rejected": "no"} for i in range(40)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("r.yaml").write_text("model: builtin\ndata: {path: p.jsonl}\nlocal_steps: 1\nrounds: 1\n", encoding="utf-8")
    assert main(["run", "r.yaml", "threads=1", "best_by=preference_accuracy", "--format", "json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["recipe"]["data"]["type"] == "preference" and "DPO on pairs" in told.err
    assert "rejected  ' no</s>'" in told.err and "ranked right" in told.err
    assert main(["preview", "r.yaml", "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    [pair] = shown["examples"]
    assert shown["read_as"] == "preference" and pair["rejected"][-1]["text"].strip().startswith("no")
    imitate = ["run", "r.yaml", "threads=1", "data.columns.completion=chosen", "score=none", "output_dir=b"]
    assert main([*imitate, "beta=0.3"]) == 2
    assert "dpo.beta would have no effect" in capsys.readouterr().err and not Path("b").exists()
    assert main([*imitate, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["read_as"] == "prompt_completion"

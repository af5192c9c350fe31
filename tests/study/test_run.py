"""A whole run on a tiny model: arms, folder, resume after real kills, and what happens when things go wrong."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.study.tiny_runs import kill_at, outcome, recipe, rows

from fedloom.errors import FedloomError, RunError, UserError
from fedloom.study import checkpoint
from fedloom.study import run as runs
from fedloom.study.progress import Silent
from fedloom.study.run import run_recipe


@pytest.fixture(scope="module")
def plain(home) -> Path:
    """An uninterrupted run."""
    return run_recipe(recipe(home, home / "plain"))


def test_the_run_folder_has_what_it_should(plain, home):
    result = json.loads((plain / "result.json").read_text())
    assert result["schema"] == 1
    assert result["status"] == "done"
    assert list(result["arms"]) == ["base", "local", "federated", "global"]
    for arm in result["arms"].values():
        assert set(arm["score_per_client"]) == {"a", "b", "c"}
        assert 0 <= arm["score"] <= 1
        assert arm["loss"] > 0
    losses = {arm: values["loss"] for arm, values in result["arms"].items()}
    assert losses["federated"] < losses["base"] - 0.05
    assert losses["global"] < losses["base"] - 0.05
    costs = result["costs"]
    trained = load_file(plain / "adapter" / "adapter_model.safetensors")
    assert costs["trainable_parameters"] == sum(leaf.numel() for leaf in trained.values())
    assert costs["bytes_up_per_client_round"] > 8 * costs["trainable_parameters"], "float64 weights and a frame"
    assert costs["bytes_up_per_client_round"] < 8 * costs["trainable_parameters"] + 4000
    assert costs["train_tokens"] > 0
    rounds = [json.loads(line) for line in (plain / "rounds.jsonl").read_text().splitlines()]
    seen = [(line["arm"], line["round"]) for line in rounds]
    assert seen == [("base", 0)] + [(arm, r) for arm in ("local", "federated", "global") for r in range(4)]
    assert all(line["val_loss"] is not None for line in rounds)
    for line in rounds:
        each = line["val_loss_per_client"]
        assert set(each) == {"a", "b", "c"}
        assert min(each.values()) <= line["val_loss"] <= max(each.values())
        assert "score_per_client" not in line  # nothing is scored on validation rows unless it is asked for
    untouched = [line["val_loss_per_client"] for line in rounds if line["round"] == 0]
    assert all(each == pytest.approx(untouched[0]) for each in untouched), "all arms start from the same model"
    report = (plain / "report.html").read_text()
    assert "federated" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert sorted(p.name for p in (plain / "checkpoints" / "federated").glob("round_*"))[-1] == "round_00003"


def test_a_short_run_draws_its_report_once_and_leaves_what_stays_out_of_collection(home, monkeypatch):
    frozen: list[int] = []
    monkeypatch.setattr(runs, "write_report", lambda path: frozen.append(gc.get_freeze_count()))
    short = {"rounds": 1, "arms": ["base", "federated"]}
    run_recipe(recipe(home, home / "short", **short))
    assert len(frozen) == 1 and frozen[0] > 100_000
    assert gc.get_freeze_count() == 0
    monkeypatch.setattr(runs, "REPORT_SECONDS", 0.0)
    run_recipe(recipe(home, home / "long", **short))
    assert len(frozen) == 1 + 4, "after the base, after the round, after the arm, at the end"


def test_the_adapter_folder_is_one_of_peft_with_the_same_logits(plain, home):
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float64)
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        before = model(ids).logits
    tuned = peft.PeftModel.from_pretrained(model, plain / "adapter", autocast_adapter_dtype=False)
    with torch.no_grad():
        after = tuned.double()(ids).logits
    assert float((after - before).abs().max()) > 1e-3

    from fedloom.rounds import initial_state
    from fedloom.study.build import algorithm_of
    from fedloom.study.session import open_session

    session = open_session(recipe(home, home / "unused"))
    start = initial_state(algorithm_of(session.recipe), session.adapter, session.recipe.seed)
    state, _ = checkpoint.load(plain / "checkpoints" / "federated", start)
    with torch.no_grad(), session.adapter.bound({k: leaf[None] for k, leaf in state.params.items()}) as ours:
        assert float((ours(ids).logits - after).abs().max()) < 1e-9


@pytest.mark.parametrize("kind", ["sequential", "loopback"])
def test_other_runtimes_give_the_same_run(plain, home, kind):
    run = run_recipe(recipe(home, home / kind, runtime={"kind": kind}))
    want, got = outcome(plain), outcome(run)
    a = load_file(plain / "adapter" / "adapter_model.safetensors")
    b = load_file(run / "adapter" / "adapter_model.safetensors")
    # norms are in float32 inside, and how many rows are packed together differs
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-6
    for arm in want["result"]["arms"]:
        assert want["result"]["arms"][arm]["loss"] == pytest.approx(got["result"]["arms"][arm]["loss"], rel=1e-6)
        for cost in ("bytes_up_per_client_round", "bytes_down_per_client_round", "train_tokens"):
            assert want["result"]["costs_per_arm"][arm][cost] == got["result"]["costs_per_arm"][arm][cost], cost


# ---- kills -----------------------------------------------------------------------------------------------------------


POINTS = [
    "local: round 2 4",  # inside a round of an arm
    "after line federated 2",  # a round's line is there, its checkpoint is not
    "writing 7",  # half a checkpoint
    "federated: test 3",  # all rounds done, the arm is not
    "global: round 1 1",
    "after line global 0",
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(plain, home, tmp_path, point):
    told = recipe(home, tmp_path / "run")
    assert kill_at(told, point) == -signal.SIGKILL
    assert not (tmp_path / "run" / "result.json").exists()
    run_recipe(told, resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(plain)
    leftovers = list((tmp_path / "run").rglob("*.tmp"))
    assert not leftovers


def test_killed_many_times_in_one_life(plain, home, tmp_path):
    told = recipe(home, tmp_path / "run")
    kill_at(told, "after line local 0")
    for point in ("local: round 3 2", "writing 2", "after line federated 1", "global: round 2 2"):
        kill_at(told, point, resume=tmp_path / "run")
    run_recipe(told, resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(plain)
    again = run_recipe(told, resume=tmp_path / "run")  # a finished run is left alone
    assert outcome(again) == outcome(plain)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(plain, home, tmp_path, caplog):
    told = recipe(home, tmp_path / "run")
    kill_at(told, "federated: test 3")
    newest = tmp_path / "run" / "checkpoints" / "federated" / "round_00003" / "state.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    run_recipe(told, resume=tmp_path / "run")
    assert "round_00003 is damaged" in caplog.text
    assert outcome(tmp_path / "run") == outcome(plain)


def test_ctrl_c_finishes_the_round_and_can_be_resumed(plain, home, tmp_path):
    told = recipe(home, tmp_path / "run")
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()

    def body() -> None:
        class Press(Silent):
            def advance(self, done: int, total: int, what: str) -> None:
                if what == "federated: round 2" and done == 2:
                    os.kill(os.getpid(), signal.SIGINT)

        try:
            run_recipe(told, display=Press())
        except FedloomError as error:
            theirs.send((error.exit_code, str(error)))

    process = context.Process(target=body)
    process.start()
    assert mine.poll(100)
    code, text = mine.recv()
    process.join(60)
    assert code == 130
    assert f"fedloom run --resume {tmp_path / 'run'}" in text
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert (lines[-1]["arm"], lines[-1]["round"]) == ("federated", 2), "the round was not finished"
    assert checkpoint.rounds(tmp_path / "run" / "checkpoints" / "federated")[-1] == 2
    run_recipe(told, resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(plain)


# ---- what can go wrong -----------------------------------------------------------------------------------------------


def test_changed_data_is_not_resumed(home, tmp_path):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows(60)))
    told = recipe(home, tmp_path / "run", data={"path": str(data)})
    kill_at(told, "after line federated 1")
    data.write_text(json.dumps(rows(61)))
    with pytest.raises(UserError, match="has changed"):
        run_recipe(told, resume=tmp_path / "run")


def test_a_run_folder_that_exists_is_left_alone(plain, home):
    before = outcome(plain)
    with pytest.raises(UserError, match="holds a run already"):
        run_recipe(recipe(home, plain))
    assert outcome(plain) == before


def test_nothing_is_written_for_bad_input(home, tmp_path):
    for values, words in [
        ({"data": {"path": str(tmp_path / "none.json")}}, "none.json"),
        ({"clients_per_round": 9}, "clients_per_round 9, but the split has 3 clients"),
        ({"adapter": {"lora_target_modules": ["q_prj"]}}, "did you mean 'q_proj'"),
        ({"data": {"max_length": 16}}, "max_length"),
        ({"model": str(tmp_path)}, "config.json"),
    ]:
        with pytest.raises(UserError, match=words):
            run_recipe(recipe(home, tmp_path / "run", **values))
        assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_with_the_reason_and_keeps_its_checkpoint(home, tmp_path):
    wild = recipe(
        home,
        tmp_path / "run",
        method="fedavg",
        arms=["federated"],
        client={"learning_rate": 1e200, "optim": "sgd", "max_grad_norm": None, "lr_scheduler_type": "constant"},
    )
    with pytest.raises(RunError, match=r"none of 3 clients finished|not finite|non-finite"):
        run_recipe(wild)
    saved = tmp_path / "run" / "checkpoints" / "federated"
    assert checkpoint.rounds(saved)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_full_disk_stops_the_run_and_it_can_go_on_later(plain, home, tmp_path, monkeypatch):
    import errno

    told = recipe(home, tmp_path / "run")
    write = checkpoint._write_tensors
    seen = []

    def full(path: Path, header: bytes, tensors: Any) -> Any:
        seen.append(path)
        if len(seen) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, header, tensors)

    monkeypatch.setattr(checkpoint, "_write_tensors", full)
    with pytest.raises(RunError, match="no space left"):
        run_recipe(told)
    monkeypatch.undo()
    run_recipe(told, resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(plain)


def test_clients_that_drop_out_are_counted_and_the_run_goes_on(home, tmp_path):
    told = recipe(home, tmp_path / "run", arms=["federated"], rounds=4, runtime={"client_dropout": 0.4, "threads": 1})
    run_recipe(told)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()][1:]
    failed = sum(len(line["failed"]) for line in lines)
    assert failed > 0
    assert all(line["clients"] + len(line["failed"]) == line["cohort"] == 3 for line in lines)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["skipped"]["client_rounds_failed"]["federated"] == failed


def test_partial_participation_and_local_epochs(home, tmp_path):
    told = recipe(
        home, tmp_path / "run", arms=["federated", "global"], clients_per_round=0.5, local_steps=None, local_epochs=1
    )
    run_recipe(told)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["cohort"] for line in lines if line["arm"] == "federated" and line["round"]] == [2, 2, 2]


def test_smoke_goes_through_every_step_with_little(home, tmp_path):
    run = run_recipe(recipe(home, tmp_path / "run"), smoke=True)
    assert run == tmp_path / "run-smoke"
    result = json.loads((run / "result.json").read_text())
    assert len(result["arms"]["federated"]["score_per_client"]) == 2
    assert all(costs["rounds"] <= 1 for costs in result["costs_per_arm"].values())
    assert run_recipe(recipe(home, tmp_path / "run"), smoke=True) == tmp_path / "run-smoke-2"

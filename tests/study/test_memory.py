"""A run that meets the end of its memory."""

from __future__ import annotations

import json

import pytest
import torch
from tests.study.tiny_runs import recipe

from fedloom.errors import RunError
from fedloom.study import session as sessions
from fedloom.study.plan import plan
from fedloom.study.run import run_recipe

SAID = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000 bytes. Error code 12 (Cannot allocate memory)"
)


def smaller(monkeypatch, most_rows):
    """Every model that a session loads has room for so many rows in a pass with a graph."""
    load = sessions.make_base

    def made(*given):
        base = load(*given)

        def look(layer, args):
            if torch.is_grad_enabled() and args[0].shape[0] > most_rows:
                raise RuntimeError(SAID)

        base.model.model.layers[1].mlp.register_forward_pre_hook(look)
        return base

    monkeypatch.setattr(sessions, "make_base", made)


def test_a_run_goes_on_and_says_so_once(home, monkeypatch):
    few = {"arms": ["federated"], "rounds": 2}
    want = run_recipe(recipe(home, home / "wide", **few))
    size = recipe(home, home / "narrow", **few).client.per_device_train_batch_size
    smaller(monkeypatch, size)
    narrow = run_recipe(recipe(home, home / "narrow", **few))
    losses = [json.loads((run / "result.json").read_text())["arms"]["federated"]["loss"] for run in (want, narrow)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    log = (narrow / "log.txt").read_text()
    assert log.count("out of memory with 3 clients in one pass: 1 from now on") == log.count("out of memory") == 1


def test_a_plan_finds_the_width_and_says_where_one_is_too_much(home, monkeypatch):
    size = recipe(home, home / "plan").client.per_device_train_batch_size
    smaller(monkeypatch, size)
    session = sessions.open_session(recipe(home, home / "plan"))
    assert plan(session).clients_per_batch == session.room.width == 1
    smaller(monkeypatch, size - 1)
    with pytest.raises(RunError, match="largest batch") as caught:
        plan(sessions.open_session(recipe(home, home / "plan")))
    assert caught.value.code == "run.memory" and "gradient_checkpointing=true" in caught.value.hint

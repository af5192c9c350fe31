"""A whole run that several processes share, begun by one and finished by two: the run of one process."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from tests.study.tiny_runs import outcome, recipe

from fedloom.errors import RunError, UserError
from fedloom.study.processes import Processes
from fedloom.study.progress import Silent
from fedloom.study.run import run_recipe

SETTINGS: dict[str, Any] = {
    "rounds": 2,
    "method": "fedsa_lora",  # clients keep half of the adapter
    "client": {"learning_rate": 1e-2, "per_device_train_batch_size": 2},
    "arms": ["local", "federated", "global"],
}


class StopAfter(Silent):
    """Ctrl-C when a round's line is out."""

    def __init__(self, arm: str, round: int) -> None:
        self.point = arm, round

    def round(self, line: Any) -> None:
        if (line["arm"], line["round"]) == self.point:
            os.kill(os.getpid(), signal.SIGINT)


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def alike(a: Any, b: Any, where: str = "") -> None:
    """Equal but for rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            alike(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            alike(one, other, f"{where}[{number}]")
    elif isinstance(a, float):
        assert math.isclose(a, b, rel_tol=1e-7, abs_tol=1e-9), (where, a, b)  # Adam makes more of rounding
    else:
        assert a == b, (where, a, b)


def test_a_run_goes_on_with_another_number_of_processes_and_ends_alike(home: Path, tmp_path: Path) -> None:
    plain = run_recipe(recipe(home, tmp_path / "plain", **SETTINGS))
    told = recipe(home, tmp_path / "shared", **SETTINGS)
    with pytest.raises(RunError) as stopped:
        run_recipe(told, display=StopAfter("local", 1))
    assert stopped.value.code == "run.stopped"
    heard = Heard()
    shared = run_recipe(told, resume=tmp_path / "shared", nproc=2, display=heard)
    want, got = outcome(plain), outcome(shared)
    weights = [safetensors.torch.load(one.pop("adapter")) for one in (want, got)]
    assert weights[0].keys() == weights[1].keys()
    assert max(float((leaf - weights[1][name]).abs().max()) for name, leaf in weights[0].items()) < 1e-7  # float32
    for one in (want, got):  # how blocks are padded follows who is in them
        for costs in (one["result"]["costs"], *one["result"]["costs_per_arm"].values()):
            costs.pop("padded_tokens", None)
            costs.pop("flops_padded", None)
    alike(want, got)
    log = (shared / "log.txt").read_text()
    assert "resumed, 2 processes" in log
    assert json.loads((shared / "result.json").read_text())["status"] == "done"


def test_more_processes_than_clients_are_refused_with_the_way_out(home: Path, tmp_path: Path) -> None:
    from fedloom.study.session import _check_cohort, open_session

    told = recipe(home, tmp_path / "out", arms=["federated"], clients_per_round=2)
    session = open_session(told)
    with pytest.raises(UserError, match="3 processes, but a round trains 2 clients") as refused:
        _check_cohort(told, session.federation, 3)
    assert refused.value.hint == "--nproc 2, or clients_per_round=3"
    _check_cohort(told, session.federation, 2)
    alone = recipe(home, tmp_path / "out", arms=["global"])
    with pytest.raises(UserError, match="2 processes, but a round trains 1 client"):
        _check_cohort(alone, session.federation, 2)
    everyone = recipe(home, tmp_path / "out", arms=["local", "federated"], clients_per_round=1)
    _check_cohort(everyone, session.federation, 3)  # the local arm trains everyone


def test_the_command_that_goes_on_says_how_many() -> None:
    import contextlib

    with contextlib.ExitStack() as stack:
        assert Processes(stack, 4).option == " --nproc 4"
        assert Processes(stack, None).option == ""

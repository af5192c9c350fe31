"""Evaluation asks one model of all its clients at once, and models of clients' own block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.small import clients, fedavg, small_lora

from fedloom.clients import local_only, sgd_client, split_personal
from fedloom.evaluate.loss import loss_evaluation
from fedloom.optimizers import sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched
from fedloom.runtimes.cohort import TOGETHER
from fedloom.tree import is_shared
from fedloom.types import Client, Evaluation, Metrics, Tree

UPDATES: dict[str, Any] = {
    "fedavg": lambda: sgd_client(sgd(0.5)),
    "local_only": lambda: local_only(sgd_client(sgd(0.5))),
    "fedsa_lora": lambda: split_personal(sgd_client(sgd(0.5)), lambda name: "lora_A" in name),
}


def watched(inner: Evaluation, calls: list[tuple[bool, tuple[str, ...]]]) -> Evaluation:
    def run(adapter: Any, tree_C: Tree, some: Sequence[Client]) -> list[Metrics]:
        calls.append((is_shared(tree_C), tuple(client.id for client in some)))
        return inner.run(adapter, tree_C, some)

    return Evaluation(inner.name, run)


@pytest.mark.parametrize("ranks", [None, [4, 2, 4, 2, 4]])
@pytest.mark.parametrize("name", UPDATES)
def test_one_model_is_asked_of_all_its_clients_at_once(name: str, ranks: list[int] | None) -> None:
    adapter, cohort = small_lora(), clients(5, ranks)
    algorithm = fedavg(UPDATES[name]())
    state = initial_state(algorithm, adapter, seed=1)
    state, _ = run_round(algorithm, adapter, batched(2), state, cohort[:3])
    data = {client.id: [{k: v for k, v in one.items() if v.ndim == 2} for one in client.batches] for client in cohort}
    loss = loss_evaluation("loss", data.__getitem__)
    calls: list[tuple[bool, tuple[str, ...]]] = []
    together = batched(2).evaluate(algorithm, adapter, state, cohort, watched(loss, calls))
    alone = {c.id: batched(1).evaluate(algorithm, adapter, state, [c], loss)[c.id] for c in cohort}
    assert list(together) == [client.id for client in cohort]
    for client, row in together.items():
        assert row["loss_sum"] == pytest.approx(alone[client]["loss_sum"], rel=1e-9)
    asked = [len(some) for _, some in calls]
    if name == "fedavg":
        assert asked == ([5] if ranks is None else [3, 2]) and all(shared for shared, _ in calls)
    else:
        assert asked == [2, 2, 1]
    assert TOGETHER >= 5


def test_blocks_of_one_model_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.runtimes.cohort.TOGETHER", 3)
    adapter, cohort = small_lora(), clients(5)
    state = initial_state(fedavg(), adapter, seed=1)
    calls: list[tuple[bool, tuple[str, ...]]] = []
    nothing = Evaluation("nothing", lambda adapter, tree_C, some: [{"n": float(len(some))} for _ in some])
    found = batched(2).evaluate(fedavg(), adapter, state, cohort, watched(nothing, calls))
    assert [row["n"] for row in found.values()] == [3, 3, 3, 2, 2]
    assert torch.is_grad_enabled()

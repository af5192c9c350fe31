"""The other process of test_distributed.py: does what the test's own process leads it to, for any recipe of the zoo.

A key is JSON: the recipe's values, and what goes wrong here.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
from tests import zoo

from fedloom.errors import RunError
from fedloom.runtimes import Room
from fedloom.runtimes.distributed import Work, follow
from fedloom.runtimes.lead import Follower, Order
from fedloom.runtimes.team import Over, meet, member
from fedloom.study import build
from fedloom.study.recipe import Recipe
from fedloom.study.team_tasks import TASK_WORK


def wrong(fault: str, adapter: Any, follower: Follower) -> Room:
    """Let something go wrong in this process; the room of its passes."""
    loss, calls = adapter.loss, []

    def broken(tree_C: Any, batch_CBT: Any) -> Any:
        calls.append(len(batch_CBT["input_ids"]))
        if fault == "bug":
            raise ZeroDivisionError("no such number")
        if fault == "memory" and calls[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if fault == "refused":
            raise RunError("it would rather not", code="client.refused")
        return loss(tree_C, batch_CBT)

    if fault:
        adapter.loss = broken
    return Room(8, follower.notes.append)


def main(port: int, size: int, rank: int) -> None:
    torch.set_num_threads(1)
    team = member(port, rank, size)
    meet(team)
    assert team.mesh.size() == size
    follower = Follower(team, team.device, lambda: 1234)
    known: dict[str, tuple[Work, Any]] = {}

    def made(key: str) -> tuple[Work, Any]:
        if key not in known:
            known.clear()
            told = json.loads(key)
            recipe = Recipe.model_validate(told["values"])
            base = zoo.new_base()
            adapter = build.adapter_of(base, recipe)
            follower.shards = build.sharded(team, adapter, recipe) if recipe.runtime.shard_base else None
            room = wrong(told.get("fault", ""), adapter, follower)
            population = build.population_of(zoo.federation_of(recipe), recipe, "federated")
            evaluation = zoo.evaluation_of(recipe)
            work = Work(zoo.algorithm_of(recipe), adapter, population.open, {"loss": evaluation}, room)
            known[key] = work, SimpleNamespace(recipe=recipe, base=base)
        return known[key]

    def task(kind: str) -> Any:
        def do(work: Work, order: Order) -> Any:
            return TASK_WORK[kind](made(order.key)[1], work, order)

        return do

    try:
        follow(follower, lambda key: made(key)[0], {kind: task(kind) for kind in TASK_WORK})
    except Over:
        os._exit(0)
    os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Rounds over several processes: the cohort is split by load, and the summands are added by one all-reduce.

A round is one broadcast of the parameters (from the leader), everyone's local work on its part of the cohort, a few
bytes from everyone to everyone about how it went, and one all-reduce of the sum of what clients sent: one flat buffer
for each dtype that there is, which is one for most methods and two where clients tell a number beside their update in
float64. A rule that does not add leaf by leaf (factors stacked side by side) gets everyone's sums at the leader
instead, and adds them itself. Which of the two it is, is asked of the rule's own `add`.

The order of sums is the only difference to one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedloom import wire
from fedloom.runtimes import payload as sides
from fedloom.runtimes.cohort import batched, train_part
from fedloom.runtimes.lead import ALONE, Follower, Lead, Order, Said, trees_from, trees_to
from fedloom.runtimes.room import Room
from fedloom.runtimes.team import Team
from fedloom.types import (
    Adapter,
    Aggregate,
    Algorithm,
    Client,
    Evaluation,
    Metrics,
    Runtime,
    State,
    Trained,
    Tree,
    Upload,
)

__all__ = ["Work", "distributed", "follow", "split"]

Load = Callable[[Client], float]


class Work(NamedTuple):
    """What a process needs to do its part of what a key stands for."""

    algorithm: Algorithm
    adapter: Adapter
    open: Callable[[str, int], Client]  # id, round
    evaluations: Mapping[str, Evaluation]
    room: Room


def tokens_of(client: Client) -> float:
    """A client's load in a round: its padded tokens where they are known, else its steps."""
    return float(getattr(client.batches, "padded_tokens", len(client.batches)))


def split(loads: Sequence[float], num_parts: int) -> list[list[int]]:
    """Places of the loads, in parts of about the same sum: the longest first, each to where least is so far.

    No part has more than 4/3 of what the best split has in its largest (Graham 1969). Within a part, places rise.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    sums = [0.0] * num_parts
    for place in sorted(range(len(loads)), key=lambda place: -loads[place]):
        least = min(range(num_parts), key=lambda part: (sums[part], len(parts[part])))
        parts[least].append(place)
        sums[least] += loads[place]
    return [sorted(part) for part in parts]


def distributed(
    lead: Lead,
    key: str,
    clients_per_batch: int | Room,
    *,
    load: Load = tokens_of,
    evaluation_load: Callable[[str, str], float] = lambda evaluation, client: 1.0,
) -> Runtime:
    """`batched` in every process of a team; this is the leader's side, and `follow` the others'.

    Args:
        lead: of the team; a piece of work that fails anywhere raises a RunError that names the process.
        key: what the others know this algorithm, adapter and population by.
        clients_per_batch: at the leader; each process has its own, and halves it by itself where memory ends.
        load: of a client in a round.
        evaluation_load: of a client in an evaluation of that name.
    """
    room = clients_per_batch if isinstance(clients_per_batch, Room) else Room(clients_per_batch)
    here = batched(room)
    team = lead.team

    def train(algorithm: Algorithm, adapter: Adapter, state: State, cohort: Sequence[Client]) -> Trained:
        ids = tuple(client.id for client in cohort)
        parts = [[cohort[place] for place in part] for part in split([load(one) for one in cohort], team.size)]
        told = [[[one.id, one.weight, one.rank] for one in part] for part in parts]
        lead.ask("train", key, state, told, {"cohort": ids}, [[one.id for one in part] for part in parts])
        trained: list[Trained] = []

        def work() -> Any:
            trained.append(train_part(algorithm, adapter, state, parts[0], ids, room))
            return _told_of(trained[0], algorithm.aggregate)

        said = lead.do(work)
        total, personal = _together(team, algorithm.aggregate, trained[0], said)
        device = next(iter(state.params.values())).device
        rows = {id: row for one in said for id, row in one.result["clients"].items()}
        failed = {id: reason for one in said for id, reason in one.result["failed"].items()}
        # as one process has them: those with the most steps first
        order = [one.id for one in sorted(cohort, key=lambda one: -len(one.batches))]
        clients: dict[str, Metrics] = {id: rows[id] for id in order if id in rows}
        if total is not None:
            tree = {name: leaf.to(device) for name, leaf in total.tree.items()}
            total = Upload(tree, total.weight, sides.summed(clients))
        kept: Any = trained[0].personal  # it may be a file
        for id, own in personal:
            kept[id] = {name: leaf.to(device) for name, leaf in own.items()}
        return Trained(total, kept, clients, {id: failed[id] for id in order if id in failed})

    def evaluate(
        algorithm: Algorithm, adapter: Adapter, state: State, clients: Sequence[Client], evaluation: Evaluation
    ) -> Mapping[str, Metrics]:
        loads = [evaluation_load(evaluation.name, one.id) for one in clients]
        parts = [[clients[place] for place in part] for part in split(loads, team.size)]
        told = [[[one.id, one.rank] for one in part] for part in parts]
        own = [[one.id for one in part] for part in parts]
        lead.ask("evaluate", key, state, told, {"evaluation": evaluation.name}, own)
        said = lead.do(lambda: here.evaluate(algorithm, adapter, state, parts[0], evaluation))
        found = {id: row for one in said for id, row in one.result.items()}
        return {one.id: found[one.id] for one in clients}

    return Runtime(train, evaluate)


def follow(
    follower: Follower,
    work_of: Callable[[str], Work],
    more: Mapping[str, Callable[[Work, Order], Any]] | None = None,
) -> None:
    """Do what the leader asks until it lets go.

    Args:
        work_of: from a runtime's key to what it stands for here.
        more: other kinds of work, by name; their results are JSON values.
    """
    while (order := follower.next()) is not None:
        if order.kind == ALONE:
            follower.do(lambda: None)
        elif order.kind == "train":
            _train(follower, work_of, order)
        elif order.kind == "evaluate":
            follower.do(lambda order=order: _evaluate(work_of(order.key), order))  # type: ignore[misc]
        else:
            do = (more or {})[order.kind]
            follower.do(lambda order=order, do=do: do(work_of(order.key), order))  # type: ignore[misc]


def _train(follower: Follower, work_of: Callable[[str], Work], order: Order) -> None:
    done: list[tuple[Aggregate, Trained]] = []

    def work() -> Any:
        own = work_of(order.key)
        own.adapter.sync(order.state.base)
        opened = [own.open(id, order.state.round)._replace(weight=weight, rank=rank) for id, weight, rank in order.part]
        trained = train_part(own.algorithm, own.adapter, order.state, opened, tuple(order.about["cohort"]), own.room)
        done.append((own.algorithm.aggregate, trained))
        return _told_of(trained, own.algorithm.aggregate)

    said = follower.do(work)
    if all(one.error is None for one in said):
        _together(follower.team, *done[0], said)


def _evaluate(own: Work, order: Order) -> Any:
    evaluation = own.evaluations[order.about["evaluation"]]
    clients = [Client(id, (), rank=rank) for id, rank in order.part]
    return batched(own.room).evaluate(own.algorithm, own.adapter, order.state, clients, evaluation)


# ---- everyone's sums together ----------------------------------------------------------------------------------------


def _told_of(trained: Trained, aggregate: Aggregate) -> dict[str, Any]:
    upload = trained.upload
    return {
        "clients": trained.clients,
        "failed": trained.failed,
        "personal": bool(trained.personal),
        "weight": None if upload is None else float(upload.weight),
        "layout": None if upload is None else layout_of(upload.tree),
        "adds": upload is None or adds_leaf_by_leaf(aggregate, upload),
    }


def layout_of(tree: Tree) -> list[Any]:
    """Names, shapes and dtypes, as JSON values."""
    return [[name, list(leaf.shape), str(leaf.dtype).removeprefix("torch.")] for name, leaf in tree.items()]


def adds_leaf_by_leaf(aggregate: Aggregate, upload: Upload) -> bool:
    """Whether `add` is a plain sum, asked of itself: a summand and itself are twice the summand."""
    twice = aggregate.add(upload, upload)
    if twice.weight != 2 * upload.weight or twice.tree.keys() != upload.tree.keys():
        return False
    return all(
        twice.tree[name].shape == leaf.shape and torch.equal(twice.tree[name], leaf + leaf)
        for name, leaf in upload.tree.items()
    )


def _together(
    team: Team, aggregate: Aggregate, trained: Trained, said: Sequence[Said]
) -> tuple[Upload | None, Iterator[tuple[str, Tree]]]:
    """(the sum of all processes' summands, the others' personal trees), at the leader; of no use elsewhere."""
    results = [one.result for one in said]
    with_sum = [result for result in results if result["weight"] is not None]
    total: Upload | None = None
    if with_sum and all(one["adds"] and _alike(one["layout"], with_sum[0]["layout"]) for one in with_sum):
        tree = all_reduced(team, None if trained.upload is None else trained.upload.tree, with_sum[0]["layout"])
        total = Upload(tree, sum(one["weight"] for one in with_sum))
    elif with_sum:
        raws = team.gather(b"" if trained.upload is None else wire.encode("sum", {}, tree=trained.upload.tree))
        for raw, result in zip(raws, results, strict=bool(raws)):
            if raw:
                one = Upload(wire.decode(raw).trees["tree"], result["weight"])
                total = one if total is None else aggregate.add(total, one)
    gathered: list[bytes] = []
    if any(result["personal"] for result in results):
        gathered = team.gather(b"" if team.leads else trees_to(trained.personal))[1:]
    return total, (one for raw in gathered for one in trees_from(raw).items())


def _alike(a: Any, b: Any) -> bool:
    return sorted(a) == sorted(b)


def all_reduced(team: Team, tree: Tree | None, layout: Sequence[Any]) -> dict[str, Tensor]:
    """The sum of all processes' trees of that layout, by one all-reduce for each dtype; None counts as zeros."""
    total: dict[str, Tensor] = {}
    for dtype in sorted({dtype for _, _, dtype in layout}):
        group = sorted((name, shape) for name, shape, other in layout if other == dtype)
        sizes = [torch.Size(shape).numel() for _, shape in group]
        if tree is None:
            flat = torch.zeros(sum(sizes), dtype=getattr(torch, dtype), device=team.device)
        else:
            flat = torch.cat([tree[name].detach().reshape(-1) for name, _ in group])
        team.sum(flat)
        for (name, shape), leaf in zip(group, flat.split(sizes), strict=True):
            total[name] = leaf.view(shape)
    return {name: total[name] for name, _, _ in layout}

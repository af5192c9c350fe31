"""Asynchronous rounds on a simulated clock: FedBuff (Nguyen et al. 2022, Algorithm 1).

So many clients train at once. A round is over when K uploads have arrived; whoever is still under way then stays so,
and its upload is taken in a later round, computed from the parameters that it was sent. Who starts and who arrives when
is known before anyone trains, since durations hang on speeds and steps alone: all who start in a round are sent the
same parameters and train together, as a cohort does.

What is under way is in `State.personal`, under names that no client has: a checkpoint holds it, and a resumed run is
the uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from fedloom.errors import FedloomError, RunError
from fedloom.runtimes import payload as sides
from fedloom.runtimes.cohort import batched, counted, trained_blocks
from fedloom.runtimes.room import Room
from fedloom.seeds import seed_of
from fedloom.tree import scale
from fedloom.types import Adapter, Algorithm, Client, Metrics, Runtime, Site, State, Trained, Tree, Upload

UNDER_WAY = "\x1funder way/"  # + client id, in State.personal; an empty tree once it has arrived
CLOCK = "\x1fclock"
_PAYLOAD, _OWN, _METRIC = "payload/", "own/", "metric/"

Duration = Callable[[Client], float]


class Flight(NamedTuple):
    """A client's work from when it is sent the parameters to when its upload arrives."""

    arrives: float
    order: int  # of starting, for those that arrive at the same time
    round: int  # of the parameters that it was sent
    weight: float
    payload: Tree
    own: Tree  # its personal state from then on
    metrics: Metrics


class Plan(NamedTuple):
    """What a round's clock gives, before anyone trains."""

    starts: list[tuple[Client, float, int]]  # client, when it will arrive, order
    arrivals: list[tuple[str, bool]]  # client id, and whether it started in this round
    now: float
    order: int


def buffered(
    clients_per_batch: int | Room,
    *,
    buffer_size: int,
    concurrency: int,
    duration: Duration,
    staleness_exponent: float = 0.5,
) -> Runtime:
    """FedBuff: w <- w + mean of s(tau) delta over K uploads, s(tau) = 1 / (1 + tau)^a.

    tau is how many rounds have ended since the client was sent its parameters. The mean is over the clients' weights,
    not over s: a buffer of old uploads makes a small step, as in the paper.

    A client is sent a round's parameters once: a second time it would send the same.

    Args:
        clients_per_batch: in one pass, as in `batched`.
        buffer_size: K.
        concurrency: clients that train at once. A round's cohort must hold K more, or everyone.
        duration: simulated seconds of a client's work in a round.
        staleness_exponent: a; 0 takes old uploads as they are.
    """
    room = clients_per_batch if isinstance(clients_per_batch, Room) else Room(clients_per_batch)

    def train(algorithm: Algorithm, adapter: Adapter, state: State, cohort: Sequence[Client]) -> Trained:
        if algorithm.protect:
            raise RunError("uploads that arrive one by one cannot be protected as a sum", code="runtime.protect")
        flights = under_way(state)
        made: dict[str, Flight] = {}
        failed: dict[str, str] = {}
        while True:  # again without those that failed, in whose places others start
            able = [client for client in cohort if client.id not in failed]
            planned = _planned(state, flights, able, buffer_size, concurrency, duration)
            todo = [start for start in planned.starts if start[0].id not in made]
            if not todo:
                break
            _fly(algorithm, adapter, state, todo, room, made, failed)
        made = {  # a failure may have moved the others
            client.id: made[client.id]._replace(arrives=arrives, order=order)
            for client, arrives, order in planned.starts
        }
        total: Upload | None = None
        clients: dict[str, Metrics] = {}
        personal: dict[str, Tree] = {}
        for client, new in planned.arrivals:
            flight = made.pop(client) if new else flights[client]
            if not new:
                personal[UNDER_WAY + client] = {}
            try:
                row = {**flight.metrics, "uploads": 1.0, "staleness": float(state.round - flight.round)}
                summand = _arrived(algorithm, state, client, flight, row, staleness_exponent)
            except FedloomError as error:
                failed[client] = error.message
                continue
            total = summand if total is None else algorithm.aggregate.add(total, summand)
            clients[client] = sides.summed({"": clients.get(client, {}), "again": row})
            if flight.own:
                personal[client] = flight.own
        personal |= {UNDER_WAY + client: _tree_of(flight) for client, flight in made.items()}
        personal[CLOCK] = {"now": _number(planned.now), "order": torch.tensor(planned.order)}
        if total is not None:
            total = total._replace(metrics=sides.summed(clients))
        return Trained(total, personal, clients, failed)

    return Runtime(train, batched(room).evaluate)


def clock_of(state: State) -> float | None:
    """Simulated seconds since the start; None for a run that is not asynchronous."""
    told = state.personal.get(CLOCK)
    return None if told is None else float(told["now"])


def under_way(state: State) -> dict[str, Flight]:
    """Clients whose uploads have not arrived yet."""
    return {
        name.removeprefix(UNDER_WAY): _flight_of(tree)
        for name, tree in state.personal.items()
        if name.startswith(UNDER_WAY) and tree
    }


def _planned(
    state: State,
    flights: Mapping[str, Flight],
    cohort: Sequence[Client],
    buffer_size: int,
    concurrency: int,
    duration: Duration,
) -> Plan:
    """Advance the clock until K uploads have arrived: whenever one does, the next idle client starts."""
    told = state.personal.get(CLOCK)
    now, order = (0.0, 0) if told is None else (float(told["now"]), int(told["order"]))
    there = {client.id: client for client in cohort}
    turn = {client.id: seed_of(state.seed, state.round, client.id, "turn") for client in cohort}
    idle = sorted((client for client in cohort if client.id not in flights), key=lambda client: turn[client.id])
    queue = [(flight.arrives, flight.order, client, False) for client, flight in flights.items()]
    heapq.heapify(queue)
    starts: list[tuple[Client, float, int]] = []
    arrivals: list[tuple[str, bool]] = []
    while len(arrivals) < buffer_size:
        while idle and len(queue) < concurrency:
            client = idle.pop(0)
            starts.append((client, now + duration(client), order))
            heapq.heappush(queue, (now + duration(client), order, client.id, True))
            order += 1
        if not queue:
            break
        now, _, id, new = heapq.heappop(queue)
        arrivals.append((id, new))
        if not new and id in there:
            idle.append(there[id])
    return Plan(starts, arrivals, now, order)


def _fly(
    algorithm: Algorithm,
    adapter: Adapter,
    state: State,
    starts: Sequence[tuple[Client, float, int]],
    room: Room,
    made: dict[str, Flight],
    failed: dict[str, str],
) -> None:
    """Train those who start, all on the state's parameters; what they will send goes into `made`."""
    times = {client.id: (arrives, order) for client, arrives, order in starts}
    broadcast = sides.broadcast_payload(algorithm, state)
    received = sides.broadcast_received(algorithm, broadcast, Site(state.seed, state.round, ""))
    back = {client: flight.own for client, flight in under_way(state).items() if flight.own}  # whoever starts is back
    start = dataclasses.replace(state, params=received, personal={**state.personal, **back})

    def site_of(client: Client) -> Site:
        return Site(state.seed, state.round, client.id, (), max(1, len(client.batches)))

    who = [client for client, _, _ in starts]
    for block, sites, updates in trained_blocks(algorithm, adapter, start, who, room, site_of):
        if isinstance(updates, FedloomError):
            failed.update({client.id: updates.message for client in block})
            continue
        for client, site, (delta, own, metrics) in zip(block, sites, updates, strict=True):
            try:
                if isinstance(metrics, RunError):
                    raise metrics
                weight = sides.weight_of(algorithm, client.weight)
                sent = sides.client_payload(algorithm, start.params, delta, weight, site)
                row = counted(state, broadcast, site, sent, weight, metrics)
            except FedloomError as error:
                failed[client.id] = error.message
                continue
            made[client.id] = Flight(*times[client.id], state.round, weight, sent, own, row)


def _arrived(
    algorithm: Algorithm, state: State, client: str, flight: Flight, row: Metrics, staleness_exponent: float
) -> Upload:
    """The summand that an upload stands for by the time it is here."""
    rule = algorithm.aggregate
    discount = (1 + state.round - flight.round) ** -staleness_exponent

    def lift(params: Tree, delta: Tree, weight: float) -> Upload:
        return rule.lift(params, scale(delta, discount), weight)

    stale = dataclasses.replace(algorithm, aggregate=rule._replace(lift=lift))
    site = Site(state.seed, flight.round, client, ())
    return sides.server_summand(stale, state.params, flight.payload, flight.weight, row, site)


def _number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _tree_of(flight: Flight) -> dict[str, torch.Tensor]:
    return {
        "arrives": _number(flight.arrives),
        "order": torch.tensor(flight.order),
        "round": torch.tensor(flight.round),
        "weight": _number(flight.weight),
        **{_PAYLOAD + name: leaf for name, leaf in flight.payload.items()},
        **{_OWN + name: leaf for name, leaf in flight.own.items()},
        **{_METRIC + name: _number(value) for name, value in flight.metrics.items()},
    }


def _flight_of(tree: Tree) -> Flight:
    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): leaf for name, leaf in tree.items() if name.startswith(prefix)}

    return Flight(
        float(tree["arrives"]),
        int(tree["order"]),
        int(tree["round"]),
        float(tree["weight"]),
        part(_PAYLOAD),
        part(_OWN),
        {name: float(leaf) for name, leaf in part(_METRIC).items()},
    )

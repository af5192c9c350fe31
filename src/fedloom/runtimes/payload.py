"""What crosses between a client and the server: the same functions on both sides, in every runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fedloom import wire
from fedloom.errors import RunError
from fedloom.ops.names import TOLD, apart
from fedloom.tree import all_finite
from fedloom.types import Algorithm, Metrics, Site, State, Tree, Upload

WEIGHT = "weight"


def broadcast_header(state: State, site: Site) -> dict[str, Any]:
    """What a client is told besides the parameters."""
    return {"seed": state.seed, "round": state.round, "client": site.client, "cohort": list(site.cohort)}


def broadcast_payload(algorithm: Algorithm, state: State) -> Tree:
    """What the server sends of its parameters: the same for every client of the round."""
    params = state.params
    for transform in algorithm.downlink:
        params = transform.encode(params, Site(state.seed, state.round, ""))
    return params


def broadcast_received(algorithm: Algorithm, payload: Tree, site: Site) -> Tree:
    """What a client makes of it: its start, from which its delta is measured."""
    for transform in reversed(algorithm.downlink):
        payload = transform.decode(payload, Site(site.seed, site.round, ""))
    return payload


def broadcast_bytes(state: State, sent: Tree, site: Site) -> int:
    return wire.num_bytes("train", broadcast_header(state, site), params=sent, base=state.base)


def upload_trees(payload: Tree, weight: float, metrics: Metrics) -> dict[str, Tree]:
    """What a client sends. Numbers go as float64 tensors, so that the size of a message does not depend on them."""
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in {**metrics, WEIGHT: weight}.items()}
    return {"payload": payload, "numbers": numbers}


def read_upload(message: wire.Message) -> tuple[Tree, float, dict[str, float]]:
    """(payload, weight, metrics) of a client's message.

    Raises:
        RunError: it has no payload or no weight.
    """
    numbers = {name: float(value) for name, value in message.trees.get("numbers", {}).items()}
    if WEIGHT not in numbers or not message.trees.get("payload"):
        raise RunError("its message holds no parameters or no weight", code="client.message")
    weight = numbers.pop(WEIGHT)
    return message.trees["payload"], weight, numbers


def upload_bytes(payload: Tree, weight: float, metrics: Metrics) -> int:
    return wire.num_bytes("trained", {}, **upload_trees(payload, weight, metrics))


def client_payload(algorithm: Algorithm, params: Tree, delta: Tree, weight: float, site: Site) -> Tree:
    """The client's side: what it sends.

    With protection the client itself makes the summand, so that the server sees nothing but a protected one;
    without, it sends the compressed delta.

    Raises:
        RunError: there is nothing to send, or it is not finite.
    """
    if not all_finite(delta):
        bad = [name for name, leaf in delta.items() if not all_finite({name: leaf})]
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise RunError(f"its update is not finite ({', '.join(bad[:4])}{more})", code="client.nonfinite")
    told, sent = apart(delta, TOLD)
    if not sent:
        raise RunError("its upload holds no parameter", code="client.empty")
    for transform in algorithm.compress:
        sent = dict(transform.encode(sent, site))
    delta = {**sent, **told}
    if not algorithm.protect:
        return delta
    tree = algorithm.aggregate.lift(params, _decompressed(algorithm, delta, site), weight).tree
    for transform in algorithm.protect:
        tree = transform.encode(tree, site)
    return tree


def server_summand(
    algorithm: Algorithm, params: Tree, payload: Tree, weight: float, metrics: Metrics, site: Site
) -> Upload:
    """The server's side: the summand that a payload stands for.

    Raises:
        RunError: the client's weight is no positive number.
    """
    if not (math.isfinite(weight) and weight > 0):
        raise RunError(f"its weight is {weight}", code="client.weight")
    if algorithm.protect:
        return Upload(payload, weight, metrics)
    return algorithm.aggregate.lift(params, _decompressed(algorithm, payload, site), weight)._replace(metrics=metrics)


def weight_of(algorithm: Algorithm, weight: float) -> float:
    return 1.0 if algorithm.uniform_weight else weight


def _decompressed(algorithm: Algorithm, delta: Tree, site: Site) -> Tree:
    told, sent = apart(delta, TOLD)
    for transform in reversed(algorithm.compress):
        sent = dict(transform.decode(sent, site))
    return {**sent, **told}


def summed(rows: Mapping[str, Metrics]) -> dict[str, float]:
    """Metrics of clients, added."""
    total: dict[str, float] = {}
    for row in rows.values():
        for key, value in row.items():
            total[key] = total.get(key, 0.0) + value
    return total

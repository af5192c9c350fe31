"""A federation inside one process, over messages: the seam that real transports use.

Every payload goes through the wire codec to client objects that hold their own model and data. The server knows ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from fedloom import wire
from fedloom.errors import FedloomError, RunError
from fedloom.runtimes import payload as sides
from fedloom.runtimes.cohort import client_model, has_own_model, train_block
from fedloom.tree import stack
from fedloom.types import (
    Adapter,
    Algorithm,
    Client,
    Evaluation,
    Metrics,
    Runtime,
    Site,
    State,
    Trained,
    Tree,
    Upload,
)

Send = Callable[[bytes], bytes]  # one request to one client and its reply; a transport is nothing more

_codec_seconds: ContextVar[list[float]] = ContextVar("codec_seconds")  # durations, where someone wants to know them


def _encode(kind: str, header: Mapping[str, Any], **trees: Tree) -> bytes:
    start = time.perf_counter()
    raw = wire.encode(kind, header, **trees)
    _codec_seconds.get([]).append(time.perf_counter() - start)
    return raw


def _decode(raw: bytes) -> wire.Message:
    start = time.perf_counter()
    message = wire.decode(raw)
    _codec_seconds.get([]).append(time.perf_counter() - start)
    return message


class ClientSite:
    """What runs where a client's data is: its own model, data and personal state; bytes in, bytes out."""

    def __init__(
        self,
        client: str,
        make: Callable[[], tuple[Algorithm, Adapter]],
        open_client: Callable[[int], Client],
        evaluations: Mapping[str, Evaluation],
        rank: int | None = None,
    ) -> None:
        self.client, self.rank = client, rank
        self._make = make
        self._made: tuple[Algorithm, Adapter] | None = None  # the model is loaded at the first message
        self._open = open_client
        self._evaluations = evaluations
        self.personal: Tree | None = None  # never leaves this object

    def serve(self, raw: bytes) -> bytes:
        """Answer one message. What goes wrong here is told to the server as a reason, not raised."""
        try:
            message = _decode(raw)
            if message.header.get("client") != self.client:
                raise RunError(f"a message for {message.header.get('client')!r} came to {self.client!r}")
            if message.kind == "train":
                return self._train(message)
            if message.kind == "evaluate":
                return self._evaluate(message)
            raise RunError(f"unknown message kind {message.kind!r}")
        except (FedloomError, OSError) as error:
            reason = error.message if isinstance(error, FedloomError) else str(error)
            return _encode("failed", {"reason": reason})

    def _state(self, message: wire.Message) -> State:
        personal = {} if self.personal is None else {self.client: self.personal}
        head, trees = message.header, message.trees
        return State(int(head["seed"]), int(head["round"]), trees["params"], None, personal, trees["base"])

    def _parts(self) -> tuple[Algorithm, Adapter]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _train(self, message: wire.Message) -> bytes:
        algorithm, adapter = self._parts()
        state = self._state(message)
        came = Site(state.seed, state.round, self.client)
        state = replace(state, params=sides.broadcast_received(algorithm, state.params, came))
        client = self._open(state.round)
        if self.rank is not None:
            client = client._replace(rank=self.rank)
        cohort = tuple(message.header["cohort"])
        site = Site(state.seed, state.round, self.client, cohort, max(1, len(client.batches)))
        adapter.sync(state.base)
        ((delta, personal, metrics),) = train_block(algorithm, adapter, state, [client], [site])
        if isinstance(metrics, RunError):
            raise metrics
        weight = sides.weight_of(algorithm, client.weight)
        sent = sides.client_payload(algorithm, state.params, delta, weight, site)
        if personal:
            self.personal = personal
        return _encode("trained", {}, **sides.upload_trees(sent, weight, metrics))

    def _evaluate(self, message: wire.Message) -> bytes:
        algorithm, adapter = self._parts()
        state = self._state(message)
        adapter.sync(state.base)
        own = has_own_model(algorithm.client, state.params)
        client = Client(self.client, (), rank=self.rank if own else None)
        tree = client_model(algorithm, adapter, state, client)
        (metrics,) = self._evaluations[message.header["evaluation"]].run(adapter, stack([tree]), [client])
        return _encode("evaluated", {}, **sides.upload_trees({}, 1.0, metrics))


def loopback(sends: Mapping[str, Send]) -> Runtime:
    """One message and one reply per client, through the codec both ways.

    Args:
        sends: client id -> how to reach it (`ClientSite(...).serve` here; a socket elsewhere).
    """

    def train(algorithm: Algorithm, adapter: Adapter, state: State, cohort: Sequence[Client]) -> Trained:
        ids = tuple(client.id for client in cohort)
        total: Upload | None = None
        clients: dict[str, Metrics] = {}
        failed: dict[str, str] = {}
        broadcast = sides.broadcast_payload(algorithm, state)
        for client in cohort:
            site = Site(state.seed, state.round, client.id, ids)
            codec: list[float] = []
            watching = _codec_seconds.set(codec)
            request = _encode("train", sides.broadcast_header(state, site), params=broadcast, base=state.base)
            reply = sends[client.id](request)
            try:
                message = _answer(reply, "trained")
                payload, weight, metrics = sides.read_upload(message)
                row = {
                    **metrics,
                    "bytes_up": float(len(reply)),
                    "bytes_down": float(len(request)),
                    "communication_seconds": sum(codec),
                }
                summand = sides.server_summand(algorithm, state.params, payload, weight, row, site)
            except FedloomError as error:
                failed[client.id] = error.message
                continue
            finally:
                _codec_seconds.reset(watching)
            total = summand if total is None else algorithm.aggregate.add(total, summand)
            clients[client.id] = row
        if total is not None:
            total = total._replace(metrics=sides.summed(clients))
        return Trained(total, {}, clients, failed)

    def evaluate(
        algorithm: Algorithm, adapter: Adapter, state: State, clients: Sequence[Client], evaluation: Evaluation
    ) -> Mapping[str, Metrics]:
        found: dict[str, Metrics] = {}
        for client in clients:
            header = {
                **sides.broadcast_header(state, Site(state.seed, state.round, client.id)),
                "evaluation": evaluation.name,
            }
            reply = sends[client.id](_encode("evaluate", header, params=state.params, base=state.base))
            numbers = _answer(reply, "evaluated").trees["numbers"]
            found[client.id] = {name: float(value) for name, value in numbers.items() if name != sides.WEIGHT}
        return found

    return Runtime(train, evaluate)


def _answer(reply: bytes, kind: str) -> wire.Message:
    message = _decode(reply)
    if message.kind == "failed":
        raise RunError(str(message.header.get("reason", "it failed without a reason")), code="client.failed")
    if message.kind != kind:
        raise RunError(f"it answered {message.kind!r} instead of {kind!r}", code="client.message")
    return message

"""Clients that fail: a wrapper that loses a share of each cohort, as real federations do."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fedloom.seeds import seed_of
from fedloom.types import Adapter, Algorithm, Client, Runtime, State, Trained


def with_dropout(inner: Runtime, share: float) -> Runtime:
    """Each client of a cohort fails with probability `share`, drawn from (seed, round, client); the rest goes on."""

    def fails(state: State, client: Client) -> bool:
        return random.Random(seed_of(state.seed, state.round, client.id, "dropout")).random() < share

    def train(algorithm: Algorithm, adapter: Adapter, state: State, cohort: Sequence[Client]) -> Trained:
        lost = {client.id: "dropped out (simulated)" for client in cohort if fails(state, client)}
        done = inner.train(algorithm, adapter, state, [client for client in cohort if client.id not in lost])
        return done._replace(failed={**lost, **done.failed})

    return Runtime(train, inner.evaluate)

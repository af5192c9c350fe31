"""The only loop in the package: sample, map, reduce, finish on the server, repeat."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedloom.errors import RunError
from fedloom.personal import joined
from fedloom.seeds import seed_of
from fedloom.tree import all_finite
from fedloom.types import Adapter, Algorithm, Client, RoundReport, Runtime, Site, State, Tree, Upload


class Population(Protocol):
    """Everyone who may take part. It may be a million: `open` is called for the cohort only."""

    ids: Sequence[str]

    def open(self, client: str, round: int) -> Client:
        """The client with its batches of that round (lazily)."""


@dataclass(frozen=True)
class Sampling:
    """How a cohort is drawn: without replacement, uniformly, afresh each round."""

    clients_per_round: int | None = None  # None: everyone

    def cohort(self, ids: Sequence[str], seed: int, round: int) -> tuple[str, ...]:
        """The ids of one round.

        Raises:
            RunError: fewer clients than `clients_per_round`.
        """
        if self.clients_per_round is None:
            return tuple(ids)
        if not 1 <= self.clients_per_round <= len(ids):
            raise RunError(
                f"clients_per_round is {self.clients_per_round}, but there are {len(ids)} clients", code="sample.few"
            )
        if self.clients_per_round == len(ids):
            return tuple(ids)
        return tuple(random.Random(seed_of(seed, round, "", "cohort")).sample(ids, self.clients_per_round))


def initial_state(algorithm: Algorithm, adapter: Adapter, seed: int) -> State:
    """The state before round 1."""
    params = adapter.init(seed)
    return State(seed, 0, params, algorithm.server.init(params))


def run_round(
    algorithm: Algorithm, adapter: Adapter, runtime: Runtime, state: State, cohort: Sequence[Client]
) -> tuple[State, RoundReport]:
    """One round. `state` stays as it was; a round in which some clients fail goes on with the rest.

    Raises:
        RunError: no client finished, the uploads hold nothing or unknown names, or the result is not finite.
    """
    start = time.perf_counter()
    adapter.sync(state.base)
    trained = runtime.train(algorithm, adapter, state, cohort)
    if trained.upload is None:
        raise RunError(
            f"round {state.round + 1}: none of {len(cohort)} clients finished\n"
            + "\n".join(f"  {client}: {reason}" for client, reason in trained.failed.items()),
            code="round.no_client",
        )
    tree: Tree = trained.upload.tree
    ids = tuple(client.id for client in cohort)
    for transform in reversed(algorithm.protect):
        tree = transform.decode(tree, Site(state.seed, state.round, "", ids))
    proposal = algorithm.aggregate.finish(state.params, Upload(tree, trained.upload.weight, trained.upload.metrics))
    if proposal.params.keys() != state.params.keys():
        unknown = sorted(proposal.params.keys() ^ state.params.keys())
        raise RunError(f"the aggregate proposes other parameters than there are: {unknown[:5]}", code="round.names")
    params, server = algorithm.server.apply(state.params, proposal, state.server)
    if not all_finite(params):
        bad = [name for name, leaf in params.items() if not all_finite({name: leaf})]
        raise RunError(
            f"round {state.round + 1}: the server step gave non-finite parameters ({bad[0]} and {len(bad) - 1} more)",
            hint="lower server_learning_rate or client.learning_rate; the last checkpoint is sound",
            code="round.nonfinite",
        )
    base = adapter.accumulate(state.base, proposal.merge) if proposal.merge else state.base
    personal = joined(state.personal, trained.personal)
    after = State(state.seed, state.round + 1, params, server, personal, base)
    seconds = time.perf_counter() - start
    return after, RoundReport(after.round, ids, trained.failed, trained.upload.metrics, trained.clients, seconds)


def federate(
    algorithm: Algorithm,
    adapter: Adapter,
    runtime: Runtime,
    state: State,
    population: Population,
    *,
    rounds: int,
    sampling: Sampling | None = None,
) -> Iterator[tuple[State, RoundReport]]:
    """Rounds from `state.round` to `rounds`, one at a time, so that the caller evaluates, saves or stops in between."""
    sampling = sampling or Sampling()
    while state.round < rounds:
        ids = sampling.cohort(population.ids, state.seed, state.round)
        cohort = [population.open(client, state.round) for client in ids]
        state, report = run_round(algorithm, adapter, runtime, state, cohort)
        yield state, report

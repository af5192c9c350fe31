"""Clients of different LoRA ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fedloom.runtimes.cohort import has_own_model
from fedloom.types import Adapter, Algorithm, Client, Evaluation, Metrics, Runtime, State, Trained


def with_ranks(inner: Runtime, rank_of: Callable[[str], int | None]) -> Runtime:
    """Each client trains at its own rank. A personalised model is evaluated at that rank, a common one at the full."""

    def ranked(cohort: Sequence[Client]) -> list[Client]:
        return [client._replace(rank=rank_of(client.id)) for client in cohort]

    def train(algorithm: Algorithm, adapter: Adapter, state: State, cohort: Sequence[Client]) -> Trained:
        return inner.train(algorithm, adapter, state, ranked(cohort))

    def evaluate(
        algorithm: Algorithm, adapter: Adapter, state: State, clients: Sequence[Client], evaluation: Evaluation
    ) -> Mapping[str, Metrics]:
        own = has_own_model(algorithm.client, state.params)
        return inner.evaluate(algorithm, adapter, state, ranked(clients) if own else clients, evaluation)

    return Runtime(train, evaluate)

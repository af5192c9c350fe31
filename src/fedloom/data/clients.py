"""Prepared data as a population: who there is, and what each client trains on in a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.data.batches import Batches, examples_seen, round_batches, steps_per_epoch
from fedloom.data.federation import ClientData, Federation
from fedloom.data.holdings import ClientTable
from fedloom.data.pair_batches import PairBatches, Pairs, pair_batches
from fedloom.data.tokens import pad_id_of
from fedloom.types import Client


@dataclass(frozen=True)
class Clients:
    """A population over clients' data. A client's batches of a round are drawn when it is opened, tensors when used.

    Exactly one of `num_steps` and `num_epochs` is set; `batch_size` is examples per optimiser step. `paired` is for
    preference data, whose examples are pairs.
    """

    data: Mapping[str, ClientData]
    pad_id: int
    batch_size: int
    seed: int
    num_steps: int | None = None
    num_epochs: int | None = None
    paired: bool = False

    @property
    def ids(self) -> Sequence[str]:
        return self.data.ids if isinstance(self.data, ClientTable) else list(self.data)

    def open(self, client: str, round: int) -> Client:
        """The client with its batches of that round; its FedAvg weight is its number of training rows."""
        return Client(client, self.batches(client, round), float(len(self.data[client].train)))

    def examples_seen(self, client: str, rounds: int) -> int:
        """How many examples a client works on in its first `rounds` rounds, known without drawing them."""
        own = Pairs(self.data[client].train).longer if self.paired else self.data[client].train
        steps = self.num_steps or (self.num_epochs or 0) * steps_per_epoch(len(own), self.batch_size)
        return examples_seen(own, batch_size=self.batch_size, steps=rounds * steps, seed=self.seed, client=client)

    def steps_of(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Local steps a round of clients with so many examples."""
        if self.num_steps is not None:
            return np.full(len(sizes), self.num_steps, dtype=np.int64)
        return (self.num_epochs or 0) * -(-sizes // self.batch_size)

    def batches(self, client: str, round: int) -> Batches | PairBatches:
        train = self.data[client].train
        if self.paired:
            return pair_batches(
                Pairs(train),
                batch_size=self.batch_size,
                num_steps=self.num_steps,
                num_epochs=self.num_epochs,
                pad_id=self.pad_id,
                seed=self.seed,
                round=round,
                client=client,
            )
        return round_batches(
            train,
            batch_size=self.batch_size,
            num_steps=self.num_steps,
            num_epochs=self.num_epochs,
            pad_id=self.pad_id,
            seed=self.seed,
            round=round,
            client=client,
        )


def population(
    federation: Federation,
    *,
    batch_size: int,
    seed: int,
    num_steps: int | None = None,
    num_epochs: int | None = None,
) -> Clients:
    """All clients of prepared data, with `num_steps` batches or `num_epochs` epochs a round."""
    pad_id = pad_id_of(federation.tokenizer)
    return Clients(federation.clients, pad_id, batch_size, seed, num_steps, num_epochs, federation.paired)

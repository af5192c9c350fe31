"""Which examples are in which step: stateless, so that a resumed run draws what an uninterrupted one would have.

A client walks through its examples without replacement, epoch after epoch, across rounds: its step j of round r is
global step i = r x num_steps + j, which lies in epoch i // (batches per epoch). Every draw is made from the seed, the
epoch or round, and the client, so no round needs another's, and no client needs another's.

Padding is what costs, twice over. Inside a client, windows of an epoch are sorted by length, so that a batch holds
similar lengths. Between clients, who step together, the batches of one round are put in an order that all share: step j
has the same rank of length at every client, while lengths still come in random order over the round. So that equal
ranks mean equal lengths, an epoch's batches are ordered such that every stretch of them spreads over all its lengths.

Shapes: B examples, T tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.data.tokens import NO_LOSS, Example, Examples
from fedloom.seeds import seed_of
from fedloom.types import Batch

WINDOW = 16  # batches that are sorted together: enough for similar lengths, and still a random draw


class Batches(Sequence[Batch]):
    """A lazy sequence of batches. Its length, shapes and token counts are known without making a tensor."""

    def __init__(self, examples: Sequence[Example], plan: Sequence[NDArray[np.int64]], pad_id: int) -> None:
        self.examples = examples
        self.plan = plan  # example numbers of each batch
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.plan)

    @overload
    def __getitem__(self, number: int) -> Batch: ...
    @overload
    def __getitem__(self, number: slice) -> Batches: ...
    def __getitem__(self, number: int | slice) -> Batch | Batches:
        if isinstance(number, slice):
            return Batches(self.examples, self.plan[number], self.pad_id)
        return collate([self.examples[int(place)] for place in self.plan[number]], self.pad_id)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(B, T) of each batch."""
        lengths = lengths_of(self.examples)
        return [(len(places), int(lengths[places].max())) for places in self.plan]

    @property
    def num_tokens(self) -> int:
        """Tokens of all batches together, padding left out."""
        lengths = lengths_of(self.examples)
        return int(sum(int(lengths[places].sum()) for places in self.plan))


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """{"input_ids", "labels"}: int64 [B, T], padded on the right, and "lengths": int64 [B], the tokens that are real.

    Causal attention then needs no mask.
    """
    longest = max(len(example.input_ids) for example in examples)
    ids = np.full((len(examples), longest), pad_id, dtype=np.int64)
    labels = np.full((len(examples), longest), NO_LOSS, dtype=np.int64)
    for line, example in enumerate(examples):
        ids[line, : len(example.input_ids)] = example.input_ids
        labels[line, : len(example.labels)] = example.labels
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "lengths": lengths}


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Tokens of each example."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.asarray([len(example.input_ids) for example in examples], dtype=np.int64)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Batches in one pass over the examples; the last may be smaller."""
    return -(-num_examples // batch_size)


def examples_seen(examples: Sequence[Example], *, batch_size: int, steps: int, seed: int, client: str) -> int:
    """How many examples the first `steps` steps of a client have, over its rounds; an epoch has one smaller batch."""
    per_epoch = steps_per_epoch(len(examples), batch_size)
    epochs, rest = divmod(steps, per_epoch)
    seen = epochs * len(examples)
    if rest:
        _, edges, sequence = _epoch(lengths_of(examples), batch_size, seed, epochs, client, True)
        seen += int(np.diff(edges)[sequence[:rest]].sum())
    return seen


def round_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    pad_id: int,
    seed: int,
    round: int,
    client: str,
    bucket: bool = True,
) -> Batches:
    """What a client trains on in one round: `num_steps` batches, or all batches of `num_epochs` epochs.

    `batch_size` is the number of examples per optimiser step. The last batch of an epoch may be smaller; nothing is
    ever repeated within an epoch. `round` is 0 for the first. `bucket=False` gives plain random order.

    Raises:
        ValueError: not exactly one of num_steps and num_epochs, a number below 1, or no examples.
    """
    if (num_steps is None) == (num_epochs is None):
        raise ValueError("give one of num_steps and num_epochs")
    amount = num_steps if num_steps is not None else num_epochs
    if amount is None or amount < 1 or batch_size < 1 or round < 0:
        raise ValueError(
            f"steps or epochs {amount} and batch_size {batch_size} must be at least 1, round {round} at least 0"
        )
    if not len(examples):
        raise ValueError(f"client {client} has no training rows")
    lengths = lengths_of(examples)
    per_epoch = steps_per_epoch(len(examples), batch_size)
    steps = amount if num_steps is not None else amount * per_epoch
    first = round * steps
    plan: list[NDArray[np.int64]] = []
    for epoch in range(first // per_epoch, (first + steps - 1) // per_epoch + 1):
        order, edges, sequence = _epoch(lengths, batch_size, seed, epoch, client, bucket)
        begin = epoch * per_epoch
        for place in sequence[max(0, first - begin) : first + steps - begin].tolist():
            plan.append(order[edges[place] : edges[place + 1]])
    if bucket:
        # Whole epochs keep their order: nothing of the second comes before the first is through.
        stretch = steps if num_steps is not None else per_epoch
        plan = _aligned(plan, lengths, stretch, seed, round)
    return Batches(examples, plan, pad_id)


def _epoch(
    lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int, client: str, bucket: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """One epoch: its examples, the edges of its batches in them, and the order in which the batches come.

    Batch k is `examples[edges[k] : edges[k + 1]]`. Arrays, as an epoch may have a million batches and a round thirty.
    """
    rng = np.random.Generator(np.random.PCG64(seed_of(seed, epoch, client, "order")))
    number = len(lengths)
    order = rng.permutation(number)
    num_batches = steps_per_epoch(number, batch_size)
    edges = np.minimum(np.arange(num_batches + 1) * batch_size, number)
    if not bucket:
        return order, edges, np.arange(num_batches)
    window = np.arange(number) // (WINDOW * batch_size)
    order = order[np.lexsort((lengths[order], window))]
    short = number % batch_size
    if short:
        # The smaller batch may be any of the last window, or the longest rows would always be the ones in it.
        place = int(rng.integers(int(window[-1]) * WINDOW, num_batches))
        edges[place + 1 : -1] -= batch_size - short
    longest = np.maximum.reduceat(lengths[order], edges[:-1])
    return order, edges, np.argsort(longest, kind="stable")[_spread(num_batches, rng)]


def _spread(number: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of 0 ... number - 1 in which every stretch is spread evenly over the whole range.

    Low and high halves alternate, and so do the halves' halves among themselves, which of two comes first being drawn:
    bit reversal, scrambled. The batches of one round are then alike in length from client to client, not by luck.
    """
    nodes = np.arange(1 << max(0, number - 1).bit_length(), dtype=np.int64)[:, None]
    while len(nodes) > 1:
        low, high = nodes[0::2], nodes[1::2]
        swap = rng.integers(0, 2, size=(len(low), 1), dtype=np.int64).astype(np.bool_)
        pairs = np.stack([np.where(swap, high, low), np.where(swap, low, high)], axis=2)
        nodes = pairs.reshape(len(low), -1)
    order: NDArray[np.int64] = nodes[0]
    return order[order < number]


def _aligned(
    plan: Sequence[NDArray[np.int64]], lengths: NDArray[np.int64], stretch: int, seed: int, round: int
) -> list[NDArray[np.int64]]:
    """Reorder each stretch so that a step's rank of length is about the same at every client.

    Step j gets the batch whose rank is that of a number drawn for j. The numbers are the same at all clients, and a
    client with fewer steps uses the first ones, so ranks agree as shares also between clients of different sizes.
    """
    drawn = np.random.Generator(np.random.PCG64(seed_of(seed, round, "", "step-order"))).random(len(plan))
    longest = np.asarray([lengths[places].max() for places in plan])
    found: list[NDArray[np.int64]] = []
    for begin in range(0, len(plan), stretch):
        span = slice(begin, begin + stretch)
        by_length = begin + np.argsort(longest[span], kind="stable")
        rank = np.argsort(np.argsort(drawn[span], kind="stable"), kind="stable")
        found += [plan[int(place)] for place in by_length[rank]]
    return found


def eval_batches(examples: Sequence[Example], *, batch_size: int, pad_id: int) -> Batches:
    """Every example once, sorted by length: what is measured does not depend on the order."""
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    order = np.argsort(lengths_of(examples), kind="stable")
    plan = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    return Batches(examples, plan, pad_id)

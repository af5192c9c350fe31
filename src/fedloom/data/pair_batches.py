"""Pairs of preference data as examples and batches, for losses that compare two answers to the same prompt.

In a batch a row is a pair, so whatever takes rows apart or adds some (accumulation, padding a cohort, a gradient per
example) keeps both sides together. Shapes: B pairs, T tokens of the longest side.

    input_ids, rejected_ids      int64 [B, T], padded on the right: the two sides
    chosen_mask, rejected_mask   int64 [B, T], 1 at the tokens of the answer; padded with 0 like everything
    labels                       int64 [B, T], one PAIR in each row: a mean by labels is a mean over pairs, not tokens
    lengths                      int64 [B], real tokens of both sides together
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.data.batches import Batches, collate, eval_batches, round_batches
from fedloom.data.tokens import NO_LOSS, Example, Examples
from fedloom.types import Batch

__all__ = ["PAIR", "PairBatches", "PairExample", "Pairs", "collate_pairs", "eval_pair_batches", "pair_batches"]

PAIR = -1  # the one label of a pair: no token, so that a loss over tokens fails on it instead of training on it


class PairExample(NamedTuple):
    """Two answers to one prompt. Both have the prompt's tokens before them, without loss, and the same row."""

    chosen: Example
    rejected: Example


class Pairs(Sequence[PairExample]):
    """The pairs of some examples of preference data, which are the chosen ones (see `fedloom.data.pairs`)."""

    def __init__(self, chosen: Examples) -> None:
        if (chosen.numbers % 2).any():
            raise ValueError("these examples are not the chosen ones of preference data")
        self.chosen = chosen
        self.rejected = Examples(chosen.tokens, chosen.numbers + 1)

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, number: int) -> PairExample: ...
    @overload
    def __getitem__(self, number: slice) -> Pairs: ...
    def __getitem__(self, number: int | slice) -> PairExample | Pairs:
        if isinstance(number, slice):
            return Pairs(self.chosen[number])
        return PairExample(self.chosen[number], self.rejected[number])

    def __iter__(self) -> Iterator[PairExample]:
        return map(PairExample, self.chosen, self.rejected)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of the longer side of each pair."""
        return np.maximum(self.chosen.lengths, self.rejected.lengths)

    @property
    def longer(self) -> Examples:
        """The longer side of each pair: what batches are made by."""
        first = self.chosen.lengths >= self.rejected.lengths
        return Examples(self.chosen.tokens, np.where(first, self.chosen.numbers, self.rejected.numbers))

    @property
    def both(self) -> Examples:
        """All chosen examples, then all rejected ones."""
        return Examples(self.chosen.tokens, np.concatenate([self.chosen.numbers, self.rejected.numbers]))


class PairBatches(Sequence[Batch]):
    """A lazy sequence of batches of pairs.

    `examples` and `plan` name both sides of each batch, the chosen ones first, so that what is counted from them
    (shapes, tokens, cost) is what goes through the model.
    """

    def __init__(self, pairs: Pairs, places: Sequence[NDArray[np.int64]], pad_id: int) -> None:
        self.pairs = pairs
        self.places = places  # pair numbers of each batch
        self.pad_id = pad_id
        self.examples = pairs.both
        self.plan = [np.concatenate([one, one + len(pairs)]) for one in places]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> Batch: ...
    @overload
    def __getitem__(self, number: slice) -> PairBatches: ...
    def __getitem__(self, number: int | slice) -> Batch | PairBatches:
        if isinstance(number, slice):
            return PairBatches(self.pairs, self.places[number], self.pad_id)
        return collate_pairs([self.pairs[int(place)] for place in self.places[number]], self.pad_id)

    @property
    def num_tokens(self) -> int:
        """Tokens of all batches together, padding left out."""
        return Batches(self.examples, self.plan, self.pad_id).num_tokens


def collate_pairs(pairs: Sequence[PairExample], pad_id: int) -> Batch:
    """A batch of pairs (see the top of the file)."""
    sides = collate([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)], pad_id)
    number = len(pairs)
    mask = (sides["labels"] != NO_LOSS).long()
    labels = torch.full_like(sides["labels"][:number], NO_LOSS)
    labels[:, 1] = PAIR  # the first place is never counted; an answer's token is the second one at the earliest
    lengths = sides["lengths"]
    return {
        "input_ids": sides["input_ids"][:number],
        "chosen_mask": mask[:number],
        "rejected_ids": sides["input_ids"][number:],
        "rejected_mask": mask[number:],
        "labels": labels,
        "lengths": lengths[:number] + lengths[number:],
    }


def pair_batches(
    pairs: Pairs,
    *,
    batch_size: int,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    pad_id: int,
    seed: int,
    round: int,
    client: str,
) -> PairBatches:
    """What a client trains on in one round, as `round_batches` with pairs in place of examples."""
    found = round_batches(
        pairs.longer,
        batch_size=batch_size,
        num_steps=num_steps,
        num_epochs=num_epochs,
        pad_id=pad_id,
        seed=seed,
        round=round,
        client=client,
    )
    return PairBatches(pairs, found.plan, pad_id)


def eval_pair_batches(pairs: Pairs, *, batch_size: int, pad_id: int) -> PairBatches:
    """Every pair once, sorted by the length of the longer side."""
    return PairBatches(pairs, eval_batches(pairs.longer, batch_size=batch_size, pad_id=pad_id).plan, pad_id)

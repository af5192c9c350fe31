"""Pairs of preference data as examples and batches, for losses that compare two answers to the same prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from fedloom.data.batches import Batches, round_batches
from fedloom.data.tokens import Example, Examples

__all__ = ["PairExample", "Pairs", "pair_batches"]


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
    def both(self) -> Examples:
        """All chosen examples, then all rejected ones."""
        return Examples(self.chosen.tokens, np.concatenate([self.chosen.numbers, self.rejected.numbers]))


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
) -> Batches:
    """What a client trains on in one round, as `round_batches` with pairs in place of examples.

    A batch of B pairs has 2 B lines of one length: the chosen sides, then the rejected ones in the same order.
    """
    longer = Examples(
        pairs.chosen.tokens,
        np.where(pairs.chosen.lengths >= pairs.rejected.lengths, pairs.chosen.numbers, pairs.rejected.numbers),
    )
    found = round_batches(
        longer,
        batch_size=batch_size,
        num_steps=num_steps,
        num_epochs=num_epochs,
        pad_id=pad_id,
        seed=seed,
        round=round,
        client=client,
    )
    plan = [np.concatenate([places, places + len(pairs)]) for places in found.plan]
    return Batches(pairs.both, plan, pad_id)

"""The passes that a run will make, counted before any is made: their shapes are known, as its batches are.

A step of training is one pass of a block of clients, or several where a batch is worked off in pieces. Where a run has
so many rounds or clients that counting them all would take long, some rounds stand for the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedloom.data.batches import Batches, eval_batches, lengths_of
from fedloom.data.federation import ClientData, Federation
from fedloom.data.listing import spread
from fedloom.data.pair_batches import PairBatches, Pairs, eval_pair_batches
from fedloom.data.tokens import Examples
from fedloom.evaluate.loss import together
from fedloom.runtimes import Room
from fedloom.runtimes.cohort import TOGETHER
from fedloom.runtimes.distributed import split
from fedloom.study.build import clients_in_a_pass, global_pieces, population_of, sampling_of
from fedloom.study.costs import work_of
from fedloom.study.recipe import Recipe

__all__ = ["ArmWork", "Decoding", "Passes", "Step", "arm_work", "decodings", "evaluation_passes", "pieces_of"]

MOST_ROUNDS = 64  # counted one by one; more are stood for by so many, spread evenly
MOST_CLIENTS = 1000  # of a round or of an evaluation, as well
MOST_SECONDS = 2.0  # of counting an arm, after which the rounds counted so far stand for all


class Step(NamedTuple):
    """One optimiser step of a block: `clients` x `rows` x `tokens` go through the model, `real` of them text."""

    clients: int
    rows: int  # of each client; pairs where data are pairs
    tokens: int
    real: int
    pieces: int = 1  # passes in which it is worked off
    round: int = 0
    ids: tuple[str, ...] = ()  # of the block's active clients
    place: int = 0  # of their batches

    @property
    def padded(self) -> int:
        return self.clients * self.rows * self.tokens

    @property
    def pass_tokens(self) -> int:
        """Of its largest pass."""
        return self.clients * -(-self.rows // self.pieces) * self.tokens

    @property
    def text(self) -> float:
        """Tokens of one of its passes, padding left out."""
        return self.real / self.passes

    @property
    def passes(self) -> int:
        size = -(-self.rows // self.pieces)
        return -(-self.rows // size)


class Passes(NamedTuple):
    """So many passes with so many tokens in all, padding counted and not, and the largest one's with padding."""

    number: float = 0.0
    padded: float = 0.0
    real: float = 0.0
    largest: int = 0

    def __add__(self, other: Passes) -> Passes:  # type: ignore[override]
        return Passes(
            self.number + other.number,
            self.padded + other.padded,
            self.real + other.real,
            max(self.largest, other.largest),
        )

    def times(self, factor: float) -> Passes:
        return Passes(self.number * factor, self.padded * factor, self.real * factor, self.largest)


class Share(NamedTuple):
    """What one of several processes does in a round."""

    passes: Passes
    clients: int


@dataclass(frozen=True)
class ArmWork:
    """The training of one arm over all its rounds."""

    steps: Sequence[Step]  # of the rounds that were counted
    scale: float  # by which they stand for all rounds
    rounds: int
    clients: int  # that train in a round
    models: int  # whose state the arm keeps: 1, or one per client
    samples_per_round: float  # that one model is trained on
    blocks_per_round: float
    shares: Sequence[Sequence[Share]] = ()  # of each round that was counted, where several processes share it

    @property
    def passes(self) -> Passes:
        return _passes_of(self.steps).times(self.scale)

    @property
    def real_tokens(self) -> float:
        return self.scale * sum(step.real for step in self.steps)

    @property
    def largest(self) -> Step:
        return max(self.steps, key=lambda step: (step.pass_tokens, step.real))


def _passes_of(steps: Sequence[Step]) -> Passes:
    found = Passes()
    for step in steps:
        found += Passes(step.passes, step.padded, step.real, step.pass_tokens)
    return found


def pieces_of(recipe: Recipe, federation: Federation, arm: str, width: int) -> int:
    """Passes of one optimiser step."""
    more = global_pieces(recipe, federation, Room(width)) if arm == "global" else 1
    return recipe.client.gradient_accumulation_steps * more


def arm_work(
    recipe: Recipe,
    federation: Federation,
    arm: str,
    width: int,
    *,
    side_by_side: bool = True,
    processes: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> ArmWork:
    """What an arm trains on: every step of every block of at most `width` clients, or of rounds that stand for all.

    Args:
        side_by_side: whether the local work takes several clients at once at all.
        processes: that share each round's cohort by load; the global arm's one client is the first one's.
    """
    population = population_of(federation, recipe, arm)
    sampling = sampling_of(recipe, arm, len(population.ids))
    pieces = pieces_of(recipe, federation, arm, width)
    width = clients_in_a_pass(recipe, Room(width)) if arm != "global" and side_by_side else 1
    rounds = np.unique(np.linspace(0, recipe.rounds - 1, min(recipe.rounds, MOST_ROUNDS)).astype(int)).tolist()
    steps: list[Step] = []
    shares: list[list[Share]] = []
    counted = blocks = clients = everyone = 0
    examples = 0.0
    began = clock()
    for round in _outside_in(rounds):
        ids = sampling.cohort(population.ids, recipe.seed, round)
        some = [ids[place] for place in spread(len(ids), MOST_CLIENTS)]
        opened = [(client, population.batches(client, round)) for client in some]
        shares.append([])
        loads = [work_of(batches).padded_tokens if processes > 1 else 0.0 for _, batches in opened]
        for part in split(loads, processes):
            own = sorted((opened[place] for place in part), key=lambda one: -len(one[1]))
            before = len(steps)
            for start in range(0, len(own), width):
                steps += _block_steps(own[start : start + width], pieces, round)
                blocks += 1
            shares[-1].append(Share(_passes_of(steps[before:]), len(own)))
        counted += 1
        clients += len(opened)
        everyone += len(ids)
        examples += sum(len(places) for _, batches in opened for places in _rows(batches))
        if clock() - began > MOST_SECONDS:
            break
    each = arm == "local"
    return ArmWork(
        steps,
        recipe.rounds / counted * everyone / clients,
        recipe.rounds,
        round_half_up(everyone / counted),
        len(population.ids) if each else 1,
        examples / counted * everyone / clients / (len(population.ids) if each else 1),
        blocks / counted * everyone / clients,
        shares if processes > 1 else (),
    )


def round_half_up(value: float) -> int:
    return max(1, math.floor(value + 0.5))


def _outside_in(rounds: Sequence[int]) -> Iterator[int]:
    """Both ends, the middle, the quarters: whenever it is stopped, what was taken is spread over the whole."""
    if not rounds:
        return
    yield from dict.fromkeys([rounds[0], rounds[-1]])
    taken = {0, len(rounds) - 1}
    gap = len(rounds)
    while gap > 1:
        gap = -(-gap // 2)
        for place in range(0, len(rounds), gap):
            if place not in taken:
                taken.add(place)
                yield rounds[place]
    yield from (rounds[place] for place in range(len(rounds)) if place not in taken)


def _rows(batches: Batches | PairBatches) -> Sequence[np.ndarray]:
    return batches.places if isinstance(batches, PairBatches) else batches.plan


def _block_steps(block: Sequence[tuple[str, Batches | PairBatches]], pieces: int, round: int) -> Iterator[Step]:
    """The block's clients come by falling number of batches, so the active ones are its first ones."""
    lengths = [lengths_of(batches.examples) for _, batches in block]
    rows = [_rows(batches) for _, batches in block]
    for index in range(len(block[0][1])):
        active = [place for place, one in enumerate(rows) if index < len(one)]
        own = [lengths[place][block[place][1].plan[index]] for place in active]
        yield Step(
            len(active),
            max(len(rows[place][index]) for place in active),
            int(max(one.max() for one in own)),
            int(sum(int(one.sum()) for one in own)),
            pieces,
            round,
            tuple(block[place][0] for place in active),
            index,
        )


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluation_passes(
    recipe: Recipe,
    federation: Federation,
    part: str,
    width: int,
    *,
    own_models: bool = False,
    of: tuple[int, int] = (0, 1),
) -> Passes:
    """Passes without a graph over `part` ("validation", "test") of all clients, with one model.

    Args:
        own_models: every client's model over every client's rows, as the local arm is tested.
        of: the share of one process of several: its number, and how many there are.
    """
    size = recipe.evaluate.eval_batch_size
    clients, factor = some_clients(federation)
    if own_models:
        shapes = [_eval_shapes(getattr(client, part), size, federation.paired) for client in clients]
        return _together(shapes).times(factor * len(_share_of(list(federation.ids), of)))
    clients = _share(federation, clients, part, of)
    shapes = [_eval_shapes(getattr(client, part), size, federation.paired) for client in clients]
    shapes = [one for one in shapes if one or part == "test"]  # without rows there is no validation of a client
    found, at_once = Passes(), max(width, TOGETHER)
    for start in range(0, len(shapes), at_once):
        found += _together(shapes[start : start + at_once])
    return found.times(factor)


def _share(federation: Federation, clients: list[ClientData], part: str, of: tuple[int, int]) -> list[ClientData]:
    """The clients that a process of a team evaluates, by their tokens."""
    sets = [getattr(client, part) for client in clients]
    lengths = [Pairs(one).lengths if federation.paired else one.lengths for one in sets]
    return _share_of(clients, of, [1.0 + float(own.sum()) for own in lengths])


def _share_of(whole: list[Any], of: tuple[int, int], loads: Sequence[float] | None = None) -> list[Any]:
    number, processes = of
    if processes == 1:
        return whole
    return [whole[place] for place in split(loads or [1.0] * len(whole), processes)[number]]


def some_clients(federation: Federation) -> tuple[list[ClientData], float]:
    """All clients, or as many as stand for them, and how many each of these stands for."""
    ids = federation.ids
    some = [federation.clients[ids[place]] for place in spread(len(ids), MOST_CLIENTS)]
    return some, len(ids) / len(some)


def _eval_shapes(examples: Examples, size: int, paired: bool) -> list[tuple[int, int, int]]:
    """(rows, longest, tokens of all rows) of each batch."""
    if not len(examples):
        return []
    if paired:
        pairs = Pairs(examples)
        batches = eval_pair_batches(pairs, batch_size=size, pad_id=0)
        lengths, plan = pairs.lengths, batches.places
    else:
        lengths, plan = examples.lengths, eval_batches(examples, batch_size=size, pad_id=0).plan
    return [(len(places), int(lengths[places].max()), int(lengths[places].sum())) for places in plan]


def _together(each: Sequence[Sequence[tuple[int, int, int]]]) -> Passes:
    """Passes of one model over the clients' batches, as evaluation puts them together."""
    found = Passes()
    for some in together([[shape[:2] for shape in shapes] for shapes in each]):
        here = [each[c][i] for c, i in some]
        padded = len(here) * max(rows for rows, _, _ in here) * max(tokens for _, tokens, _ in here)
        found += Passes(1, padded, sum(real for _, _, real in here), padded)
    return found


class Decoding(NamedTuple):
    """Answers that are written in one go: to so many rows, so many at once."""

    rows: int
    prompts: int  # tokens of all prompts
    answers: int  # tokens of all answers that the data has, with their ends
    longest: int  # of them
    slots: int

    @property
    def steps(self) -> int:
        """Tokens one after the other: a slot that is free takes the next row."""
        return max(self.longest, -(-self.answers // max(1, min(self.slots, self.rows))))

    def all_of(self, tokens: int) -> Decoding:
        """The same rows with answers of so many tokens each."""
        return self._replace(answers=tokens * self.rows, longest=tokens)


def decodings(
    recipe: Recipe,
    federation: Federation,
    part: str,
    width: int,
    most: int,
    *,
    own_models: bool = False,
    of: tuple[int, int] = (0, 1),
) -> list[Decoding]:
    """What is written to the rows of `part`, block by block: at most `most` tokens each. `of` as above."""
    limit, slots = recipe.evaluate.limit, recipe.evaluate.eval_batch_size
    clients, factor = some_clients(federation)
    if own_models:
        each = [getattr(client, part)[:limit] for client in clients]
        return [_decoding(each, most, slots)] * round(factor * len(_share_of(list(federation.ids), of)))
    each = [getattr(client, part)[:limit] for client in _share(federation, clients, part, of)]
    each = [one for one in each if len(one) or part == "test"]
    at_once = max(width, TOGETHER)
    found = [_decoding(each[start : start + at_once], most, slots) for start in range(0, len(each), at_once)]
    return found * round(factor)


def _decoding(each: Sequence[Examples], most: int, slots: int) -> Decoding:
    answers = [one.tokens.targets[one.numbers].astype(np.int64) for one in each]
    prompts = sum(int(one.lengths.sum() - own.sum()) for one, own in zip(each, answers, strict=True))
    capped = np.minimum(np.concatenate(answers), most) if answers else np.zeros(0, dtype=np.int64)
    return Decoding(len(capped), prompts, int(capped.sum()), int(capped.max(initial=0)), slots)

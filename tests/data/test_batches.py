"""Batches: every example once an epoch, drawn from the seed alone, and little padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.data.batches import (
    WINDOW,
    Batches,
    _spread,
    collate,
    eval_batches,
    examples_seen,
    round_batches,
    steps_per_epoch,
)
from fedloom.data.tokens import NO_LOSS, Example

PAD = 9


def examples_of(lengths: Sequence[int]) -> list[Example]:
    found = []
    for row, length in enumerate(lengths):
        ids = np.full(length, 1, dtype=np.int32)
        labels = ids.copy()
        labels[: length // 2] = NO_LOSS
        found.append(Example(ids, labels, row))
    return found


def lognormal(number: int, seed: int) -> list[int]:
    """Lengths as instruction data has them: the median about 150 tokens, the longest ten times that."""
    draw = np.random.default_rng(seed)
    return [int(length) for length in np.clip(np.exp(draw.normal(5.0, 0.6, number)), 8, 1024)]


def rows_in(batches: Batches) -> list[list[int]]:
    return [[batches.examples[int(place)].row for place in places] for places in batches.plan]


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=120)
SIZES = st.integers(1, 9)


@given(LENGTHS, SIZES, st.integers(1, 7), st.integers(1, 9))
def test_examples_seen_are_those_that_the_rounds_draw(lengths: list[int], size: int, steps: int, rounds: int) -> None:
    examples = examples_of(lengths)
    drawn = 0
    for r in range(rounds):
        batches = round_batches(examples, batch_size=size, num_steps=steps, pad_id=PAD, seed=5, round=r, client="b")
        drawn += sum(len(batch) for batch in rows_in(batches))
    assert examples_seen(examples, batch_size=size, steps=rounds * steps, seed=5, client="b") == drawn


@given(LENGTHS, SIZES, st.integers(1, 7), st.booleans())
def test_every_example_once_per_epoch_across_rounds(lengths: list[int], size: int, steps: int, bucket: bool) -> None:
    examples = examples_of(lengths)
    per_epoch = steps_per_epoch(len(examples), size)
    rounds = -(-3 * per_epoch // steps)
    plan = [
        batch
        for r in range(rounds)
        for batch in rows_in(
            round_batches(
                examples, batch_size=size, num_steps=steps, pad_id=PAD, seed=1, round=r, client="a", bucket=bucket
            )
        )
    ]
    assert len(plan) == rounds * steps
    # Within a round batches are reordered, so an epoch is whole where it ends with a round: count over all rounds.
    seen = Counter(row for batch in plan for row in batch)
    whole = len(plan) // per_epoch
    assert all(whole <= seen[row] <= whole + 1 for row in range(len(examples)))
    assert all(len(set(batch)) == len(batch) for batch in plan)
    if not bucket:
        for epoch in range(whole):
            rows = [row for batch in plan[epoch * per_epoch : (epoch + 1) * per_epoch] for row in batch]
            assert sorted(rows) == list(range(len(examples)))


@given(LENGTHS, SIZES, st.integers(1, 3), st.integers(0, 3), st.booleans())
def test_epochs(lengths: list[int], size: int, epochs: int, round: int, bucket: bool) -> None:
    examples = examples_of(lengths)
    batches = round_batches(
        examples, batch_size=size, num_epochs=epochs, pad_id=PAD, seed=1, round=round, client="a", bucket=bucket
    )
    per_epoch = steps_per_epoch(len(examples), size)
    assert len(batches) == epochs * per_epoch
    plan = rows_in(batches)
    for epoch in range(epochs):
        one = plan[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for batch in one for row in batch) == list(range(len(examples)))
        assert sorted(map(len, one), reverse=True)[:-1] == [size] * (per_epoch - 1)


@given(LENGTHS, SIZES, st.integers(1, 7), st.integers(0, 5))
def test_a_round_needs_neither_the_round_before_nor_another_client(
    lengths: list[int], size: int, steps: int, round: int
) -> None:
    examples = examples_of(lengths)

    def plan(round: int, client: str, seed: int = 1) -> list[list[int]]:
        return rows_in(
            round_batches(examples, batch_size=size, num_steps=steps, pad_id=PAD, seed=seed, round=round, client=client)
        )

    alone = plan(round, "a")
    for before in range(round):
        plan(before, "a")
        plan(before, "b")
    assert plan(round, "a") == alone


def test_seed_round_and_client_each_matter() -> None:
    examples = examples_of(lognormal(200, 0))

    def plan(**changed: object) -> list[list[int]]:
        settings = {"seed": 1, "round": 0, "client": "a", **changed}
        return rows_in(round_batches(examples, batch_size=4, num_steps=10, pad_id=PAD, **settings))  # type: ignore[arg-type]

    first = plan()
    assert first == plan() and first != plan(seed=2) and first != plan(round=1) and first != plan(client="b")


def test_a_client_smaller_than_a_batch_gives_a_smaller_batch() -> None:
    batches = round_batches(examples_of([5, 3, 4]), batch_size=8, num_steps=4, pad_id=PAD, seed=0, round=0, client="a")
    assert [sorted(rows) for rows in rows_in(batches)] == [[0, 1, 2]] * 4
    assert batches[0]["input_ids"].shape == (3, 5)


def test_the_smaller_batch_is_not_always_the_one_with_the_longest_rows() -> None:
    examples = examples_of(range(1, 42))  # 10 batches of 4, and one row over
    alone = set()
    for epoch in range(60):
        plan = rows_in(round_batches(examples, batch_size=4, num_epochs=1, pad_id=PAD, seed=0, round=epoch, client="a"))
        alone |= {rows[0] for rows in plan if len(rows) == 1}
    assert len(alone) > 6 and min(alone) < 15


def test_batches_are_lazy_right_padded_and_masked_by_position() -> None:
    ids = np.asarray([PAD, 4, PAD], dtype=np.int32)
    pair = [Example(ids, np.asarray([NO_LOSS, 4, PAD], dtype=np.int32), 0), examples_of([5])[0]]
    batch = collate(pair, PAD)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"][0].tolist() == [PAD, 4, PAD, PAD, PAD]
    assert batch["labels"][0].tolist() == [NO_LOSS, 4, PAD, NO_LOSS, NO_LOSS]

    class Counting(list[Example]):
        asked = 0

        def __getitem__(self, place):  # type: ignore[no-untyped-def, override]
            Counting.asked += 1
            return super().__getitem__(place)

    batches = round_batches(
        Counting(examples_of([4] * 40)), batch_size=4, num_steps=5, pad_id=PAD, seed=0, round=0, client="a"
    )
    assert len(batches) == 5 and batches.shapes == [(4, 4)] * 5 and batches.num_tokens == 80 and Counting.asked == 0
    assert batches[3]["input_ids"].shape == (4, 4) and Counting.asked == 4
    assert len(batches[1:3]) == 2 and batches[-1]["labels"].shape == (4, 4)
    with pytest.raises(IndexError):
        batches[5]


@given(LENGTHS, SIZES)
def test_evaluation_has_every_example_once_sorted_by_length(lengths: list[int], size: int) -> None:
    batches = eval_batches(examples_of(lengths), batch_size=size, pad_id=PAD)
    assert sorted(row for rows in rows_in(batches) for row in rows) == list(range(len(lengths)))
    longest = [longest for _, longest in batches.shapes]
    assert longest == sorted(longest) and len(batches) == steps_per_epoch(len(lengths), size)
    assert len(eval_batches([], batch_size=size, pad_id=PAD)) == 0


def test_numbers_out_of_range() -> None:
    examples = examples_of([3])
    for wrong in (
        {"num_steps": 1, "num_epochs": 1},
        {},
        {"num_steps": 0},
        {"num_epochs": 0},
        {"num_steps": 1, "batch_size": 0},
        {"num_steps": 1, "round": -1},
        {"num_steps": 1, "examples": []},
    ):
        settings = {"examples": examples, "batch_size": 1, "pad_id": PAD, "seed": 0, "round": 0, "client": "a", **wrong}
        with pytest.raises(ValueError):
            round_batches(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        eval_batches(examples, batch_size=0, pad_id=PAD)


# ---------------------------------------------------------------- padding


def padding(cohort: Sequence[Batches], reorder: np.random.Generator | None = None) -> float:
    """Share of positions that are padding when a cohort steps together: step j is as long as its longest row."""
    shapes = [batches.shapes for batches in cohort]
    if reorder is not None:
        shapes = [[own[int(place)] for place in reorder.permutation(len(own))] for own in shapes]
    positions = 0
    for step in range(max(map(len, shapes))):
        there = [own[step] for own in shapes if step < len(own)]
        positions += len(there) * max(size for size, _ in there) * max(longest for _, longest in there)
    return 1 - sum(batches.num_tokens for batches in cohort) / positions


def cohorts_of(sizes: Sequence[int], bucket: bool = True, **amount: int) -> list[list[Batches]]:
    """Four rounds of clients with so many rows each, batch 4."""
    own = [examples_of(lognormal(size, place)) for place, size in enumerate(sizes)]
    return [
        [
            round_batches(
                examples, batch_size=4, pad_id=PAD, seed=5, round=round, client=f"c{place}", bucket=bucket, **amount
            )
            for place, examples in enumerate(own)
        ]
        for round in range(4)
    ]


def mean_padding(cohorts: Sequence[Sequence[Batches]], reorder: bool = False) -> float:
    return float(np.mean([padding(one, np.random.default_rng(0) if reorder else None) for one in cohorts]))


def test_padding_inside_clients_and_between_them() -> None:
    """Measured, share of positions that are padding, 8 clients of 2,000 rows, batch 4, 30 steps: plain order 66.0 %,
    buckets in an order of each client's own 60.8 %, buckets in the shared order 19.8 %; one client alone 8.8 %."""
    cohorts = cohorts_of([2000] * 8, num_steps=30)
    plain = mean_padding(cohorts_of([2000] * 8, bucket=False, num_steps=30))
    unaligned, aligned = mean_padding(cohorts, reorder=True), mean_padding(cohorts)
    alone = mean_padding([[own] for one in cohorts for own in one])
    print(f"padding: plain {plain:.1%}, buckets {unaligned:.1%}, aligned {aligned:.1%}, one client alone {alone:.1%}")
    assert alone < 0.12 and aligned < 0.25 < 0.5 < unaligned < plain


def test_clients_of_different_sizes_are_aligned_by_rank() -> None:
    cohorts = cohorts_of([90, 200, 140, 200], num_epochs=1)
    unaligned, aligned = mean_padding(cohorts, reorder=True), mean_padding(cohorts)
    print(f"padding, clients of different sizes: buckets {unaligned:.1%}, aligned {aligned:.1%}")
    assert aligned < 0.6 * unaligned


@given(st.integers(1, 200), st.integers(0, 99))
def test_every_stretch_of_an_epoch_is_spread_over_all_lengths(number: int, seed: int) -> None:
    order = _spread(number, np.random.default_rng(seed)).tolist()
    assert sorted(order) == list(range(number))
    # A stretch holds from the lower half what is its share, give or take two.
    half = 1 << max(0, (number - 1).bit_length() - 1)
    for begin in range(0, number, 8):
        stretch = order[begin : begin + 8]
        low = sum(rank < half for rank in stretch)
        assert abs(low - len(stretch) * half / number) <= 2 or number < 8


def test_lengths_still_come_in_random_order_over_a_round() -> None:
    longest = np.asarray([longest for _, longest in cohorts_of([400], num_steps=64)[0][0].shapes])
    correlation = np.corrcoef(np.arange(len(longest)), longest)[0, 1]
    assert abs(correlation) < 0.35 and len(set(longest.tolist())) > 20


def test_every_round_has_an_order_of_its_own() -> None:
    """With distinct lengths ranks are plain: their order is the same for all clients, and new in each round."""

    def ranks(round: int, client: str) -> list[int]:
        batches = round_batches(
            examples_of(range(10, 74)), batch_size=2, num_steps=8, pad_id=PAD, seed=0, round=round, client=client
        )
        return np.argsort(np.argsort([longest for _, longest in batches.shapes])).tolist()

    assert ranks(0, "a") == ranks(0, "b") and ranks(1, "a") == ranks(1, "b")
    assert ranks(0, "a") != ranks(1, "a") != ranks(2, "a")


def test_buckets_leave_the_window_random() -> None:
    """A batch is drawn from WINDOW batches' worth of rows, so two epochs do not group the same rows."""
    examples = examples_of(lognormal(4 * WINDOW * 4, 0))

    def pairs(round: int) -> set[frozenset[int]]:
        plan = rows_in(round_batches(examples, batch_size=4, num_epochs=1, pad_id=PAD, seed=0, round=round, client="a"))
        return {frozenset((a, b)) for rows in plan for a in rows for b in rows if a != b}

    assert len(pairs(0) & pairs(1)) < 0.25 * len(pairs(0))

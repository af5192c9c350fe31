"""How likely a model finds given continuations: batched, and each distinct stretch of tokens is run once.

Rows are padded on the right, so the causal mask alone keeps padding away from what is asked. Continuations that differ
in their last token only (" A" to " D") share one row, and a row that is the beginning of another is not run by itself.
Rows that begin alike (solved examples, a question with several answers) have the beginning run once: each goes on from
a copy of the keys and values that it left.

Shape suffixes: N rows, T tokens, P places, M targets, S columns of a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.errors import UserError
from fedloom.evaluate import decoding
from fedloom.evaluate.slots import Other, Slots
from fedloom.models.causal import CausalLM, body_of

__all__ = ["Continuation", "Loglikelihood", "loglikelihoods"]

Ids = Sequence[int]
Rows = Sequence[NDArray[np.uint32]]
SHARED = 32  # tokens that rows must begin with in common, for it to pay


class Continuation(NamedTuple):
    """Tokens to be judged after other tokens."""

    before: Ids  # at least one
    tokens: Ids  # at least one


class Loglikelihood(NamedTuple):
    """Of a continuation."""

    nats: float  # summed over its tokens
    greedy: bool  # each of its tokens is the most likely one in its place


def loglikelihoods(
    causal: CausalLM,
    asked: Sequence[Continuation],
    *,
    batch_size: int,
    on_rows: Callable[[int, int], None] | None = None,
) -> list[Loglikelihood]:
    """One result per continuation, the same (rounding aside) in any order and with any `batch_size`.

    Args:
        causal: the model, with whatever adapter is bound to it at this moment.
        batch_size: rows in one pass.
        on_rows: is told how many rows are done, of how many.

    Raises:
        UserError: a continuation, or what stands before it, has no tokens; or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, must be 1 or more", code="evaluate.batch_size")
    if any(len(one.before) == 0 or len(one.tokens) == 0 for one in asked):
        raise UserError("a continuation, or what stands before it, has no tokens", code="evaluate.no_tokens")
    rows, row_of = _rows([*one.before, *one.tokens[:-1]] for one in asked)
    wanted: list[dict[int, list[tuple[int, int]]]] = [{} for _ in rows]  # row -> position -> (continuation, token)
    for number, one in enumerate(asked):
        for position, token in enumerate(one.tokens, len(one.before) - 1):
            wanted[row_of[number]].setdefault(position, []).append((number, token))
    nats, greedy = np.zeros(len(asked)), np.ones(len(asked), dtype=np.bool_)
    device = next(causal.model.parameters()).device
    beginnings = _Beginnings(causal.model, rows, [min(own) for own in wanted])
    done = 0
    for some in beginnings.passes(batch_size):
        given, skipped = beginnings.before(some)
        width = max(len(rows[row]) - skip for row, skip in zip(some, skipped, strict=True))
        ids_NT = torch.zeros(len(some), width, dtype=torch.int64)
        for n, (row, skip) in enumerate(zip(some, skipped, strict=True)):
            ids_NT[n, : len(rows[row]) - skip] = torch.from_numpy(rows[row][skip:].astype(np.int64))
        places = [(n, position, targets) for n, row in enumerate(some) for position, targets in wanted[row].items()]
        flat = [(p, number, token) for p, (_, _, targets) in enumerate(places) for number, token in targets]
        found = causal.at(
            ids_NT.to(device),
            torch.tensor([n for n, _, _ in places], device=device),
            torch.tensor([position - skipped[n] for n, position, _ in places], device=device),
            torch.tensor([p for p, _, _ in flat], device=device),
            torch.tensor([token for _, _, token in flat], device=device),
            given,
        )
        numbers = np.asarray([number for _, number, _ in flat])
        np.add.at(nats, numbers, found.loglikelihood_M.double().cpu().numpy())
        np.logical_and.at(greedy, numbers, found.first_M.cpu().numpy())
        done += len(some)
        if on_rows is not None:
            on_rows(done, len(rows))
    return [Loglikelihood(float(a), bool(b)) for a, b in zip(nats, greedy, strict=True)]


class _Beginnings:
    """Which rows begin alike, and their beginnings' keys and values.

    Args:
        rows: sorted, so that rows which begin alike are neighbours.
        first: of each row the first position that is asked about; it is not part of a beginning.
    """

    def __init__(self, model: Any, rows: Rows, first: Sequence[int]) -> None:
        self.model, self.rows = model, rows
        self.group = list(range(len(rows)))  # of each row: the first row of those that begin as it does
        self.length = [0] * len(rows)  # and how many tokens they have in common
        for group, length in _alike(rows, first):
            for row in group:
                self.group[row], self.length[row] = group[0], length
        if any(self.length) and decoding.misfit(model) is not None:
            self.length = [0] * len(rows)
        self.kept: tuple[int, Slots] | None = None  # the last beginning that rows of a pass had all in common

    def passes(self, batch_size: int) -> Iterable[list[int]]:
        """Rows of each pass: those by themselves, then those that share, the longest first."""
        longest: dict[int, int] = {}
        for row, group in enumerate(self.group):
            longest[group] = max(longest.get(group, 0), len(self.rows[row]))
        for shared in (False, True):
            order = [row for row in range(len(self.rows)) if (self.length[row] > 0) == shared]
            if shared:
                order.sort(key=lambda row: (-longest[self.group[row]], self.group[row], -len(self.rows[row])))
            else:
                order.sort(key=lambda row: -len(self.rows[row]))
            for start in range(0, len(order), batch_size):
                yield order[start : start + batch_size]

    @torch.no_grad()
    def before(self, some: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        """What the model is given besides the rest of these rows, and how many tokens of each it has got by that."""
        skipped = [self.length[row] for row in some]
        if not any(skipped):
            return {}, skipped
        spare = max(len(self.rows[row]) - self.length[row] for row in some)
        groups = sorted({self.group[row] for row in some})
        if len(groups) == 1:
            if self.kept is None or self.kept[0] != groups[0]:
                self.kept = groups[0], self._run(groups)
            return {"past_key_values": self.kept[1].copied([0] * len(some), spare), "use_cache": True}, skipped
        opening = self._run(groups)
        more = opening.length - max(skipped)  # what an adapter has put before
        lengths = [more + length for length in skipped]
        columns = max(lengths)
        which = [groups.index(self.group[row]) for row in some]
        cache = opening.moved([], [], len(some), columns, spare, [Other(opening, which, lengths, range(len(some)))])
        length_N1 = torch.tensor(lengths, device=cache.layers[0].keys.device)[:, None]
        mask_NS = torch.arange(columns + spare, device=length_N1.device) >= columns - length_N1
        given = {"past_key_values": cache, "use_cache": True, "attention_mask": mask_NS}
        if decoding.takes_positions(type(body_of(self.model))):
            given["position_ids"] = length_N1 + torch.arange(spare, device=length_N1.device)
        return given, skipped

    def _run(self, groups: Sequence[int]) -> Slots:
        opening = Slots(self.model.config)
        ids_NT = torch.zeros(len(groups), max(self.length[group] for group in groups), dtype=torch.int64)
        for n, group in enumerate(groups):
            ids = self.rows[group][: self.length[group]].astype(np.int64)
            ids_NT[n, : len(ids)] = torch.from_numpy(ids)
        decoding.fill(self.model, ids_NT.to(next(self.model.parameters()).device), opening)
        return opening


def _alike(rows: Rows, first: Sequence[int]) -> Iterable[tuple[range, int]]:
    """Neighbours that begin alike, and in how many tokens: more rows as long as that saves more tokens."""
    links = [_in_common(a, b) for a, b in itertools.pairwise(rows)] + [0, 0]
    start = 0
    while start < len(rows):
        end, length = start + 1, 0
        while end < len(rows):
            common = min(links[end - 1], first[end], first[start] if end == start + 1 else length)
            if common < SHARED or (end - start) * common < (end - start - 1) * length or links[end] > 2 * common:
                break
            end, length = end + 1, common
        if length:
            yield range(start, end), length
        start = end


def _in_common(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> int:
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def _rows(sequences: Iterable[Ids]) -> tuple[list[NDArray[np.uint32]], list[int]]:
    """The sequences that are the beginning of no other one, each once, and which of them holds each sequence."""
    number: dict[bytes, int] = {}  # each distinct sequence, as bytes that sort as its tokens do
    numbers = [number.setdefault(np.asarray(sequence, dtype=">u4").tobytes(), len(number)) for sequence in sequences]
    place = [0] * len(number)
    kept: list[bytes] = []
    before = b""
    for key in sorted(number, reverse=True):  # a sequence comes right after one that it begins
        if before.startswith(key):
            place[number[key]] = place[number[before]]
        else:
            place[number[key]] = len(kept)
            kept.append(key)
        before = key
    return [np.frombuffer(key, dtype=">u4").astype(np.uint32) for key in kept], [place[n] for n in numbers]

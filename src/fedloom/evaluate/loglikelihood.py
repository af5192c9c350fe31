"""How likely a model finds given continuations: batched, and each distinct stretch of tokens is run once.

Rows are padded on the right, so the causal mask alone keeps padding away from what is asked. Continuations that differ
in their last token only (" A" to " D") share one row, and a row that is the beginning of another is not run by itself.

Shape suffixes: N rows, T tokens, P places, M targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.errors import UserError
from fedloom.models.causal import CausalLM

__all__ = ["Continuation", "Loglikelihood", "loglikelihoods"]

Ids = Sequence[int]


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
    # Longest first: what does not fit in memory fails at once.
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    device = next(causal.model.parameters()).device
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        ids_NT = torch.zeros(len(some), len(rows[some[0]]), dtype=torch.int64)
        for n, row in enumerate(some):
            ids_NT[n, : len(rows[row])] = torch.from_numpy(rows[row].astype(np.int64))
        places = [(n, position, targets) for n, row in enumerate(some) for position, targets in wanted[row].items()]
        flat = [(p, number, token) for p, (_, _, targets) in enumerate(places) for number, token in targets]
        found = causal.at(
            ids_NT.to(device),
            torch.tensor([n for n, _, _ in places], device=device),
            torch.tensor([position for _, position, _ in places], device=device),
            torch.tensor([p for p, _, _ in flat], device=device),
            torch.tensor([token for _, _, token in flat], device=device),
        )
        numbers = np.asarray([number for _, number, _ in flat])
        np.add.at(nats, numbers, found.loglikelihood_M.double().cpu().numpy())
        np.logical_and.at(greedy, numbers, found.first_M.cpu().numpy())
        if on_rows is not None:
            on_rows(min(start + batch_size, len(order)), len(order))
    return [Loglikelihood(float(a), bool(b)) for a, b in zip(nats, greedy, strict=True)]


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

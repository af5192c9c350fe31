"""Rows of tokens end to end, without padding, and a prefix that several rows share only once.

A layer that treats every position by itself (embeddings, norms, products, adapters) then runs on real tokens only.
Attention alone needs rows: inside it queries, keys and values are gathered from the packed sequence to padded rows,
the model's own attention runs on them, and its output is gathered back. That is exact: padding is on the right of a
row and a shared prefix on the left, so the causal mask leaves every token what it saw before.

The last block can be narrowed: a first run of it, given up at its attention, gives the keys and values of all
positions; the block itself then runs on those positions only whose output somebody wants.

Shape suffixes: C sequences (clients), B rows of each, R rows that are not empty, T tokens of a row, P packed tokens of
a sequence, Q wanted ones, S = C * P, N = R * T or any number of picks, F tokens in front of every row, H heads,
E size of a head.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["Caught", "Layout", "Pick", "attend_in_rows", "current", "on", "pack", "pick", "pick_of"]

Ints = NDArray[np.int64]
NAME = "fedloom_rows_"  # and the attention it works with, as transformers knows it: `config._attn_implementation`
LEAST_SHARED = 8  # a shorter prefix is not worth the adding up of its gradients


class Pick(NamedTuple):
    """Which of S vectors stand in N places; -1, and anything, where nobody looks. The gradient is gathered, too."""

    index_N: Tensor
    back_S: Tensor  # the first place of each
    unused: Tensor  # those without a place
    more: tuple[tuple[Tensor, Tensor], ...]  # further places: each pair has a vector once, so sums have one order
    same: bool  # place n has vector n


def pick_of(index_N: Ints, size: int, device: torch.device) -> Pick:
    """The pick of `index_N` among `size` vectors."""
    places = np.flatnonzero(index_N >= 0)
    values = index_N[places]
    order = np.argsort(values, kind="stable")
    values, places = values[order], places[order]
    first = np.ones(len(values), dtype=bool)
    first[1:] = values[1:] != values[:-1]
    starts = np.flatnonzero(first)
    nth = np.arange(len(values)) - np.repeat(starts, np.diff(np.append(starts, len(values))))
    back = np.zeros(size, dtype=np.int64)
    back[values[first]] = places[first]
    free = np.ones(size, dtype=bool)
    free[values] = False

    def there(array: Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    more = tuple((there(values[nth == k]), there(places[nth == k])) for k in range(1, int(nth.max(initial=0)) + 1))
    same = len(index_N) == size and bool((index_N == np.arange(size)).all())
    return Pick(there(index_N.clip(min=0)), there(back), there(np.flatnonzero(free)), more, same)


def pick(x_SX: Tensor, which: Pick) -> Tensor:
    """[S, X] -> [N, X]."""
    if which.same:
        return x_SX
    out: Tensor = _Picked.apply(x_SX, which)  # type: ignore[no-untyped-call]
    return out


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SX: Tensor, which: Pick) -> Tensor:
        ctx.which = which
        return x_SX.index_select(0, which.index_N)

    @staticmethod
    def backward(ctx: Any, grad_NX: Tensor) -> tuple[Tensor, None]:
        which: Pick = ctx.which
        grad_SX = grad_NX.index_select(0, which.back_S)
        if len(which.unused):
            grad_SX.index_fill_(0, which.unused, 0)
        for vectors, places in which.more:
            grad_SX.index_add_(0, vectors, grad_NX.index_select(0, places))
        return grad_SX, None


class Picks(NamedTuple):
    """The ways between a packed sequence and rows, and to and from the wanted positions alone."""

    to_rows: Pick
    from_rows: Pick
    narrow: Pick  # packed -> wanted
    queries: Pick  # wanted -> rows
    answers: Pick  # rows -> wanted
    length: int  # T, with what is in front


class Kept(NamedTuple):
    """Keys and values [R, H, T, E] of all positions of the last block."""

    module: nn.Module
    key: Tensor
    value: Tensor
    picks: Picks


class Caught(Exception):  # no error: a run that has given what it was made for
    """The last block's first run has come to its attention."""


@dataclass(eq=False)
class Layout:
    """Where each token of each row is; of one forward pass, and what was seen in it."""

    slot_RT: Ints  # in its sequence; -1 is padding
    sequence_R: Ints
    row_R: Ints  # its number in its sequence
    ids_CP: Tensor
    position_CP: Tensor
    wanted_CQ: Ints  # slots whose last hidden state is wanted; -1 is padding
    calls: int = 0  # of attention
    catching: bool = False
    kept: Kept | None = None
    _picks: dict[int, Picks] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return int(self.slot_RT.shape[1])

    @property
    def width(self) -> int:
        return self.ids_CP.shape[1]

    def picks(self, front: int = 0) -> Picks:
        """With `front` further tokens before each sequence, which are before every one of its rows."""
        if front not in self._picks:
            self._picks[front] = self._made(front)
        return self._picks[front]

    def _made(self, f: int) -> Picks:
        (r, t), (c, p), q, device = self.slot_RT.shape, self.ids_CP.shape, self.wanted_CQ.shape[1], self.ids_CP.device
        size, width, length = c * (f + p), f + p, f + t
        ahead = np.arange(f)
        slot = np.concatenate([np.broadcast_to(ahead, (r, f)), np.where(self.slot_RT < 0, -1, self.slot_RT + f)], 1)
        index_N = np.where(slot < 0, -1, slot + width * self.sequence_R[:, None]).reshape(-1)
        to_rows = pick_of(index_N, size, device)
        place_S = np.full(size, -1, dtype=np.int64)
        used = np.flatnonzero(index_N >= 0)[::-1]
        place_S[index_N[used]] = used  # the first place of each is written last
        wanted = np.concatenate(
            [np.broadcast_to(ahead, (c, f)), np.where(self.wanted_CQ < 0, -1, self.wanted_CQ + f)], 1
        )
        wanted = np.where(wanted < 0, -1, wanted + width * np.arange(c)[:, None]).reshape(-1)
        answers = np.where(wanted < 0, -1, place_S[wanted])
        queries = np.full(r * length, -1, dtype=np.int64)
        asked = np.flatnonzero(answers >= 0)
        queries[answers[asked]] = asked
        return Picks(
            to_rows,
            pick_of(place_S, r * length, device),
            pick_of(wanted, size, device),
            pick_of(queries, c * (f + q), device),
            pick_of(answers, r * length, device),
            length,
        )


def pack(
    ids_CBT: Ints,
    need_CB: Ints,
    row_M: Ints,
    position_M: Ints,
    device: torch.device,
    shared: int,
    size: Callable[[int], int] = lambda size: size,
) -> Layout:
    """The layout of C sequences, each of B rows end to end.

    Args:
        ids_CBT: token ids.
        need_CB: how many tokens of each row matter; what follows cannot be seen from there.
        row_M: rows [C * B] of the positions whose hidden state is wanted.
        position_M: these positions.
        device: of the model.
        shared: the least number of tokens at the beginning of two rows of a sequence that are stored once; 0: none.
        size: how many positions to make of T, P and Q: see `ops.shapes`.
    """
    c, b, _ = ids_CBT.shape
    t = size(int(need_CB.max()))
    slot_CBT = np.full((c, b, t), -1, dtype=np.int64)
    sizes = np.zeros(c, dtype=np.int64)
    for client in range(c):
        done: list[int] = []
        for row in sorted(range(b), key=lambda row: -int(need_CB[client, row])):
            need = int(need_CB[client, row])
            if not need:
                break
            start = 0
            if shared and done:
                equal = ids_CBT[client, done, :need] == ids_CBT[client, row, :need]
                equal &= np.arange(need) < need_CB[client, done][:, None]
                common = np.where(equal.all(1), need, equal.argmin(1))
                best = int(common.argmax())
                if common[best] >= shared:
                    start = int(common[best])
                    slot_CBT[client, row, :start] = slot_CBT[client, done[best], :start]
            slot_CBT[client, row, start:need] = sizes[client] + np.arange(need - start)
            sizes[client] += need - start
            done.append(row)
    p = size(int(sizes.max()))
    ids_CP, position_CP = np.zeros((c, p), dtype=np.int64), np.zeros((c, p), dtype=np.int64)
    client_N, row_N, position_N = np.nonzero(slot_CBT >= 0)
    ids_CP[client_N, slot_CBT[client_N, row_N, position_N]] = ids_CBT[client_N, row_N, position_N]
    position_CP[client_N, slot_CBT[client_N, row_N, position_N]] = position_N
    wanted = [np.unique(slot_CBT[row_M // b, row_M % b, position_M][row_M // b == client]) for client in range(c)]
    wanted_CQ = np.full((c, min(p, size(max(map(len, wanted))))), -1, dtype=np.int64)
    for client, slots in enumerate(wanted):
        wanted_CQ[client, : len(slots)] = slots
    sequence_R, row_R = np.nonzero(need_CB)
    return Layout(
        slot_CBT[sequence_R, row_R],
        sequence_R,
        row_R,
        torch.from_numpy(ids_CP).to(device),
        torch.from_numpy(position_CP).to(device),
        wanted_CQ,
    )


# ---- attention -------------------------------------------------------------------------------------------------------

_layout: ContextVar[Layout | None] = ContextVar("fedloom_layout", default=None)


def current() -> Layout | None:
    """The layout of the forward pass that is under way; None where rows are padded."""
    return _layout.get()


@contextlib.contextmanager
def on(layout: Layout | None) -> Iterator[None]:
    """Within it attention takes its queries, keys and values as packed in this way."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def attend_in_rows(name: str) -> str:
    """Tell transformers of an attention that is `name`, save that it takes packed sequences while a layout is on.

    Returns:
        its name for `set_attn_implementation`.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain_mask: Any = ALL_MASK_ATTENTION_FUNCTIONS[name]

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        # transformers has no function by the name "eager": each file of a model has its own
        plain: Callable[..., tuple[Tensor, Tensor | None]] = (
            sys.modules[type(module).__module__].eager_attention_forward
            if name == "eager"
            else ALL_ATTENTION_FUNCTIONS[name]
        )
        layout = current()
        if layout is None:
            return plain(module, query, key, value, attention_mask, **more)
        layout.calls += 1
        more.pop("position_ids", None)  # they are those of the packed sequence
        kept = layout.kept
        if kept is not None and kept.module is module:
            query = _to_rows(query, kept.picks.queries, kept.picks.length)
            out = plain(module, query, kept.key, kept.value, attention_mask, **more)[0]
            return _from_rows(out, kept.picks.answers, len(layout.ids_CP)), None
        if query.shape[2] != key.shape[2]:
            raise RuntimeError("there are keys without queries before packed rows")
        picks = layout.picks(key.shape[2] - layout.width)
        key, value = (_to_rows(x, picks.to_rows, picks.length) for x in (key, value))
        if layout.catching:
            layout.kept = Kept(module, key, value, picks)
            raise Caught
        query = _to_rows(query, picks.to_rows, picks.length)
        out = plain(module, query, key, value, attention_mask, **more)[0]
        return _from_rows(out, picks.from_rows, len(layout.ids_CP)), None

    def mask(**given: Any) -> Any:
        layout = current()
        if layout is None:
            return plain_mask(**given)
        length = layout.length + given["q_length"] - layout.width
        rows: Mapping[str, Any] = {  # every row is alike: padding is on its right
            **given, "batch_size": 1, "q_length": length, "kv_length": length, "attention_mask": None
        }  # fmt: skip
        return plain_mask(**rows)

    AttentionInterface.register(NAME + name, attend)
    AttentionMaskInterface.register(NAME + name, mask)
    return NAME + name


def _to_rows(x_CHPE: Tensor, which: Pick, length: int) -> Tensor:
    if which.same and x_CHPE.shape[2] == length:  # as many rows as sequences; equal rows of one are cut apart below
        return x_CHPE
    h, e = x_CHPE.shape[1], x_CHPE.shape[3]
    picked = pick(x_CHPE.transpose(1, 2).reshape(-1, h * e), which)
    return picked.view(-1, length, h, e).transpose(1, 2)


def _from_rows(x_RTHE: Tensor, which: Pick, sequences: int) -> Tensor:
    if which.same and len(x_RTHE) == sequences:
        return x_RTHE
    h, e = x_RTHE.shape[2], x_RTHE.shape[3]
    return pick(x_RTHE.reshape(-1, h * e), which).view(sequences, -1, h, e)

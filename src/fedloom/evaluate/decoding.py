"""Decoding for many rows and several clients' models at once, without a pass for what is done already.

Rows stand in a grid of [clients, slots per client] and are written on together, a token at a time. A row that has
ended makes room: the next ones of the queue take free slots as soon as a quarter of them is free, and where the queue
is empty the grid shrinks to what is still being written, clients that are done going first. What all prompts of a
client begin with is run once. Answers are those of one row at a time; the reference is `fedloom.evaluate.plain`.

Shape suffixes: C clients, B slots of a client, N = C * B slots, T tokens, S columns of the cache, V vocabulary.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedloom.evaluate.draws import drawn
from fedloom.evaluate.sampling import Sampling
from fedloom.evaluate.slots import SPARE, Other, Slots, unfit

__all__ = ["Bind", "Opening", "fill", "misfit", "takes_positions", "write"]

PASS_TOKENS = 4096  # prompt tokens in one pass, all rows together
SHARED = 16  # prompts that begin with so many tokens in common have them run once
STRIDE = 8  # steps between two looks at what was written, where looking waits for a device

Ids = Sequence[int]
Bind = Callable[[Sequence[int]], AbstractContextManager[nn.Module]]  # clients -> the model tuned for them
Texts = Callable[[Sequence[Ids]], Sequence[str]]


class Opening(NamedTuple):
    """Tokens to go on from."""

    ids: Ids  # at least one
    room: int  # tokens to write at most, at least one; the model's positions allow so many
    stop: tuple[str, ...] = ()  # texts that end an answer; it ends soon after one is written, which is then still in it
    sampling: Sampling | None = None  # with a seed of this row's own; None takes the most likely token


def write(
    bind: Bind,
    asked: Sequence[Sequence[Opening]],
    *,
    slots: int,
    stops: Sequence[int],
    texts: Texts,
    on_token: Callable[[int], None] | None = None,
    on_rows: Callable[[int], None] | None = None,
    stride: int | None = None,
) -> list[list[list[int]]]:
    """Token ids that client c's model writes after each of `asked[c]`, up to the first stop token.

    Args:
        bind: puts models of the named clients on, rows coming with the cohort outermost; entered one at a time.
        slots: rows in one pass, all clients together; at least one per client goes in.
        stops: tokens that end an answer; no answer has one.
        texts: token ids to text.
        on_token: is told each new token; for one row only.
        on_rows: is told how many rows are done.
        stride: steps between two looks; 1 on a CPU, where looking costs nothing.
    """
    writer = _Writer(bind, asked, slots, stops, texts, on_token, on_rows, stride)
    with torch.no_grad(), writer.models:
        writer.run()
    return writer.written


class _Row:
    """A row that is being written."""

    def __init__(self, client: int, number: int, opening: Opening) -> None:
        self.client, self.number, self.opening = client, number, opening
        self.ids: list[int] = []
        sampling = opening.sampling
        self.draws = None if sampling is None else torch.Generator().manual_seed(sampling.seed)
        # Each token of a stop text has at least a byte of it; some more, since a first token may lose its space.
        self.window = max((len(text.encode()) for text in opening.stop), default=0) + 4

    @property
    def left(self) -> int:
        return self.opening.room - len(self.ids)


class _Writer:
    """The work of one `write`."""

    def __init__(
        self,
        bind: Bind,
        asked: Sequence[Sequence[Opening]],
        slots: int,
        stops: Sequence[int],
        texts: Texts,
        on_token: Callable[[int], None] | None,
        on_rows: Callable[[int], None] | None,
        stride: int | None,
    ) -> None:
        self.models = _Models(bind)
        self.slots, self.stops, self.texts, self.stride = slots, frozenset(stops), texts, stride
        self.on_token, self.on_rows = on_token, on_rows
        self.written: list[list[list[int]]] = [[[] for _ in own] for own in asked]
        self.done = 0
        # Longest first: what does not fit in memory fails at once. Taken from the end.
        self.queues = [
            sorted((_Row(c, j, one) for j, one in enumerate(own)), key=lambda row: len(row.opening.ids))
            for c, own in enumerate(asked)
        ]
        self.clients: list[int] = []  # of the grid
        self.grid: list[_Row | None] = []  # [C * B]
        self.starts: list[int] = []  # the first column of each slot's row
        self.cache: Slots | None = None
        self.start_N = self.mask_NS = self.token_N = torch.empty(0)
        self.common = 0  # tokens that all prompts of a client begin with, which `opening` holds
        self.opening: Slots | None = None
        self.opened: dict[int, int] = {}  # client -> row of `opening`

    def run(self) -> None:
        self._open()
        while any(self.queues) or any(self.grid):
            if not self._admit():
                self._shrink()
                self._steps()

    # ---- which rows are in the grid -------------------------------------------------------------------------------

    def _active(self, client: int) -> list[int]:
        return [n for n, row in enumerate(self.grid) if row is not None and row.client == client]

    def _admit(self) -> bool:
        """Take rows from the queues where it pays; False when it does not yet."""
        if not any(self.queues):
            return False
        active = {c: len(self._active(c)) for c in range(len(self.queues))}
        clients = [c for c, queue in enumerate(self.queues) if queue or active[c]]
        each = max(1, self.slots // len(clients))
        number = {c: max(0, min(len(self.queues[c]), each - active[c])) for c in clients}
        enough = min(max(1, self.slots // 4), sum(map(len, self.queues)))
        if sum(number.values()) < enough and any(active.values()):
            return False
        new = [[self.queues[c].pop() for _ in range(number[c])] for c in clients if number[c]]
        self._rearrange(self._prefilled(new))
        return True

    def _shrink(self) -> None:
        """Leave out clients and slots whose rows have ended, once they are a quarter of the grid."""
        counts = [len(self._active(c)) for c in self.clients]
        if sum(map(bool, counts)) * max(counts, default=0) <= 0.75 * len(self.grid):
            self._rearrange([])

    def _rearrange(self, new: Sequence[tuple[Slots, list[int], list[_Row | None]]]) -> None:
        """Build the grid anew, from the rows that are being written and from prefilled ones: cache, lengths, rows."""
        length = 0 if self.cache is None else self.cache.length
        rows: dict[int, list[tuple[_Row, int, int]]] = {}  # client -> (row, which cache, where in it)
        longest = 0
        for n, row in enumerate(self.grid):
            if row is not None:
                rows.setdefault(row.client, []).append((row, 0, n))
                longest = max(longest, length - self.starts[n])
        for which, (_, lengths, some) in enumerate(new, 1):
            for n, row in enumerate(some):
                if row is not None:
                    rows.setdefault(row.client, []).append((row, which, n))
                    longest = max(longest, lengths[n])
        self.clients = sorted(rows)
        if not rows:
            self.grid, self.cache = [], None
            return
        each = max(map(len, rows.values()))
        size = each * len(self.clients)
        self.grid, starts = [None] * size, [longest] * size
        tokens = [0] * size
        parts: list[tuple[list[int], list[int]]] = [([], []) for _ in range(len(new) + 1)]
        for place, c in enumerate(self.clients):
            for j, (row, which, n) in enumerate(rows[c]):
                slot = place * each + j
                self.grid[slot], tokens[slot] = row, row.ids[-1]
                starts[slot] = longest - (length - self.starts[n] if which == 0 else new[which - 1][1][n])
                parts[which][0].append(n)
                parts[which][1].append(slot)
        first = min(starts)
        self.starts = [first if row is None else start for row, start in zip(self.grid, starts, strict=True)]
        spare = min(max(row.left for row in self.grid if row is not None), max(SPARE, longest // 2))
        others = [
            Other(cache, some, [lengths[n] for n in some], places)
            for (cache, lengths, _), (some, places) in zip(new, parts[1:], strict=True)
            if some
        ]
        old = self.cache if self.cache is not None else others[0].cache
        self.cache = old.moved(*parts[0], slots=size, columns=longest, spare=spare, others=others)
        device = self.cache.layers[0].keys.device
        self.token_N = torch.tensor(tokens, device=device)
        self.start_N = torch.tensor(self.starts, device=device)
        self.mask_NS = self._mask(longest + spare)

    def _mask(self, columns: int) -> Tensor:
        return torch.arange(columns, device=self.start_N.device) >= self.start_N[:, None]

    # ---- prompts ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Run what all prompts of each client begin with."""
        own = [(c, [row.opening.ids for row in queue]) for c, queue in enumerate(self.queues) if queue]
        if sum(len(prompts) for _, prompts in own) < 2 * len(own):
            return
        self.common = min((_in_common(prompts) for _, prompts in own), default=0)
        if self.common < SHARED:
            self.common = 0
            return
        clients = [c for c, _ in own]
        model = self.models.on(clients)
        ids_CT = torch.tensor([list(prompts[0][: self.common]) for _, prompts in own], device=_device(model))
        self.opening = Slots(model.config)
        fill(model, ids_CT, self.opening)
        self.opened = {c: n for n, c in enumerate(clients)}

    def _prefilled(self, new: list[list[_Row]]) -> list[tuple[Slots, list[int], list[_Row | None]]]:
        """Run the prompts of new rows, the longest first, and take the first token of each.

        Gives the caches, with the length of each of their rows, and who is still to be written on.
        """
        clients = [rows[0].client for rows in new]
        model = self.models.on(clients)
        device = _device(model)
        found = []
        begin, most = 0, max(map(len, new))
        while begin < most:
            longest = max(len(rows[begin].opening.ids) for rows in new if len(rows) > begin) - self.common
            end = begin + max(1, PASS_TOKENS // (longest * len(new)))
            some = [row for rows in new for row in _filled(rows[begin:end], min(end, most) - begin)]
            begin = end
            filler = min((row.opening.ids for row in some if row is not None), key=len)
            suffixes = [(filler if row is None else row.opening.ids)[self.common :] for row in some]
            width = max(map(len, suffixes))
            ids_NT = torch.zeros(len(some), width, dtype=torch.int64)
            for n, suffix in enumerate(suffixes):
                ids_NT[n, : len(suffix)] = torch.as_tensor(suffix, dtype=torch.int64)
            cache = Slots(model.config)
            if self.opening is not None:
                of = [self.opened[c] for c in clients for _ in range(len(some) // len(clients))]
                cache = self.opening.copied(of, width)
            last_N = torch.tensor([len(suffix) - 1 for suffix in suffixes], device=device)
            z_NV = _first_logits(model, ids_NT.to(device), cache, last_N)
            before = cache.length - width  # with what an adapter has put there
            for n, token in enumerate(self._picked(z_NV, some).tolist()):
                some[n] = self._taken(some[n], [token])
            found.append((cache, [before + len(suffix) for suffix in suffixes], some))
        return found

    # ---- tokens ----------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        """One step, or as many as fit between two looks."""
        active = [row for row in self.grid if row is not None]
        if not active or self.cache is None:
            return
        model = self.models.on(self.clients)
        stride = self.stride or (1 if self.token_N.device.type == "cpu" else STRIDE)
        first = min(start for row, start in zip(self.grid, self.starts, strict=True) if row is not None)
        idle = len(active) < len(self.grid)
        written = []
        for _ in range(min(stride, *(row.left for row in active))):
            column = self.cache.length
            if column >= self.mask_NS.shape[1]:
                self.mask_NS = self._mask(column + max(SPARE, column // 2))
            at_N = column - self.start_N
            at_N = at_N.clamp(max=column - first) if idle else at_N  # a row that has ended may have no position left
            mask_NS = self.mask_NS[:, : column + 1] if any(self.starts) else None
            z_NV = _next_logits(model, self.token_N, at_N, mask_NS, self.cache)
            self.token_N = self._picked(z_NV, self.grid)
            written.append(self.token_N)
        looked = torch.stack(written, 1).tolist()
        for n, row in enumerate(self.grid):
            self.grid[n] = self._taken(row, looked[n])

    def _picked(self, z_NV: Tensor, rows: Sequence[_Row | None]) -> Tensor:
        """The next token of each row, drawn with the row's own draws where it is drawn."""
        token_N = z_NV.argmax(1)
        ways: dict[Sampling, list[int]] = {}
        for n, row in enumerate(rows):
            if row is not None and row.opening.sampling is not None:
                ways.setdefault(replace(row.opening.sampling, seed=0), []).append(n)
        for way, numbers in ways.items():
            u_N = torch.stack([_draw(rows[n]) for n in numbers])
            token_N[numbers] = drawn(z_NV[numbers], way, u_N).to(token_N.device)
        return token_N

    def _taken(self, row: _Row | None, tokens: Sequence[int]) -> _Row | None:
        """The row with these tokens; None when it has ended."""
        if row is None:
            return None
        for token in tokens:
            ended = token in self.stops
            if not ended:
                row.ids.append(token)
                if self.on_token is not None:
                    self.on_token(token)
                ended = row.left < 1 or self._stopped(row)
            if ended:
                self.written[row.client][row.number] = row.ids
                self.done += 1
                if self.on_rows is not None:
                    self.on_rows(self.done)
                return None
        return row

    def _stopped(self, row: _Row) -> bool:
        if not row.opening.stop:
            return False
        [text] = self.texts([row.ids[-row.window :]])
        return any(stop in text for stop in row.opening.stop)


class _Models:
    """The model with the adapters of some clients on; changing them takes the last ones off."""

    def __init__(self, bind: Bind) -> None:
        self.bind = bind
        self.clients: tuple[int, ...] | None = None
        self.stack = ExitStack()

    def on(self, clients: Sequence[int]) -> Any:
        if self.clients != tuple(clients):
            self.stack.close()
            self.clients = None
            self.model = self.stack.enter_context(self.bind(clients))
            self.clients = tuple(clients)
        return self.model

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        self.stack.close()


def _draw(row: _Row | None) -> Tensor:
    assert row is not None
    return torch.rand((), generator=row.draws, dtype=torch.float64)


def _filled(rows: Sequence[_Row], number: int) -> Iterator[_Row | None]:
    yield from rows
    yield from [None] * (number - len(rows))


def _in_common(prompts: Sequence[Ids]) -> int:
    """Tokens that all begin with, one at least left over for each."""
    first, last = min(map(list, prompts)), max(map(list, prompts))  # what these two share, all between them share
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(same, min(map(len, prompts)) - 1)


# ---- the model -------------------------------------------------------------------------------------------------------


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def fill(model: Any, ids_NT: Tensor, cache: Slots) -> None:
    """Fill the cache; of the logits only the last ones are made."""
    _first_logits(model, ids_NT, cache, torch.full((len(ids_NT),), ids_NT.shape[1] - 1, device=ids_NT.device))


def _first_logits(model: Any, ids_NT: Tensor, cache: Slots, last_N: Tensor) -> Tensor:
    """Run prompts that are padded on the right; logits of each one's last token only.

    The causal mask alone keeps padding away from what is before it, and positions count from what the cache holds.
    """
    head = model.get_output_embeddings()
    row_N = torch.arange(len(ids_NT), device=ids_NT.device)

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        fits = isinstance(args[0], Tensor) and args[0].shape[:2] == ids_NT.shape
        return (args[0][row_N, last_N][:, None], *args[1:]) if fits else None

    handle = None if head is None else head.register_forward_pre_hook(keep)
    try:
        z_NTV: Tensor = model(input_ids=ids_NT, past_key_values=cache, use_cache=True).logits
    finally:
        if handle is not None:
            handle.remove()
    return z_NTV[:, 0] if z_NTV.shape[1] == 1 else z_NTV[row_N, last_N]


def _next_logits(model: Any, token_N: Tensor, at_N: Tensor, mask_NS: Tensor | None, cache: Slots) -> Tensor:
    given = {"position_ids": at_N[:, None]} if takes_positions(type(model)) else {}
    z_NTV: Tensor = model(
        input_ids=token_N[:, None], attention_mask=mask_NS, past_key_values=cache, use_cache=True, **given
    ).logits
    return z_NTV[:, -1]


def takes_positions(kind: type[nn.Module]) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


# ---- whether it fits -------------------------------------------------------------------------------------------------

_known: weakref.WeakKeyDictionary[nn.Module, dict[int, str | None]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def misfit(model: nn.Module) -> str | None:
    """Why this model cannot be decoded here, tried on a few tokens; None where it can. Known from then on.

    The model is as it is bound now, for one client.
    """
    tried = _known.setdefault(model, {})
    virtual = int(getattr(model, "num_virtual_tokens", 0))
    if virtual not in tried:
        tried[virtual] = unfit(getattr(model, "config", None)) or _difference(model)
    return tried[virtual]


def _difference(model: nn.Module) -> str | None:
    """Logits of two ragged rows, a beginning in common, against those of each row alone without a cache."""
    texts = [[3, 4, 5, 6, 7, 8, 9], [3, 4, 10, 11, 12]]
    size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    texts = [[token % size for token in text] for text in texts]
    device = _device(model)
    try:
        plain = [model(input_ids=torch.tensor([text], device=device), use_cache=False).logits for text in texts]
        want = torch.stack([z_1TV[0, -3:] for z_1TV in plain], 1)
        opening = Slots(model.config)
        fill(model, torch.tensor([texts[0][:2]], device=device), opening)
        virtual = opening.length - 2
        prompts = [text[2:-2] for text in texts]
        ids_NT = torch.tensor([prompt + [0] * (3 - len(prompt)) for prompt in prompts], device=device)
        last_N = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        cache = opening.copied([0, 0], 3)
        got = [_first_logits(model, ids_NT, cache, last_N)]
        lengths = [virtual + len(text) - 2 for text in texts]
        cache = cache.moved([], [], 2, max(lengths), 1, [Other(cache, [0, 1], lengths, [0, 1])])
        start_N = max(lengths) - torch.tensor(lengths, device=device)
        for step in (-2, -1):
            mask_NS = torch.arange(cache.length + 1, device=device) >= start_N[:, None]
            token_N = torch.tensor([text[step] for text in texts], device=device)
            got.append(_next_logits(model, token_N, cache.length - start_N, mask_NS, cache))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model of unknown making does with a cache it does not know
        return f"{type(error).__name__}: {error}".splitlines()[0]
    gap = float((torch.stack(got).double() - want.double()).abs().max())
    exact = want.dtype in (torch.float32, torch.float64)
    bound = (1e-3 if exact else 5e-2) * (1 + float(want.abs().max()))
    return None if gap <= bound else f"its logits differ by {gap:.2g} from those without a cache"

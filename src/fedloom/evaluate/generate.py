"""Write answers with tuned models, those of several clients at once.

Prompts come as token ids, so that what stands before an answer is exactly what stood there in training. How rows are
batched changes no answer, rounding aside.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fedloom.errors import UserError
from fedloom.evaluate import decoding, plain
from fedloom.evaluate.decoding import Bind, Opening
from fedloom.evaluate.draws import drawn
from fedloom.evaluate.sampling import Sampling
from fedloom.models.load import stop_ids
from fedloom.models.rows import positions_of
from fedloom.seeds import seed_of
from fedloom.tree import is_shared
from fedloom.types import Adapter, Tree

__all__ = ["Opening", "Sampling", "decode", "drawn", "generate", "generate_one", "write_openings"]

logger = logging.getLogger("fedloom")

Ids = Sequence[int]


def generate(
    adapter: Adapter,
    tree_C: Tree,
    prompts: Sequence[Sequence[Ids]],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
) -> list[list[list[int]]]:
    """Token ids that client c's model writes after each of `prompts[c]`, without the stop token.

    Clients may have different numbers of prompts. `batch_size` is the number of rows in one pass, all clients
    together; at least one per client goes in. Where a prompt leaves room for fewer than `max_new_tokens`, the answer
    is as long as the model's positions allow, and the log says so. With `sampling` each row has draws of its own.

    Raises:
        UserError: an empty prompt, or `max_new_tokens` or `batch_size` below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise UserError("max_new_tokens and batch_size must be 1 or more", code="generate.limits")
    rooms = [_rooms(adapter.model, own, max_new_tokens) for own in prompts]
    asked, places = [], []
    for c, own in enumerate(prompts):
        here = [j for j in range(len(own)) if rooms[c][j] > 0]
        asked.append([Opening(own[j], rooms[c][j], sampling=_of_row(sampling, c, j)) for j in here])
        places.append([(c, j) for j in here])
    answers: list[list[list[int]]] = [[[] for _ in own] for own in prompts]
    if len(prompts) > 1 and is_shared(tree_C):  # one model: all rows are its own
        tree_C = {name: leaf[:1] for name, leaf in tree_C.items()}
        asked, places = [[one for own in asked for one in own]], [[one for own in places for one in own]]
    written = write_openings(adapter, tree_C, asked, tokenizer, batch_size=batch_size)
    for there, own_answers in zip(places, written, strict=True):
        for (c, j), ids in zip(there, own_answers, strict=True):
            answers[c][j] = ids
    return answers


def generate_one(
    adapter: Adapter,
    tree: Tree,
    prompt: Ids,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The answer to one prompt as text; `on_text` gets each new piece of it as it is written."""
    [room] = _rooms(adapter.model, [prompt], max_new_tokens)
    if room < 1:
        return ""
    streamer = None if on_text is None else _Streamer(tokenizer, on_text)
    tree_C = {name: leaf[None] for name, leaf in tree.items()}
    [[ids]] = write_openings(
        adapter, tree_C, [[Opening(prompt, room, sampling=sampling)]], tokenizer, batch_size=1,
        on_token=None if streamer is None else streamer.put,
    )  # fmt: skip
    if streamer is not None:
        streamer.end()
    return decode(tokenizer, [ids])[0]


def write_openings(
    adapter: Any,
    tree_C: Tree,
    asked: Sequence[Sequence[Opening]],
    tokenizer: Any,
    *,
    batch_size: int,
    on_token: Callable[[int], None] | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> list[list[list[int]]]:
    """Token ids after each of client c's openings, up to the first stop token.

    Args:
        adapter: what `bound` of an adapter is asked of.
        batch_size: rows in one pass, all clients together; at least one per client goes in.
        on_token: is told each new token; for one row only.
        on_rows: is told how many rows are done.

    Raises:
        UserError: an empty prompt.
    """
    if any(len(one.ids) == 0 for own in asked for one in own):
        raise UserError("a prompt has no tokens", code="generate.empty_prompt")
    if not any(asked):
        return [[] for _ in asked]
    bind = _binder(adapter, tree_C)
    with bind([0]) as model:
        stops, reason = stop_ids(model, tokenizer), decoding.misfit(model)
    how: Any = decoding if reason is None else plain
    if reason is not None:
        _say_plain(model, reason)
    written: list[list[list[int]]] = how.write(
        bind, asked, slots=batch_size, stops=stops, texts=lambda rows: decode(tokenizer, rows),
        on_token=on_token, on_rows=on_rows,
    )  # fmt: skip
    return written


def decode(tokenizer: Any, answers: Sequence[Ids]) -> list[str]:
    """Answers as text, special tokens left out, spaces as they were written."""
    texts: list[str] = tokenizer.batch_decode(
        [list(ids) for ids in answers], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts


def _binder(adapter: Any, tree_C: Tree) -> Bind:
    """How to put some clients' models on; those of the last two choices are kept, as they take turns."""
    number = len(next(iter(tree_C.values()), (None,)))  # a plain model has no leaves, and is one
    known: dict[tuple[int, ...], Tree] = {}

    @contextlib.contextmanager
    def bind(clients: Sequence[int]) -> Iterator[nn.Module]:
        chosen = tuple(clients)
        some = tree_C if chosen == tuple(range(number)) else known.get(chosen)
        if some is None:
            first, last = chosen[0], chosen[-1]
            near = chosen == tuple(range(first, last + 1))
            some = {k: leaf[first : last + 1] if near else leaf[list(chosen)] for k, leaf in tree_C.items()}
            if len(known) > 1:
                known.pop(next(iter(known)))
            known[chosen] = some
        with adapter.bound(some) as model:
            yield model

    return bind


def _of_row(sampling: Sampling | None, client: int, number: int) -> Sampling | None:
    return sampling and replace(sampling, seed=seed_of(sampling.seed, 0, f"{client}", f"row/{number}"))


def _rooms(model: nn.Module, prompts: Sequence[Ids], max_new_tokens: int) -> list[int]:
    """New tokens that the model's positions allow after each prompt."""
    positions = positions_of(model)
    if positions is None:
        return [max_new_tokens] * len(prompts)
    rooms = [max(0, min(max_new_tokens, positions - len(prompt))) for prompt in prompts]
    short = sorted((len(prompt), room) for prompt, room in zip(prompts, rooms, strict=True) if room < max_new_tokens)
    if short:
        logger.warning(
            "a prompt of %d tokens leaves room for %d new ones of %d%s: the model has %d positions",
            *short[0],
            max_new_tokens,
            f", and {len(short) - 1} longer ones for fewer" if len(short) > 1 else "",
            positions,
        )
    return rooms


def _say_plain(model: nn.Module, reason: str) -> None:
    """Once for each model."""
    if not getattr(model, "_fedloom_said_plain", False):
        model._fedloom_said_plain = True  # type: ignore[assignment]
        logger.warning("this model's answers are written by transformers, one client at a time (slower): %s", reason)


class _Streamer:
    """Hands over text as it becomes certain: a character of several tokens only once it is whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.said = 0

    def put(self, token: int) -> None:
        self.ids.append(token)
        text = decode(self.tokenizer, [self.ids])[0]
        if not text.endswith("�"):
            self._say(text)

    def end(self) -> None:
        self._say(decode(self.tokenizer, [self.ids])[0])

    def _say(self, text: str) -> None:
        if len(text) > self.said:
            self.on_text(text[self.said :])
            self.said = len(text)

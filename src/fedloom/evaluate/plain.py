"""Writing by `generate` of transformers, one client at a time: the reference of `fedloom.evaluate.decoding`.

It is in use for models that do not fit there. Rows of a batch are padded on the left, and all are computed until the
last one has ended.

Shape suffixes: N rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.evaluate.decoding import Bind, Opening, Texts
from fedloom.evaluate.draws import drawn
from fedloom.evaluate.sampling import Sampling

__all__ = ["write"]

Ids = Sequence[int]


def write(
    bind: Bind,
    asked: Sequence[Sequence[Opening]],
    *,
    slots: int,
    stops: Sequence[int],
    texts: Texts,
    on_token: Callable[[int], None] | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> list[list[list[int]]]:
    """As `fedloom.evaluate.decoding.write`, `slots` being rows of one client in one pass."""
    found: list[list[list[int]]] = [[[] for _ in own] for own in asked]
    done = 0
    for c, own in enumerate(asked):
        groups: dict[Any, list[int]] = {}  # what may share a pass
        for number, one in enumerate(own):
            how = None if one.sampling is None else replace(one.sampling, seed=0)
            groups.setdefault((one.room, one.stop, how), []).append(number)
        if not groups:
            continue
        with bind([c]) as model:
            for (room, stop, how), numbers in groups.items():
                numbers.sort(key=lambda number, own=own: -len(own[number].ids))  # type: ignore[misc]
                for start in range(0, len(numbers), slots):
                    some = numbers[start : start + slots]
                    seeds = [drawn.seed for number in some if (drawn := own[number].sampling) is not None]
                    prompts = [own[number].ids for number in some]
                    rows = _rows(model, prompts, room, stops, how, seeds, stop, texts, on_token)
                    for number, ids in zip(some, rows, strict=True):
                        found[c][number] = ids
                    done += len(some)
                    if on_rows is not None:
                        on_rows(done)
    return found


@torch.no_grad()
def _rows(
    model: Any,
    prompts: Sequence[Ids],
    room: int,
    stops: Sequence[int],
    sampling: Sampling | None,
    seeds: Sequence[int],
    stop: Sequence[str],
    texts: Texts,
    on_token: Callable[[int], None] | None,
) -> list[list[int]]:
    """One batch."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids_NT = torch.full((len(prompts), longest), stops[0], dtype=torch.int64)
    mask_NT = torch.zeros_like(ids_NT)
    for n, prompt in enumerate(prompts):
        ids_NT[n, longest - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.int64)
        mask_NT[n, longest - len(prompt) :] = 1
    # Made anew so that a model's own generation_config.json (sampling, penalties) does not change what is measured.
    settings = GenerationConfig(
        max_new_tokens=room,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=stops[0],
        eos_token_id=list(stops),
    )
    ended = _Ended(texts, stop, len(prompts), longest) if stop else None
    with _own_settings_aside(model):
        written_NT: Tensor = model.generate(
            input_ids=ids_NT.to(device),
            attention_mask=mask_NT.to(device),
            generation_config=settings,
            stopping_criteria=None if ended is None else _criteria(ended, device),
            logits_processor=None if sampling is None else _own_draws(sampling, seeds),
            streamer=None if on_token is None else _Streamer(stops, on_token),
        )[:, longest:]
    rows = written_NT.tolist() if ended is None else [row[:end] for row, end in zip(written_NT.tolist(), ended.ends)]  # noqa: B905
    return [_until(row, stops) for row in rows]


def _until(row: list[int], stops: Sequence[int]) -> list[int]:
    for n, token in enumerate(row):
        if token in stops:
            return row[:n]
    return row


@contextlib.contextmanager
def _own_settings_aside(model: nn.Module) -> Iterator[None]:
    """Within it the model generates as it is told, not as its own generation config says."""
    from transformers import GenerationConfig

    holder: Any = model
    kept = holder.generation_config
    holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        holder.generation_config = kept


def _criteria(ended: _Ended, device: torch.device) -> Any:
    """By which rows stop at a stop text."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Ends(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
            return torch.tensor(ended.look(input_ids), dtype=torch.bool, device=device)

    return StoppingCriteriaList([Ends()])


class _Ended:
    """Which rows have written one of the stop texts, and after how many tokens."""

    def __init__(self, texts: Texts, stop: Sequence[str], rows: int, prompt: int) -> None:
        self.texts, self.stop, self.prompt = texts, tuple(stop), prompt
        # Each token of a stop text has at least a byte of it; some more, since a first token may lose its space.
        self.window = max(len(text.encode()) for text in stop) + 4
        self.ends: list[int | None] = [None] * rows

    def look(self, ids_NT: Tensor) -> list[bool]:
        length = ids_NT.shape[1] - self.prompt
        tails = ids_NT[:, -min(self.window, length) :].tolist()
        open_rows = [n for n, end in enumerate(self.ends) if end is None]
        for n, text in zip(open_rows, self.texts([tails[n] for n in open_rows]), strict=True):
            if any(stop in text for stop in self.stop):
                self.ends[n] = length
        return [end is not None for end in self.ends]


def _own_draws(sampling: Sampling, seeds: Sequence[int]) -> Any:
    """Leaves one token per row: the one that the row's own generator draws."""
    from transformers import LogitsProcessor, LogitsProcessorList

    draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    class Own(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            u_N = torch.stack([torch.rand((), generator=draw, dtype=torch.float64) for draw in draws])
            token_N = drawn(scores, sampling, u_N).to(scores.device)
            return torch.full_like(scores, -torch.inf).scatter(1, token_N[:, None], 0.0)

    return LogitsProcessorList([Own()])


class _Streamer:
    """What transformers hands tokens to."""

    def __init__(self, stops: Sequence[int], on_token: Callable[[int], None]) -> None:
        self.stops, self.on_token = stops, on_token
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # the first call brings the prompt
            self.prompt_seen = True
            return
        for token in value.flatten().tolist():
            if token not in self.stops:
                self.on_token(token)

    def end(self) -> None:
        pass

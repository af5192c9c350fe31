"""Write answers with a tuned model, for several clients' models in one batch.

Prompts come as token ids, so that what stands before an answer is exactly what stood there in training. Rows of a batch
have about the same length and are padded on the left; the cohort axis is outermost.

Shape suffixes: N rows (C clients x B prompts each), T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import UserError
from fedloom.evaluate.sampling import Sampling
from fedloom.models.causal import positions_of
from fedloom.models.load import stop_ids
from fedloom.types import Adapter, Tree

__all__ = ["Sampling", "decode", "generate", "generate_one", "generate_rows"]

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
    is as long as the model's positions allow, and the log says so.

    Raises:
        UserError: an empty prompt, or `max_new_tokens` or `batch_size` below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise UserError("max_new_tokens and batch_size must be 1 or more", code="generate.limits")
    num_clients = len(prompts)
    per_client = max(1, batch_size // max(1, num_clients))
    # Longest first: what does not fit in memory fails at once. The b-th longest prompts of all clients meet in a row.
    order = [sorted(range(len(own)), key=lambda j, own=own: -len(own[j])) for own in prompts]  # type: ignore[misc]
    answers: list[list[list[int]]] = [[[] for _ in own] for own in prompts]
    with adapter.bound(tree_C) as model:
        for start in range(0, max(map(len, order), default=0), per_client):
            width = min(per_client, max(len(own) for own in order) - start)
            slots = [[own[j] if j < len(own) else None for j in range(start, start + width)] for own in order]
            rows = [(c, j) for c, own in enumerate(slots) for j in own]
            filler = min((prompts[c][j] for c, j in rows if j is not None), key=len)
            written = generate_rows(
                model,
                [prompts[c][j] if j is not None else filler for c, j in rows],
                tokenizer,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                idle=[j is None for _, j in rows],
            )
            for (c, j), ids in zip(rows, written, strict=True):
                if j is not None:
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
    with adapter.bound({name: leaf[None] for name, leaf in tree.items()}) as model:
        streamer = _Streamer(tokenizer, stop_ids(model, tokenizer), on_text) if on_text is not None else None
        [ids] = generate_rows(
            model, [prompt], tokenizer, max_new_tokens=max_new_tokens, sampling=sampling, streamer=streamer
        )
    return decode(tokenizer, [ids])[0]


@torch.no_grad()
def generate_rows(
    model: nn.Module,
    prompts: Sequence[Ids],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    idle: Sequence[bool] | None = None,
    streamer: Any = None,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
) -> list[list[int]]:
    """One batch: token ids after each prompt, up to the first stop token.

    Args:
        idle: rows that only fill the shape.
        seeds: one per row, in place of `sampling.seed`; a row's draws then depend on nothing else in the batch.
        stop: texts that end an answer. A row ends soon after one is written, which is then still in it.
    """
    from transformers import GenerationConfig

    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt has no tokens", code="generate.empty_prompt")
    stops = stop_ids(model, tokenizer)
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    room = _room(model, longest, max_new_tokens)
    if room < 1:
        return [[] for _ in prompts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    ids_NT = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask_NT = torch.zeros_like(ids_NT)
    for n, prompt in enumerate(prompts):
        ids_NT[n, longest - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.int64)
        mask_NT[n, longest - len(prompt) :] = 1
    # Made anew so that a model's own generation_config.json (sampling, penalties) does not change what is measured.
    shared = sampling is not None and seeds is None  # one stream of draws for the whole batch
    settings = GenerationConfig(
        max_new_tokens=room,
        do_sample=shared,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=list(stops),
        **(_sampling_settings(sampling) if shared and sampling is not None else {}),
    )
    ended = _Ended(tokenizer, stop, len(prompts), longest) if stop else None
    with _own_settings_aside(model), torch.random.fork_rng(devices=_devices(device), enabled=shared):
        if shared and sampling is not None:
            torch.manual_seed(sampling.seed)
        written_NT: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids_NT.to(device),
            attention_mask=mask_NT.to(device),
            generation_config=settings,
            stopping_criteria=_criteria(idle, ended, device),
            logits_processor=_own_draws(sampling, seeds),
            streamer=streamer,
        )[:, longest:]
    rows = written_NT.tolist() if ended is None else [row[:end] for row, end in zip(written_NT.tolist(), ended.ends)]  # noqa: B905
    return [_until(row, stops) for row in rows]


def decode(tokenizer: Any, answers: Sequence[Ids]) -> list[str]:
    """Answers as text, special tokens left out, spaces as they were written."""
    texts: list[str] = tokenizer.batch_decode(
        [list(ids) for ids in answers], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts


def _until(row: list[int], stops: Sequence[int]) -> list[int]:
    for n, token in enumerate(row):
        if token in stops:
            return row[:n]
    return row


def _room(model: nn.Module, longest: int, max_new_tokens: int) -> int:
    """New tokens that the model's positions allow after the batch's longest prompt."""
    positions = positions_of(model)
    if positions is None or longest + max_new_tokens <= positions:
        return max_new_tokens
    room = max(0, positions - longest)
    logger.warning(
        "a prompt of %d tokens leaves room for %d new ones of %d: the model has %d positions",
        longest,
        room,
        max_new_tokens,
        positions,
    )
    return room


def _sampling_settings(sampling: Sampling) -> dict[str, Any]:
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}


def _devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


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


def _criteria(idle: Sequence[bool] | None, ended: _Ended | None, device: torch.device) -> Any:
    """By which rows stop before a stop token: those that only fill the shape at once, others at a stop text."""
    idle = idle if idle is not None and any(idle) else None
    if idle is None and ended is None:
        return None
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Ends(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
            done = [False] * len(input_ids) if ended is None else ended.look(input_ids)
            both = done if idle is None else [a or b for a, b in zip(done, idle, strict=True)]
            return torch.tensor(both, dtype=torch.bool, device=device)

    return StoppingCriteriaList([Ends()])


class _Ended:
    """Which rows have written one of the stop texts, and after how many tokens."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], rows: int, prompt: int) -> None:
        self.tokenizer, self.stop, self.prompt = tokenizer, tuple(stop), prompt
        # Each token of a stop text has at least a byte of it; some more, since a first token may lose its space.
        self.window = max(len(text.encode()) for text in stop) + 4
        self.ends: list[int | None] = [None] * rows

    def look(self, ids_NT: Tensor) -> list[bool]:
        length = ids_NT.shape[1] - self.prompt
        tails = ids_NT[:, -min(self.window, length) :].tolist()
        open_rows = [n for n, end in enumerate(self.ends) if end is None]
        for n, text in zip(open_rows, decode(self.tokenizer, [tails[n] for n in open_rows]), strict=True):
            if any(stop in text for stop in self.stop):
                self.ends[n] = length
        return [end is not None for end in self.ends]


def _own_draws(sampling: Sampling | None, seeds: Sequence[int] | None) -> Any:
    """Leaves one token per row: the one that the row's own generator draws."""
    if sampling is None or seeds is None:
        return None
    from transformers import LogitsProcessor, LogitsProcessorList

    how, draws = sampling, [torch.Generator().manual_seed(seed) for seed in seeds]

    class Own(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            u_N = torch.stack([torch.rand((), generator=draw, dtype=torch.float64) for draw in draws])
            token_N = drawn(scores, how, u_N).to(scores.device)
            return torch.full_like(scores, -torch.inf).scatter(1, token_N[:, None], 0.0)

    return LogitsProcessorList([Own()])


def drawn(scores_NV: Tensor, sampling: Sampling, u_N: Tensor) -> Tensor:
    """The token of each row at which the sum of probabilities, the likeliest first, passes u of [0, 1).

    Temperature, top-k and top-p in this order, as in Hugging Face's `generate`: top-p keeps the fewest likeliest tokens
    whose probabilities sum up to at least p.
    """
    size = scores_NV.shape[1]
    k = min(sampling.top_k or size, size)
    z_NK, token_NK = scores_NV.topk(k) if k < size else scores_NV.sort(dim=1, descending=True, stable=True)
    z_NK, token_NK = z_NK.cpu().double() / sampling.temperature, token_NK.cpu()
    share_NK = z_NK.softmax(1)
    before_NK = share_NK.cumsum(1) - share_NK
    share_NK = share_NK.masked_fill(before_NK >= sampling.top_p, 0.0)
    share_NK[:, 0] = share_NK[:, 0].clamp(min=torch.finfo(torch.float64).tiny)  # never no token at all
    passed_NK = share_NK.cumsum(1) <= u_N[:, None] * share_NK.sum(1, keepdim=True)
    last_N = (share_NK > 0).sum(1) - 1
    return token_NK.gather(1, torch.minimum(passed_NK.sum(1), last_N)[:, None])[:, 0]


class _Streamer:
    """Hands over text as it becomes certain: a character of several tokens only once it is whole."""

    def __init__(self, tokenizer: Any, stops: Sequence[int], on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.on_text = tokenizer, stops, on_text
        self.ids: list[int] = []
        self.said = 0
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # the first call brings the prompt
            self.prompt_seen = True
            return
        self.ids += [token for token in value.flatten().tolist() if token not in self.stops]
        text = decode(self.tokenizer, [self.ids])[0]
        if not text.endswith("�"):
            self._say(text)

    def end(self) -> None:
        self._say(decode(self.tokenizer, [self.ids])[0])

    def _say(self, text: str) -> None:
        if len(text) > self.said:
            self.on_text(text[self.said :])
            self.said = len(text)

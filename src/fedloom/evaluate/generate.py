"""Write answers with a tuned model, for several clients' models in one batch.

Prompts come as token ids, so that what stands before an answer is exactly what stood there in training. Rows of a batch
have about the same length and are padded on the left; the cohort axis is outermost.

Shape suffixes: N rows (C clients x B prompts each), T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import UserError
from fedloom.models.load import stop_ids
from fedloom.types import Adapter, Tree

__all__ = ["Sampling", "decode", "generate", "generate_one", "generate_rows"]

logger = logging.getLogger("fedloom")

Ids = Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; without one of these the most likely token is taken."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if not self.temperature > 0:
            wrong.append(f"temperature is {self.temperature}, must be above 0 (leave it out for the most likely token)")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p is {self.top_p}, must be above 0 and at most 1")
        if self.top_k < 0:
            wrong.append(f"top_k is {self.top_k}, must be 0 or more")
        if wrong:
            raise UserError("; ".join(wrong), code="generate.sampling")


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
) -> list[list[int]]:
    """One batch: token ids after each prompt, up to the first stop token. Rows marked `idle` only fill the shape."""
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
    settings = GenerationConfig(
        max_new_tokens=room,
        do_sample=sampling is not None,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=list(stops),
        **({} if sampling is None else _sampling_settings(sampling)),
    )
    with _own_settings_aside(model), torch.random.fork_rng(devices=_devices(device), enabled=sampling is not None):
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        written_NT: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids_NT.to(device),
            attention_mask=mask_NT.to(device),
            generation_config=settings,
            stopping_criteria=_idle_rows(idle, device),
            streamer=streamer,
        )[:, longest:]
    return [_until(row, stops) for row in written_NT.tolist()]


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
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(positions, int) or longest + max_new_tokens <= positions:
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


def _idle_rows(idle: Sequence[bool] | None, device: torch.device) -> Any:
    """A criterion by which rows that only fill the shape have stopped before they begin."""
    if idle is None or not any(idle):
        return None
    from transformers import StoppingCriteria, StoppingCriteriaList

    done_N = torch.tensor(list(idle), dtype=torch.bool, device=device)

    class Idle(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
            return done_N

    return StoppingCriteriaList([Idle()])


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

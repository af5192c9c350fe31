"""Virtual tokens before every text, inside the model: callers go on as if they were not there.

Hooks on the model's body put the virtual tokens before the embeddings and take their outputs away again, so hidden
states, logits and generated texts have the lengths of what was passed in. In cached generation the virtual tokens go in
with the first step only; in later ones the mask and the positions are shifted by them, unless the cache says that its
owner does this (`managed`). The same hooks serve kinds that put keys and values into the cache instead of embeddings
before the text.

Shape suffixes: C clients, N rows (C x B), T tokens, P virtual tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import UserError
from fedloom.models.causal import body_of

Rows = Callable[[int], Any]  # number of rows N -> what goes before them


class Virtual:
    """The hooks of one model. While `rows` is None the model is its plain self."""

    def __init__(self, model: nn.Module, number: int, *, in_cache: bool) -> None:
        self.number, self.in_cache = number, in_cache
        self.rows: Rows | None = None
        self.body = body_of(model)
        self._names = list(inspect.signature(self.body.forward).parameters)
        missing = {"inputs_embeds", "attention_mask"} - set(self._names)
        if missing:
            raise UserError(
                f"this model's body does not take {' and '.join(sorted(missing))}, which virtual tokens need",
                hint="adapter.kind: lora works on its layers",
                code="adapter.virtual",
            )
        self.embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        model.num_virtual_tokens = number  # type: ignore[assignment]  # they take positions: see `positions_of`
        self._cut = 0
        self._handles = [
            self.body.register_forward_pre_hook(self._before, with_kwargs=True),
            self.body.register_forward_hook(self._after, with_kwargs=True),
        ]

    @contextlib.contextmanager
    def on(self, rows: Rows) -> Iterator[None]:
        self.rows = rows
        try:
            yield
        finally:
            self.rows = None

    def _before(self, body: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        self._cut = 0
        if self.rows is None:
            return None
        given = {**dict(zip(self._names, args, strict=False)), **given}
        ids, embeds, cache = given.get("input_ids"), given.get("inputs_embeds"), given.get("past_key_values")
        shape = ids if ids is not None else embeds
        assert shape is not None
        n = shape.shape[0]
        first = cache is None or cache.get_seq_length() == 0
        if getattr(cache, "managed", False):  # its owner counts the virtual tokens in masks and positions
            return None
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor):
            if mask.ndim != 2:
                raise UserError("virtual tokens need an attention mask of [rows, tokens]", code="adapter.virtual")
            given["attention_mask"] = torch.cat([mask.new_ones(n, self.number), mask], 1)
        positions = given.get("position_ids")
        if positions is not None:
            positions = positions + self.number
            if first and not self.in_cache:
                before = torch.arange(self.number, device=positions.device).expand(positions.shape[0], -1)
                positions = torch.cat([before, positions], 1)
            given["position_ids"] = positions
        if not first:
            return (), given
        if self.in_cache:
            given["past_key_values"] = self._filled(cache, self.rows(n))
            return (), given
        text = embeds if embeds is not None else self.embed(ids)
        given["input_ids"] = None
        given["inputs_embeds"] = torch.cat([self.rows(n).to(text.dtype), text], 1)
        self._cut = self.number
        return (), given

    def _filled(self, cache: Any, layers: list[tuple[Tensor, Tensor]]) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache() if cache is None else cache
        for number, (key, value) in enumerate(layers):
            cache.update(key, value, number)
        return cache

    def _after(self, body: nn.Module, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> Any:
        if not self._cut:
            return None
        cut, self._cut = self._cut, 0
        if isinstance(out, tuple):
            return (out[0][:, cut:], *out[1:])
        out["last_hidden_state"] = out["last_hidden_state"][:, cut:]
        return out


def per_row(leaf_C: Tensor, n: int) -> Tensor:
    """A leaf per client [C, ...] -> per row [N, ...], with the cohort axis outermost."""
    return leaf_C.repeat_interleave(n // leaf_C.shape[0], 0)

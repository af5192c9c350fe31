"""Prefix tuning (Li and Liang 2021): trained keys and values before every text, in every layer.

Shape suffixes: C clients, N rows, P virtual tokens, L layers, G key-value heads, E size of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fedloom.adapters.frame import Frame, adapter_dtype, check_tree
from fedloom.adapters.prompt_tuning import PROMPT, read_prompt, write_prompt
from fedloom.adapters.virtual import Virtual, per_row
from fedloom.errors import UserError
from fedloom.seeds import generator
from fedloom.types import Tree


def prefix_tuning(model: nn.Module, *, num_virtual_tokens: int = 20, base_name: str = "") -> PrefixTuning:
    """Keys and values of P virtual tokens in every layer: one leaf [P, 2 L G E], as PEFT lays it out.

    They begin as the keys and values that P tokens drawn from the vocabulary have (the paper: real activations beat
    random ones), so before training the model is as if those tokens stood before the text.

    Args:
        model: a Hugging Face causal LM with a cache of keys and values; it is frozen and gets hooks.
        num_virtual_tokens: P.
        base_name: for the exported adapter's `base_model_name_or_path`.

    Raises:
        UserError: P is below 1, or the model has no such cache.
    """
    if num_virtual_tokens < 1:
        raise UserError(f"num_virtual_tokens is {num_virtual_tokens}, must be at least 1", code="adapter.prompt")
    return PrefixTuning(model, num_virtual_tokens, base_name)


class PrefixTuning(Frame):
    """The adapter; see `prefix_tuning`."""

    kind = "prefix_tuning"
    in_front = True

    def __init__(self, model: nn.Module, number: int, base_name: str) -> None:
        self.number, self.base_name = number, base_name
        super().__init__(model, self._put_on)
        self.causal.rows.way = "padded"  # there are keys and values before each row that no query belongs to
        self.virtual = Virtual(model, number, in_cache=True)
        weight = self.virtual.embed.weight
        assert isinstance(weight, Tensor)
        self.weight_VD = weight
        found = self._activations([0] * number)
        self.layers, _, self.heads, _, self.head_size = found.shape

    @torch.no_grad()
    def _activations(self, ids: list[int]) -> Tensor:
        """Keys and values [2 L, 1, G, P, E] of these tokens."""
        cache = self.virtual.body(
            input_ids=torch.tensor([ids], device=self.weight_VD.device), use_cache=True
        ).past_key_values
        pairs = [(layer.keys, layer.values) for layer in getattr(cache, "layers", ())]
        if not pairs or any(key is None or key.shape != pairs[0][0].shape for key, _ in pairs):
            raise UserError(
                "this model has no cache of keys and values of one size, which prefix tuning fills",
                hint="adapter.kind: prompt_tuning, or lora",
                code="adapter.virtual",
            )
        return torch.stack([leaf for pair in pairs for leaf in pair])

    def init(self, seed: int) -> dict[str, Tensor]:
        """The keys and values of P tokens drawn from the vocabulary."""
        draw = generator(seed, 0, "", "prefix_tuning")
        ids = torch.randint(len(self.weight_VD), (self.number,), generator=draw).tolist()
        found = self._activations(ids)[:, 0].permute(2, 0, 1, 3)  # [P, 2 L, G, E]
        return {PROMPT: found.reshape(self.number, -1).to(adapter_dtype(self.weight_VD)).clone()}

    def check(self, tree: Tree) -> None:
        """Raise UserError when `tree` is not made for this model and number of tokens."""
        check_tree(tree, {PROMPT: (self.number, self.layers * self.heads * self.head_size)})

    def export(self, tree: Tree, path: Path) -> None:
        """A PEFT adapter folder of type PREFIX_TUNING that gives the same logits."""
        self.check(tree)
        write_prompt(
            self.model, tree[PROMPT], path, "PREFIX_TUNING", self.base_name,
            num_attention_heads=self.heads, token_dim=self.heads * self.head_size, num_layers=self.layers // 2,
            encoder_hidden_size=None, prefix_projection=False,
        )  # fmt: skip

    def load(self, path: Path) -> dict[str, Tensor]:
        """Read a PEFT adapter folder written for this model."""
        tree = {PROMPT: read_prompt(path, "PREFIX_TUNING").to(self.weight_VD.device, adapter_dtype(self.weight_VD))}
        self.check(tree)
        return tree

    @contextlib.contextmanager
    def _put_on(self, tree_C: Tree, seed_C: Tensor | None) -> Iterator[None]:
        def rows(n: int) -> list[tuple[Tensor, Tensor]]:
            flat_NPX = per_row(tree_C[PROMPT], n).to(self.weight_VD.dtype)
            split = flat_NPX.view(n, self.number, self.layers, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
            return [(split[2 * i], split[2 * i + 1]) for i in range(self.layers // 2)]

        with self.virtual.on(rows):
            yield

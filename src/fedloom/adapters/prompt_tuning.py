"""Prompt tuning (Lester et al. 2021): trained embeddings before every text.

Shape suffixes: C clients, N rows, P virtual tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fedloom.adapters.frame import Frame, adapter_dtype, check_tree
from fedloom.adapters.virtual import Virtual, per_row
from fedloom.errors import UserError
from fedloom.models.peft_folder import read_folder, write_folder
from fedloom.seeds import generator
from fedloom.types import Tree

PROMPT = "prompt_embeddings"  # PEFT's name in its files, too


def prompt_tuning(
    model: nn.Module, *, num_virtual_tokens: int = 20, init_ids: Sequence[int] | None = None, base_name: str = ""
) -> PromptTuning:
    """P trained embeddings [P, D]; a client sends their change and nothing else.

    Args:
        model: any Hugging Face causal LM whose body takes embeddings; it is frozen and gets hooks.
        num_virtual_tokens: P.
        init_ids: tokens whose embeddings the prompt begins with, repeated or cut to P; None draws embeddings of tokens
            of the vocabulary at random (the paper's "sampled vocabulary").
        base_name: for the exported adapter's `base_model_name_or_path`.

    Raises:
        UserError: P is below 1, `init_ids` is empty, or the model takes no embeddings.
    """
    if num_virtual_tokens < 1:
        raise UserError(f"num_virtual_tokens is {num_virtual_tokens}, must be at least 1", code="adapter.prompt")
    if init_ids is not None and not len(init_ids):
        raise UserError("prompt_tuning_init_text has no tokens", code="adapter.prompt")
    return PromptTuning(model, num_virtual_tokens, init_ids, base_name)


class PromptTuning(Frame):
    """The adapter; see `prompt_tuning`."""

    kind = "prompt_tuning"
    in_front = True

    def __init__(self, model: nn.Module, number: int, init_ids: Sequence[int] | None, base_name: str) -> None:
        self.number, self.init_ids, self.base_name = number, init_ids, base_name
        super().__init__(model, self._put_on)
        self.virtual = Virtual(model, number, in_cache=False)
        weight = self.virtual.embed.weight
        assert isinstance(weight, Tensor)
        self.weight_VD = weight

    def init(self, seed: int) -> dict[str, Tensor]:
        """Embeddings of the initial text, or of tokens drawn from the vocabulary."""
        if self.init_ids is not None:
            ids = torch.tensor([self.init_ids[n % len(self.init_ids)] for n in range(self.number)])
        else:
            draw = generator(seed, 0, "", "prompt_tuning")
            ids = torch.randint(len(self.weight_VD), (self.number,), generator=draw)
        rows_PD = self.weight_VD[ids.to(self.weight_VD.device)].detach().clone()
        return {PROMPT: rows_PD.to(adapter_dtype(self.weight_VD))}

    def check(self, tree: Tree) -> None:
        """Raise UserError when `tree` is not made for this model and number of tokens."""
        check_tree(tree, {PROMPT: (self.number, self.weight_VD.shape[1])})

    def export(self, tree: Tree, path: Path) -> None:
        """A PEFT adapter folder of type PROMPT_TUNING that gives the same logits."""
        self.check(tree)
        write_prompt(self.model, tree[PROMPT], path, "PROMPT_TUNING", self.base_name)

    def load(self, path: Path) -> dict[str, Tensor]:
        """Read a PEFT adapter folder written for this model."""
        tree = {PROMPT: read_prompt(path, "PROMPT_TUNING").to(self.weight_VD.device, adapter_dtype(self.weight_VD))}
        self.check(tree)
        return tree

    @contextlib.contextmanager
    def _put_on(self, tree_C: Tree, seed_C: Tensor | None) -> Iterator[None]:
        with self.virtual.on(lambda n: per_row(tree_C[PROMPT], n)):
            yield


def write_prompt(model: nn.Module, prompt: Tensor, path: Path, kind: str, base_name: str, **more: object) -> None:
    """A PEFT folder of a prompt kind: what is used at inference, the virtual tokens' embeddings or keys and values."""
    config = model.config
    text = {
        "peft_type": kind,
        "base_model_name_or_path": base_name,
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": getattr(config, "hidden_size", None),
        "num_transformer_submodules": 1,
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
        **more,
    }
    write_folder(path, text, {PROMPT: prompt})


def read_prompt(path: Path, kind: str) -> Tensor:
    """The one tensor of a PEFT folder of a prompt kind.

    Raises:
        UserError: the folder is not such an adapter's.
    """
    _, tensors = read_folder(path, kind)
    if PROMPT not in tensors:
        raise UserError(f"{path} has no {PROMPT} (it has {', '.join(sorted(tensors)[:4])})", code="adapter.kind")
    return tensors[PROMPT]

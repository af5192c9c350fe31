"""The model's own weights as a tree: what full fine-tuning and the tuning of some layers share.

The tree holds a float32 copy of each trained weight (float64 stays); of a float32 model it is the model's own memory.
While a tree is on, its leaves, cast to the model's dtype, stand where the model has its parameters, which are not
touched. One client's leaf is put there as it is, so that one client costs what the plain model costs; of several
clients each has its own, with products batched over the cohort (`ops.per_client`).

Shape suffixes: C clients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.adapters.frame import adapter_dtype, check_tree
from fedloom.errors import UserError
from fedloom.ops.per_client import per_client_weight
from fedloom.types import Tree


class Weights:
    """Some of a model's parameters by name. A tied weight has one leaf, under its first name, and many places."""

    def __init__(self, model: nn.Module, chosen: Callable[[str], bool]) -> None:
        self.model = model
        self.own = {name: leaf for name, leaf in model.named_parameters() if chosen(name) and leaf.is_floating_point()}
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for attribute, leaf in module.named_parameters(recurse=False):
                places.setdefault(id(leaf), []).append((module, attribute))
        self.places = {name: places[id(leaf)] for name, leaf in self.own.items()}

    def start(self) -> dict[str, Tensor]:
        """The model's weights. Updates make new tensors, so these may be the model's own memory."""
        return {name: leaf.detach().to(adapter_dtype(leaf)) for name, leaf in self.own.items()}

    def check(self, tree: Tree) -> None:
        """Raise UserError when `tree` has not these weights."""
        check_tree(tree, {name: tuple(leaf.shape) for name, leaf in self.own.items()})

    def move_in(self, tree: Tree) -> None:
        """The tree's weights become the model's, for good; the tensors they replace stay as they are."""
        self.check(tree)
        for name, leaf in self.own.items():
            leaf.data = tree[name].detach().to(leaf.device, leaf.dtype)

    @contextlib.contextmanager
    def on(self, tree_C: Tree) -> Iterator[None]:
        """Within it the model has the tree's weights."""
        try:
            for name, leaf in self.own.items():
                weight = _placed(tree_C[name], leaf.dtype)
                for module, attribute in self.places[name]:
                    module._parameters[attribute] = weight  # type: ignore[assignment]  # as torch's functional_call does
            yield
        finally:
            for name, leaf in self.own.items():
                for module, attribute in self.places[name]:
                    module._parameters[attribute] = leaf


def _placed(leaf_C: Tensor, dtype: torch.dtype) -> Tensor:
    """One client's leaf as it is; one that all clients share, and nobody trains, once; else one for each."""
    shared = leaf_C.stride(0) == 0 and not (leaf_C.requires_grad and torch.is_grad_enabled())
    if leaf_C.shape[0] == 1 or shared:
        return leaf_C[0].to(dtype)
    return per_client_weight(leaf_C.to(dtype))


def write_model(weights: Weights, tree: Tree, path: Path, save_tokenizer: Callable[[Path], None] | None) -> None:
    """A whole model folder with the tree's weights, in the dtype the model computes in, as `save_pretrained` has it."""
    before = {name: leaf.data for name, leaf in weights.own.items()}
    weights.move_in(tree)
    try:
        model: Any = weights.model
        model.save_pretrained(path)
    finally:
        for name, leaf in weights.own.items():
            leaf.data = before[name]
    if save_tokenizer is not None:
        save_tokenizer(path)


def read_model(weights: Weights, path: Path) -> dict[str, Tensor]:
    """The weights of a model folder of the same architecture.

    Raises:
        UserError: it is none, or of another shape.
    """
    from fedloom.models.load import load_base

    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a model folder: there is no config.json", code="adapter.missing")
    first = next(iter(weights.own.values()))
    found = dict(load_base(str(path), dtype=first.dtype, device=first.device).model.named_parameters())
    tree = {name: found[name].detach().to(adapter_dtype(leaf)) for name, leaf in weights.own.items() if name in found}
    weights.check(tree)
    return tree

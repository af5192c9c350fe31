"""The model's own weights as a tree: what full fine-tuning and the tuning of some layers share.

The tree holds a float32 copy of each trained weight (float64 stays); of a float32 model it is the model's own memory.
While a tree is on, its leaves, cast to the model's dtype, stand where the model has its parameters, which are not
touched. One client's leaf is put there as it is, so that one client costs what the plain model costs; of several
clients each has its own, with products batched over the cohort (`ops.per_client`).

Shape suffixes: C clients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.adapters.frame import Frame, Hold, adapter_dtype, check_tree
from fedloom.errors import UserError
from fedloom.models.load import load_base
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

    def placed(self, tree_C: Tree) -> dict[str, Tensor]:
        """The tree's weights as they are put where the model has its own."""
        return {name: _placed(tree_C[name], leaf.dtype) for name, leaf in self.own.items()}

    @contextlib.contextmanager
    def on(self, placed: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it the model has these weights."""
        try:
            for name, weight in placed.items():
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


class OwnWeights(Frame):
    """The adapter of `full` and `last_layers`; one tree at a time is on its model."""

    whole_model = True  # what is exported is a model folder, not an adapter's

    def __init__(
        self, model: nn.Module, kind: str, chosen: Callable[[str], bool], save_tokenizer: Callable[[Path], None] | None
    ) -> None:
        super().__init__(model, self._put_on)
        self.kind = kind
        self.weights = Weights(model, chosen)
        self.save_tokenizer = save_tokenizer

    def init(self, seed: int) -> dict[str, Tensor]:
        """The model's own weights, whatever the seed."""
        return self.weights.start()

    def check(self, tree: Tree) -> None:
        """Raise UserError when `tree` is not made for this model."""
        self.weights.check(tree)

    def merge(self, tree: Tree) -> None:
        """The tree's weights become the model's, for good."""
        self.weights.move_in(tree)

    def export(self, tree: Tree, path: Path) -> None:
        """A model folder (config, safetensors, tokenizer) that `transformers` loads, in the model's dtype."""
        before = {name: leaf.data for name, leaf in self.weights.own.items()}
        self.weights.move_in(tree)
        try:
            model: Any = self.model
            model.save_pretrained(path)
        finally:
            for name, leaf in self.weights.own.items():
                leaf.data = before[name]
        if self.save_tokenizer is not None:
            self.save_tokenizer(path)

    def load(self, path: Path) -> dict[str, Tensor]:
        """Read a model folder of the same architecture.

        Raises:
            UserError: it is none, or of another shape.
        """
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a model folder: there is no config.json", code="adapter.missing")
        own = self.weights.own
        first = next(iter(own.values()))
        found = dict(load_base(str(path), dtype=first.dtype, device=first.device).model.named_parameters())
        tree = {name: found[name].detach().to(adapter_dtype(leaf)) for name, leaf in own.items() if name in found}
        self.check(tree)
        return tree

    def _put_on(self, tree_C: Tree, seed_C: Tensor | None) -> AbstractContextManager[None]:
        return self.weights.on(self.weights.placed(tree_C))

    def hold(self, tree_C: Tree, seed_C: Tensor | None) -> Hold:
        """Cast once, however often they are put on."""
        placed = self.weights.placed(tree_C)
        return lambda: self.weights.on(placed)

"""Full fine-tuning: every weight of the model is trained, and each client of a cohort has its own.

FedAvg as McMahan et al. 2017 have it: the whole model travels both ways, in float32 (`compress: {up: [bfloat16]}`
halves it). A tied embedding is one leaf and travels once.

Shape suffixes: C clients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn

from fedloom.adapters.frame import Frame
from fedloom.adapters.weights import Weights, read_model, write_model
from fedloom.types import Tree


def full(model: nn.Module, *, save_tokenizer: Callable[[Path], None] | None = None) -> Full:
    """Every weight of the model, under its own name.

    Args:
        model: any Hugging Face causal LM. Its own parameters stay as they are; a tree stands in for them while it is
            on. Several clients at once need a model whose layers do products, lookups and scalings with their weights
            (see `ops.per_client`); one at a time, any.
        save_tokenizer: writes the tokenizer into an exported folder.
    """
    return Full(model, save_tokenizer)


class Full(Frame):
    """The adapter; see `full`."""

    kind = "full"
    whole_model = True  # what is exported is a model folder, not an adapter's

    def __init__(self, model: nn.Module, save_tokenizer: Callable[[Path], None] | None) -> None:
        super().__init__(model, self._put_on)
        self.weights = Weights(model, lambda name: True)
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
        write_model(self.weights, tree, path, self.save_tokenizer)

    def load(self, path: Path) -> dict[str, Tensor]:
        """Read a model folder of the same architecture."""
        return read_model(self.weights, path)

    def _put_on(self, tree_C: Tree, seed_C: Tensor | None) -> AbstractContextManager[None]:
        return self.weights.on(tree_C)

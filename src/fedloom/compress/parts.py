"""Names of the parts of a compressed leaf, and shapes that travel beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedloom.errors import RunError
from fedloom.types import Tree

MARK = "|"  # between a leaf's name and its part; parameter names never hold it
MAX_NUMBERS = 2**36  # of one decoded leaf: what a message claims is checked before anything is allocated


def part(name: str, which: str) -> str:
    return f"{name}{MARK}{which}"


def names_with(tree: Tree, which: str) -> list[str]:
    """Leaves that have this part."""
    return [name.removesuffix(MARK + which) for name in tree if name.endswith(MARK + which)]


def shape_leaf(leaf: Tensor) -> Tensor:
    return torch.tensor(leaf.shape, dtype=torch.int32)


def shape_of(tree: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape that a message says a leaf has.

    Raises:
        RunError: it says none, or one that cannot be.
    """
    said = tree.get(part(name, "shape"))
    if said is None or said.ndim != 1 or said.dtype != torch.int32:
        raise RunError(f"a compressed leaf has no shape: {name}", code="compress.content")
    shape = tuple(int(size) for size in said.tolist())
    numbers = 1
    for size in shape:
        numbers *= max(size, 0)
    if any(size < 0 for size in shape) or numbers > MAX_NUMBERS:
        raise RunError(f"a compressed leaf claims the shape {list(shape)}: {name}", code="compress.content")
    return shape


def floating(tree: Tree) -> list[str]:
    """Names of the leaves that hold real numbers, at least one."""
    return [name for name, leaf in tree.items() if leaf.is_floating_point() and leaf.numel()]

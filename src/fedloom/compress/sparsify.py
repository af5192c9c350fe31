"""Few of the numbers on the wire: the largest (Aji and Heafield 2017), random ones that a seed stands for, or those
that are not zero.

Shape suffixes: N numbers of a leaf, K of them sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedloom.compress.parts import floating, names_with, part, shape_leaf, shape_of
from fedloom.errors import RunError
from fedloom.seeds import generator
from fedloom.types import Site, Transform, Tree

NAMES_BYTES = 256  # about what the names, types and places of three parts take in a message's header


def top_k(share: float) -> Transform:
    """The largest `share` of each leaf's numbers, with their places (int32); the others are taken as zero.

    Biased: use it with error feedback (`clients.error_feedback`), which sends later what was left out.
    """

    def encode(tree: Tree, site: Site) -> Tree:
        out = {}
        real = set(floating(tree))
        for name, leaf in tree.items():
            if name not in real:
                out[name] = leaf
                continue
            flat_N = leaf.detach().flatten()
            place_K = flat_N.abs().topk(count(share, len(flat_N))).indices.sort().values
            out[part(name, "top")] = flat_N[place_K]
            out[part(name, "place")] = place_K.to(torch.int32)
            out[part(name, "shape")] = shape_leaf(leaf)
        return out

    return Transform(encode, _decode_places("top"))


def nonzero() -> Transform:
    """The numbers that are not zero, with their places; lossless. For updates that leave most numbers as they are, as
    those of clients in seed space do: a client that has drawn 30 of 4,096 seeds sends 30 numbers. A leaf with so many
    numbers that this would not pay goes as it is.
    """

    def encode(tree: Tree, site: Site) -> Tree:
        out = {}
        real = set(floating(tree))
        for name, leaf in tree.items():
            flat_N = leaf.detach().flatten()
            place_K = flat_N.nonzero()[:, 0] if name in real else flat_N[:0]
            narrow = torch.int16 if len(flat_N) <= 1 << 15 else torch.int32
            pays = len(place_K) * (leaf.element_size() + narrow.itemsize) + NAMES_BYTES < flat_N.nbytes
            if name not in real or not pays:
                out[name] = leaf
                continue
            out[part(name, "nonzero")] = flat_N[place_K]
            out[part(name, "place")] = place_K.to(narrow)
            out[part(name, "shape")] = shape_leaf(leaf)
        return out

    return Transform(encode, _decode_places("nonzero"))


def random_k(share: float, *, unbiased: bool = True) -> Transform:
    """A random `share` of each leaf's numbers; their places are drawn from the site at both ends and do not travel.

    Args:
        share: of the numbers, at least one of each leaf.
        unbiased: multiply by N / K, so that the expectation of what is decoded is what was sent; False with error
            feedback, which would feed the enlargement back.
    """

    def places(name: str, n: int, site: Site) -> Tensor:
        draw = generator(site.seed, site.round, site.client, f"random_k/{name}")
        return torch.randperm(n, generator=draw)[: count(share, n)].sort().values

    def encode(tree: Tree, site: Site) -> Tree:
        out = {}
        real = set(floating(tree))
        for name, leaf in tree.items():
            if name not in real:
                out[name] = leaf
                continue
            flat_N = leaf.detach().flatten()
            place_K = places(name, len(flat_N), site).to(flat_N.device)
            out[part(name, "some")] = flat_N[place_K] * (len(flat_N) / len(place_K) if unbiased else 1.0)
            out[part(name, "shape")] = shape_leaf(leaf)
        return out

    def decode(tree: Tree, site: Site) -> Tree:
        names = names_with(tree, "some")
        parts = {part(name, which) for name in names for which in ("some", "shape")}
        out = {name: leaf for name, leaf in tree.items() if name not in parts}
        for name in names:
            shape = shape_of(tree, name)
            place_K = places(name, int(torch.Size(shape).numel()), site)
            out[name] = spread(tree[part(name, "some")], place_K.to(tree[part(name, "some")].device), shape, name)
        return out

    return Transform(encode, decode)


def _decode_places(which: str) -> Callable[[Tree, Site], Tree]:
    def decode(tree: Tree, site: Site) -> Tree:
        names = names_with(tree, which)
        parts = {part(name, one) for name in names for one in (which, "place", "shape")}
        out = {name: leaf for name, leaf in tree.items() if name not in parts}
        for name in names:
            place_K = tree.get(part(name, "place"))
            if place_K is None:
                raise RunError(f"a sparse leaf has no places: {name}", code="compress.content")
            out[name] = spread(tree[part(name, which)], place_K.long(), shape_of(tree, name), name)
        return out

    return decode


def count(share: float, n: int) -> int:
    return min(n, max(1, math.ceil(share * n)))


def spread(value_K: Tensor, place_K: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Zeros of this shape with these values in these places.

    Raises:
        RunError: there are more or fewer places than values, or a place that is not there.
    """
    flat_N = value_K.new_zeros(int(torch.Size(shape).numel()))
    if value_K.shape != place_K.shape or (
        len(place_K) and not 0 <= int(place_K.min()) <= int(place_K.max()) < len(flat_N)
    ):
        raise RunError(f"a sparse leaf does not fit its shape {list(shape)}: {name}", code="compress.content")
    flat_N[place_K] = value_K
    return flat_N.view(shape)

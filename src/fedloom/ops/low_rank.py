"""Algebra on LoRA's factors: one product B @ A per layer, and sums of them that are never formed.

Everything that crosses between client and server is in the scale of the adapter's full rank: the weight that a pair
stands for is `scale * B @ A` with one `scale` for all clients, whatever their own rank. A client of rank r holds the
first r rows of A and columns of B.

Shape suffixes: D in-features, O out-features, R the adapter's rank, S any other rank (of stacked or merged factors).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedloom.types import Tree

A, B = "lora_A.weight", "lora_B.weight"
Scale = float | Callable[[str], float]  # what B A is multiplied by at the full rank: everywhere, or of a layer
MERGE_A, MERGE_B = "merge_A", "merge_B"  # factors of what was added to a frozen weight: + merge_B @ merge_A


def layers_of(tree: Tree) -> list[str]:
    """Names of the layers that have a pair of factors."""
    return [name.removesuffix(f".{A}") for name in tree if name.endswith(f".{A}")]


def scale_at(scale: Scale, layer: str) -> float:
    return scale(layer) if callable(scale) else scale


def others(tree: Tree) -> dict[str, Tensor]:
    """What is no factor of a product: trained biases."""
    return {name: leaf for name, leaf in tree.items() if not name.endswith((A, B, MERGE_A, MERGE_B))}


def pad_like(leaf: Tensor, like: Tensor) -> Tensor:
    """`leaf` with zeros behind it in every dimension, in the shape of `like`; itself where the shapes are equal."""
    if leaf.shape == like.shape:
        return leaf
    whole = torch.zeros_like(like, dtype=leaf.dtype)
    whole[tuple(slice(size) for size in leaf.shape)] = leaf
    return whole


def cut_like(leaf: Tensor, like: Tensor) -> Tensor:
    """The first part of `leaf`, in the shape of `like`."""
    return leaf if leaf.shape == like.shape else leaf[tuple(slice(size) for size in like.shape)]


def own_factors(params: Tree, delta: Tree, layer: str) -> tuple[Tensor, Tensor]:
    """(A [S, D], B [O, S]) that a client came to, at its own rank. A factor that it did not send is the broadcast one.

    Raises:
        KeyError: the delta names neither.
    """
    a, b = delta.get(f"{layer}.{A}"), delta.get(f"{layer}.{B}")
    rank = len(a) if a is not None else delta[f"{layer}.{B}"].shape[1]
    old_a, old_b = params[f"{layer}.{A}"][:rank], params[f"{layer}.{B}"][:, :rank]
    return (old_a if a is None else old_a + a), (old_b if b is None else old_b + b)


def stacked(parts: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Layer -> (A, B) as a tree under the names of merged factors."""
    tree: dict[str, Tensor] = {}
    for layer, (a_SD, b_OS) in parts.items():
        tree[f"{layer}.{MERGE_A}"], tree[f"{layer}.{MERGE_B}"] = a_SD, b_OS
    return tree


def beside(first: Tree, second: Tree) -> dict[str, Tensor]:
    """Sums of products without forming them: [B1 B2] @ [A1; A2] = B1 @ A1 + B2 @ A2."""
    both = dict(first)
    for name, factor in second.items():
        dim = 0 if name.endswith(MERGE_A) else 1
        both[name] = torch.cat([first[name], factor], dim) if name in first else factor
    return both


def slimmed(tree: Tree) -> dict[str, Tensor]:
    """The same products with the fewest numbers: factors wider than the product itself are multiplied out."""
    slim = dict(tree)
    for name, a_SD in tree.items():
        if not name.endswith(MERGE_A):
            continue
        other = name.removesuffix(MERGE_A) + MERGE_B
        b_OS = tree[other]
        (s, d), o = a_SD.shape, len(b_OS)
        if s <= min(d, o):
            continue
        product_OD = (b_OS.double() @ a_SD.double()).to(b_OS.dtype)
        eye = torch.eye(min(d, o), dtype=b_OS.dtype, device=b_OS.device)
        slim[name], slim[other] = (eye, product_OD) if d <= o else (product_OD, eye)
    return slim


def svd_of_product(b_OS: Tensor, a_SD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [rank, D], B [O, rank]) of the best approximation of B @ A (Eckart-Young), without forming the product.

    QR of both factors and the SVD of an [S, S] core; singular values are shared out evenly. Ranks beyond min(S, D, O)
    are zeros. In float64 inside.
    """
    q_b, r_b = torch.linalg.qr(b_OS.double())
    q_a, r_a = torch.linalg.qr(a_SD.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = torch.where(s > 1e-12 * s[:1], s, torch.zeros_like(s))[:rank].sqrt()  # what is rounding only is nothing
    b_OR, a_RD = (q_b @ u[:, :rank]) * root, root[:, None] * (vh[:rank] @ q_a.mT)
    # A singular vector's sign is the library's whim: the largest entry of each column of B is made positive.
    sign = torch.sign(b_OR.gather(0, b_OR.abs().argmax(0, keepdim=True))).masked_fill(root == 0, 1.0)
    b_OR, a_RD = b_OR * sign, a_RD * sign.mT
    like_a, like_b = a_SD.new_empty(rank, a_SD.shape[1]), b_OS.new_empty(len(b_OS), rank)
    return pad_like(a_RD.to(a_SD.dtype), like_a), pad_like(b_OR.to(b_OS.dtype), like_b)

"""Matrices as two thin factors: one power iteration from a shared random start (PowerSGD, Vogels et al. 2019).

Shape suffixes: M rows, N columns, R rank.
"""

from __future__ import annotations

import torch

from fedloom.compress.parts import floating, names_with, part
from fedloom.errors import RunError
from fedloom.seeds import generator
from fedloom.types import Site, Transform, Tree


def low_rank(rank: int) -> Transform:
    """X [M, N] -> P = orth(X Q), R = X' P, decoded as P R': X projected on `rank` directions (Algorithm 1).

    Q is drawn from the run's seed and round, the same for the whole cohort. Only matrices for which it pays
    (R (M + N) < M N) are touched. Biased: use it with error feedback, as the paper does; its warm start of Q would be
    state on both sides and is left out.
    """

    def pays(shape: torch.Size) -> bool:
        return len(shape) == 2 and rank * (shape[0] + shape[1]) < shape[0] * shape[1]

    def encode(tree: Tree, site: Site) -> Tree:
        out = {}
        real = set(floating(tree))
        for name, leaf in tree.items():
            if name not in real or not pays(leaf.shape):
                out[name] = leaf
                continue
            x_MN = leaf.detach().double()
            draw = generator(site.seed, site.round, "", f"low_rank/{name}")
            q_NR = torch.randn(x_MN.shape[1], rank, generator=draw, dtype=torch.float64).to(x_MN.device)
            p_MR, _ = torch.linalg.qr(x_MN @ q_NR)
            out[part(name, "P")], out[part(name, "R")] = p_MR.to(leaf.dtype), (x_MN.mT @ p_MR).to(leaf.dtype)
        return out

    def decode(tree: Tree, site: Site) -> Tree:
        names = names_with(tree, "P")
        parts = {part(name, which) for name in names for which in ("P", "R")}
        out = {name: leaf for name, leaf in tree.items() if name not in parts}
        for name in names:
            p_MR, r_NR = tree[part(name, "P")], tree.get(part(name, "R"))
            if r_NR is None or p_MR.ndim != 2 or r_NR.ndim != 2 or p_MR.shape[1] != r_NR.shape[1]:
                raise RunError(f"the factors of a leaf do not fit: {name}", code="compress.content")
            out[name] = p_MR @ r_NR.mT
        return out

    return Transform(encode, decode)

"""FLoRA (Wang et al. 2024): the clients' products are stacked and merged into the frozen weights."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from fedloom.aggregates.parts import all_of, averaged, exact_downlink, needs_replace, no_protect, stack_add, stack_lift
from fedloom.ops.low_rank import MERGE_A, MERGE_B, A, B, Scale, layers_of, scale_at
from fedloom.seeds import generator
from fedloom.types import Aggregate, Proposal, Tree, Upload


def flora(scale: Scale) -> Aggregate:
    """W <- W + scale * sum_k p_k B_k A_k (Eq. 5 and 6), exactly, whatever the clients' ranks; adapters start anew.

    A client sends its factors; what comes back to all is the merged factors of the round, the sum of the cohort's ranks
    wide. The new A is drawn as the first one was, from a seed that the old A gives; the new B is zero.

    Args:
        scale: what the adapter multiplies B A by, at its full rank (alpha / R): a number, or of each layer.
    """

    def finish(params: Tree, total: Upload) -> Proposal:
        fresh, merge = averaged(params, total), {}
        for layer in layers_of(params):
            merge[f"{layer}.{MERGE_A}"] = total.tree[f"{layer}.{MERGE_A}"]
            merge[f"{layer}.{MERGE_B}"] = total.tree[f"{layer}.{MERGE_B}"] * (scale_at(scale, layer) / total.weight)
            fresh[f"{layer}.{A}"] = redrawn(params[f"{layer}.{A}"], layer)
            fresh[f"{layer}.{B}"] = torch.zeros_like(params[f"{layer}.{B}"])
        return Proposal(fresh, merge)

    return Aggregate(
        stack_lift, stack_add, finish, all_of(needs_replace("flora"), no_protect("flora"), exact_downlink("flora"))
    )


def redrawn(a_RD: Tensor, layer: str) -> Tensor:
    """Another A of the same distribution: uniform in +-1 / sqrt(D). Old values only ever came from such a draw, so the
    same run gives the same ones in every runtime."""
    seed = zlib.crc32(a_RD.detach().cpu().contiguous().numpy().tobytes())
    bound = 1 / math.sqrt(a_RD.shape[1])
    draw = torch.empty(a_RD.shape, dtype=torch.float64)
    draw.uniform_(-bound, bound, generator=generator(seed, 0, "", f"flora/{layer}"))
    return draw.to(a_RD)

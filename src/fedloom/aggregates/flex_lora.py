"""FlexLoRA (Bai et al. 2024): the mean of the clients' products, cut back to the adapter's rank by an SVD."""

from __future__ import annotations

import torch

from fedloom.aggregates.parts import all_of, averaged, exact_downlink, needs_replace, no_protect, stack_add, stack_lift
from fedloom.ops.low_rank import MERGE_A, MERGE_B, A, B, layers_of, svd_of_product
from fedloom.types import Aggregate, Proposal, Tree, Upload


def flex_lora() -> Aggregate:
    """(alpha / R) B A = SVD_R of sum_k p_k (alpha / r_k) B_k A_k (Section 3.2), per layer.

    The dense product is never formed. A client of rank r then starts from the first r singular directions, which are
    the best approximation of that rank. What a client sends is its own factors, at its own rank.
    """

    def finish(params: Tree, total: Upload) -> Proposal:
        new = averaged(params, total)
        for layer in layers_of(params):
            b_OS, a_SD = total.tree[f"{layer}.{MERGE_B}"] / total.weight, total.tree[f"{layer}.{MERGE_A}"]
            rank = len(params[f"{layer}.{A}"])
            a_RD, b_OR = svd_of_product(b_OS, a_SD, rank)
            # Where the product has no more directions a row of the old A stays, as both being zero would never move.
            spent_R1 = a_RD.abs().amax(1, keepdim=True) == 0
            new[f"{layer}.{A}"] = torch.where(spent_R1, params[f"{layer}.{A}"], a_RD)
            new[f"{layer}.{B}"] = b_OR
        return Proposal(new)

    return Aggregate(
        stack_lift,
        stack_add,
        finish,
        all_of(needs_replace("flex_lora"), no_protect("flex_lora"), exact_downlink("flex_lora")),
    )

"""FedEx-LoRA (Singhal et al. 2025): averaged factors, and what averaging them misses goes into the frozen weights."""

from __future__ import annotations

import torch

from fedloom.aggregates.parts import all_of, averaged, exact_downlink, needs_replace, no_protect, stack_add, stack_lift
from fedloom.ops.low_rank import MERGE_A, MERGE_B, A, B, Scale, layers_of, pad_like, scale_at
from fedloom.types import Aggregate, Proposal, Tree, Upload


def fedex_lora(scale: Scale) -> Aggregate:
    """A = sum p_k A_k, B = sum p_k B_k, W <- W + scale * (sum p_k B_k A_k - B A) (Eq. 7 to 9): exact for every client.

    The residual is kept as factors, [w_1 B_1, ..., -B] and [A_1; ...; A]: it is at most (number of clients + 1) x R
    wide, and never a dense matrix. What a client sends is its own factors.

    Args:
        scale: what the adapter multiplies B A by, at its full rank (alpha / R): a number, or of each layer.
    """

    def lift(params: Tree, delta: Tree, weight: float) -> Upload:
        stack = stack_lift(params, delta, weight)
        means = {}
        for layer in layers_of(params):
            a, b = stack.tree[f"{layer}.{MERGE_A}"], stack.tree[f"{layer}.{MERGE_B}"]
            means[f"{layer}.{A}"] = pad_like(a * weight, params[f"{layer}.{A}"])
            means[f"{layer}.{B}"] = pad_like(b, params[f"{layer}.{B}"])
        return stack._replace(tree={**stack.tree, **means})

    def finish(params: Tree, total: Upload) -> Proposal:
        new, merge = averaged(params, total), {}
        for layer in layers_of(params):
            mean_a, mean_b = (total.tree[f"{layer}.{factor}"] / total.weight for factor in (A, B))
            new[f"{layer}.{A}"], new[f"{layer}.{B}"] = mean_a, mean_b
            merge[f"{layer}.{MERGE_A}"] = torch.cat([total.tree[f"{layer}.{MERGE_A}"], mean_a])
            stacked_b = total.tree[f"{layer}.{MERGE_B}"] / total.weight
            merge[f"{layer}.{MERGE_B}"] = torch.cat([stacked_b, -mean_b], 1) * scale_at(scale, layer)
        return Proposal(new, merge)

    return Aggregate(
        lift,
        stack_add,
        finish,
        all_of(needs_replace("fedex_lora"), no_protect("fedex_lora"), exact_downlink("fedex_lora")),
    )
